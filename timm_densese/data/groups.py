"""Which images belong together: of one patient, of the same bytes, of one picture, or copies by their names."""
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Set, Tuple

import numpy as np

from ..errors import SplitError
from ..files import printable
from .msld import MSLD_PATIENT, is_msld, msld_patients
from .sources import SplitImage
from .tables import describe_names, find_column, match_files, read_table

__all__ = ['find_patients', 'group_images']

Pairs = List[Tuple[int, int]]

# What tools call copies. Roboflow: NAME_jpg.rf.HASH. Keras: PREFIX_INDEX_RANDOM. Others add a word: IMG_1_aug_3,
# IMG_1-flipped, IMG_1 - Copy. A number alone, as in `x (1)` or `crop_001`, tells nothing.
_ROBOFLOW = re.compile(r'(.+)\.rf\.[0-9a-z]{8,}', re.IGNORECASE)
_KERAS = re.compile(r'(.*?)_?(\d{1,6})_(\d+)')
_WORD = re.compile(
    r'(.*?[^\W_].*?)(?:[ _.-]+\(?(?:aug(?:mented|mentation)?|copy|crop(?:ped)?|[hv]?flip(?:ped)?|mirror(?:ed)?|'
    r'rot(?:ated?|ation)?|blur(?:red)?|bright(?:ness)?|noise|noisy|scaled?|shear|zoom)\)?[ _.\d-]*)+(?:\(\d+\))?',
    re.IGNORECASE)


def find_patients(
        images: Sequence[SplitImage],
        src: Path,
        groups: Optional[Path] = None,
        group_regex: Optional[str] = None,
        labels: Optional[Path] = None,
) -> None:
    """Fill in the patients of images, and print where they are from.

    Args:
        images: Images.
        src: Folder that they are in.
        groups: Table of patients, see `timm_densese.data.tables.match_files`.
        group_regex: Pattern searched in an image's path below its class; its first group, or the whole match, is the
            patient.
        labels: Table of labels, which may tell patients, too.

    Raises:
        SplitError: The patients cannot be had from where they are said to be.
    """
    table = groups or labels
    column = find_column(table, read_table(table), 'patient') if table else None
    if group_regex:
        patients = _by_pattern(images, src, group_regex)
    elif table and column:
        found = match_files(table, column, 'patient', src, [image.path for image in images])
        lost = [image for image, patient in zip(images, found, strict=True) if patient is None]
        if lost:
            raise SplitError(f'{table} has no row for {len(lost)} images of {src}, the first '
                             f'{printable(lost[0].path)}. {describe_names(table)}')
        patients = [patient or '' for patient in found]
        print(f'patients: {column} of {table}; {sum(not p.strip() for p in patients)} images have none there')
    elif groups:
        raise SplitError(f'{groups} must have a column for the patient, named patient, group, lesion or the like; '
                         f'found {", ".join(read_table(groups)[0])}.')
    else:
        if labels:
            print(f'patients: none of the columns of {labels} is named like one: {", ".join(read_table(labels)[0])}')
        return
    patients = list(map(_plain, patients))
    written: Dict[str, List[str]] = {}
    for name in sorted(set(patients)):
        written.setdefault(re.sub(r'(?<!\d)0+(?=\d)|\.0+$', '', name.casefold()), []).append(name)
    alike = [names for names in written.values() if len(names) > 1]
    if alike:
        print(f'  WARNING: {len(alike)} patients are written in two ways, by capitals or zeros, and taken for two, '
              f'such as {alike[0][0]} and {alike[0][1]}')
    for image, patient in zip(images, patients, strict=True):
        image.patient = patient


def _plain(patient: str) -> str:
    """What looks the same is the same: blanks of any kind, and letters with their accents as one sign or as two."""
    return ' '.join(unicodedata.normalize('NFC', patient).split())


def group_images(images: Sequence[SplitImage]) -> Pairs:
    """Number the groups of images, and print what made them.

    Two images are of one group, transitively, if they are of one patient, have the same bytes, or show the same
    picture by local features. Names propose copies and pictures decide, about each way to name copies: where most of
    its copies show the same picture, it is believed of all. Where a picture has too little texture for features, its
    name decides. Names never join two known patients.

    Args:
        images: Images that can be read, with their SHA-256 and, where they are known, patients; their `group` is
            filled in, and where none is known, MSLD's patients.

    Returns:
        The pairs of different files that show the same picture.

    Raises:
        SplitError: A class holds copies of another.
    """
    from .duplicates import find_copies

    if not any(image.patient for image in images):
        _recognise_msld(images)
    same_patient = _chain([image.patient for image in images])
    same_bytes = _chain([image.sha256 for image in images])
    found = find_copies([image.path for image in images], known=same_bytes)
    pictures = [(copy.first, copy.second) for copy in found.pairs]
    _check_copied_classes(images, [*same_bytes, *pictures])
    plain = set(found.plain)
    proposed = _propose(images)
    named = [pair for pair in _decide(proposed, plain, _components(len(images), [*same_bytes, *pictures]))
             if not _two_patients(images, pair)]

    numbers = _components(len(images), [*same_patient, *same_bytes, *pictures, *named])
    for image, number in zip(images, numbers, strict=True):
        image.group = int(number)

    known = len({image.patient for image in images} - {''})
    print(f'{len(images)} images in {max(numbers, default=-1) + 1} groups, which are not parted:')
    print(f'  {known} patients' + ('' if known else ' known: every image counts as a patient of its own. Give --groups '
                                   'or --group-regex if the names tell.'))
    print(f'  {len(same_bytes)} repeats of the same bytes, {len(pictures)} pairs that show the same picture, '
          f'{len(named)} copies by name')
    most = int(np.bincount(_components(len(images), [*same_bytes, *pictures])).max(initial=0))
    if most > max(20, len(images) / 10):
        print(f'  WARNING: {most} images are linked as one picture. If they only share a background, a frame or a '
              f'marker, crop it away; --report shows them')
    if plain:
        shown = ', '.join(printable(images[i].path) for i in found.plain[:5])
        more = f' and {len(plain) - 5} more' if len(plain) > 5 else ''
        print(f'  {len(plain)} images have too little texture for a copy to be surely found; only bytes, names and '
              f'patients link them: {shown}{more}')
    for what, pairs in (('same bytes', same_bytes), ('same picture', pictures), ('copy by name', named)):
        _print_pairs(f'    {what}', images, pairs)
    _print_pairs('  WARNING: the same picture under two labels', images, [
        (i, j) for i, j in [*same_bytes, *pictures] if images[i].label != images[j].label])
    _print_pairs('  WARNING: the same picture under two patients', images, [
        pair for pair in [*same_bytes, *pictures] if _two_patients(images, pair)])
    _print_pairs('  WARNING: copies by their names, but other pictures, so not linked; --groups joins them', images, [
        (members[0], other) for sets in proposed.values() for members in sets for other in members[1:]
        if images[members[0]].group != images[other].group])
    return pictures


def _print_pairs(what: str, images: Sequence[SplitImage], pairs: Pairs) -> None:
    for i, j in pairs[:5]:
        print(f'{what}: {printable(images[i].path)} and {printable(images[j].path)}')
    if len(pairs) > 5:
        print(f'{what}: {len(pairs) - 5} more')


def _two_patients(images: Sequence[SplitImage], pair: Tuple[int, int]) -> bool:
    one, other = (images[i].patient for i in pair)
    return bool(one and other and one != other)


def _chain(keys: Sequence[str]) -> Pairs:
    """Link each image to the first of the same key; none where there is no key."""
    first: Dict[str, int] = {}
    return [(first[key], i) for i, key in enumerate(keys) if key and first.setdefault(key, i) != i]


def _components(count: int, pairs: Pairs) -> np.ndarray:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


# Patients.


def _recognise_msld(images: Sequence[SplitImage]) -> None:
    if is_msld(image.sha256 for image in images):
        known = msld_patients()
        for image in images:
            patients = known.get(image.sha256, {'': ''})
            image.patient = patients.get(image.path.name) or min(patients.values())
        print('patients: MSLD was recognised by the hashes of its images, and its manifest tells them')
        return
    alike = [image.path.name for image in images if re.search(MSLD_PATIENT, image.path.name)]
    if 10 * len(alike) > 9 * len(images):
        print(f"names such as {printable(alike[0])} are like MSLD's, whose patients --group-regex '{MSLD_PATIENT}' "
              f'tells')


def _by_pattern(images: Sequence[SplitImage], src: Path, group_regex: str) -> List[str]:
    try:
        pattern = re.compile(group_regex)
    except re.error as e:
        raise SplitError(f'--group-regex {group_regex!r} is no pattern ({e}).') from e
    matches = [pattern.search(image.name) for image in images]
    patients = [(m[1] if pattern.groups else m[0]) or '' if m else '' for m in matches]
    lost = [image.name for image, patient in zip(images, patients, strict=True) if not patient]
    if len(lost) == len(images):
        raise SplitError(f'--group-regex {group_regex!r} matches no file name of {src}, such as {printable(lost[0])}.')
    if lost:
        print(f'--group-regex tells no patient of {len(lost)} images, such as {printable(lost[0])}: each is its own')
    return patients


# Names.


def _propose(images: Sequence[SplitImage]) -> Dict[str, List[List[int]]]:
    """Images that are copies of one original by their names, for each way to name copies."""
    where = [image.path.parent for image in images]
    stems = [Path(image.name).stem for image in images]
    present = set(zip(where, stems, strict=True))
    sets: Dict[str, Dict[Tuple[object, ...], List[int]]] = defaultdict(lambda: defaultdict(list))
    numbers: Dict[Tuple[object, ...], List[int]] = defaultdict(list)
    worded: Set[Tuple[object, ...]] = set()
    for i, (folder, stem) in enumerate(zip(where, stems, strict=True)):
        word = _WORD.fullmatch(stem)
        if match := _ROBOFLOW.fullmatch(stem):
            sets['Roboflow'][folder, match[1]].append(i)
        elif word and ((folder, word[1]) in present or re.search(r'\d', word[1])):
            sets['words'][folder, word[1]].append(i)
            worded.add((folder, word[1]))
        else:
            sets['words'][folder, stem].append(i)  # the original, if there are copies
            if match := _KERAS.fullmatch(stem):
                sets['Keras'][folder, match[1], match[2]].append(i)
                numbers[folder, match[1], match[2]].append(int(match[3]))
    # Keras's last number is drawn at random; numbers that run are shots, crops or patients.
    running = {key for key, values in numbers.items() if max(values) - min(values) < 4 * len(values)}
    originals = sets['words'].keys() - worded
    return {way: [members for key, members in found.items() if len(members) > 1 and key not in running | originals]
            for way, found in sets.items()}


def _decide(proposed: Dict[str, List[List[int]]], plain: Set[int], shown: np.ndarray) -> Pairs:
    """Links by names that the pictures, of the components `shown`, do not make already."""
    pairs = []
    for sets in proposed.values():
        # One of those with texture stands for the original, and one of the largest component.
        anchored = []
        for members in sets:
            sizes = Counter(shown[i] for i in members if i not in plain)
            anchor = max((i for i in members), key=lambda i: (sizes[shown[i]], -i))
            anchored.append((anchor, [i for i in members if i != anchor]))
        told = [shown[i] == shown[anchor] for anchor, others in anchored for i in others if not {i, anchor} & plain]
        believed = bool(told) and 2 * sum(told) >= len(told)
        pairs += [(min(anchor, i), max(anchor, i)) for anchor, others in anchored for i in others
                  if shown[i] != shown[anchor] and (believed or i in plain or anchor in plain)]
    return pairs


# Classes that are copies of others.


def _check_copied_classes(images: Sequence[SplitImage], pairs: Pairs) -> None:
    """Refuse a class of which half is another's pictures."""
    members = defaultdict(list)
    for image, number in zip(images, _components(len(images), pairs), strict=True):
        members[number].append(image.label)
    sizes = Counter(image.label for image in images)
    shared: Counter = Counter()
    for labels in members.values():
        for label in set(labels):
            for other in set(labels) - {label}:
                shared[label, other] += labels.count(label)
    # Of two that hold the same pictures, the larger is the copies.
    for (label, other), count in sorted(shared.items(), key=lambda item: (-sizes[item[0][0]], item[0])):
        if 2 * count >= sizes[label] and count > 1:
            raise SplitError(f'{label} is no class of its own: {count} of its {sizes[label]} images show pictures of '
                             f'{other}. Leave the folder out, or mend its labels.')
