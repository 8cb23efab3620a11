"""Copies of one picture are found whatever was done to them; pictures that only resemble each other are not joined."""
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from timm_densese.data.duplicates import find_copies


def save(folder: Path, images: list[Image.Image]) -> list[Path]:
    paths = [folder / f'{i:03}.png' for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return paths


def smooth(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    low = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.asarray(low.resize((size, size), Image.Resampling.BICUBIC), np.float64)


def image_of(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def scene(seed: int, size: int = 160) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = image_of(.6 * smooth(rng, size, 5) + .4 * smooth(rng, size, 24))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y, w, h = rng.integers(0, size // 2, 4).tolist()
        draw.ellipse((x * 2, y * 2, x * 2 + w, y * 2 + h), tuple(rng.integers(0, 256, 3).tolist()))
    return image


def reflected(image: Image.Image) -> Image.Image:
    wide = Image.fromarray(np.pad(np.asarray(image), ((80, 80), (80, 80), (0, 0)), 'symmetric'))
    return wide.rotate(30, Image.Resampling.BILINEAR).crop((80, 80, 80 + image.width, 80 + image.height))


def jpeg(image: Image.Image) -> Image.Image:
    file = BytesIO()
    image.save(file, 'jpeg', quality=25)
    return Image.open(file)


def noisy(image: Image.Image) -> Image.Image:
    return image_of(np.asarray(image) + np.random.default_rng(0).normal(0, 15, (image.height, image.width, 3)))


def cutout(image: Image.Image) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).rectangle((60, 60, 120, 120), (0, 0, 0))
    return image


def masked(image: Image.Image) -> Image.Image:
    mask = Image.new('L', image.size, 0)
    ImageDraw.Draw(mask).ellipse((12, 12, image.width - 12, image.height - 12), 255)
    return Image.composite(image, Image.new('RGB', image.size), mask)


def with_bars(image: Image.Image) -> Image.Image:
    image = image.copy()
    for top in (0, image.height * 4 // 5):
        ImageDraw.Draw(image).rectangle((0, top, image.width, top + image.height // 5), 'white')
    return image


def with_holes(image: Image.Image) -> Image.Image:
    image = image.copy()
    for x, y in np.random.default_rng(0).integers(0, 130, (8, 2)).tolist():
        ImageDraw.Draw(image).rectangle((x, y, x + 24, y + 24), (0, 0, 0))
    return image


CHANGES = {
    'turned before black': lambda image: image.rotate(40, Image.Resampling.BILINEAR),
    'turned the other way before white': lambda image: image.rotate(-155, fillcolor='white'),
    'turned before a reflection': reflected,
    'quarter turn': lambda image: image.transpose(Image.Transpose.ROTATE_90),
    'mirrored': ImageOps.mirror,
    'mirrored and turned': lambda image: ImageOps.mirror(image).rotate(20),
    'cropped': lambda image: image.crop((10, 30, 134, 154)),
    'sheared and shifted': lambda image: image.transform(image.size, Image.Transform.AFFINE, (1, .2, -9, .05, .9, 12)),
    'squashed': lambda image: image.resize((160, 110)),
    'shrunk': lambda image: image.resize((64, 64), Image.Resampling.LANCZOS),
    'enlarged': lambda image: image.resize((500, 500)),
    'darker': lambda image: ImageEnhance.Brightness(image).enhance(.5),
    'brighter': lambda image: ImageEnhance.Brightness(image).enhance(1.4),
    'less contrast': lambda image: ImageEnhance.Contrast(image).enhance(.4),
    'grey': lambda image: image.convert('L'),
    'compressed': jpeg,
    'blurred': lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    'noisy': noisy,
    'cut out': cutout,
    'under a round mask': masked,
    'behind bars': with_bars,
    'with holes': with_holes,
}


@pytest.fixture(scope='module')
def groups(tmp_path_factory):
    """Groups (pictures, 1 + changes) of three pictures and their copies."""
    pictures = [scene(seed) for seed in range(3)]
    images = [image for picture in pictures for image in (picture, *(change(picture) for change in CHANGES.values()))]
    found = find_copies(save(tmp_path_factory.mktemp('copies'), images))
    assert not found.plain
    edges = np.array([pair[:2] for pair in found.pairs])
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(images), len(images)))
    return connected_components(graph, directed=False)[1].reshape(3, -1)


@pytest.mark.parametrize('change', CHANGES)
def test_copies_are_found(groups, change):
    place = 1 + list(CHANGES).index(change)
    assert (groups[:, place] == groups[:, 0]).all()


def test_copies_of_different_pictures_stay_apart(groups):
    assert all(not set(a) & set(b) for a, b in ((groups[0], groups[1]), (groups[0], groups[2]), (groups[1], groups[2])))


def test_small_images(tmp_path):
    pictures = [scene(seed).resize((32, 32), Image.Resampling.LANCZOS) for seed in range(4)]
    found = find_copies(save(tmp_path, [image for picture in pictures for image in (picture, ImageOps.flip(picture))]))
    assert [(pair.first, pair.second) for pair in found.pairs] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert all(pair.mirrored and pair.inliers >= 4 for pair in found.pairs)


def blobs(rng):
    return image_of(smooth(rng, 48, 8) * .4 + 60)


def lesion(rng):
    y, x = np.mgrid[:96, :96, :1][:2] / 96 - .5
    a, b = rng.uniform(.15, .35, 2)
    inside = 1 / (1 + np.exp(((x / a) ** 2 + (y / b) ** 2 - 1) * rng.uniform(3, 12)))
    drawn = np.array([215, 165, 145]) - (95, 90, 85) * inside + (smooth(rng, 96, 12) - 128) * inside * .2
    return image_of(drawn + rng.normal(0, 6, (96, 96, 1)))


def through_a_lens(rng):
    y, x = np.mgrid[:128, :128] / 128 - .5
    image = image_of(smooth(rng, 128, 16) * (np.hypot(x, y) < .5)[..., None])
    draw = ImageDraw.Draw(image)
    for place in range(8, 128, 8):
        draw.line((place, 110, place, 122), 'white')
    return image


def page(rng):
    image = Image.new('RGB', (224, 224), 'white')
    draw = ImageDraw.Draw(image)
    draw.text((20, 6), 'Institute of Things', 'black', ImageFont.load_default(16))
    for top in range(34, 210, 18):
        draw.text((8, top), ' '.join(''.join(rng.choice(list('etaoinshrdlu'), 5)) for _ in range(5)), 'black',
                  ImageFont.load_default(13))
    return image


def watermarked(rng):
    image = image_of(smooth(rng, 160, 20))
    ImageDraw.Draw(image).text((6, 130), 'SAMPLE 2024', 'white', ImageFont.load_default(22))
    return image


def stripes(rng):
    x = np.mgrid[:128, :128][1][..., None] / 128 * 2 * np.pi * rng.uniform(4, 9) + rng.uniform(0, 6)
    return image_of(128 + 60 * np.sin(x) + rng.normal(0, 30, (128, 128, 3)))


def spots(rng):
    y, x = np.mgrid[:128, :128, :1][:2] / 128 * 2 * np.pi * rng.uniform(4, 9) + rng.uniform(0, 6)
    return image_of(128 + 60 * np.sin(x) * np.sin(y) + rng.normal(0, 30, (128, 128, 3)))


@pytest.mark.slow
@pytest.mark.parametrize('draw', [blobs, lesion, through_a_lens, page, watermarked, stripes, spots])
def test_what_pictures_share_does_not_join_them(tmp_path, draw):
    rng = np.random.default_rng(0)
    images = [draw(rng) for _ in range(16)]
    found = find_copies(save(tmp_path, [*images, images[3].transpose(Image.Transpose.ROTATE_90)]))
    assert [(pair.first, pair.second) for pair in found.pairs] == [(3, 16)]
    # Without their noise, stripes fit anywhere along themselves; blobs are too soft for all copies to be found.
    assert draw in (stripes, blobs) or not found.plain


def test_soft_pictures(tmp_path):
    """Their few points are large, and what these describe ends outside a copy."""
    rng = np.random.default_rng(0)
    pictures = [image_of(smooth(rng, 160, 6) * .4 + 60) for _ in range(20)]
    paths = save(tmp_path, [image for picture in pictures for image in (picture, ImageOps.mirror(picture).rotate(25))])
    found = find_copies(paths)
    pairs = {pair[:2] for pair in found.pairs}
    assert pairs <= {(2 * i, 2 * i + 1) for i in range(20)}
    assert len(pairs) >= 15  # without halves of points and alignment, 5
    assert {*found.plain} == {*range(40)} - {i for pair in pairs for i in pair}  # what is missed is listed


def test_black_corners_are_no_picture(tmp_path):
    """Soft pictures, all turned by one angle and cropped: their black corners are the same."""
    rng = np.random.default_rng(0)
    pictures = [image_of(smooth(rng, 160, 6) * .4 + 60) for _ in range(20)]
    assert not find_copies(save(tmp_path, [image.crop((20, 8, 150, 140)).rotate(30) for image in pictures])).pairs


def test_a_marker_is_no_picture(tmp_path):
    """Bodies in nearly one pose, as in X-rays, with the same letters in two corners."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:256, :256, :1][:2] / 256
    images = []
    for _ in range(16):
        cx, cy, r = rng.uniform((.45, .4, .25), (.55, .5, .35))
        body = 60 + 90 * np.exp(-(((x - cx) / r) ** 2 + ((y - cy) / .4) ** 2) ** 2)
        image = image_of(body + (smooth(rng, 256, 64) - 128) * .1 + rng.normal(0, 3, (256, 256, 1)))
        draw = ImageDraw.Draw(image)
        draw.text((215, 15), 'L', 'white', ImageFont.load_default(32))
        draw.text((12, 12), 'PORTABLE\nAP ERECT', 'white', ImageFont.load_default(12))
        images.append(image)
    assert not find_copies(save(tmp_path, images)).pairs  # by the letters alone, all are


def test_pages_of_one_form(tmp_path):
    """Each of their letters looks like a thousand others."""
    rng = np.random.default_rng(0)
    pages = [page(rng) for _ in range(25)]
    copies = [noisy(image.rotate(17 + i)) for i, image in enumerate(pages[:5])]
    assert [pair[:2] for pair in find_copies(save(tmp_path, [*pages, *copies])).pairs] == [
        (i, len(pages) + i) for i in range(len(copies))]


def test_what_has_no_texture_is_listed(tmp_path):
    rng = np.random.default_rng(0)
    colour = Image.new('RGB', (100, 80), 'teal')
    turned = [colour.rotate(turn) for turn in (10, 40)]  # straight edges and four corners
    grain = image_of(rng.normal(128, 2, (80, 100, 3)))
    slope = image_of(np.broadcast_to(np.linspace(100, 130, 100)[:, None], (80, 100, 3)))
    images = [scene(0), colour, grain, colour, slope, *turned, Image.new('L', (1, 1)), scene(0)]
    found = find_copies(save(tmp_path, images))
    assert found.plain == [1, 2, 3, 4, 5, 6, 7]
    assert [(pair.first, pair.second) for pair in found.pairs] == [(0, 8)]


def test_known_copies_are_looked_at_once(tmp_path):
    picture, other = scene(0), scene(1)
    colour = Image.new('RGB', (64, 64), 'teal')
    paths = save(tmp_path, [other, picture, picture, colour, picture.rotate(20), picture, colour])
    for i in (2, 5, 6):
        paths[i].unlink()  # so that looking would fail
    found = find_copies(paths, known=[(5, 2), (1, 2), (3, 6)])
    assert [(pair.first, pair.second) for pair in found.pairs] == [(1, 4)]
    assert found.plain == [3, 6]


@pytest.mark.slow
def test_the_same_images_give_the_same_result(tmp_path):
    pictures = [scene(seed, 96) for seed in range(5)]
    copies = [picture.rotate(turn) for picture in pictures for turn in (0, 9, 30)]
    paths = save(tmp_path, copies)
    assert find_copies(paths) == find_copies(paths)


@pytest.mark.parametrize('count', [0, 1])
def test_few_images(tmp_path, count):
    assert find_copies(save(tmp_path, [scene(0)] * count)) == ([], [])


@pytest.mark.parametrize('size', [(200, 1), (1, 200), (2000, 20)])
def test_shapes(tmp_path, size):
    strip = image_of(np.random.default_rng(0).uniform(0, 256, (size[1], size[0], 3)))
    assert len(find_copies(save(tmp_path, [strip, scene(0)])).pairs) == 0
