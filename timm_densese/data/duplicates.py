"""Copies of one picture: turned, mirrored, cropped, brightened, compressed.

An inverted file of all images' local features proposes pairs: points that look alike vote for a pair, by how far one is
turned, zoomed and shifted against the other (Lowe 2004), each by how much nearer it is than what else looks alike
(Jegou et al. 2011). An image asks as it is and mirrored. Geometry and pixels decide (`features.py`). What finds no copy
asks again, with all its points.

What has no texture, or texture in one direction only, is left to bytes and names. `benchmarks/copies.py` measures all
this.

Lowe, Distinctive image features from scale-invariant keypoints, IJCV 2004. Jegou, Douze and Schmid, Exploiting
descriptor distances for precise image search, INRIA 2011.
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

from .features import POINTS, SIDE, Features, count_inliers, describe, is_plain, mirror

__all__ = ['CopiesFound', 'Copy', 'find_copies']

_VOTES = 3  # votes that a pair needs
# The votes' bins: 30 degrees, a factor of 2, and pixels, each taken together with its neighbour.
_TURNS, _ZOOMS, _SHIFT = 12, 8, 40


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
        plain: Places of the images of which no copy was found, and that have too little texture for that to be sure;
            bytes and names must tell.
    """
    pairs: list[Copy]
    plain: list[int]


class _Search(NamedTuple):
    """How hard to look for an image's copies.

    Attributes:
        points: Points that ask the index, the strongest of the image.
        pairs: Pairs tried of an image, those with most votes.
    """
    points: int
    pairs: int


# Most copies are found by the first. What has found none asks again: of a text, each letter is like a thousand others.
_SEARCHES = _Search(100, 10), _Search(POINTS, 30)
_HITS, _PROBES = 10, 8  # points that the index gives to each that asks, and its cells that are looked through for them


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
        described = pool.map(lambda i: describe(paths[i]), firsts)
        features = dict(zip(firsts, tqdm(described, total=len(firsts), desc='local features', unit='image'),
                            strict=True))
        index = _Index([features[i] for i in firsts])
        alone = list(range(len(firsts)))  # places in `firsts` of what has found no copy
        for search in _SEARCHES:
            ranked = [[(firsts[i], firsts[j], mirrored) for i, j, mirrored in row]
                      for row in index.propose(alone, search)]
            with tqdm(total=sum(map(len, ranked)), desc='copies', unit='pair') as progress:
                for rank in range(search.pairs):  # the likeliest first: what these link need not be tried again
                    row = [candidates[rank] for candidates in ranked if rank < len(candidates)]
                    new = sorted({(i, j, m) for i, j, m in row if root(i) != root(j)} - tried)
                    tried.update(new)
                    inliers = pool.map(lambda pair: count_inliers(features[pair[0]], features[pair[1]], pair[2]), new)
                    for (i, j, mirrored), count in zip(new, inliers, strict=True):
                        if count and root(i) != root(j):
                            pairs.append(Copy(i, j, count, mirrored))
                            link(i, j)
                    progress.update(len(row))
            linked = {i for pair in pairs for i in pair[:2]}
            alone = [k for k in alone if firsts[k] not in linked]
        bare = pool.map(lambda k: is_plain(features[firsts[k]]), alone)
        plain = {firsts[k] for k, is_bare in zip(alone, bare, strict=True) if is_bare}
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


class _Index:
    """The points of all images, by their descriptors."""

    def __init__(self, features: Sequence[Features]) -> None:
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
        self.inverted_file.nprobe = _PROBES
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
        votes: dict[tuple[int, int, bool], float] = {}
        for start in tqdm(range(0, len(images), 64), desc='candidates', unit='block'):
            block = [self.features[i] for i in images[start:start + 64]]
            asking = np.concatenate([np.arange(len(f.xy))[:search.points] + self.ends[i] - len(f.xy)
                                     for i, f in zip(images[start:], block, strict=False)])
            for mirrored in (False, True):
                asked = [mirror(f) if mirrored else f for f in block]
                xy, turn, descriptors = (np.concatenate([getattr(f, name)[:search.points] for f in asked])
                                         for name in ('xy', 'turn', 'descriptors'))
                distances, hits = self.inverted_file.search(descriptors.astype(np.float32), _HITS)
                for i, j, score in self._count(asking, xy, turn, distances, hits, search.pairs):
                    pair = min(i, j), max(i, j), mirrored
                    votes[pair] = max(votes.get(pair, 0), score)

        ranked: dict[int, list[tuple[int, int, bool]]] = {i: [] for i in images}
        for pair in sorted(votes, key=lambda pair: (-votes[pair], pair)):
            for i in pair[:2]:
                if i in ranked and len(ranked[i]) < search.pairs:
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
        """For each image that asks, the images for which most of its points vote, and their score.

        Args:
            asking: Numbers of the points that ask, (Q,).
            xy: Where they are, (Q, 2), mirrored if so; `self.xy` is not.
            turn: Their direction, the same.
            distances: Of the points that look like them, squared (Q, hits).
            hits: Numbers of these; -1 where there are fewer.
            pairs_each: How many images to give for each that asks.
        """
        owner = self.owner
        row, column = np.nonzero((hits >= 0) & (owner[hits] != owner[asking][:, None]))
        images = len(self.features)
        _, place, counts = np.unique(owner[asking][row] * images + owner[hits[row, column]],
                                     return_inverse=True, return_counts=True)
        row, column = (values[counts[place] >= _VOTES] for values in (row, column))  # most pairs share a point or two
        hit, ask = hits[row, column], asking[row]
        # Where all hits are as far, as those of a logo on every page, they say little (Jegou et al. 2011).
        farthest = np.where(hits >= 0, distances, 0).max(1)
        weights = 1 - distances[row, column] / np.maximum(farthest[row], 1)
        by, zoom = self.turn[hit] - turn[row], self.zoom[hit] - self.zoom[ask]
        # Where the middle of the one would lie in the other.
        middle = ((SIDE / 2 * (1 + 1j) - xy[row] @ (1, 1j)) * np.exp2(zoom) * np.exp(1j * by)
                  + self.xy[hit] @ (1, 1j)) / _SHIFT
        cells = [np.floor(by / (2 * np.pi) * _TURNS), np.floor(zoom).clip(-3, 3) + 3,
                 np.floor(middle.real).clip(-8, 8) + 8, np.floor(middle.imag).clip(-8, 8) + 8]
        turns, zooms, x, y = (cell.astype(np.int64) for cell in cells)
        # What a copy's points say lies in one bin or in the next: each votes in both.
        bins = np.concatenate([(((turns + t) % _TURNS * _ZOOMS + zooms + z) * 18 + x + u) * 18 + y + v
                               for t in (0, 1) for z in (0, 1) for u in (0, 1) for v in (0, 1)])
        size = _TURNS * _ZOOMS * 18 * 18
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
