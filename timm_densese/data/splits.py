"""Splits of image folders that keep together what belongs together."""
import csv
import os
import re
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm  # comes with huggingface_hub

from ..errors import SplitError
from ..files import check_new_folder, new_folder, sha256
from .images import list_images, read_image
from .msld import MSLD_PATIENT

__all__ = ['SplitImage', 'split_images']


@dataclass
class SplitImage:
    """One image of a split.

    Attributes:
        path: The image in the source folder.
        label: Its class, the folder directly below the source.
        sha256: Hash of its bytes; empty if it could not be decoded.
        group: Number of its group: images of one group are never parted.
        splits: Its split in each fold, 'train', 'val' or 'test'; empty if it could not be decoded.
        error: Why it could not be decoded; empty if it could.
    """
    path: Path
    label: str
    sha256: str = ''
    group: int = -1
    splits: List[str] = field(default_factory=list)
    error: str = ''


# Of 64 bits of perceptual hash, this many may differ between two images that are called the same picture. On MSLD, 8
# finds no two different pictures alike (10 does), all mirrored, quarter-turned, blurred and noisy copies, and few that
# are turned by other angles or zoomed: those it takes names or patients to find.
_NEAR = 8
# What tools add to the name of a copy: IMG_1_aug_3, IMG_1-flipped, IMG_1 (2), IMG_1_rot90, IMG_1_copy.
_COPY_SUFFIX = re.compile(
    r'(?:[ _.-]*(?:\(\d+\)|(?:aug(?:mented|mentation)?|copy|crop(?:ped)?|(?:[hv]?flip(?:ped)?)|mirror(?:ed)?|'
    r'rot(?:ated?|ation)?|blur(?:red)?|bright(?:ness)?|noise|noisy|scaled?|shear|zoom)[ _.-]?\d*))+$', re.IGNORECASE)


def split_images(
        src: Path,
        out: Path,
        val: float = .1,
        test: float = .2,
        seed: int = 0,
        folds: Optional[int] = None,
        groups: Optional[Path] = None,
        group_regex: Optional[str] = None,
        report: Optional[Path] = None,
) -> List[SplitImage]:
    """Split a folder of class folders into `train/`, `val/` and `test/`, and part nothing that belongs together.

    Images belong together, transitively, if they are of one patient, have the same bytes, look the same (a perceptual
    hash, also against each other's mirror images and quarter turns), or are copies of one original by their names
    (`a.jpg`, `a_aug_1.jpg`). The classes keep their shares as far as the groups allow.

    Args:
        src: Folder with a folder for each class; images may lie deeper. Nothing is written there.
        out: Folder to write, which must not exist or be empty. It gets the splits (in `fold0/`, `fold1/`, ... if
            `folds` is given) as hard links, or copies where the file system has none, and `split.csv`.
        val: Share of the images to validate on.
        test: Share of the images to test on; ignored if `folds` is given, when each fold tests on 1 / folds.
        seed: The same seed and images give the same split.
        folds: Number of folds for cross-validation.
        groups: CSV with the columns `file` (path below `src`) and `patient` or `group`.
        group_regex: Pattern searched in a file's name; its first group, or the whole match, is the patient. By default
            names like MSLD's are recognised.
        report: Picture to write of the images that look the same, group by group.

    Returns:
        The images, in the order of their paths.

    Raises:
        SplitError: The folders or the shares do not allow a split; the message says what was found.
    """
    src, out = Path(src), Path(out)
    if groups and group_regex:
        raise SplitError('Give --groups or --group-regex, not both.')
    if not 0 <= val < 1 or not 0 <= test < 1 or val + test >= 1:
        raise SplitError(f'--val {val} and --test {test} must be shares that leave something to train on.')
    if folds is not None and folds < 2:
        raise SplitError(f'--folds {folds}: cross-validation takes 2 folds or more.')
    if out.resolve().is_relative_to(src.resolve()):
        raise SplitError(f'{out} lies inside {src}, where nothing is to be written. Choose another --output.')
    check_new_folder(out, '--output', SplitError)

    images = _find_images(src)
    hashes = _fingerprint(images)
    good = [i for i, image in enumerate(images) if not image.error]
    for image in images:
        if image.error:
            print(f'left out, not decodable: {image.path} ({image.error})')
    counts = Counter(images[i].label for i in good)
    if len(counts) < 2:
        raise SplitError(
            f'{src} must hold a folder of images for each of two or more classes; found {dict(counts)}.')

    near = _group([images[i] for i in good], hashes, src, groups, group_regex)
    _assign([images[i] for i in good], val, test, seed, folds)
    _write(images, src, out, folds)
    _print_balance([images[i] for i in good], folds)
    if report and near:
        _contact_sheet([images[i] for i in good], near, report)
        print(f'the images that look the same: {report}')
    elif report:
        print(f'no different files look the same: {report} was not written')
    return images


def _find_images(src: Path) -> List[SplitImage]:
    if not src.is_dir():
        raise SplitError(f'{src} is not a folder.')
    folder = list_images(src)
    ready = [name for name in folder.classes
             if name.lower() in ('train', 'training', 'val', 'valid', 'validation', 'test')]
    if ready:
        raise SplitError(
            f'{src} holds {", ".join(ready)}: it is split already. Point SRC at a folder of class folders, or merge '
            f'these first: a split made elsewhere may part a patient.')
    return [SplitImage(path, folder.classes[label]) for path, label in folder.samples]


def _fingerprint_one(path: Path) -> Tuple[str, str, List[int]]:
    """Hash an image: its bytes' SHA-256 or the error on decoding it, and perceptual hashes of its eight poses."""
    import imagehash

    try:
        # 32 x 32 is what phash works on; shrinking first makes the eight poses cheap.
        gray = read_image(path).convert('L').resize((32, 32), Image.Resampling.LANCZOS)
    except Exception as e:  # PIL's decoders raise whatever they meet
        return '', f'{type(e).__name__}: {e}', []
    mirrored = gray.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    poses = (image.rotate(90 * turns) for image in (gray, mirrored) for turns in range(4))
    return sha256(path), '', [int(str(imagehash.phash(pose)), 16) for pose in poses]


def _fingerprint(images: Sequence[SplitImage]) -> np.ndarray:
    """Fill in each image's SHA-256 or error; give the perceptual hashes (N, 8) of those that decode."""
    hashes = []
    with ProcessPoolExecutor() as pool:
        results = pool.map(_fingerprint_one, [image.path for image in images], chunksize=32)
        progress = tqdm(results, total=len(images), desc='hash', unit='image')
        for image, (sha256, error, poses) in zip(images, progress, strict=True):
            image.sha256, image.error = sha256, error
            if not error:
                hashes.append(poses)
    return np.array(hashes, dtype=np.uint64).reshape(-1, 8)


def _near_pairs(hashes: np.ndarray) -> Iterator[Tuple[int, int]]:
    """Find the pairs within `_NEAR` bits, the first image as it is against each pose of the second."""
    for i in range(len(hashes) - 1):  # a row at a time: memory stays linear
        distance = np.bitwise_count(hashes[i, 0] ^ hashes[i + 1:]).min(1)
        for j in np.flatnonzero(distance <= _NEAR):
            yield i, i + 1 + int(j)


def _group(
        images: Sequence[SplitImage],
        hashes: np.ndarray,
        src: Path,
        groups: Optional[Path],
        group_regex: Optional[str],
) -> List[Tuple[int, int]]:
    """Number the groups, print what made them, and give the pairs of different files that look the same."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    def chained(keys: Sequence[Optional[str]]) -> List[Tuple[int, int]]:
        last: Dict[str, int] = {}
        pairs = []
        for i, key in enumerate(keys):
            if key is not None:
                if key in last:
                    pairs.append((last[key], i))
                last[key] = i
        return pairs

    patients = _patients(images, src, groups, group_regex)
    same_patient = chained(patients)
    same_bytes = chained([image.sha256 for image in images])
    originals = [_COPY_SUFFIX.sub('', image.path.stem) for image in images]
    copied = {(i.label, o) for i, o in zip(images, originals, strict=True) if o != i.path.stem}
    same_name = chained([
        f'{i.label}/{o}' if (i.label, o) in copied else None for i, o in zip(images, originals, strict=True)])
    near = [(i, j) for i, j in _near_pairs(hashes) if images[i].sha256 != images[j].sha256]

    edges = np.array([*same_patient, *same_bytes, *same_name, *near], dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(images), len(images)))
    count, numbers = connected_components(graph, directed=False)
    for image, number in zip(images, numbers, strict=True):
        image.group = int(number)

    known = len({p for p in patients if p is not None})
    print(f'{len(images)} images in {count} groups, which are not parted:')
    print(f'  {known} patients' + ('' if known else ' known: every image counts as a patient of its own. Give --groups '
                                   'or --group-regex if the names tell.'))
    print(f'  {len(same_bytes)} repeats of the same bytes, {len(near)} pairs that look the same, '
          f'{len(same_name)} copies by name')
    for what, pairs in (('same bytes', same_bytes), ('look the same', near), ('copy by name', same_name)):
        for i, j in pairs[:5]:
            print(f'    {what}: {images[i].path} and {images[j].path}')
        if len(pairs) > 5:
            print(f'    and {len(pairs) - 5} more')
    for i, j in chain(same_bytes, near):
        if images[i].label != images[j].label:
            print(f'  WARNING: the same picture under two labels: {images[i].path} and {images[j].path}')
    return near


def _patients(
        images: Sequence[SplitImage],
        src: Path,
        groups: Optional[Path],
        group_regex: Optional[str],
) -> List[Optional[str]]:
    if groups:
        with open(groups, newline='') as file:
            rows = list(csv.DictReader(file))
        column = next((c for c in ('patient', 'group') if rows and c in rows[0]), None)
        if column is None or 'file' not in rows[0]:
            raise SplitError(f'{groups} must have the columns file, and patient or group; found {list(rows[:1])}.')
        known = {row['file']: row[column] for row in rows}
        names = [image.path.relative_to(src).as_posix() for image in images]
        lost = [name for name in names if name not in known]
        if lost:
            raise SplitError(f'{groups} has no row for {len(lost)} images of {src}, the first {lost[0]}.')
        return [known[name] for name in names]
    pattern = re.compile(group_regex or MSLD_PATIENT)
    matches = [pattern.search(image.path.name) for image in images]
    if group_regex and not any(matches):
        raise SplitError(f'--group-regex {group_regex!r} matches no file name of {src}.')
    return [None if m is None else m[1] if pattern.groups else m[0] for m in matches]


def _hold_out(images: Sequence[SplitImage], indices: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Choose a share of the images, whole groups, stratified: p of q folds, where p / q is near the share."""
    if not share:
        return indices[:0]
    fraction = Fraction(share).limit_denominator(10) or Fraction(1, 20)
    if fraction >= 1:
        raise SplitError(
            f'{len(indices)} of {len(images)} images are left, too few for a share of {share:.0%} of them and others '
            f'to train on. Use a smaller --val or --test, or 0, or, where a group, which is not parted, is large, more '
            f'folds.')
    chosen = _folds(images, indices, fraction.denominator, seed)[:fraction.numerator]
    return np.sort(np.concatenate(chosen))


def _folds(images: Sequence[SplitImage], indices: np.ndarray, count: int, seed: int) -> List[np.ndarray]:
    from sklearn.model_selection import StratifiedGroupKFold

    labels = np.array([images[i].label for i in indices])
    groups = np.array([images[i].group for i in indices])
    for label in np.unique(labels):
        found = len(np.unique(groups[labels == label]))
        if found < count:
            raise SplitError(
                f'Class {label} has {found} groups of images, too few for {count} parts that share none. Use fewer '
                f'folds, larger --val and --test shares, or 0 for one of them.')
    folds = StratifiedGroupKFold(n_splits=count, shuffle=True, random_state=seed)
    return [indices[held_out] for _, held_out in folds.split(indices, labels, groups)]


def _assign(images: Sequence[SplitImage], val: float, test: float, seed: int, folds: Optional[int]) -> None:
    everything = np.arange(len(images))
    tests = _folds(images, everything, folds, seed) if folds else [_hold_out(images, everything, test, seed)]
    for held_out in tests:
        rest = np.setdiff1d(everything, held_out)
        validation = set(_hold_out(images, rest, val * len(images) / len(rest), seed).tolist())
        test_set = set(held_out.tolist())
        for i, image in enumerate(images):
            image.splits.append('test' if i in test_set else 'val' if i in validation else 'train')


def _write(images: Sequence[SplitImage], src: Path, out: Path, folds: Optional[int]) -> None:
    """Write the folders and split.csv under a temporary name, then rename."""
    with new_folder(out) as work:
        taken: Counter = Counter()
        stored: Dict[Path, str] = {}
        for image in images:
            # Folders below the class go into the name, which a number makes unique: x/a.png and x_a.jpg are two.
            name = '_'.join(image.path.relative_to(src / image.label).with_suffix('').parts)
            taken[image.label, name] += 1
            if taken[image.label, name] > 1:
                name = f'{name}-{taken[image.label, name]}'
            for fold, split in enumerate(image.splits):
                folder = work / (f'fold{fold}' if folds else '') / split / image.label
                folder.mkdir(parents=True, exist_ok=True)
                file = _place(image.path, folder / name)
                if image.path not in stored:  # the same bytes in every fold
                    stored[image.path] = sha256(file)
        fold_columns = [f'fold{k}' for k in range(folds)] if folds else ['split']
        with open(work / 'split.csv', 'w', newline='') as table:
            writer = csv.writer(table)
            writer.writerow(['file', 'label', 'group', 'sha256', 'stored_sha256', *fold_columns, 'error'])
            for image in images:
                splits = image.splits or [''] * len(fold_columns)
                writer.writerow([image.path.relative_to(src).as_posix(), image.label, image.group, image.sha256,
                                 stored.get(image.path, ''), *splits, image.error])


def _place(source: Path, target: Path) -> Path:
    """Put an image where timm's folder reader finds it, which takes .jpg and .png: link, copy, or convert to PNG.

    What timm would read otherwise than a person sees it is converted, too: turned by EXIF, or of 16 bits a pixel.
    """
    with Image.open(source) as file:
        suffix = {'JPEG': '.jpg', 'MPO': '.jpg', 'PNG': '.png'}.get(file.format or '')
        turned = file.getexif().get(ExifTags.Base.Orientation, 1) != 1
        wide = file.mode.startswith('I')
    if suffix is None or turned or wide:
        target = target.with_name(f'{target.name}.png')
        read_image(source).save(target)
        return target
    target = target.with_name(f'{target.name}{suffix}')
    with suppress(OSError):
        os.link(source, target)
        return target
    shutil.copy2(source, target)
    return target


def _print_balance(images: Sequence[SplitImage], folds: Optional[int]) -> None:
    labels = sorted({image.label for image in images})
    for fold in range(folds or 1):
        prefix = f'fold{fold} ' if folds else ''
        for split in ('train', 'val', 'test'):
            counts = Counter(image.label for image in images if image.splits[fold] == split)
            groups = len({image.group for image in images if image.splits[fold] == split})
            classes = ', '.join(f'{label} {counts[label]}' for label in labels)
            print(f'{prefix}{split:5} {counts.total():5} images in {groups} groups: {classes}')


def _contact_sheet(images: Sequence[SplitImage], near: Sequence[Tuple[int, int]], report: Path) -> None:
    """Draw the images that look the same, a pair a row."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    shown = near[:30]
    fig, axes = plt.subplots(len(shown), 2, figsize=(5, 2.4 * len(shown)), layout='constrained', squeeze=False)
    for row, pair in zip(axes, shown, strict=True):
        for ax, i in zip(row, pair, strict=True):
            with Image.open(images[i].path) as file:
                ax.imshow(file.convert('RGB'))
            ax.set_title(f'{images[i].label}/{images[i].path.name}\ngroup {images[i].group}', fontsize=7)
            ax.axis('off')
    if len(near) > len(shown):
        fig.suptitle(f'the first {len(shown)} of {len(near)} pairs', fontsize=8)
    report.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(report, dpi=80)
    plt.close(fig)
