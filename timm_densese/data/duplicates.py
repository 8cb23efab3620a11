"""Copies of one picture, found by local features: turned, mirrored, cropped, brightened, compressed.

Four steps, each with its paper:

1. SIFT describes up to 300 points of each image (Lowe 2004), compared as RootSIFT (Arandjelovic and Zisserman 2012).
2. An inverted file proposes: points that look alike vote for a pair of images, by how far one is turned and zoomed
   against the other (Jegou et al. 2008). An image asks as it is and mirrored.
3. Geometry decides: matched points must agree on one affine map (RANSAC, Fischler and Bolles 1981). A match of two SIFT
   points says shift, turn and zoom, so each match is tried as the start, none is drawn at random (Philbin et al. 2007).
4. The pixels confirm: under that map, most of what has texture in either image must be the same in both. A logo, a
   ruler, dark corners or a line grid that different pictures share does not pass.

What has no texture is left to bytes and names. `benchmarks/copies.py` measures all this.

Lowe, Distinctive image features from scale-invariant keypoints, IJCV 2004. Arandjelovic and Zisserman, Three things
everyone should know to improve object retrieval, CVPR 2012. Jegou, Douze and Schmid, Hamming embedding and weak
geometric consistency, ECCV 2008. Fischler and Bolles, Random sample consensus, CACM 1981. Philbin et al., Object
retrieval with large vocabularies and fast spatial matching, CVPR 2007.
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
_POINTS, _ASKING = 300, 100  # points kept of an image; of these, the strongest, which ask the index
_WINDOW = 33  # side of the square in which pixels are compared
_TEXTURE = 4.  # grey levels of standard deviation in such a square, from which it has texture
_NEIGHBOURS, _CANDIDATES, _VOTES = 10, 10, 3  # hits of a point; pairs tried of an image; votes that a pair needs
_TURNS, _ZOOMS = 12, 8  # the votes' bins: 30 degrees and a factor of 2, each taken together with its neighbour
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
        plain: Places of the images that have too little texture to tell; bytes and names must tell.
    """
    pairs: list[Copy]
    plain: list[int]


class _Features(NamedTuple):
    """An image's points, strongest first, and its pixels.

    Attributes:
        xy: Where they are, (P, 2).
        zoom: Logarithm to base 2 of their size, (P,).
        turn: Their direction in radians, (P,).
        descriptors: RootSIFT, scaled to 8 bits, (P, 128).
        grey: The image of `_SIDE`² pixels as a JPEG, an eighth of the memory.
        width: Its width.
        plain: Whether it has too little texture.
    """
    xy: np.ndarray
    zoom: np.ndarray
    turn: np.ndarray
    descriptors: np.ndarray
    grey: np.ndarray
    width: int
    plain: bool


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
        textured = [i for i in firsts if not features[i].plain]
        ranked = [[(textured[i], textured[j], mirrored) for i, j, mirrored in row]
                  for row in _propose([features[i] for i in textured])]
        with tqdm(total=sum(map(len, ranked)), desc='copies', unit='pair') as progress:
            for rank in range(_CANDIDATES):  # the likeliest first: what these link need not be tried again
                row = [candidates[rank] for candidates in ranked if rank < len(candidates)]
                new = sorted({(i, j, m) for i, j, m in row if root(i) != root(j)} - tried)
                tried.update(new)
                inliers = pool.map(lambda pair: _verify(features[pair[0]], features[pair[1]], pair[2]), new)
                for (i, j, mirrored), count in zip(new, inliers, strict=True):
                    if count and root(i) != root(j):
                        pairs.append(Copy(i, j, count, mirrored))
                        link(i, j)
                progress.update(len(row))
    return CopiesFound(sorted(pairs), [i for i, first in enumerate(roots) if features[first].plain])


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
    image = read_image(path).convert('L')
    zoom = _SIDE / (image.width * image.height) ** .5
    width, height = (min(max(round(side * zoom), _SIDE // 8), _SIDE * 8) for side in image.size)
    grey = cv2.resize(np.asarray(image), (width, height), interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC)
    # Blurred, for the finest points are noise, which a copy does not share. Many weak points, for skin has no strong
    # ones; of these the large are the steadier.
    points, descriptors = cv2.SIFT.create(1000, contrastThreshold=.01).detectAndCompute(_blur(grey), None)
    best = sorted(range(len(points)), key=lambda i: -points[i].response * points[i].size)[:_POINTS]
    table = np.array([(*points[i].pt, np.log2(points[i].size), np.radians(points[i].angle)) for i in best], np.float32)
    table = table.reshape(-1, 4)
    rows = descriptors[best] if best else np.empty((0, 128), np.float32)
    root_sift = (512 * np.sqrt(rows / np.maximum(rows.sum(1, keepdims=True), 1))).clip(0, 255).astype(np.uint8)
    _, variance = _moments(_blur(grey.astype(np.float32)))
    return _Features(
        table[:, :2], table[:, 2], table[:, 3], root_sift, cv2.imencode('.jpg', grey)[1], width,
        len(best) < 8 or bool((variance > _TEXTURE ** 2).mean() < .1))


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


def _propose(features: Sequence[_Features]) -> list[list[tuple[int, int, bool]]]:
    """For each image, the pairs that it is in for which most points vote, the likeliest first."""
    if not features:
        return []
    ends = np.cumsum([len(f.descriptors) for f in features])
    owner = np.repeat(np.arange(len(features)), np.diff(ends, prepend=0))
    descriptors = np.concatenate([f.descriptors for f in features])
    zoom, turn = np.concatenate([f.zoom for f in features]), np.concatenate([f.turn for f in features])
    lists = min(max(len(owner) // 500, 1), 4096)
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatL2(128), 128, lists, faiss.ScalarQuantizer.QT_8bit_direct)
    index.cp.niter, index.cp.min_points_per_centroid = 10, 1
    sample = np.sort(np.random.default_rng(0).permutation(len(owner))[:50 * lists])
    index.train(descriptors[sample].astype(np.float32))
    for start in range(0, len(owner), 1 << 16):
        index.add(descriptors[start:start + (1 << 16)].astype(np.float32))
    index.nprobe = 8

    votes: dict[tuple[int, int, bool], int] = {}
    for start in tqdm(range(0, len(features), 64), desc='candidates', unit='block'):
        block = features[start:start + 64]
        asking = np.concatenate([np.arange(len(f.descriptors))[:_ASKING] + end - len(f.descriptors)
                                 for f, end in zip(block, ends[start:], strict=False)])
        for mirrored in (False, True):
            order, direction = (_MIRROR, np.pi - turn[asking]) if mirrored else (slice(None), turn[asking])
            _, hits = index.search(descriptors[asking][:, order].astype(np.float32), _NEIGHBOURS)
            for i, j, count in _count(owner, zoom, turn, asking, direction, hits):
                pair = min(i, j), max(i, j), mirrored
                votes[pair] = max(votes.get(pair, 0), count)

    ranked: list[list[tuple[int, int, bool]]] = [[] for _ in features]
    for pair in sorted(votes, key=lambda pair: (-votes[pair], pair)):
        for i in pair[:2]:
            if len(ranked[i]) < _CANDIDATES:
                ranked[i].append(pair)
    return ranked


def _count(
        owner: np.ndarray,
        zoom: np.ndarray,
        turn: np.ndarray,
        asking: np.ndarray,
        direction: np.ndarray,
        hits: np.ndarray,
) -> Iterator[tuple[int, int, int]]:
    """For each image that asks, the images with most points that look alike, turned and zoomed alike, and how many."""
    row, column = np.nonzero((hits >= 0) & (owner[hits] != owner[asking][:, None]))
    hit, ask = hits[row, column], asking[row]
    turns = np.floor((turn[hit] - direction[row]) / (2 * np.pi) * _TURNS).astype(np.int64)
    zooms = np.floor(zoom[hit] - zoom[ask]).astype(np.int64).clip(-3, 3) + 3
    # What a copy's points say lies in one bin or in the next: each votes in both.
    bins = np.concatenate([(turns + t) % _TURNS * _ZOOMS + zooms + z for t in (0, 1) for z in (0, 1)])
    images, size = int(owner[-1]) + 1, _TURNS * _ZOOMS
    keys, counts = np.unique(np.tile(owner[ask] * images + owner[hit], 4) * size + bins, return_counts=True)
    if not len(keys):
        return
    pairs, starts = np.unique(keys // size, return_index=True)
    most = np.maximum.reduceat(counts, starts)
    asker, found = np.divmod(pairs, images)
    order = np.lexsort((found, -most, asker))
    rank = np.arange(len(order)) - np.searchsorted(asker, asker[order])
    for k in order[(rank < _CANDIDATES) & (most[order] >= _VOTES)]:
        yield int(asker[k]), int(found[k]), int(most[k])


def _verify(a: _Features, b: _Features, mirrored: bool) -> int:
    """Points that agree on an affine map under which the pixels agree as well; 0 if these are two pictures."""
    if mirrored:
        a = _mirrored(a)
    x, y = (f.descriptors.astype(np.float32) for f in (a, b))
    # OpenCV's product stays on this thread, where NumPy would start its own.
    alike = np.asarray(cv2.gemm(x, y, 1, np.empty((0, 0), np.float32), 0, flags=cv2.GEMM_2_T))
    nearest = alike.argmax(1)
    i = np.flatnonzero(alike.argmax(0)[nearest] == np.arange(len(nearest)))  # each other's nearest
    j = nearest[i]
    affine, inliers = _fit(a, b, i, j)
    # Of many matches more agree by chance (Brown and Lowe, IJCV 2007).
    if affine is None or inliers < max(4, 3 + .12 * len(i)):
        return 0
    return inliers if _same_pixels(a, b, mirrored, affine) else 0


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
            count = min(len(np.unique(points[inside] // 6, axis=0)) for points in (p, q))  # at places of their own
            if plausible and count > best[1]:
                best = affine, count
    return best


def _same_pixels(a: _Features, b: _Features, mirrored: bool, affine: np.ndarray) -> bool:
    """Whether the images agree where they overlap under a map from `a`, mirrored if so, to `b`."""
    x, y = (np.asarray(cv2.imdecode(f.grey, cv2.IMREAD_GRAYSCALE), np.float32) for f in (a, b))
    if mirrored:
        x = np.ascontiguousarray(x[:, ::-1])
    size = y.shape[::-1]
    overlap = cv2.warpAffine(np.ones_like(x), affine, size)
    covered = max(overlap.mean(), overlap.sum() / np.linalg.det(affine[:, :2]) / x.size)  # of the one that has less
    x, y = _blur(cv2.warpAffine(x, affine, size, borderMode=cv2.BORDER_REPLICATE)), _blur(y)
    (mean_x, var_x), (mean_y, var_y) = _moments(x), _moments(y)
    textured = (_window_mean(overlap) > .9) & (np.maximum(var_x, var_y) > _TEXTURE ** 2)
    correlation = (_window_mean(x * y) - mean_x * mean_y) / np.sqrt(var_x * var_y + 1)
    agreeing = ((correlation > .8) & textured).sum() / max(textured.sum(), 1)
    # The less they overlap, the more of it must agree: what different pictures share is a small part of both.
    return bool(textured.sum() > .1 * overlap.sum() and agreeing > max(.5, 1.3 - 1.1 * covered))
