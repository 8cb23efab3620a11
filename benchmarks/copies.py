"""Copies of one picture: what find_copies finds and what it wrongly joins, beside a perceptual hash.

docs/data.md has the figures.

    python benchmarks/copies.py                     # MSLD in ../shared/data/msld; without it, drawn pictures only
    python benchmarks/copies.py --seed 5            # other copies and pictures than thresholds were chosen on
    python benchmarks/copies.py --growth            # seconds and peak memory of 1,000, 3,000 and 10,000 images

Each picture gets three copies as Keras' ImageDataGenerator makes them: turned by up to 45 degrees, zoomed by 0.8 to
1.2, sheared, shifted, flipped, brightened, noisy, the edges filled with the nearest pixel, black or a reflection;
half of them are saved as JPEG. The drawn families are made hard: different pictures share a ruler and dark corners
(dermoscopy), a heading and the lines (text), a composition (lesions) or a lattice (patterns).

Recall is the share of images that are grouped with an image of the same original; images that find_copies calls plain,
for bytes and names to tell, are counted apart. A false pair is two images in one group, linked or through others,
whose originals differ. The hash is imagehash's phash, within 8 of 64 bits, over flips and quarter turns.
"""
import argparse
import json
import multiprocessing
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import imagehash
import numpy as np
from common import RESULTS, save, status
from PIL import Image, ImageDraw, ImageFont
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from timm_densese.data.duplicates import find_copies
from timm_densese.data.images import read_image

COPIES, DRAWN, SIZES = 3, 100, (1_000, 3_000, 10_000)
FILLS = (cv2.BORDER_REPLICATE, cv2.BORDER_CONSTANT, cv2.BORDER_REFLECT)
LETTERS = list('eeeeetttaaaooiinnsshhrrddlucmfwypvbgk')
# MSLD gives one picture to two patients here, seen by eye: no false pairs.
SAME_PICTURE = {'NM110': 'NM68', 'NM32': 'NM28', 'NM12': 'NM04'}


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy as Keras' ImageDataGenerator makes it."""
    height, width = image.shape[:2]
    turn, shear = np.radians(rng.uniform(-45, 45)), rng.uniform(-.2, .2)
    scale = rng.uniform(.8, 1.2, 2) * rng.choice((-1, 1), 2)
    matrix = (np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
              @ np.array([[1, -np.sin(shear)], [0, np.cos(shear)]]) @ np.diag(scale))
    center = np.array([width - 1, height - 1]) / 2
    offset = center + rng.uniform(-.2, .2, 2) * (width, height) - matrix @ center
    moved = cv2.warpAffine(image, np.c_[matrix, offset], (width, height), borderMode=int(rng.choice(FILLS)))
    changed = moved * rng.uniform(.5, 1.5) + rng.normal(0, rng.uniform(0, 10), moved.shape)
    return changed.clip(0, 255).astype(np.uint8)


# Drawn pictures: (size, size, 3), 8 bits.


def noise(rng: np.random.Generator, size: int, cells: int, channels: int = 1) -> np.ndarray:
    """Smooth noise."""
    low = rng.normal(0, 1, (cells, cells, channels)).astype(np.float32)
    return cv2.resize(low, (size, size), interpolation=cv2.INTER_CUBIC).reshape(size, size, channels)


def finish(image: np.ndarray, rng: np.random.Generator, sigma: float) -> np.ndarray:
    return (image + rng.normal(0, sigma, image.shape)).clip(0, 255).astype(np.uint8)


def lesion(rng: np.random.Generator, size: int = 224) -> np.ndarray:
    """A dark spot in the middle of skin."""
    y, x = np.mgrid[:size, :size] / size - .5
    (cx, cy), turn, (r1, r2) = rng.normal(0, .06, 2), rng.uniform(0, np.pi), rng.uniform(.15, .4, 2)
    u = ((x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)) / r1
    v = ((y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)) / r2
    border = 1 + sum(rng.normal(0, .12 / k) * np.cos(k * np.arctan2(v, u) + rng.uniform(0, 6.3)) for k in range(2, 7))
    inside = 1 / (1 + np.exp((u ** 2 + v ** 2 - border) * rng.uniform(3, 12)))[..., None]
    skin, dark = rng.normal((215, 165, 145), 15), rng.normal((120, 75, 60), 25)
    drawn = skin * (1 - inside) + (dark + 15 * noise(rng, size, 12)) * inside
    return finish(drawn + 5 * noise(rng, size, 40) + 10 * noise(rng, size, 3), rng, 3)


def dermoscopy(rng: np.random.Generator, size: int = 224) -> np.ndarray:
    """A lesion with hairs, and the ruler and the lens's dark corners that all have."""
    image = lesion(rng, size)
    for _ in range(rng.integers(0, 12)):
        p, q, r = rng.uniform(0, size, (3, 2))
        t = np.linspace(0, 1, 30)[:, None]
        curve = p * (1 - t) ** 2 + 2 * q * t * (1 - t) + r * t ** 2
        curve = [curve.round().astype(np.int32)]
        cv2.polylines(image, curve, False, (60, 45, 40), int(rng.integers(1, 3)), cv2.LINE_AA)
    for x in range(10, size, 10):
        cv2.line(image, (x, size - 20), (x, size - (8 if x % 50 else 2)), (30, 30, 30), 1)
    y, x = np.mgrid[:size, :size] / size - .5
    return finish(image * (np.hypot(x, y) < .56)[..., None], rng, 3)


def text(rng: np.random.Generator, size: int = 224) -> np.ndarray:
    """A page of one form: logo, heading and lines are the same, the words are not."""
    image = Image.new('RGB', (size, size), 'white')
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    draw.rectangle((6, 6, 30, 30), fill=(20, 60, 140))
    draw.text((36, 10), 'Institute of Things', 'black', ImageFont.load_default(14))
    for top in range(38, size - 14, 14):
        line = ''
        while draw.textlength(line, font) < size - 60:
            line += ''.join(rng.choice(LETTERS, rng.integers(2, 9))) + ' '
        draw.text((8, top), line, (20, 20, 20), font)
    return np.array(image)


def flat(rng: np.random.Generator, size: int = 224) -> np.ndarray:
    """One colour, a slope, or soft blobs."""
    y, x = np.mgrid[:size, :size, :1][:2] / size - .5
    drawn = rng.uniform(40, 215, 3) + np.zeros((size, size, 3))
    kind = rng.integers(3)
    if kind == 1:
        drawn += 80 * (x * rng.normal() + y * rng.normal())
    elif kind == 2:
        drawn += 30 * noise(rng, size, 8, 3)
    return finish(drawn, rng, 3)


def patterns(rng: np.random.Generator, size: int = 128) -> np.ndarray:
    """Stripes or spots, of which all are alike up to shift and zoom; only their noise tells them apart."""
    angles = np.mgrid[:size, :size, :1][:2] / size * 2 * np.pi * rng.uniform(4, 9)
    y, x = angles + rng.uniform(0, 6.3, (2, 1, 1, 1))
    wave = np.sin(x) * (np.sin(y) if rng.integers(2) else 1)
    return finish(128 + 60 * wave * rng.uniform(.3, 1, 3), rng, 30)


def scene(rng: np.random.Generator, size: int = 224) -> np.ndarray:
    """Shapes before a textured ground."""
    image = finish(128 + sum(60 / k * noise(rng, size, 4 * k, 3) for k in (1, 4, 12)), rng, 0)
    for _ in range(12):
        color, center = tuple(map(int, rng.integers(0, 256, 3))), tuple(map(int, rng.integers(0, size, 2)))
        axes = tuple(map(int, rng.integers(5, size // 4, 2)))
        cv2.ellipse(image, center, axes, rng.uniform(0, 180), 0, 360, color, -1, cv2.LINE_AA)
    return finish(image, rng, 3)


def write(folder: Path, originals: Iterator[np.ndarray], seed: int = 0, copies: int = COPIES) -> list[Path]:
    """Write pictures, each followed by its copies."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    paths = []
    for i, original in enumerate(originals):
        for k in range(copies + 1):
            path = folder / f'{i:05}_{k}.{"jpg" if rng.integers(2) else "png"}'
            image = Image.fromarray(augment(original, rng) if k else original)
            image.save(path, quality=int(rng.integers(75, 96)))  # PNG takes no notice of it
            paths.append(path)
    return paths


# Methods: paths -> linked pairs, and the images left out.


def by_features(paths: Sequence[Path]) -> tuple[list[tuple[int, int]], list[int]]:
    found = find_copies(paths)
    return [(pair.first, pair.second) for pair in found.pairs], found.plain


def _poses(path: Path) -> list[int]:
    grey = read_image(path).convert('L').resize((32, 32), Image.Resampling.LANCZOS)
    mirrored = grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return [int(str(imagehash.phash(image.rotate(90 * turns))), 16) for image in (grey, mirrored) for turns in range(4)]


def by_hash(paths: Sequence[Path]) -> tuple[list[tuple[int, int]], list[int]]:
    with ThreadPoolExecutor() as pool:
        hashes = np.array(list(pool.map(_poses, paths)), np.uint64)
    distance = (np.bitwise_count(hashes[i, 0] ^ hashes[i + 1:]).min(1) for i in range(len(hashes) - 1))
    return [(i, i + 1 + int(j)) for i, row in enumerate(distance) for j in np.flatnonzero(row <= 8)], []


METHODS: dict[str, Callable[[Sequence[Path]], tuple[list[tuple[int, int]], list[int]]]] = {
    'local features': by_features, 'perceptual hash': by_hash}


def measure(method: str, paths: Sequence[Path], subjects: Sequence[str], copies: int = COPIES) -> dict[str, Any]:
    """Score one method on files of which each original stands before its copies.

    Args:
        method: Its name.
        paths: Files.
        subjects: Of each original, what it shows: two of one subject are neither a copy nor a false pair.
    """
    start, cpu = time.perf_counter(), time.process_time()
    pairs, plain = METHODS[method](paths)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu  # the second does not mind a busy machine
    edges = np.array(pairs).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(paths), len(paths)))
    group = connected_components(graph, directed=False)[1]
    original = np.arange(len(paths)) // (copies + 1)
    subject = np.unique(subjects, return_inverse=True)[1][original]
    family = group * len(paths) + original
    found = np.bincount(np.unique(family, return_inverse=True)[1])[np.unique(family, return_inverse=True)[1]] > 1
    judged = np.setdiff1d(np.arange(len(paths)), plain)
    whole = np.mean([len(set(row)) == 1 for row in group.reshape(-1, copies + 1)])

    def count(key: np.ndarray) -> int:
        sizes = np.unique(key, return_counts=True)[1]
        return int((sizes * (sizes - 1) // 2).sum())

    different = len(paths) * (len(paths) - 1) // 2 - count(subject)
    false = count(group) - count(group * len(paths) + subject)
    names = sorted({tuple(sorted((subjects[original[i]], subjects[original[j]]))) for i, j in pairs
                    if subject[i] != subject[j]})
    return {'method': method, 'images': len(paths), 'plain': len(plain),
            'recall': float(found[judged].mean()) if copies else None,
            'whole': float(whole), 'false_pairs': false, 'different_pairs': different,
            'largest_group': max(Counter(group.tolist()).values()), 'seconds': seconds, 'cpu_seconds': cpu,
            'false_subjects': names[:20]}


def grow(paths: Sequence[Path], copies: int) -> dict[str, Any]:
    """Seconds, score and peak memory, in a process of its own."""
    result = measure('local features', paths, [str(i) for i in range(len(paths) // (copies + 1))], copies)
    return {**result, 'peak_mb': status('VmHWM') / 1e6}


def print_table(rows: list[dict[str, Any]]) -> None:
    print('\n| family | method | images | plain | recall | originals whole | false pairs in 10,000 (number) | '
          'largest group | seconds | CPU seconds | peak MB |\n|---|---|---|---|---|---|---|---|---|---|---|')
    for row in rows:
        rate = 1e4 * row['false_pairs'] / row['different_pairs']
        recall = '' if row['recall'] is None else f'{row["recall"]:.1%}'
        print(f'| {row["family"]} | {row["method"]} | {row["images"]:,} | {row["plain"]} | {recall} | '
              f'{row["whole"]:.1%} | {rate:.2f} ({row["false_pairs"]}) | {row["largest_group"]} | '
              f'{row["seconds"]:.0f} | {row["cpu_seconds"]:.0f} | {row.get("peak_mb", 0):.0f} |')


def main() -> None:
    cv2.setNumThreads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', type=Path, default=Path('../shared/data/msld'), help='folder of class folders')
    parser.add_argument('--growth', action='store_true', help='measure time and memory, and keep the other rows')
    parser.add_argument('--seed', type=int, default=0, help='other than 0: copies and drawn pictures that no threshold '
                                                           'was chosen on')
    args = parser.parse_args()
    file = RESULTS / 'copies.json'
    record = json.loads(file.read_text()) if file.exists() else {}
    rows: list[dict[str, Any]] = []
    part = 'growth' if args.growth else 'held_out' if args.seed else 'families'

    def keep(rows: list[dict[str, Any]]) -> None:
        print_table(rows)
        save('copies', {**{key: record.get(key) for key in ('families', 'held_out', 'growth')}, part: rows})

    with tempfile.TemporaryDirectory() as folder:
        if args.growth:
            for name, copies in (('scenes', COPIES), ('scenes without a copy', 0)):
                rng = np.random.default_rng(0)
                scenes = (scene(rng) for _ in range(SIZES[-1] // (copies + 1)))
                paths = write(Path(folder, name), scenes, copies=copies)
                for size in SIZES:
                    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as fresh:
                        rows.append({'family': name, **fresh.submit(grow, paths[:size], copies).result()})
                    keep(rows)
        else:
            sources = sorted(args.data.glob('*/*.jpg'))
            patients = [re.sub(r'_\d+$', '', path.stem) for path in sources]
            families = {'MSLD': (lambda: (np.array(read_image(path)) for path in sources),
                                 [SAME_PICTURE.get(patient, patient) for patient in patients])} if sources else {}
            for draw in (text, dermoscopy, lesion, flat, patterns):
                rng = np.random.default_rng(1 + 1000 * args.seed)
                families[draw.__name__] = (lambda draw=draw, rng=rng: (draw(rng) for _ in range(DRAWN)),
                                           [str(i) for i in range(DRAWN)])
            for name, (originals, subjects) in families.items():
                paths = write(Path(folder, name), originals(), args.seed)
                rows += [{'family': name, **measure(method, paths, subjects)} for method in METHODS]
                keep(rows)


if __name__ == '__main__':
    main()
