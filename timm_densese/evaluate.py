"""Scores that can be trusted: with intervals by patient, calibration, leaks told, and one page that shows them."""
import re
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Set

import numpy as np
from timm.data import ImageNetInfo

from .checkpoints import Checkpoint, Model, load_model, short_name
from .comparisons import compare_models
from .data.duplicates import find_copies
from .data.images import list_images, read_image
from .data.msld import MSLD_PATIENT, is_msld
from .data.splits import read_split
from .errors import ImagesError, OptionError
from .figures import draw_figures
from .files import check_new_folder, new_folder, sha256
from .metrics import (
    Scores,
    bootstrap,
    choose_temperature,
    confusion_matrix,
    format_metric,
    score,
    softmax,
    with_intervals,
    write_metrics,
)
from .predict import compute_logits
from .recipes import recorded_images
from .report import write_page
from .subgroups import read_subgroups, subgroup_scores, warn_of_few
from .thresholds import (
    Goal,
    call,
    check_goal,
    choose_thresholds,
    describe_point,
    describe_thresholds,
    operating_point,
    wants_threshold,
)

__all__ = ['ScoredImages', 'evaluate', 'run_split']

_NO_GOAL = Goal()
_MOST_COMPARED = 20_000  # images that are compared in a few minutes


def evaluate(
        model: Model,
        data: Path,
        output: Path,
        split: str = '',
        compare: str = '',
        device: str = '',
        batch_size: int = 32,
        workers: int = 2,
        seed: int = 0,
        resamples: int = 1000,
        goal: Goal = _NO_GOAL,
        subgroups: Optional[Path] = None,
) -> Dict[str, Any]:
    """Score a model on a folder of class folders, and write a page, the figures and every number.

    Intervals are percentiles of a bootstrap that draws patients where split.csv tells them, and images elsewhere. The
    temperature is fitted on val/, never on what is scored.

    Args:
        model: What `timm_densese.checkpoints.load_model` takes, or what it returned.
        data: Folder with test/CLASS/ (and val/CLASS/, split.csv), or with CLASS/.
        output: Folder to write, which must not exist or be empty: report.html (one file, needs no network),
            metrics.json (which `timm-densese publish --metrics` reads), confusion.png, roc.png, pr.png,
            reliability.png.
        split: Folder in `data` that is scored: test where it is there, else `data` itself.
        compare: Another model, scored on the same images and compared in pairs.
        device: Device, by default CUDA where there is one.
        batch_size: Images a batch.
        workers: Processes that read images.
        seed: Seed of the bootstrap.
        resamples: Samples of the bootstrap.
        goal: What a threshold is to attain, which is chosen on val/.
        subgroups: Table, see `timm_densese.subgroups.read_subgroups`.

    Returns:
        What metrics.json holds.

    Raises:
        ImagesError: The folders or classes do not fit the model.
        UserError: The model cannot be loaded, or `output` is not empty.
    """
    import sklearn.metrics  # noqa: F401  it is missed before there is work to lose

    check_new_folder(output, '--output')
    wants_threshold(goal)
    if not data.is_dir():
        raise ImagesError(f'{data} is not a folder.')
    loaded = load_model(model, device)
    split = split or ('test' if (data / 'test').is_dir() else '')
    classes = _classes(loaded, data / split)
    found = list_images(data / split)
    counts = Counter(found.classes[label] for _, label in found.samples)
    positive = check_goal(goal, classes, [counts[name] for name in classes])
    val = next((name for name in ('val', str(loaded.recipe.get('val_split') or '')) if (data / name).is_dir()), '')
    val = '' if val == split else val
    if positive and not val:
        raise OptionError(f'--sensitivity and --specificity choose a threshold on val/, and {data} has none beside '
                          f'{split or "what is scored"}.')
    if val:
        _classes(loaded, data / val)  # refuses others
    parts_of = _subgroups(subgroups, data, split) if subgroups else {}
    other = load_model(compare, device) if compare else None
    other_classes = _classes(other, data / split) if other else classes
    if set(other_classes) != set(classes):
        raise ImagesError(f'{compare} has the classes {other_classes}, {loaded.source} has {classes}.')
    scored = run_split(loaded, data, split, classes, batch_size, workers)
    leaks = _leaks(scored, data, loaded.recipe)
    warnings = [*leaks]
    if other:
        if recorded_images(other.recipe) != recorded_images(loaded.recipe):  # to look for copies takes long
            leaks = _leaks(scored, data, other.recipe)
        warnings += [f'{short_name(compare)}: {warning}' for warning in leaks]
    for by, name in ((loaded, ''), (other, f'{short_name(compare)}: ')):
        if by and split in ('val', by.recipe.get('val_split')):
            warnings.append(f'{name}{split}/ chose the epoch of the training: its scores are no test.')
    absent = [name for i, name in enumerate(classes) if i not in scored.labels]
    if absent:
        more = f' and {len(absent) - 10} more' if len(absent) > 10 else ''
        warnings.append(f'No images of {", ".join(absent[:10])}{more}: what concerns these classes is left out.')
    if scored.unreadable:
        warnings.append(f'Images that could not be read, and are not scored: {len(scored.unreadable)}.')

    temperature, left_out = None, 'there is no val/ to fit one on'
    validation = None
    if val:
        validation = run_split(loaded, data, val, classes, batch_size, workers)
        shared = set(validation.hashes) & set(scored.hashes)
        if shared:
            warnings.append(f'{len(shared)} of the images are in {val}/, too, on which the temperature was fitted.')
        temperature, left_out = choose_temperature(validation.logits, validation.labels)
    if temperature is None:
        warnings.append(f'No temperature is used, and calibration is measured and not mended: {left_out}.')

    probabilities = softmax(scored.logits)
    calibrated = None if temperature is None else softmax(scored.logits / temperature)
    shown = probabilities if calibrated is None else calibrated
    samples = bootstrap(scored.groups, resamples, seed)
    threshold = None
    if positive and validation:
        threshold = _choose_threshold(
            validation.labels, softmax(validation.logits / (temperature or 1.)), scored.labels, shown, classes,
            positive, goal, samples)
        if 'left_out' in threshold:
            warnings.append(f'No threshold could be chosen: {threshold["left_out"]}.')

    def measure(weights: Optional[np.ndarray]) -> Scores:
        return score(scored.labels, probabilities, classes, calibrated, weights)

    scores = with_intervals(measure, samples)
    parts = subgroup_scores(
        scored.labels, shown[None], classes, scored.groups,
        {column: [values[path] for path in scored.paths] for column, values in parts_of.items()}, samples)
    grouped = len(set(scored.groups)) < len(scored.groups)
    unit = 'patients or groups' if grouped else 'images'
    warnings += warn_of_few(parts, unit)
    results: Dict[str, Any] = {
        'dataset': {'name': data.resolve().name, 'split': split or None, 'images': len(scored.paths),
                    'groups': len(set(scored.groups)) if grouped else None},
        'command': 'timm-densese evaluate' + (f' --split {split}' if split else ''),
        'interval': f'95% interval, percentiles of {len(samples)} bootstrap samples of {unit}' if len(samples) else '',
        'conditions': ' '.join(warnings),
        'model': short_name(loaded.source), 'weights': loaded.hash_weights(), 'classes': classes,
        'unit': unit, 'temperature': temperature, 'temperature_left_out': left_out or None, 'warnings': warnings,
        'metrics': {k: v for k, v in scores.items() if '/' not in k},
        'per_class': {name: {k.split('/')[0]: v for k, v in scores.items() if k.endswith(f'/{name}')}
                      for name in classes},
        'threshold': threshold,
        'subgroups': parts,
        'confusion': confusion_matrix(scored.labels, probabilities).tolist(),
        'unreadable': scored.unreadable,
        'predictions': [
            {'file': str(path.relative_to(data)), 'label': classes[label], 'group': int(group),
             'probabilities': dict(zip(classes, map(float, p), strict=True))}
            for path, label, group, p in zip(scored.paths, scored.labels, scored.groups, shown, strict=True)],
    }
    if other:
        baseline = run_split(other, data, split, other_classes, batch_size, workers)
        columns = [other_classes.index(name) for name in classes]
        results.update(compare_models(
            scored.labels, probabilities, softmax(baseline.logits[:, columns]), classes, samples, short_name(compare)))

    figures = draw_figures(scored.labels, probabilities, calibrated, classes)
    with new_folder(output) as work:
        for name, content in figures.items():
            (work / name).write_bytes(content)
        write_metrics(work / 'metrics.json', results)
        write_page(work / 'report.html', results, figures, scored.paths, scored.labels, shown)
    _print(results, output)
    return results


def _choose_threshold(
        val_labels: np.ndarray,
        val_probabilities: np.ndarray,
        labels: np.ndarray,
        probabilities: np.ndarray,
        classes: List[str],
        positive: str,
        goal: Goal,
        samples: np.ndarray,
) -> Dict[str, Any]:
    found, said = choose_thresholds(val_labels, val_probabilities, classes, positive, goal)
    if found is None:
        return {'left_out': said}
    column = classes.index(positive)
    called = call(probabilities[:, column], found)[None]
    return {**goal._asdict(), **found._asdict(), 'where': describe_thresholds([found]), 'rests_on': said,
            'metrics': operating_point(labels == column, called, samples, goal.prevalence)}


def _subgroups(table: Path, data: Path, split: str) -> Dict[str, Dict[Path, str]]:
    """What a table says of the images, by the names that they had before the split, where split.csv tells them."""
    paths = [path for path, _ in list_images(data / split).samples]
    known = {digest: row for row in read_split(data).rows for digest in (row['sha256'], row.get('stored_sha256'))}
    rows = [known.get(sha256(path)) for path in paths]
    found = read_subgroups(
        table, data, [data / row['file'] if row else path for row, path in zip(rows, paths, strict=True)],
        [row.get('patient', '') if row else '' for row in rows])
    return {column: dict(zip(paths, values, strict=True)) for column, values in found.items()}


# Images, classes and groups.


class ScoredImages(NamedTuple):
    """Images of a split that could be read, and what a model says of them.

    Attributes:
        paths: Files, (N,).
        labels: Indices of their classes, (N,).
        logits: (N, num_classes).
        groups: Number of the patient or group of each, (N,); each its own where they are not known.
        hashes: SHA-256 of each file, (N,).
        unreadable: Files that could not be read, with the reason.
    """
    paths: List[Path]
    labels: np.ndarray
    logits: np.ndarray
    groups: np.ndarray
    hashes: List[str]
    unreadable: Dict[str, str]


def _classes(loaded: Checkpoint, folder: Path) -> List[str]:
    """The model's classes in the order of its outputs, which the folders must be among."""
    if not folder.is_dir():
        raise ImagesError(f'{folder} is not a folder. Choose another --split, or make the splits with '
                          f'`timm-densese data split SRC --output DIR`.')
    found = list_images(folder).classes
    labels = loaded.label_names
    synsets: List[str] = ImageNetInfo('imagenet-1k').label_names()
    if found and set(found) <= set(synsets) and loaded.model.num_classes == len(synsets):
        labels = synsets  # as ImageNet's folders are named
    if not labels:
        raise ImagesError(
            f'{loaded.source} does not say which class each of its {loaded.model.num_classes} outputs is, and a guess '
            f'could score it wrongly. Give --class-names in the order of the outputs. After timm\'s train.py that is '
            f'the natural order of the folders trained on; those of {folder} are, in that order: '
            f'{" ".join(found[:20]) or "none"}.')
    if len(set(labels)) < len(labels):
        twice = next(name for name in labels if labels.count(name) > 1)
        raise ImagesError(f'{loaded.source} has two outputs of the name {twice}, so it cannot be scored by names.')
    if not found or not set(found) <= set(labels):
        strange = sorted(set(found) - set(labels))
        raise ImagesError(
            f'{folder} must hold a folder for each class of {loaded.source}: {", ".join(labels[:10])}. '
            + (f'It has others: {", ".join(strange[:10])}.' if strange else 'It holds no folders.'))
    return labels


def run_split(
        loaded: Checkpoint,
        data: Path,
        split: str,
        classes: List[str],
        batch_size: int,
        workers: int,
) -> ScoredImages:
    folder = data / split
    images = list_images(folder)
    place = {label: classes.index(name) for label, name in enumerate(images.classes) if name in classes}
    paths = [path for path, label in images.samples if label in place]
    labels = np.array([place[label] for _, label in images.samples if label in place])
    found = compute_logits(loaded, paths, batch_size, workers, desc=split or folder.name)
    if not found.indices:
        raise ImagesError(f'None of the {len(paths)} images of {folder} can be read, the first for '
                          f'{next(iter(found.errors.values()))}.')
    good = [paths[i] for i in found.indices]
    hashes = [sha256(path) for path in good]
    known = {digest: int(group) for digest, group in read_split(data).groups().items()}
    # An image that the table does not know is a group of its own.
    groups = [known.get(digest, -1 - i) for i, digest in enumerate(hashes)]
    return ScoredImages(
        good, labels[found.indices],
        found.values.double().numpy(), np.unique(groups, return_inverse=True)[1], hashes,
        {str(paths[i].relative_to(data)): error for i, error in found.errors.items()})


def _leaks(scored: ScoredImages, data: Path, recipe: Dict[str, Any]) -> List[str]:
    """What the scored images share with those trained on: bytes, groups of split.csv, pictures, MSLD's patients."""
    sets = recorded_images(recipe)
    splits = {'train', *(folder.name for folder, _ in sets)}
    digests: Set[str] = set()
    hashes: Set[str] = set()
    listed: Set[str] = set()
    grouped: Set[int] = set()
    files: Dict[str, Path] = {}
    for folder in {f.resolve() for f in (data, *(folder.parent for folder, _ in sets)) if f.is_dir()}:
        table = read_split(folder)
        groups = table.groups()
        train = {digest for split in splits for digest in table.hashes(split)}
        train_groups = {groups[digest] for digest in train}
        grouped |= {i for i, digest in enumerate(scored.hashes) if groups.get(digest) in train_groups}
        listed |= groups.keys()
        hashes |= train
        for images in [list_images(folder / split) for split in splits if (folder / split).is_dir()]:
            digests.add(images.digest())
            # Also what is in no table, or was put there since.
            files.update({sha256(path): path for path, _ in images.samples})
    hashes |= files.keys()
    shared = {i for i, digest in enumerate(scored.hashes) if digest in hashes}
    unlisted = [i for i, digest in enumerate(scored.hashes) if digest not in listed and digest not in hashes]
    compared = len(unlisted) + len(files)
    copies = set() if compared > _MOST_COMPARED else {
        unlisted[i] for i in _copies([scored.paths[i] for i in unlisted], list(files.values()))}
    if is_msld(hashes | listed):
        patients = {match[1] for path in files.values() if (match := re.search(MSLD_PATIENT, path.name))}
        grouped |= {i for i in unlisted if (match := re.search(MSLD_PATIENT, scored.paths[i].name))
                    and match[1] in patients}
    warnings = []
    if unlisted and compared > _MOST_COMPARED:
        warnings.append(f'Copies of images trained on were not looked for among {compared} images, only their bytes.')
    for found, what in ((shared, 'were trained on'), (copies - shared, 'show pictures that were trained on'),
                        (grouped - shared - copies, 'are of patients or groups trained on')):
        if found:
            warnings.append(f'LEAK: {len(found)} of the {len(scored.paths)} images {what}. These scores are no test.')
    gone = sorted({str(folder) for folder, digest in sets if digest and digest not in digests})
    if not hashes:
        warnings.append('It is not known which images were trained on, so a leak cannot be excluded.')
    elif gone:
        warnings.append(f'{", ".join(gone)} no longer holds the images that were trained on, so a leak cannot be '
                        f'excluded.')
    return warnings


def _copies(paths: List[Path], trained_on: List[Path]) -> Set[int]:
    """Places in `paths` of the images that show a picture of those trained on."""
    if not paths or not trained_on:
        return set()
    readable = [path for path in trained_on if _is_readable(path)]
    pairs = [(copy.first, copy.second) for copy in find_copies([*paths, *readable]).pairs]
    reached = set(range(len(paths), len(paths) + len(readable)))
    before = 0
    while len(reached) > before:  # a copy of a copy is one, too
        before = len(reached)
        reached |= {i for pair in pairs if reached & set(pair) for i in pair}
    return {i for i in reached if i < len(paths)}


def _is_readable(path: Path) -> bool:
    try:
        read_image(path)
    except Exception:  # PIL's decoders raise whatever they meet
        return False
    return True


def _print(results: Dict[str, Any], output: Path) -> None:
    for warning in results['warnings']:
        print(f'WARNING: {warning}')
    for name, metric in results['metrics'].items():
        print(f'{name:22} {format_metric(metric)}')
    if 'paired' in results:
        for name, metric in results['paired']['differences'].items():
            print(f'{name + ", difference":22} {format_metric(metric)}')
    if results['threshold']:
        print(describe_point(results['threshold']))
    print(f'{output / "report.html"} shows it, {output / "metrics.json"} goes to `timm-densese publish --metrics`.')
