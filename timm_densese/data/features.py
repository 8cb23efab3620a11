"""An image's local features, and whether two images show one picture.

1. SIFT describes up to 300 points of an image (Lowe 2004), compared as RootSIFT (Arandjelovic and Zisserman 2012).
2. Geometry decides: matched points must agree on one affine map (RANSAC, Fischler and Bolles 1981). A match of two SIFT
   points says shift, turn and zoom, so each match is tried as the start, none is drawn at random (Philbin et al. 2007).
3. The pixels confirm: under that map, most of what has texture in either image must be the same in both, but for what
   one of them has painted over. A logo, a ruler, dark corners or a line grid that different pictures share does not
   pass, and no marker on pictures that are alike: the points that agree must be near most others.

Soft pictures have few points, and these are large. So each is described at half its size as well, and where too few
agree, the map is improved by the pixels (Evangelidis and Psarakis 2008), which then must agree in more of the image.

Lowe, Distinctive image features from scale-invariant keypoints, IJCV 2004. Arandjelovic and Zisserman, Three things
everyone should know to improve object retrieval, CVPR 2012. Fischler and Bolles, Random sample consensus, CACM 1981.
Philbin et al., Object retrieval with large vocabularies and fast spatial matching, CVPR 2007. Evangelidis and Psarakis,
Parametric image alignment using enhanced correlation coefficient maximization, PAMI 2008. Lindeberg, Feature detection
with automatic scale selection, IJCV 1998.
"""
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from .images import read_image

__all__ = ['POINTS', 'SIDE', 'Features', 'count_inliers', 'describe', 'is_plain', 'mirror']

SIDE = 256  # images are brought to this many pixels squared; other lengths are in these pixels
POINTS = 300  # points kept of an image
_FEW = 100  # an image of fewer is soft
_MANY, _NEAR, _SPREAD = 30, 24, .65  # so many points that agree are to be within so many pixels of most others
_FEWEST = 60  # of an image of fewer, points are often not found again in a copy
_WINDOW = 33  # side of the square in which pixels are compared
_PAINTED = 13  # side of the square that is of one grey level where a picture is painted over
_TEXTURE = 4.  # grey levels of standard deviation in such a square, from which it has texture
# Grey levels of gradient in it, in the direction that has less of it, and the share of the other direction's, squared,
# from which it has texture in both.
_CORNER, _ROUND = 1.5, .1
# Of a SIFT descriptor (4 x 4 places of 8 directions): which bin lies at a bin's place in the mirrored image.
_MIRROR = np.arange(128).reshape(4, 4, 8)[::-1][..., -np.arange(8) % 8].ravel()


class Features(NamedTuple):
    """An image's points, strongest first, and its pixels.

    Attributes:
        xy: Where they are, (P, 2).
        zoom: Logarithm to base 2 of their size, (P,).
        turn: Their direction in radians, (P,).
        descriptors: RootSIFT, scaled to 8 bits, (P, 128).
        found: How many were found; those of a soft picture are there twice.
        grey: The image of `SIDE`² pixels as a JPEG, an eighth of the memory.
        width: Its width.
    """
    xy: np.ndarray
    zoom: np.ndarray
    turn: np.ndarray
    descriptors: np.ndarray
    found: int
    grey: np.ndarray
    width: int


def describe(path: Path) -> Features:
    """Read an image's features.

    Args:
        path: The image file.

    Raises:
        OSError: It cannot be read as an image; see `read_image`.
    """
    # The channels' mean: a brightened copy loses what is bright first, which in luma is the green that it mostly is.
    image = read_image(path).convert('L', (1 / 3, 1 / 3, 1 / 3, 0))
    zoom = SIDE / (image.width * image.height) ** .5
    width, height = (min(max(round(side * zoom), SIDE // 8), SIDE * 8) for side in image.size)
    grey = cv2.resize(np.asarray(image), (width, height), interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC)
    # Blurred, for the finest points are noise, which a copy does not share. Many weak points, for skin has no strong
    # ones; of these the large are the steadier.
    sift, blurred = cv2.SIFT.create(1000, contrastThreshold=.01), _blur(grey)
    points = sorted(sift.detect(blurred, None), key=lambda point: -point.response * point.size)
    finest = sorted(points, key=_octave)[:1]  # with it, OpenCV describes points in the pyramid that it found them in
    points = points[:POINTS]
    found = len(points)
    descriptors = sift.compute(blurred, points + finest)[1][:-1] if found else np.empty((0, 128), np.float32)
    if 0 < found < _FEW:
        # A soft picture's points are large: what they describe often ends outside a copy, and half of it does not.
        halves, described = sift.compute(blurred, [_half(point) for point in points])
        points, descriptors = points + list(halves), np.concatenate([descriptors, described])
    table = np.array([(*point.pt, np.log2(point.size), np.radians(point.angle)) for point in points], np.float32)
    table = table.reshape(-1, 4)
    root_sift = 512 * np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1))
    return Features(table[:, :2], table[:, 2], table[:, 3], root_sift.clip(0, 255).astype(np.uint8), found,
                     cv2.imencode('.jpg', grey)[1], width)


def _octave(point: cv2.KeyPoint) -> int:
    """The octave that a point lies in, which OpenCV has in the first of four bytes: -1 is that of twice the size."""
    octave = point.octave & 255
    return octave - (256 if octave > 127 else 0)


def _half(point: cv2.KeyPoint) -> cv2.KeyPoint:
    """A point at half its size, which lies an octave lower."""
    lower = max(_octave(point) - 1, -1) & 255
    x, y = point.pt
    return cv2.KeyPoint(x, y, point.size / 2, point.angle, point.response, point.octave & ~255 | lower, point.class_id)


def is_plain(f: Features) -> bool:
    """Whether an image has so few points, or texture in so little of it, that its copies are not surely found."""
    if f.found < _FEWEST:
        return True
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


def _is_painted(image: np.ndarray) -> np.ndarray:
    """Where the surrounding of a pixel is of one grey level."""
    square = np.ones((_PAINTED, _PAINTED))
    return cv2.dilate(image, square) - cv2.erode(image, square) <= 2


def _window_mean(image: np.ndarray) -> np.ndarray:
    return cv2.blur(image, (_WINDOW, _WINDOW), borderType=cv2.BORDER_REFLECT)


def mirror(f: Features) -> Features:
    """The points as the mirror image has them; its pixels stay as they are."""
    xy = np.stack([f.width - 1 - f.xy[:, 0], f.xy[:, 1]], 1)
    return f._replace(xy=xy, turn=np.pi - f.turn, descriptors=f.descriptors[:, _MIRROR])


def count_inliers(a: Features, b: Features, mirrored: bool) -> int:
    """Count the points that agree on an affine map under which the pixels agree as well.

    Args:
        a: An image.
        b: Another.
        mirrored: Compare the first one's mirror image.

    Returns:
        Points, each at a place of its own, at least 3; 0 if these are two pictures.
    """
    if mirrored:
        a = mirror(a)
    x, y = (f.descriptors.astype(np.float32) for f in (a, b))
    # OpenCV's product stays on this thread, where NumPy would start its own.
    alike = np.asarray(cv2.gemm(x, y, 1, np.empty((0, 0), np.float32), 0, flags=cv2.GEMM_2_T))
    nearest = alike.argmax(1)
    i = np.flatnonzero(alike.argmax(0)[nearest] == np.arange(len(nearest)))  # each other's nearest
    affine, at, inliers = _fit(a, b, i, nearest[i])
    if affine is None:
        return 0
    # Of many matches more agree by chance (Brown and Lowe, IJCV 2007).
    if inliers >= max(4, 2 + .2 * len(i)) and _same_pixels(a, b, mirrored, affine, b.xy[nearest[i[at]]]):
        return inliers
    # Soft pictures have few points, which do not say precisely how they lie: the pixels may still tell.
    if min(len(a.xy), len(b.xy)) >= 2 * _FEW:
        return 0
    affine = _aligned(a, b, mirrored, affine)
    return inliers if affine is not None and _same_pixels(a, b, mirrored, affine) else 0


def _places(xy: np.ndarray) -> int:
    """How many of some points lie at places of their own."""
    return len(np.unique(xy // 6 @ (1, 1j)))


def _fit(a: Features, b: Features, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray | None, np.ndarray, int]:
    """The affine map (2, 3) from points `i` of `a` to points `j` of `b` that most agree on, which do, and how many."""
    p, q = a.xy[i], b.xy[j]
    zoom = b.zoom[j] - a.zoom[i]
    x, y = (xy.view(np.complex64)[:, 0] for xy in (p, q))
    # Row k: how far match k's own shift, turn and zoom takes each point from where it should be.
    similarity = np.exp2(zoom) * np.exp(1j * (b.turn[j] - a.turn[i]))
    off = np.abs(similarity[:, None] * (x - x[:, None]) + y[:, None] - y)
    agree = (off < 15).sum(1) * (np.abs(zoom) < 1.3)
    starts = np.argsort(-agree, kind='stable')[:5]
    inside = off[starts] < 15  # (starts, points)
    enough = np.ones(len(starts), bool)
    from_xy = np.hstack([p / SIDE, np.ones((len(p), 1))])
    for tolerance in (15, 10, 5, 5, 5):  # from a similarity to an affine map, by least squares
        enough &= inside.sum(1) >= 3
        chosen = (inside[..., None] * from_xy).transpose(0, 2, 1)
        maps = np.linalg.solve(chosen @ from_xy + 1e-9 * np.eye(3), chosen @ q)  # points on a line give a flat map
        inside = np.linalg.norm(from_xy @ maps - q, axis=2) < tolerance
    affines = maps.transpose(0, 2, 1) / (SIDE, SIDE, 1)
    large, small = np.linalg.svd(affines[..., :2], compute_uv=False).T
    plausible = enough & (np.linalg.det(affines[..., :2]) > 0) & (small > .35) & (large < np.minimum(2.8, 2 * small))
    best: tuple[np.ndarray | None, np.ndarray, int] = None, np.zeros(len(p), bool), 0
    for k in np.flatnonzero(plausible):
        count = min(_places(p[inside[k]]), _places(q[inside[k]]))
        if count > best[2]:
            best = affines[k], inside[k], count
    return best


def _pixels(f: Features, mirrored: bool, flags: int = cv2.IMREAD_GRAYSCALE) -> np.ndarray:
    image = np.asarray(cv2.imdecode(f.grey, flags), np.float32)
    return np.ascontiguousarray(image[:, ::-1]) if mirrored else image


def _aligned(a: Features, b: Features, mirrored: bool, affine: np.ndarray) -> np.ndarray | None:
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


def _same_pixels(
        a: Features, b: Features, mirrored: bool, affine: np.ndarray, inliers: np.ndarray | None = None) -> bool:
    """Whether the images agree where they overlap under a map from `a`, mirrored if so, to `b`.

    Args:
        a: An image, whose points are mirrored already.
        b: Another.
        mirrored: Compare the first one's mirror image.
        affine: The map (2, 3).
        inliers: Where in `b` the points that agree are (N, 2); None for soft ones, which must agree in more of it, and
            have texture in both directions.
    """
    x, y = _pixels(a, mirrored), _pixels(b, False)
    size = y.shape[::-1]
    overlap = cv2.warpAffine(np.ones_like(x), affine, size)
    moved = cv2.warpAffine(x, affine, size, borderMode=cv2.BORDER_REPLICATE)
    # Where one is painted over, as by a mask or a bar, there is nothing to compare.
    painted = (_is_painted(moved) != _is_painted(y)).astype(np.uint8)
    areas = [overlap]
    if painted.any():
        areas.append(np.where(cv2.dilate(painted, np.ones((_WINDOW, _WINDOW))) > 0, np.float32(0), overlap))
    if inliers is not None and not _are_spread(inliers, a.xy @ affine[:, :2].T + affine[:, 2], b.xy, areas[-1]):
        return False
    share = max(1., y.size / np.linalg.det(affine[:, :2]) / x.size)  # of the image that has less in common
    x, y = _blur(moved), _blur(y)
    return any(_is_alike(x, y, where, where.mean() * share, inliers is None) for where in areas)


def _are_spread(inliers: np.ndarray, moved: np.ndarray, points: np.ndarray, seen: np.ndarray) -> bool:
    """Whether points that agree are near most others: many that lie together are of a marker or a logo."""
    if len(inliers) < _MANY:
        return True
    for xy in (moved, points):
        column, row = xy.round().astype(int).T
        inside = (column >= 0) & (row >= 0) & (column < seen.shape[1]) & (row < seen.shape[0])
        near = xy[inside][seen[row[inside], column[inside]] > 0] @ (1, 1j)
        if len(near) and (np.abs(near[:, None] - inliers @ (1, 1j)).min(1) < _NEAR).mean() < _SPREAD:
            return False
    return True


def _is_alike(x: np.ndarray, y: np.ndarray, where: np.ndarray, covered: float, soft: bool) -> bool:
    """Whether two images agree in some of their pixels, which cover a share of them."""
    (mean_x, var_x), (mean_y, var_y) = _moments(x), _moments(y)
    textured = (_window_mean(where) > .9) & (np.maximum(var_x, var_y) > _TEXTURE ** 2)
    alike = (_window_mean(x * y) - mean_x * mean_y) / np.sqrt(var_x * var_y + 1) > .8
    # The less they overlap, the more of it must agree: what different pictures share is a small part of both.
    least = max(.6, 1.4 - 1.1 * covered) + (.1 if soft else 0)
    if textured.sum() <= .1 * where.sum() or alike[textured].mean() <= least:
        return False
    corners = textured & (_corners(x) | _corners(y))  # so without the edges of black corners, which agree in all copies
    if corners.sum() <= .05 * where.sum():
        return not soft
    return bool(alike[corners].mean() > least and (not soft or corners.sum() > .1 * where.sum()))
