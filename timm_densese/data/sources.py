"""What a folder that is to be split holds: class folders, a flat folder with a table of labels, or an official test."""
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from ..errors import ImagesError, SplitError
from ..files import printable
from .images import ImageFolder, find_images, is_hidden, list_images, natural_key, read_image
from .tables import describe_names, find_column, match_files, read_table

__all__ = ['SplitImage', 'find_source']


@dataclass
class SplitImage:
    """One image of a split.

    Attributes:
        path: The image in the source folder.
        label: Its class; empty if a table of labels does not know it.
        name: Its path below its class, with slashes.
        patient: Its patient; empty if it is not known.
        official: It belongs to an official test set, which stays as it is.
        sha256: Hash of its bytes; empty if it could not be decoded.
        group: Number of its group: images of one group are never parted.
        splits: Its split in each fold, 'train', 'val' or 'test'; empty if it could not be decoded.
        error: Why it is left out; empty if it is not.
    """
    path: Path
    label: str
    name: str
    patient: str = ''
    official: bool = False
    sha256: str = ''
    group: int = -1
    splits: List[str] = field(default_factory=list)
    error: str = ''


# How people call the folders of a split.
_SPLIT = re.compile(
    r'(?P<kind>train(?:ing)?|val(?:id(?:ation)?)?|dev|test(?:ing)?)(?:[ _-]?(?:set|data|images|split))?', re.IGNORECASE)
# Folders of an archive that hold versions of one data set, and are no classes.
_VERSIONS = re.compile(
    r'(?:orig(?:inals?)?|raw|aug(?:mented|mentation)?|data(?:set)?|images?|masks?|photos?|fold ?\d*)\b', re.IGNORECASE)
_AUGMENTED = re.compile(r'[ _.-]*\(?\baug(?:mented|mentation)?\b\)?[ _.-]*', re.IGNORECASE)


def find_source(src: Path, labels: Optional[Path] = None, keep_test: bool = False) -> List[SplitImage]:
    """Find the images of a folder that is to be split, with their classes.

    Args:
        src: Folder with a folder for each class, or of any form if `labels` is given.
        labels: Table of the images' classes, see `timm_densese.data.tables.match_files`.
        keep_test: `src` holds train/ and test/ with class folders, under these names or similar ones.

    Raises:
        SplitError: It is another folder; the message names what it holds, and where to point instead.
    """
    try:
        folder = list_images(src)
        if labels is not None:
            images = _labelled(src, labels)
        elif keep_test:
            images = _official(folder)
        else:
            _check_layout(folder)
            images = _of_classes(folder)
    except ImagesError as e:
        raise SplitError(str(e)) from e
    _check_classes(sorted({image.label for image in images if not image.error}))
    return images


def _of_classes(folder: ImageFolder, official: bool = False) -> List[SplitImage]:
    if folder.loose:
        print(f'left out, in no class folder: {len(folder.loose)} images such as {printable(folder.loose[0])}')
    for path in sorted(folder.root.iterdir()):
        if path.is_dir() and not is_hidden(path.name) and path.name not in folder.classes:
            _say_it_is_left_out(path)
    return [SplitImage(path, folder.classes[label], path.relative_to(folder.root / folder.classes[label]).as_posix(),
                       official=official) for path, label in folder.samples]


def _say_it_is_left_out(folder: Path) -> None:
    """Say that a folder holds nothing with an image's name, or refuse it where it holds an image all the same."""
    file = next((p for p in sorted(folder.rglob('*')) if p.is_file() and not is_hidden(p.name)), None)
    if file is None:
        return
    try:
        read_image(file)
    except Exception:  # PIL's decoders raise whatever they meet
        print(f'left out, no folder of images: {printable(folder)}, with files such as {printable(file.name)}')
        return
    raise SplitError(f'{printable(file)} is an image, but its name does not end as one, so that {folder.name} would '
                     f'be left out. Rename such files, to .jpg or what they are, or take the folder away.')


def _labelled(src: Path, labels: Path) -> List[SplitImage]:
    paths = find_images([str(src)])
    column = find_column(labels, read_table(labels), 'label')
    assert column is not None
    found = match_files(labels, column, 'label', src, paths)
    lost = [path for path, label in zip(paths, found, strict=True) if not label]
    if 2 * len(lost) > len(paths):
        raise SplitError(f'{labels} has no {column} for {len(lost)} of the {len(paths)} images of {src}, the first '
                         f'{printable(lost[0])}. {describe_names(labels)}')
    print(f'classes: {column} of {labels}')
    if lost:
        print(f'left out, without a {column} in {labels}: {len(lost)} images such as {printable(lost[0])}')
    return [SplitImage(path, label or '', path.relative_to(src).as_posix(), error='' if label else 'has no label')
            for path, label in zip(paths, found, strict=True)]


def _split_kind(name: str) -> str:
    """Which split a folder is by its name: train, val, test or none."""
    match = _SPLIT.fullmatch(name)
    return {'tr': 'train', 'va': 'val', 'de': 'val', 'te': 'test'}[match['kind'][:2].lower()] if match else ''


def _official(parent: ImageFolder) -> List[SplitImage]:
    src = parent.root
    folders = [p for p in sorted(src.iterdir()) if p.is_dir() and not is_hidden(p.name) and _split_kind(p.name)]
    kinds: Dict[str, List[str]] = {}
    for folder in folders:
        kinds.setdefault(_split_kind(folder.name), []).append(folder.name)
    if 'test' not in kinds or len(kinds) < 2:
        raise SplitError(f'--keep-test takes a folder with train/ and test/; {src} holds '
                         f'{", ".join(printable(p.name) for p in sorted(src.iterdir()))[:300]}.')
    for name in parent.classes:
        if not _split_kind(name):
            raise SplitError(f'{printable(src / name)} holds images, and its name says neither train, val nor test. '
                             f'Rename it, or take it away.')
    if 'val' in kinds and 'train' in kinds:
        print(f'{", ".join(kinds["val"])} is put with {", ".join(kinds["train"])}: val is carved anew, by groups.')
    images = [image for folder in folders
              for image in _of_classes(list_images(folder), _split_kind(folder.name) == 'test')]
    official, others = ({image.label for image in images if image.official is kept} for kept in (True, False))
    if not official <= others:
        raise SplitError(f'The test set of {src} has classes that its other images lack: '
                         f'{", ".join(sorted(official - others)[:5])}; these have {", ".join(sorted(others)[:5])}.')
    return images


def _check_classes(labels: Sequence[str]) -> None:
    """Refuse names that are no folder, or no class, to everybody who reads them."""
    for label in labels:
        if re.search(r'[/\\\0]', label) or is_hidden(label):
            raise SplitError(f'{label!r} is no name for a class folder. Rename it.')
        if not label.isprintable() or any(c.isdigit() and not c.isdecimal() for c in label):
            raise SplitError(f'The class {printable(label)!r} has characters that timm cannot read. Rename it.')
    keys: Dict[str, List[str]] = {}
    for label in labels:
        keys.setdefault(str(natural_key(unicodedata.normalize('NFC', label))), []).append(label)
    for first, *others in keys.values():
        if others:
            raise SplitError(f'The classes {first} and {others[0]} differ in case, zeros or the form of their accents '
                             f'only: not every system and script tells them apart. Rename one, or put them together.')
    for label in labels:
        original = _AUGMENTED.sub('', label.replace('_', ' ')).strip()
        twin = next((other for other in labels if other != label and other.replace('_', ' ') == original), None)
        if twin:
            raise SplitError(f'{label} is no class of its own: by its name it holds augmented copies of {twin}. Leave '
                             f'such folders out; copies of what is tested are not to be trained on.')


def _check_layout(folder: ImageFolder) -> None:
    """Refuse a folder whose folders are not classes, and name those that hold class folders."""
    src, classes = folder.root, folder.classes
    ready = [name for name in classes if _split_kind(name)]
    if ready:
        hint = ' --keep-test keeps the test set and carves val from the others.' if any(
            _split_kind(name) == 'test' for name in ready) else ''
        raise SplitError(
            f'{src} holds {", ".join(ready)}: it is split already, and a split made elsewhere may part a patient.'
            f'{hint} Or point SRC at a folder of class folders, or put these together first.')
    roots = _roots(folder)
    inner = {parts: counts for parts, counts in roots.items() if parts}
    versions = {parts[0] for parts in inner if _split_kind(parts[-1]) or parts[-1:] == parts[-2:-1]
                or _VERSIONS.match(parts[0].replace('_', ' '))}
    if inner and (versions == {parts[0] for parts in inner} or len(classes) == 1):
        shown: Dict[str, None] = {}
        for parts, counts in sorted(inner.items(), key=lambda item: ('aug' in str(item[0]).lower(), item[0])):
            ready_below = bool(_split_kind(parts[-1]))
            where = src.joinpath(*parts[:-1] if ready_below else parts)
            found = ', '.join(f'{printable(name)} {count}' for name, count in counts[:4])
            shown[f'  {printable(where)} ({"split already, see --keep-test" if ready_below else found})'] = None
        raise SplitError(f'The folders of {src} are no classes: {", ".join(classes[:5])}. Class folders are further '
                         f'down. Point SRC at one of\n' + '\n'.join(list(shown)[:8]))
    if not classes and folder.loose:
        raise SplitError(f'{src} holds {len(folder.loose)} images in no class folders. Give --labels with a table of '
                         f'their classes, or point SRC at a folder of class folders.')


def _roots(folder: ImageFolder) -> Dict[Tuple[str, ...], List[Tuple[str, int]]]:
    """Folders, by their parts below the root, that hold two or more folders with images in them."""
    counts = Counter(path.relative_to(folder.root).parts[:-1] for path, _ in folder.samples)
    roots: Dict[Tuple[str, ...], List[Tuple[str, int]]] = {}
    for parts, count in counts.items():
        roots.setdefault(parts[:-1], []).append((parts[-1], count))
    return {parts: sorted(children) for parts, children in roots.items() if len(children) > 1 and parts not in counts}
