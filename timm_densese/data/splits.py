"""Splits of image folders that keep together what belongs together."""
import csv
import io
import os
import re
import shutil
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm  # comes with huggingface_hub

from ..errors import OptionError, SplitError
from ..files import check_new_file, check_new_folder, new_folder, printable, replace_file, sha256
from .groups import find_patients, group_images
from .images import read_image
from .sources import SplitImage, find_source

__all__ = ['SplitImage', 'SplitTable', 'read_split', 'split_images']

_TABLE = 'split.csv'
_PICTURES = ('.png', '.jpg', '.pdf', '.svg')
# Names that are not UTF-8 keep their bytes.
_TEXT = {'encoding': 'utf-8', 'errors': 'surrogateescape', 'newline': ''}


class SplitTable(NamedTuple):
    """What split.csv says of a folder.

    Attributes:
        rows: Its rows: file, label, group, patient (where it is known), sha256 (of the source), stored_sha256 (of the
            file in the split), split or fold0, fold1, ..., error. Empty where there is no table.
        column: The column that says train, val or test for this folder.
    """
    rows: List[Dict[str, str]]
    column: str

    def groups(self) -> Dict[str, str]:
        """Give the group of each image, by its hashes, of the source and of the stored file."""
        return {digest: row['group'] for row in self.rows for digest in _hashes(row)}

    def hashes(self, *splits: str) -> Set[str]:
        """Give the hashes of the images, of some splits or of all."""
        return {digest for row in self.rows if not splits or row[self.column] in splits for digest in _hashes(row)}


def _hashes(row: Dict[str, str]) -> List[str]:
    return [row[column] for column in ('sha256', 'stored_sha256') if row.get(column)]


def read_split(folder: Path) -> SplitTable:
    """Read the split.csv that tells of a split, of a fold, or of a folder in one of them.

    Args:
        folder: `OUTPUT` of a split, `OUTPUT/fold0`, or a folder such as `OUTPUT/test` in one of these.

    Returns:
        The table, which has no rows where there is none.
    """
    folder = Path(folder).resolve()
    above = folder.parent
    for file, column in ((folder / _TABLE, 'split'), (above / _TABLE, folder.name), (above / _TABLE, 'split'),
                         (above.parent / _TABLE, above.name)):
        if file.is_file():
            with open(file, **_TEXT) as table:  # type: ignore[call-overload]
                rows = list(csv.DictReader(table))
            if rows and {'sha256', 'group', column} <= set(rows[0]):
                return SplitTable(rows, column)
    return SplitTable([], '')


def split_images(
        src: Path,
        output: Path,
        val: float = .1,
        test: Optional[float] = None,
        seed: int = 0,
        folds: Optional[int] = None,
        groups: Optional[Path] = None,
        group_regex: Optional[str] = None,
        report: Optional[Path] = None,
        labels: Optional[Path] = None,
        keep_test: bool = False,
        copy: bool = False,
) -> List[SplitImage]:
    """Split a folder of class folders into `train/`, `val/` and `test/`, and part nothing that belongs together.

    Images belong together, transitively, if they are of one patient, have the same bytes, or show the same picture
    (local features and geometry: turned, mirrored, cropped, brightened); see `timm_densese.data.groups`. The classes
    keep their shares as far as the groups allow. What is written is read alike by this package and by timm's own
    scripts: .jpg and .png files, upright, on white, directly in the class folders.

    Args:
        src: Folder with a folder for each class; images may lie deeper. Nothing is written there.
        output: Folder to write, which must not exist or be empty. It gets the splits (in `fold0/`, `fold1/`, ... if
            `folds` is given) as hard links, or copies where the file system has none, and `split.csv`.
        val: Share of the images to validate on; with `keep_test`, of those that are not the test's.
        test: Share of the images to test on, .2 if None. Of `folds`, each is tested on its own share, 1 / folds.
        seed: The same seed and images give the same split.
        folds: Number of folds for cross-validation.
        groups: Table with a column for the file (path below `src`) and one for the patient or group.
        group_regex: Pattern searched in a file's path below its class; its first group, or the whole match, is the
            patient.
        report: Picture to write of the images that show the same picture, pair by pair.
        labels: Table with a column for the file and one for the class; the folders of `src` are then none.
        keep_test: `src` holds train/ and test/: the test set stays as it is, val is carved from the rest.
        copy: Copy the files, where hard links would share later edits with `src`.

    Returns:
        The images, in the order of their paths.

    Raises:
        SplitError: The folders, tables or shares do not allow a split; the message says what was found.
    """
    src, output = Path(src), Path(output)
    if groups and group_regex:
        raise SplitError('Give --groups or --group-regex, not both.')
    if folds is not None and folds < 2:
        raise SplitError(f'--folds {folds}: cross-validation takes 2 folds or more.')
    if keep_test and (folds or labels):
        raise SplitError('Give --keep-test or --folds or --labels, not two of them.')
    if test is not None and (folds or keep_test):
        share = f'each fold is tested on its own share, 1 of {folds}' if folds else 'the test set stays as it is'
        raise SplitError(f'--test {test} has no place here: {share}. Leave it out.')
    if folds:
        test = 1 / folds
    elif test is None:
        test = 0 if keep_test else .2
    if not 0 <= val < 1 or not 0 <= test < 1 or val + test >= 1:
        shares = f'--val {val} and ' + (f'--folds {folds}' if folds else f'--test {test}')
        raise SplitError(f'{shares} must be shares that leave something to train on.')
    if output.resolve().is_relative_to(src.resolve()):
        raise SplitError(f'{output} lies inside {src}, where nothing is to be written. Choose another --output.')
    check_new_folder(output, '--output', SplitError)
    if report:
        _check_report(report, src)

    images = find_source(src, labels, keep_test)
    known = [image for image in images if not image.error]
    find_patients(known, src, groups, group_regex, labels)
    _read(known)
    good = [image for image in images if not image.error]
    counts = Counter(image.label for image in good if not image.official)
    lost = sorted({image.label for image in images if image.label} - set(counts))
    if lost or len(counts) < 2:
        also = f'; no image of {", ".join(lost)} can be read' if lost else ''
        raise SplitError(
            f'{src} must hold a folder of images for each of two or more classes; found {dict(counts)}{also}.')
    if keep_test and not any(image.official for image in good):
        raise SplitError(f'None of the images of the test set of {src} can be read.')

    pictures = group_images(good)
    if keep_test:
        _assign_around_test(good, val, seed)
    else:
        _assign(good, val, test, seed, folds)
    _check_shares(good, val, test, folds, keep_test)
    _write(images, src, output, folds, copy)
    _print_balance(good, folds)
    if report and pictures:
        _contact_sheet(good, pictures, report)
        print(f'the images that show the same picture: {report}')
    elif report:
        print(f'no different files show the same picture: {report} was not written')
    return images


def _read_one(path: Path) -> Tuple[str, str]:
    """Hash a file, or say why it cannot be read as an image."""
    try:
        read_image(path)
        return sha256(path), ''
    except Exception as e:  # PIL's decoders raise whatever they meet
        return '', f'{type(e).__name__}: {e}'


def _read(images: Sequence[SplitImage]) -> None:
    """Fill in each image's SHA-256 or error."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(_read_one, [image.path for image in images])
        progress = tqdm(results, total=len(images), desc='read', unit='image')
        for image, (digest, error) in zip(images, progress, strict=True):
            image.sha256, image.error = digest, error
    for image in images:
        if image.error:
            print(f'left out, not readable: {printable(image.path)} ({image.error})')


# Who goes where.


def _hold_out(images: Sequence[SplitImage], indices: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Choose a share of the images, whole groups, stratified: p of q folds, where p / q is near the share."""
    if not share:
        return indices[:0]
    groups: Dict[str, Set[int]] = {}
    for i in indices:
        groups.setdefault(images[i].label, set()).add(images[i].group)
    fewest = min(map(len, groups.values()))
    fraction = Fraction(share).limit_denominator(min(10, fewest)) or Fraction(1, round(1 / share))
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
                f'Class {label} has {found} groups of images left, too few for {count} parts that share none: '
                f'use fewer folds, a larger --val or --test, or 0 for one of them.')
    folds = StratifiedGroupKFold(n_splits=count, shuffle=True, random_state=seed)
    return [indices[held_out] for _, held_out in folds.split(indices, labels, groups)]


def _assign(images: Sequence[SplitImage], val: float, test: float, seed: int, folds: Optional[int]) -> None:
    everything = np.arange(len(images))
    tests = _folds(images, everything, folds, seed) if folds else [_hold_out(images, everything, test, seed)]
    for held_out in tests:
        rest = np.setdiff1d(everything, held_out)
        validation = _hold_out(images, rest, val * len(images) / len(rest), seed)
        _append(images, held_out, validation)


def _assign_around_test(images: Sequence[SplitImage], val: float, seed: int) -> None:
    official = np.array([image.official for image in images])
    _append(images, np.flatnonzero(official), _hold_out(images, np.flatnonzero(~official), val, seed))
    tested = {image.group for image in images if image.official}
    across = [image for image in images if not image.official and image.group in tested]
    if across:
        print(f'  WARNING: {len(across)} images outside the official test set are of patients or pictures in it, such '
              f'as {printable(across[0].path)}: its scores are no test of new ones. Delete these images to mend it.')


def _append(images: Sequence[SplitImage], test: np.ndarray, val: np.ndarray) -> None:
    tested, validated = set(test.tolist()), set(val.tolist())
    for i, image in enumerate(images):
        image.splits.append('test' if i in tested else 'val' if i in validated else 'train')


def _check_shares(
        images: Sequence[SplitImage],
        val: float,
        test: float,
        folds: Optional[int],
        keep_test: bool,
) -> None:
    """Say where the groups made a share another than was asked for, and refuse a test set that is far from it."""
    largest = Counter(image.group for image in images).most_common(1)[0][1]
    sizes = Counter(image.label for image in images)
    labels = set(sizes)
    kept = sum(image.official for image in images)
    asked = {'val': val * (len(images) - kept), 'test': kept if keep_test else test * len(images)}
    for fold in range(folds or 1):
        where = f'fold{fold} ' if folds else ''
        for split, wanted in asked.items():
            found = [image for image in images if image.splits[fold] == split]
            missed = (f'{where}{split} has {len(found)} of {len(images)} images ({len(found) / len(images):.0%}), and '
                      f'{wanted:.0f} ({wanted / len(images):.0%}) were asked for: groups are not parted, and the '
                      f'largest has {largest} images')
            if split == 'test' and not folds and not wanted / 2 - 1 <= len(found) <= 2 * wanted + 1:
                raise SplitError(f'{missed}. Ask for another --test, or use --folds.')
            if abs(len(found) - wanted) > max(2, .15 * wanted):
                print(f'  NOTE: {missed}.')
            counts = Counter(image.label for image in found)
            absent = sorted(labels - set(counts))
            if found and absent:
                print(f'  WARNING: {where}{split} has no images of {", ".join(absent[:5])}. Use another --seed or a '
                      f'larger share.')
            uneven = [f'{label} {counts[label]} of {sizes[label]}' for label in sorted(counts)
                      if abs(counts[label] / len(found) - sizes[label] / len(images)) > .15]
            if len(found) > 20 and uneven and not (keep_test and split == 'test'):
                print(f'  NOTE: {where}{split} has the classes in other shares than asked for, by the groups: '
                      f'{", ".join(uneven[:5])} images.')


# What is written.


def _write(images: Sequence[SplitImage], src: Path, output: Path, folds: Optional[int], copy: bool) -> None:
    """Write the folders and split.csv under a temporary name, then rename."""
    with new_folder(output) as work:
        taken: Set[Tuple[str, str]] = set()
        stored: Dict[Path, str] = {}
        changes: Counter = Counter()
        linked = False
        for image in images:
            # Folders below the class go into the name, which a number makes unique: x/a.png and x_a.jpg are two.
            plain = _plain_name(image.name)
            name, number = plain, 1
            while (image.label, name.casefold()) in taken:
                number += 1
                name = f'{plain}-{number}'
            taken.add((image.label, name.casefold()))
            for fold, split in enumerate(image.splits):
                folder = work / (f'fold{fold}' if folds else '') / split / image.label
                folder.mkdir(parents=True, exist_ok=True)
                file, change = _place(image.path, folder / name, copy)
                if image.path not in stored:  # the same bytes in every fold
                    stored[image.path] = sha256(file)
                    if change:
                        changes[change] += 1
                    if name != Path(image.name).stem:
                        changes['stored under another name: of one folder, unique, and readable everywhere'] += 1
                linked = linked or os.stat(file).st_nlink > 1
        fold_columns = [f'fold{k}' for k in range(folds)] if folds else ['split']
        with open(work / _TABLE, 'w', **_TEXT) as table:  # type: ignore[call-overload]
            writer = csv.writer(table)
            writer.writerow(['file', 'label', 'group', 'patient', 'sha256', 'stored_sha256', *fold_columns, 'error'])
            for image in images:
                splits = image.splits or [''] * len(fold_columns)
                writer.writerow([image.path.relative_to(src).as_posix(), image.label, image.group, image.patient,
                                 image.sha256, stored.get(image.path, ''), *splits, image.error])
    for change, count in sorted(changes.items()):
        print(f'{count} images are {change}')
    if linked:
        print(f'The files are hard links: who edits one in {output} edits it in {src}. --copy makes copies.')


def _plain_name(name: str) -> str:
    """A file's name for its place in the class folder: without folders, and with what every system and timm read."""
    stem = '_'.join(Path(name).with_suffix('').parts)
    stem = os.fsencode(stem).decode('utf-8', 'replace')
    stem = ''.join(unicodedata.normalize('NFKC', c) if c.isdigit() and not c.isdecimal() else c for c in stem)
    stem = re.sub(r'[\\:*?"<>|\x00-\x1f\ufffd]', '_', stem)
    return stem.encode()[-150:].decode(errors='ignore').lstrip('.') or '_'  # a file system counts bytes


def _place(source: Path, target: Path, copy: bool) -> Tuple[Path, str]:
    """Put an image where timm's folder reader finds it, which takes .jpg and .png: link, copy, or convert to PNG.

    What timm would read otherwise than a person sees it is converted, too.

    Returns:
        The file, and why it was converted.
    """
    with Image.open(source) as file:
        suffix = {'JPEG': '.jpg', 'MPO': '.jpg', 'PNG': '.png'}.get(file.format or '')
        change = ''
        if suffix is None:
            change = 'of a format that timm does not read, and stored as PNG'
        elif file.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            change = 'turned as their EXIF says, and stored as PNG'
        elif file.mode.startswith('I'):
            change = 'of 16 bits, and stored as PNG with 8'
        elif file.has_transparency_data:
            change = 'transparent, and stored as PNG on white'
    if change:
        target = target.with_name(f'{target.name}.png')
        read_image(source).save(target)
        return target, change
    target = target.with_name(f'{target.name}{suffix}')
    if not copy:
        with suppress(OSError):
            os.link(source.resolve(), target)  # a link to a link would point nowhere from here
            return target, ''
    shutil.copy2(source, target)
    return target, ''


def _print_balance(images: Sequence[SplitImage], folds: Optional[int]) -> None:
    labels = sorted({image.label for image in images})
    for fold in range(folds or 1):
        prefix = f'fold{fold} ' if folds else ''
        for split in ('train', 'val', 'test'):
            counts = Counter(image.label for image in images if image.splits[fold] == split)
            groups = len({image.group for image in images if image.splits[fold] == split})
            classes = ', '.join(f'{label} {counts[label]}' for label in labels)
            print(f'{prefix}{split:5} {counts.total():5} images in {groups} groups: {classes}')


def _check_report(report: Path, src: Path) -> None:
    if report.suffix.lower() not in _PICTURES:
        raise OptionError(f'--report {report} is a picture: name it {" or ".join(_PICTURES)}.')
    if report.resolve().is_relative_to(src.resolve()):
        raise OptionError(f'--report {report} lies inside {src}, where nothing is to be written.')
    check_new_file(report, '--report')


def _contact_sheet(images: Sequence[SplitImage], pairs: Sequence[Tuple[int, int]], report: Path) -> None:
    """Draw the images that show the same picture, a pair a row."""
    from matplotlib.figure import Figure

    shown = pairs[:30]
    fig = Figure(figsize=(5, 2.4 * len(shown)), layout='constrained')
    axes = fig.subplots(len(shown), 2, squeeze=False)
    for row, pair in zip(axes, shown, strict=True):
        for ax, i in zip(row, pair, strict=True):
            ax.imshow(read_image(images[i].path))
            ax.set_title(f'{images[i].label}/{printable(images[i].path.name)}\ngroup {images[i].group}', fontsize=7)
            ax.axis('off')
    if len(pairs) > len(shown):
        fig.suptitle(f'the first {len(shown)} of {len(pairs)} pairs', fontsize=8)
    picture = io.BytesIO()
    fig.savefig(picture, dpi=80, format=report.suffix[1:].lower())
    replace_file(report, picture.getvalue())  # never into a file that others are linked to
