"""Copies of one picture, found by local features: turned, mirrored, cropped, brightened, compressed.

Four steps, each with its paper:

1. SIFT describes up to 300 points of each image (Lowe 2004), compared as RootSIFT (Arandjelovic and Zisserman 2012).
2. An inverted file proposes: points that look alike vote for a pair of images, by how far one is turned, zoomed and
   shifted against the other (Lowe 2004), each by how much nearer it is than what else looks alike (Jegou et al. 2011).
   An image asks as it is and mirrored. What finds no copy asks again, with all its points.
3. Geometry decides: matched points must agree on one affine map (RANSAC, Fischler and Bolles 1981). A match of two SIFT
   points says shift, turn and zoom, so each match is tried as the start, none is drawn at random (Philbin et al. 2007).
4. The pixels confirm: under that map, most of what has texture in either image must be the same in both. A logo, a
   ruler, dark corners or a line grid that different pictures share does not pass.

Soft pictures have few points, and these are large. So each is described at half its size as well, and where too few
agree, the map is improved by the pixels (Evangelidis and Psarakis 2008), which then must agree in more of the image.

What has no texture, or texture in one direction only, is left to bytes and names. `benchmarks/copies.py` measures all
this.

Lowe, Distinctive image features from scale-invariant keypoints, IJCV 2004. Arandjelovic and Zisserman, Three things
everyone should know to improve object retrieval, CVPR 2012. Jegou, Douze and Schmid, Exploiting descriptor distances
for precise image search, INRIA 2011. Fischler and Bolles, Random sample consensus, CACM 1981. Philbin et al., Object
retrieval with large vocabularies and fast spatial matching, CVPR 2007. Evangelidis and Psarakis, Parametric image
alignment using enhanced correlation coefficient maximization, PAMI 2008. Lindeberg, Feature detection with automatic
scale selection, IJCV 1998.
"""
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import faiss
import numpy as np
from tqdm import tqdm  # comes with huggingface_hub

from .images import read_image

__all__ = ['CopiesFound', 'Copy', 'find_copies']

_SIDE = 256  # images are brought to this many pixels squared; other lengths below are in these pixels
_POINTS, _FEW = 300, 100  # points kept of an image; an image of fewer is soft
_WINDOW = 33  # side of the square in which pixels are compared
_TEXTURE = 4.  # grey levels of standard deviation in such a square, from which it has texture
# Grey levels of gradient in it, in the direction that has less of it, and the share of the other direction's, squared,
# from which it has texture in both.
_CORNER, _ROUND = 1.5, .1
_VOTES = 3  # votes that a pair needs
# The votes' bins: 30 degrees, a factor of 2, and pixels, each taken together with its neighbour.
_TURNS, _ZOOMS, _SHIFT = 12, 8, 40
# Of a SIFT descriptor (4 x 4 places of 8 directions): which bin lies at a bin's place in the mirrored image.
_MIRROR = np.arange(128).reshape(4, 4, 8)[::-1][..., -np.arange(8) % 8].ravel()


class Copy(NamedTuple):
    """Two images that show one picture.

    Attributes:
        first: Place of one in the list of files.
        second: Place of the other, which is larger.
        inliers: Points of the two, each at a place of its own, that agree on one affine map.
        mirrored: Whether one is the mirror image of the other.
    """
    first: int
    second: int
    inliers: int
    mirrored: bool


class CopiesFound(NamedTuple):
    """What `find_copies` found.

    Attributes:
        pairs: Verified pairs in their order, enough to connect each group of copies, not all pairs of it.
        plain: Places of the images of which no copy was found, and that have too little texture to find one by; bytes
            and names must tell.
    """
    pairs: list[Copy]
    plain: list[int]


class _Search(NamedTuple):
    """How hard to look for an image's copies.

    Attributes:
        points: Points that ask the index, the strongest of the image.
        hits: Points that the index gives to each.
        probes: Cells of the index that are looked through for each.
        pairs: Pairs tried of an image, those with most votes.
    """
    points: int
    hits: int
    probes: int
    pairs: int


# Most copies are found by the first. What has found none asks again: of a text, each letter is like a thousand others.
_SEARCHES = _Search(100, 10, 8, 10), _Search(_POINTS, 30, 16, 30)


class _Features(NamedTuple):
    """An image's points, strongest first, and its pixels.

    Attributes:
        xy: Where they are, (P, 2).
        zoom: Logarithm to base 2 of their size, (P,).
        turn: Their direction in radians, (P,).
        descriptors: RootSIFT, scaled to 8 bits, (P, 128).
        grey: The image of `_SIDE`² pixels as a JPEG, an eighth of the memory.
        width: Its width.
    """
    xy: np.ndarray
    zoom: np.ndarray
    turn: np.ndarray
    descriptors: np.ndarray
    grey: np.ndarray
    width: int


def find_copies(paths: Sequence[Path], *, known: Sequence[tuple[int, int]] = ()) -> CopiesFound:
    """Find the images that are copies of one picture.

    The same images give the same result.

    Args:
        paths: Image files that can be read.
        known: Pairs of places in `paths` that are copies for certain, by their bytes: of those linked by them, only
            the first is looked at.

    Returns:
        The verified pairs beyond the known ones, and the images that have too little texture.

    Raises:
        OSError: A file cannot be read as an image; see `read_image`.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> import numpy as np
        >>> from PIL import Image
        >>> rng = np.random.default_rng(0)
        >>> pictures = [Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).resize((96, 96)) for _ in 'ab']
        >>> with TemporaryDirectory() as folder:
        ...     files = [Path(folder, f'{i}.png') for i in range(4)]
        ...     for file, image in zip(files, (*pictures, pictures[1].rotate(30), Image.new('RGB', (96, 96), 'red'))):
        ...         image.save(file)
        ...     found = find_copies(files)
        >>> [(copy.first, copy.second) for copy in found.pairs], found.plain
        ([(1, 2)], [3])
    """
    parents = list(range(len(paths)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = i = parents[parents[i]]
        return i

    def link(i: int, j: int) -> None:
        i, j = sorted((root(i), root(j)))
        parents[j] = i

    for i, j in known:
        link(i, j)
    roots = [root(i) for i in range(len(paths))]
    firsts = sorted(set(roots))
    pairs: list[Copy] = []
    tried: set[tuple[int, int, bool]] = set()
    with _one_opencv_thread(), ThreadPoolExecutor(os.cpu_count()) as pool:
        described = pool.map(lambda i: _describe(paths[i]), firsts)
        features = dict(zip(firsts, tqdm(described, total=len(firsts), desc='local features', unit='image'),
                            strict=True))
        index = _Index([features[i] for i in firsts])
        for search in _SEARCHES:
            linked = {i for pair in pairs for i in pair[:2]}
            ranked = [[(firsts[i], firsts[j], mirrored) for i, j, mirrored in row]
                      for row in index.propose([k for k, i in enumerate(firsts) if i not in linked], search)]
            with tqdm(total=sum(map(len, ranked)), desc='copies', unit='pair') as progress:
                for rank in range(search.pairs):  # the likeliest first: what these link need not be tried again
                    row = [candidates[rank] for candidates in ranked if rank < len(candidates)]
                    new = sorted({(i, j, m) for i, j, m in row if root(i) != root(j)} - tried)
                    tried.update(new)
                    inliers = pool.map(lambda pair: _verify(features[pair[0]], features[pair[1]], pair[2]), new)
                    for (i, j, mirrored), count in zip(new, inliers, strict=True):
                        if count and root(i) != root(j):
                            pairs.append(Copy(i, j, count, mirrored))
                            link(i, j)
                    progress.update(len(row))
        linked = {i for pair in pairs for i in pair[:2]}
        alone = [i for i in firsts if i not in linked]
        plain = {i for i, bare in zip(alone, pool.map(lambda i: _is_plain(features[i]), alone), strict=True) if bare}
    return CopiesFound(sorted(pairs), [i for i, first in enumerate(roots) if first in plain])


@contextmanager
def _one_opencv_thread() -> Iterator[None]:
    """Keep OpenCV from threads of its own: ours fill the cores, and a process forked later would wait for its for ever.

    For that reason threads do the work and not processes; OpenCV and PIL let them run at the same time.
    """
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _describe(path: Path) -> _Features:
    # The channels' mean: a brightened copy loses what is bright first, which in luma is the green that it mostly is.
    image = read_image(path).convert('L', (1 / 3, 1 / 3, 1 / 3, 0))
    zoom = _SIDE / (image.width * image.height) ** .5
    width, height = (min(max(round(side * zoom), _SIDE // 8), _SIDE * 8) for side in image.size)
    grey = cv2.resize(np.asarray(image), (width, height), interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC)
    # Blurred, for the finest points are noise, which a copy does not share. Many weak points, for skin has no strong
    # ones; of these the large are the steadier.
    sift, blurred = cv2.SIFT.create(1000, contrastThreshold=.01), _blur(grey)
    points, descriptors = sift.detectAndCompute(blurred, None)
    best = sorted(range(len(points)), key=lambda i: -points[i].response * points[i].size)[:_POINTS]
    points, descriptors = [points[i] for i in best], descriptors[best] if best else np.empty((0, 128), np.float32)
    if 0 < len(points) < _FEW:
        # A soft picture's points are large: what they describe often ends outside a copy, and half of it does not.
        halves = [_half(point) for point in points]
        points, descriptors = points + halves, np.concatenate([descriptors, sift.compute(blurred, halves)[1]])
    table = np.array([(*point.pt, np.log2(point.size), np.radians(point.angle)) for point in points], np.float32)
    table = table.reshape(-1, 4)
    root_sift = 512 * np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1))
    return _Features(table[:, :2], table[:, 2], table[:, 3], root_sift.clip(0, 255).astype(np.uint8),
                     cv2.imencode('.jpg', grey)[1], width)


def _half(point: cv2.KeyPoint) -> cv2.KeyPoint:
    """A point at half its size, which lies an octave lower; OpenCV has the octave in the first of four bytes."""
    octave, rest = point.octave & 255, point.octave & ~255
    lower = max(octave - (256 if octave > 127 else 0) - 1, -1)
    x, y = point.pt
    return cv2.KeyPoint(x, y, point.size / 2, point.angle, point.response, rest | lower & 255, point.class_id)


def _is_plain(f: _Features) -> bool:
    """Whether so little of an image has texture that its copies cannot be told from other images."""
    image = np.asarray(cv2.imdecode(f.grey, cv2.IMREAD_GRAYSCALE), np.float32)
    return bool(_corners(image).mean() < .12)


def _corners(image: np.ndarray) -> np.ndarray:
    """Where the window around a pixel has texture in both directions: an edge or a slope fits anywhere along itself.

    The structure tensor's eigenvalues say so, of normalised derivatives at three scales (Lindeberg 1998).
    """
    corners = np.zeros(image.shape, bool)
    for sigma in (2, 4, 8):
        blurred = cv2.GaussianBlur(image, (0, 0), sigma)
        x, y = (cv2.Sobel(blurred, cv2.CV_32F, *order, scale=sigma / 8) for order in ((1, 0), (0, 1)))
        xx, xy, yy = (_window_mean(product) for product in (x * x, x * y, y * y))
        middle, half = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
        corners |= middle - half > np.maximum(_CORNER ** 2, _ROUND * (middle + half))
    return corners


def _blur(image: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), 1)


def _moments(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the window around each pixel."""
    mean = _window_mean(image)
    return mean, (_window_mean(image * image) - mean * mean).clip(0)


def _window_mean(image: np.ndarray) -> np.ndarray:
    return cv2.blur(image, (_WINDOW, _WINDOW), borderType=cv2.BORDER_REFLECT)


def _mirrored(f: _Features) -> _Features:
    """The points as the mirror image has them; its pixels stay as they are."""
    xy = np.stack([f.width - 1 - f.xy[:, 0], f.xy[:, 1]], 1)
    return f._replace(xy=xy, turn=np.pi - f.turn, descriptors=f.descriptors[:, _MIRROR])


class _Index:
    """The points of all images, by their descriptors."""

    def __init__(self, features: Sequence[_Features]) -> None:
        self.features = features
        self.ends = np.cumsum([len(f.descriptors) for f in features], dtype=np.int64)
        self.owner = np.repeat(np.arange(len(features)), np.diff(self.ends, prepend=0))
        self.xy = np.concatenate([f.xy for f in features] or [np.empty((0, 2))])
        self.zoom = np.concatenate([f.zoom for f in features] or [np.empty(0)])
        self.turn = np.concatenate([f.turn for f in features] or [np.empty(0)])
        count = len(self.owner)
        lists = min(max(count // 500, 1), 4096)
        self.inverted_file = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatL2(128), 128, lists, faiss.ScalarQuantizer.QT_8bit_direct)
        self.inverted_file.cp.niter, self.inverted_file.cp.min_points_per_centroid = 10, 1
        if not count:
            return  # no image has a point
        descriptors = np.concatenate([f.descriptors for f in features])
        sample = np.sort(np.random.default_rng(0).permutation(count)[:50 * lists])
        self.inverted_file.train(descriptors[sample].astype(np.float32))
        for start in range(0, count, 1 << 16):
            self.inverted_file.add(descriptors[start:start + (1 << 16)].astype(np.float32))

    def propose(self, images: Sequence[int], search: _Search) -> list[list[tuple[int, int, bool]]]:
        """For each image, the pairs that it is in for which most points vote, the likeliest first."""
        images = [i for i in images if len(self.features[i].xy)]
        self.inverted_file.nprobe = search.probes
        votes: dict[tuple[int, int, bool], float] = {}
        for start in tqdm(range(0, len(images), 64), desc='candidates', unit='block'):
            block = [self.features[i] for i in images[start:start + 64]]
            asking = np.concatenate([np.arange(len(f.xy))[:search.points] + self.ends[i] - len(f.xy)
                                     for i, f in zip(images[start:], block, strict=False)])
            for mirrored in (False, True):
                asked = [_mirrored(f) if mirrored else f for f in block]
                xy, turn, descriptors = (np.concatenate([getattr(f, name)[:search.points] for f in asked])
                                         for name in ('xy', 'turn', 'descriptors'))
                distances, hits = self.inverted_file.search(descriptors.astype(np.float32), search.hits)
                for i, j, score in self._count(asking, xy, turn, distances, hits, search.pairs):
                    pair = min(i, j), max(i, j), mirrored
                    votes[pair] = max(votes.get(pair, 0), score)

        ranked: dict[int, list[tuple[int, int, bool]]] = {i: [] for i in images}
        for pair in sorted(votes, key=lambda pair: (-votes[pair], pair)):
            for i in pair[:2]:
                if len(ranked.get(i, range(search.pairs))) < search.pairs:
                    ranked[i].append(pair)
        return list(ranked.values())

    def _count(
            self,
            asking: np.ndarray,
            xy: np.ndarray,
            turn: np.ndarray,
            distances: np.ndarray,
            hits: np.ndarray,
            pairs_each: int,
    ) -> Iterator[tuple[int, int, float]]:
        """For each image that asks, the images with most points that look alike, turned and zoomed alike."""
        owner = self.owner
        row, column = np.nonzero((hits >= 0) & (owner[hits] != owner[asking][:, None]))
        hit, ask = hits[row, column], asking[row]
        # Where all hits are as far, as those of a logo on every page, they say little (Jegou et al. 2011).
        farthest = np.where(hits >= 0, distances, 0).max(1)
        weights = 1 - distances[row, column] / np.maximum(farthest[row], 1)
        by, zoom = self.turn[hit] - turn[row], self.zoom[hit] - self.zoom[ask]
        # Where the middle of the one would lie in the other.
        middle = ((_SIDE / 2 * (1 + 1j) - xy[row] @ (1, 1j)) * np.exp2(zoom) * np.exp(1j * by)
                  + self.xy[hit] @ (1, 1j)) / _SHIFT
        cells = [np.floor(by / (2 * np.pi) * _TURNS), np.floor(zoom).clip(-3, 3) + 3,
                 np.floor(middle.real).clip(-8, 8) + 8, np.floor(middle.imag).clip(-8, 8) + 8]
        turns, zooms, x, y = (cell.astype(np.int64) for cell in cells)
        # What a copy's points say lies in one bin or in the next: each votes in both.
        bins = np.concatenate([(((turns + t) % _TURNS * _ZOOMS + zooms + z) * 18 + x + u) * 18 + y + v
                               for t in (0, 1) for z in (0, 1) for u in (0, 1) for v in (0, 1)])
        images, size = len(self.features), _TURNS * _ZOOMS * 18 * 18
        keys, place, counts = np.unique(np.tile(owner[ask] * images + owner[hit], 16) * size + bins,
                                        return_inverse=True, return_counts=True)
        enough = counts >= _VOTES
        if not enough.any():
            return
        scores = np.bincount(place, np.tile(weights, 16))[enough]
        pairs, starts = np.unique(keys[enough] // size, return_index=True)
        most = np.maximum.reduceat(scores, starts)
        asker, found = np.divmod(pairs, images)
        order = np.lexsort((found, -most, asker))
        rank = np.arange(len(order)) - np.searchsorted(asker, asker[order])
        for k in order[rank < pairs_each]:
            yield int(asker[k]), int(found[k]), float(most[k])


def _verify(a: _Features, b: _Features, mirrored: bool) -> int:
    """Points that agree on an affine map under which the pixels agree as well; 0 if these are two pictures."""
    if mirrored:
        a = _mirrored(a)
    x, y = (f.descriptors.astype(np.float32) for f in (a, b))
    # OpenCV's product stays on this thread, where NumPy would start its own.
    alike = np.asarray(cv2.gemm(x, y, 1, np.empty((0, 0), np.float32), 0, flags=cv2.GEMM_2_T))
    nearest = alike.argmax(1)
    i = np.flatnonzero(alike.argmax(0)[nearest] == np.arange(len(nearest)))  # each other's nearest
    affine, inliers = _fit(a, b, i, nearest[i])
    if affine is None:
        return 0
    # Of many matches more agree by chance (Brown and Lowe, IJCV 2007).
    if inliers >= max(4, 3 + .12 * len(i)) and _same_pixels(a, b, mirrored, affine):
        return inliers
    # Soft pictures have few points, which do not say precisely how they lie: the pixels may still tell.
    if min(len(a.xy), len(b.xy)) >= 2 * _FEW:
        return 0
    affine = _aligned(a, b, mirrored, affine)
    return inliers if affine is not None and _same_pixels(a, b, mirrored, affine, soft=True) else 0


def _places(xy: np.ndarray) -> int:
    """How many of some points lie at places of their own."""
    return len(np.unique(xy // 6, axis=0))


def _fit(a: _Features, b: _Features, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray | None, int]:
    """The affine map (2, 3) from points `i` of `a` to points `j` of `b` that most agree on, and how many."""
    p, q = a.xy[i], b.xy[j]
    zoom = b.zoom[j] - a.zoom[i]
    x, y = p @ (1, 1j), q @ (1, 1j)
    # Row k: how far match k's own shift, turn and zoom takes each point from where it should be.
    similarity = np.exp2(zoom) * np.exp(1j * (b.turn[j] - a.turn[i]))
    off = np.abs(similarity[:, None] * (x - x[:, None]) + y[:, None] - y)
    agree = (off < 15).sum(1) * (np.abs(zoom) < 1.3)
    best: tuple[np.ndarray | None, int] = None, 0
    ones = np.ones((len(p), 1), np.float32)
    for start in np.argsort(-agree, kind='stable')[:5]:
        inside = off[start] < 15
        for tolerance in (15, 10, 5, 5, 5):  # from a similarity to an affine map
            if inside.sum() < 3:
                break
            affine = np.linalg.lstsq(np.hstack([p, ones])[inside], q[inside], rcond=None)[0].T
            inside = np.linalg.norm(np.hstack([p, ones]) @ affine.T - q, axis=1) < tolerance
        else:
            large, small = np.linalg.svd(affine[:, :2], compute_uv=False)
            plausible = np.linalg.det(affine[:, :2]) > 0 and small > .35 and large < min(2.8, 2 * small)
            count = min(_places(p[inside]), _places(q[inside]))
            if plausible and count > best[1]:
                best = affine, count
    return best


def _pixels(f: _Features, mirrored: bool, flags: int = cv2.IMREAD_GRAYSCALE) -> np.ndarray:
    image = np.asarray(cv2.imdecode(f.grey, flags), np.float32)
    return np.ascontiguousarray(image[:, ::-1]) if mirrored else image


def _aligned(a: _Features, b: _Features, mirrored: bool, affine: np.ndarray) -> np.ndarray | None:
    """An affine map near a given one under which the images correlate best (ECC, Evangelidis and Psarakis 2008)."""
    x, y = _pixels(a, mirrored, cv2.IMREAD_REDUCED_GRAYSCALE_4), _pixels(b, False, cv2.IMREAD_REDUCED_GRAYSCALE_4)
    start = affine * (1, 1, 1 / 4)
    overlap = cv2.warpAffine(np.ones_like(x), start, y.shape[::-1]) > .9
    moved = cv2.warpAffine(x, start, y.shape[::-1])
    if overlap.mean() < .3 or np.corrcoef(moved[overlap], y[overlap])[0, 1] < .5:
        return None
    try:
        _, back = cv2.findTransformECC(
            y, x, cv2.invertAffineTransform(start).astype(np.float32), cv2.MOTION_AFFINE,
            (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 1e-4), overlap.astype(np.uint8), 3)
    except cv2.error:  # it does not converge
        return None
    return cv2.invertAffineTransform(back) * (1, 1, 4)


def _same_pixels(a: _Features, b: _Features, mirrored: bool, affine: np.ndarray, soft: bool = False) -> bool:
    """Whether the images agree where they overlap under a map from `a`, mirrored if so, to `b`.

    Soft ones must agree in more of it, and have texture in both directions.
    """
    x, y = _pixels(a, mirrored), _pixels(b, False)
    size = y.shape[::-1]
    overlap = cv2.warpAffine(np.ones_like(x), affine, size)
    covered = max(overlap.mean(), overlap.sum() / np.linalg.det(affine[:, :2]) / x.size)  # of the one that has less
    x, y = _blur(cv2.warpAffine(x, affine, size, borderMode=cv2.BORDER_REPLICATE)), _blur(y)
    (mean_x, var_x), (mean_y, var_y) = _moments(x), _moments(y)
    textured = (_window_mean(overlap) > .9) & (np.maximum(var_x, var_y) > _TEXTURE ** 2)
    alike = (_window_mean(x * y) - mean_x * mean_y) / np.sqrt(var_x * var_y + 1) > .8
    # The less they overlap, the more of it must agree: what different pictures share is a small part of both.
    least = max(.6, 1.4 - 1.1 * covered) + (.1 if soft else 0)
    enough = textured & (_corners(x) | _corners(y)) if soft else textured
    return bool(enough.sum() > .1 * overlap.sum() and alike[textured].mean() > least)
