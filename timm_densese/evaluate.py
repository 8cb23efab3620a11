"""Scores that can be trusted: with intervals by patient, calibration, leaks told, and one page that shows them.

Papers:
    * `On Calibration of Modern Neural Networks` - https://arxiv.org/abs/1706.04599
"""
import base64
import csv
import html
import io
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo
from tqdm import tqdm  # comes with huggingface_hub

from .errors import ImagesError
from .files import check_new_folder, new_folder, sha256
from .hub import Checkpoint, load_model, short_name
from .images import Logits, choose_device, compute_logits, find_images, read_image

__all__ = ['evaluate', 'expected_calibration_error', 'fit_temperature']

_WORST = 24
_NOTICE = 'For research. This is no medical device, and its answers are not for diagnosis.'

Scores = Dict[str, float]


class _Split(NamedTuple):
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


def evaluate(
        model: str,
        data: Path,
        report: Path,
        split: str = '',
        compare: str = '',
        device: str = '',
        batch_size: int = 32,
        workers: int = 2,
        seed: int = 0,
        resamples: int = 1000,
) -> Dict[str, Any]:
    """Score a model on a folder of class folders, and write a page, the figures and every number.

    Intervals are percentiles of a bootstrap that draws patients where split.csv tells them, and images elsewhere. The
    temperature is fitted on val/, never on what is scored.

    Args:
        model: What `timm_densese.hub.load_model` takes.
        data: Folder with test/CLASS/ (and val/CLASS/, split.csv), or with CLASS/.
        report: Folder to write, which must not exist or be empty: report.html (one file, needs no network),
            metrics.json (which `timm-densese publish --metrics` reads), confusion.png, roc.png, pr.png,
            reliability.png.
        split: Folder in `data` that is scored: test where it is there, else `data` itself.
        compare: Another model, scored on the same images and compared in pairs.
        device: Device, by default CUDA where there is one.
        batch_size: Images a batch.
        workers: Processes that read images.
        seed: Seed of the bootstrap.
        resamples: Samples of the bootstrap.

    Returns:
        What metrics.json holds.

    Raises:
        ImagesError: The folders or classes do not fit the model.
        UserError: The model cannot be loaded, or `report` is not empty.
    """
    import sklearn.metrics  # noqa: F401  it is missed before there is work to lose

    check_new_folder(report, '--report')
    if not data.is_dir():
        raise ImagesError(f'{data} is not a folder.')
    where = choose_device(device)
    loaded = load_model(model)
    split = split or ('test' if (data / 'test').is_dir() else '')
    classes = _classes(loaded, data / split, model)
    scored = _run_split(loaded, data, split, classes, where, batch_size, workers)
    warnings = _leaks(scored, data, loaded.recipe)
    absent = [name for i, name in enumerate(classes) if i not in scored.labels]
    if absent:
        more = f' and {len(absent) - 10} more' if len(absent) > 10 else ''
        warnings.append(f'No images of {", ".join(absent[:10])}{more}: what concerns these classes is left out.')
    if scored.unreadable:
        warnings.append(f'{len(scored.unreadable)} images could not be read and are not scored.')

    temperature = None
    if split != 'val' and (data / 'val').is_dir():
        validation = _run_split(loaded, data, 'val', classes, where, batch_size, workers)
        shared = set(validation.hashes) & set(scored.hashes)
        if shared:
            warnings.append(f'{len(shared)} of the images are in val/, too, on which the temperature was fitted.')
        temperature = fit_temperature(validation.logits, validation.labels)
    else:
        warnings.append('There is no val/ to fit a temperature on: calibration is measured and not mended.')

    probabilities = _softmax(scored.logits)
    calibrated = None if temperature is None else _softmax(scored.logits / temperature)
    samples = _resample(scored.groups, seed, resamples)

    def measure(i: Any) -> Scores:
        return _scores(scored.labels[i], probabilities[i], classes, None if calibrated is None else calibrated[i])

    with_intervals = _with_intervals(measure, samples, 'bootstrap')
    grouped = len(set(scored.groups)) < len(scored.groups)
    unit = 'patients or groups' if grouped else 'images'
    results: Dict[str, Any] = {
        'dataset': {'name': data.resolve().name, 'split': split or None, 'images': len(scored.paths),
                    'groups': len(set(scored.groups)) if grouped else None},
        'command': 'timm-densese evaluate' + (f' --split {split}' if split else ''),
        'interval': f'95% interval, percentiles of {len(samples)} bootstrap samples of {unit}' if len(samples) else '',
        'conditions': ' '.join(warnings),
        'model': short_name(model), 'classes': classes, 'temperature': temperature, 'warnings': warnings,
        'metrics': {k: v for k, v in with_intervals.items() if '/' not in k},
        'per_class': {name: {k.split('/')[0]: v for k, v in with_intervals.items() if k.endswith(f'/{name}')}
                      for name in classes},
        'confusion': _confusion(scored.labels, probabilities).tolist(),
        'unreadable': scored.unreadable,
        'predictions': [
            {'file': str(path.relative_to(data)), 'label': classes[label], 'group': int(group),
             'probabilities': dict(zip(classes, map(float, p), strict=True))}
            for path, label, group, p in zip(
                scored.paths, scored.labels, scored.groups, probabilities if calibrated is None else calibrated,
                strict=True)],
    }
    if compare:
        other = load_model(compare)
        if _classes(other, data / split, compare) != classes:
            raise ImagesError(f'{compare} has the classes {other.label_names}, {model} has {classes}.')
        rival = _run_split(other, data, split, classes, where, batch_size, workers)
        results.update(_compare(scored, rival, classes, samples, short_name(compare)))

    figures = _figures(scored.labels, probabilities, calibrated, classes)
    with new_folder(report) as work:
        for name, content in figures.items():
            (work / name).write_bytes(content)
        (work / 'metrics.json').write_text(json.dumps(results, indent=1))
        (work / 'report.html').write_text(_page(results, figures, scored, probabilities), encoding='utf-8')
    _print(results, report)
    return results


# Images, classes and groups.


def _classes(loaded: Checkpoint, folder: Path, model: str) -> List[str]:
    """The model's classes in the order of its logits, which the folders must be among."""
    if not folder.is_dir():
        raise ImagesError(f'{folder} is not a folder. Choose another --split, or make the splits with '
                          f'`timm-densese data split SRC --out DIR`.')
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith('.'))
    labels = loaded.label_names or found
    synsets: List[str] = ImageNetInfo('imagenet-1k').label_names()
    if found and set(found) <= set(synsets) and loaded.model.num_classes == len(synsets):
        labels = synsets  # as ImageNet's folders are named
    if len(labels) != loaded.model.num_classes:
        raise ImagesError(f'{model} has {loaded.model.num_classes} outputs and does not name them; {folder} has '
                          f'{len(found)} classes: {", ".join(found[:10]) or "none"}.')
    if not found or not set(found) <= set(labels):
        strange = sorted(set(found) - set(labels))
        raise ImagesError(
            f'{folder} must hold a folder for each class of {model}: {", ".join(labels[:10])}. '
            + (f'It has others: {", ".join(strange[:10])}.' if strange else 'It holds no folders.'))
    return labels


def _run_split(
        loaded: Checkpoint,
        data: Path,
        split: str,
        classes: List[str],
        device: torch.device,
        batch_size: int,
        workers: int,
) -> _Split:
    folder = data / split
    paths = find_images([str(folder)])
    paths = [path for path in paths if path.relative_to(folder).parts[0] in classes]
    found: Logits = compute_logits(
        loaded.model, paths, loaded.data_config, device, batch_size, workers, desc=split or folder.name)
    if not found.indices:
        raise ImagesError(f'None of the {len(paths)} images of {folder} can be read, the first for '
                          f'{next(iter(found.errors.values()))}.')
    good = [paths[i] for i in found.indices]
    hashes = [sha256(path) for path in good]
    known = {digest: int(row['group']) for row in _split_table(data)[0] for digest in _row_hashes(row)}
    # An image that the table does not know is a group of its own.
    groups = [known.get(digest, -1 - i) for i, digest in enumerate(hashes)]
    return _Split(
        good, np.array([classes.index(path.relative_to(folder).parts[0]) for path in good]),
        found.values.double().numpy(), np.unique(groups, return_inverse=True)[1], hashes,
        {str(paths[i].relative_to(data)): error for i, error in found.errors.items()})


def _split_table(data: Path) -> Tuple[List[Dict[str, str]], str]:
    """Rows of the split.csv that tells of a split, a fold, or a folder in one of them, and the column of its splits."""
    data = data.resolve()
    above = data.parent
    for file, column in ((data / 'split.csv', 'split'), (above / 'split.csv', data.name),
                         (above / 'split.csv', 'split'), (above.parent / 'split.csv', above.name)):
        if file.is_file():
            with open(file, newline='') as table:
                rows = list(csv.DictReader(table))
            if rows and {'sha256', 'group', column} <= set(rows[0]):
                return rows, column
    return [], ''


def _row_hashes(row: Dict[str, str]) -> Set[str]:
    """Hashes of an image as it was and as the split stored it."""
    return {row[column] for column in ('sha256', 'stored_sha256') if row.get(column)}


def _leaks(scored: _Split, data: Path, recipe: Dict[str, Any]) -> List[str]:
    """What the scored images share with those trained on, by hashes and by the groups of split.csv."""
    hashes: Set[str] = set()
    groups: Set[int] = set()
    trained_on = recipe.get('data_dir') or recipe.get('data')
    folders = {Path(folder).resolve() for folder in (data, trained_on) if folder and Path(folder).is_dir()}
    for folder in folders:
        rows, column = _split_table(folder)
        train = [row for row in rows if row[column] == 'train']
        hashes |= {digest for row in train for digest in _row_hashes(row)}
        if not rows and (folder / 'train').is_dir():
            hashes |= {sha256(p) for p in find_images([str(folder / 'train')])}
        if folder == data.resolve():
            known = {digest: row['group'] for row in rows for digest in _row_hashes(row)}
            train_groups = {row['group'] for row in train}
            groups = {i for i, digest in enumerate(scored.hashes) if known.get(digest) in train_groups}
    shared = sum(digest in hashes for digest in scored.hashes)
    warnings = []
    if shared:
        warnings.append(f'LEAK: {shared} of the {len(scored.paths)} images were trained on. These scores are no test.')
    elif groups:
        warnings.append(f'LEAK: {len(groups)} of the {len(scored.paths)} images are of patients or groups trained on. '
                        f'These scores are no test.')
    if not hashes:
        warnings.append('It is not known which images were trained on, so a leak cannot be excluded.')
    return warnings


# Numbers.


def _softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(1).numpy()


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Fit the temperature that logits are divided by, to the least negative log-likelihood.

    Args:
        logits: (N, num_classes).
        labels: (N,).

    Returns:
        The temperature, between 0.05 and 20.

    Example:
        >>> import numpy as np
        >>> logits = np.array([[4., 0.]] * 10)
        >>> labels = np.array([0] * 8 + [1] * 2)    # right four times of five: a difference of log 4 would do
        >>> bool(abs(fit_temperature(logits, labels) - 4 / np.log(4)) < 1e-3)
        True
    """
    from scipy.optimize import minimize_scalar

    x, y = torch.from_numpy(logits), torch.from_numpy(labels)

    def loss(log_temperature: float) -> float:
        return torch.nn.functional.cross_entropy(x / np.exp(log_temperature), y).item()

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(.05), np.log(20)), options={'xatol': 1e-6}).x))


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over bins of confidence, by Guo et al.

    Args:
        labels: (N,).
        probabilities: (N, num_classes).
        bins: Bins of equal width.

    Example:
        >>> import numpy as np
        >>> round(expected_calibration_error(np.array([0, 0, 0, 1]), np.array([[.9, .1]] * 4)), 3)
        0.15
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(places, confidence - right, bins)
    return float(np.abs(gaps).sum() / len(labels))


def _confusion(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(labels, probabilities.argmax(1), labels=range(probabilities.shape[1]))


def _scores(
        labels: np.ndarray,
        probabilities: np.ndarray,
        classes: Sequence[str],
        calibrated: Optional[np.ndarray] = None,
) -> Scores:
    """Every score by name, NAME/CLASS for one class; not a number where a class has no images or no others."""
    from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

    every = range(len(classes))
    confusion = _confusion(labels, probabilities).astype(float)
    right, actual, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid='ignore', divide='ignore'):
        recall, precision = right / actual, right / predicted
        specificity = 1 - (predicted - right) / (len(labels) - actual)
        f1 = 2 * right / (actual + predicted)
    scores = {'accuracy': right.sum() / len(labels), 'balanced_accuracy': float(np.nanmean(recall))}
    curves: Dict[str, List[float]] = {'auroc': [], 'auprc': []}
    for i in every:
        mixed = 0 < actual[i] < len(labels)
        curves['auroc'].append(roc_auc_score(labels == i, probabilities[:, i]) if mixed else np.nan)
        curves['auprc'].append(average_precision_score(labels == i, probabilities[:, i]) if mixed else np.nan)
    for name, values in curves.items():
        scores[name] = float(np.mean([v for v in values if not np.isnan(v)] or [np.nan]))
    for suffix, p in (('', probabilities), ('_calibrated', calibrated)):
        if p is not None:
            scores[f'nll{suffix}'] = log_loss(labels, p, labels=every)
            scores[f'brier{suffix}'] = brier_score_loss(labels, p, labels=every, scale_by_half=False)
            scores[f'ece{suffix}'] = expected_calibration_error(labels, p)
    by_class = {'precision': precision, 'recall': recall, 'f1': f1, 'specificity': specificity, **curves}
    scores.update({f'{name}/{classes[i]}': float(values[i]) for name, values in by_class.items() for i in every})
    return scores


def _resample(groups: np.ndarray, seed: int, resamples: int) -> List[np.ndarray]:
    """Bootstrap samples: for each, as many groups as there are, drawn with replacement, with all their images."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    if len(members) < 2:
        return []
    return [np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
            for _ in range(resamples)]


def _with_intervals(
        measure: Callable[[Any], Scores],
        samples: Sequence[np.ndarray],
        desc: str,
) -> Dict[str, Dict[str, float]]:
    """Each score's value, and the 2.5 and 97.5 percentiles of its bootstrap; undefined scores are left out."""
    values = {name: value for name, value in measure(slice(None)).items() if not np.isnan(value)}
    drawn = [measure(sample) for sample in tqdm(samples, desc=desc, unit='sample', leave=False)]
    found: Dict[str, Dict[str, float]] = {}
    for name, value in values.items():
        found[name] = {'value': float(value)}
        spread = [scores[name] for scores in drawn if not np.isnan(scores[name])]
        if spread:
            low, high = np.percentile(spread, (2.5, 97.5))
            found[name].update(low=float(low), high=float(high))
    return found


def _compare(
        scored: _Split,
        rival: _Split,
        classes: Sequence[str],
        samples: Sequence[np.ndarray],
        name: str,
) -> Dict[str, Any]:
    """Compare two models on the same images: differences by patient, and McNemar's exact test on the images."""
    from scipy.stats import binomtest

    ours, theirs = _softmax(scored.logits), _softmax(rival.logits)
    labels = scored.labels
    right, rival_right = ours.argmax(1) == labels, theirs.argmax(1) == labels
    only_ours, only_theirs = int((right & ~rival_right).sum()), int((~right & rival_right).sum())

    def measure(i: Any) -> Scores:
        here, there = _scores(labels[i], ours[i], classes), _scores(labels[i], theirs[i], classes)
        names = [k for k in here if '/' not in k]
        return {**{f'there/{k}': there[k] for k in names}, **{f'difference/{k}': here[k] - there[k] for k in names}}

    found = _with_intervals(measure, samples, 'comparison')

    def part(prefix: str) -> Dict[str, Dict[str, float]]:
        return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}

    mcnemar = binomtest(only_ours, only_ours + only_theirs).pvalue if only_ours + only_theirs else 1.
    return {
        'comparison': {name: part('there/')},
        'paired': {'with': name, 'differences': part('difference/'),
                   'mcnemar': {'right_here_only': only_ours, 'right_there_only': only_theirs, 'p': float(mcnemar)}},
    }


# The page.


def _figures(
        labels: np.ndarray,
        probabilities: np.ndarray,
        calibrated: Optional[np.ndarray],
        classes: Sequence[str],
) -> Dict[str, bytes]:
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import ConfusionMatrixDisplay, PrecisionRecallDisplay, RocCurveDisplay

    figures: Dict[str, bytes] = {}

    def save(name: str, fig: Any) -> None:
        content = io.BytesIO()
        fig.savefig(content, dpi=100)
        plt.close(fig)
        figures[name] = content.getvalue()

    legible = len(classes) <= 40
    side = 3.6 + .25 * min(len(classes), 40)
    fig, ax = plt.subplots(figsize=(side, side), layout='constrained')
    ConfusionMatrixDisplay(_confusion(labels, probabilities), display_labels=classes if legible else None).plot(
        ax=ax, cmap='Blues', colorbar=not legible, include_values=legible,
        xticks_rotation='vertical' if len(classes) > 3 else 'horizontal')
    if not legible:
        ax.set(xticks=[], yticks=[])
    ax.set_title('images')
    save('confusion.png', fig)

    shown = [i for i in range(len(classes)) if 0 < (labels == i).sum() < len(labels)][:10]
    for name, display, title in (('roc.png', RocCurveDisplay, 'ROC'), ('pr.png', PrecisionRecallDisplay, 'PR')):
        fig, ax = plt.subplots(figsize=(4.2, 4.2), layout='constrained')
        for i in shown:
            display.from_predictions(labels == i, probabilities[:, i], name=classes[i], ax=ax)
        ax.set(title=f'{title}, each class against the others')
        save(name, fig)

    fig, ax = plt.subplots(figsize=(4.2, 4.2), layout='constrained')
    ax.plot((0, 1), (0, 1), color='gray', lw=1)
    for label, p in (('as it is', probabilities), ('temperature from val/', calibrated)):
        if p is not None:
            right, confidence = calibration_curve(p.argmax(1) == labels, p.max(1).clip(0, 1), n_bins=10)
            ax.plot(confidence, right, 'o-', label=f'{label}: ECE {expected_calibration_error(labels, p):.3f}')
    ax.set(xlabel='confidence', ylabel='share that is right', title='reliability', xlim=(0, 1), ylim=(0, 1))
    ax.legend()
    save('reliability.png', fig)
    return figures


def _cell(metric: Optional[Dict[str, float]]) -> str:
    if metric is None:
        return 'undefined'
    return f'{metric["value"]:.3f}' + (f' ({metric["low"]:.3f} to {metric["high"]:.3f})' if 'low' in metric else '')


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; what is in the cells is HTML already."""
    head = ''.join(f'<th>{cell}</th>' for cell in header)
    body = ''.join('<tr>' + ''.join(f'<td>{cell}</td>' for cell in row) + '</tr>' for row in rows)
    return f'<table><tr>{head}</tr>{body}</table>'


def _embed(content: bytes, kind: str, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


_PAGE = '''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ border: 1px solid #ccc; padding: 4px 9px; text-align: left }}
th {{ background: #f3f3f3 }}
.warning {{ background: #fff3cd; border-left: 5px solid #e0a800; padding: .5em 1em; margin: .5em 0 }}
</style></head><body>
{body}
</body></html>
'''


def _page(results: Dict[str, Any], figures: Dict[str, bytes], scored: _Split, probabilities: np.ndarray) -> str:
    dataset, classes = results['dataset'], results['classes']
    names = [html.escape(name) for name in classes]
    groups = f', {dataset["groups"]} patients or groups' if dataset['groups'] else ''
    body = [
        f'<h1>{html.escape(results["model"])}</h1>',
        f'<p>{html.escape(dataset["name"])}{", " + html.escape(dataset["split"]) if dataset["split"] else ""}: '
        f'{dataset["images"]} images{groups}. {_NOTICE}</p>',
        *(f'<div class="warning">{html.escape(warning)}</div>' for warning in results['warnings']),
        '<h2>Scores</h2>', f'<p>In brackets: {results["interval"] or "no interval"}.</p>',
        _table(('score', html.escape(results['model']),
                *map(html.escape, results.get('comparison', {}))),
               [(name, _cell(metric), *(_cell(other.get(name)) for other in results.get('comparison', {}).values()))
                for name, metric in results['metrics'].items()]),
        '<h2>By class</h2>',
        _table(('class', 'images', *(per := ('precision', 'recall', 'f1', 'specificity', 'auroc', 'auprc'))),
               [(names[i], str(int((scored.labels == i).sum())),
                 *(_cell(results['per_class'][name].get(score)) for score in per)) for i, name in enumerate(classes)]),
    ]
    if 'paired' in results:
        paired = results['paired']
        mcnemar = paired['mcnemar']
        body += [
            f'<h2>Against {html.escape(paired["with"])}</h2>',
            f'<p>Only this model is right on {mcnemar["right_here_only"]} images, only the other on '
            f'{mcnemar["right_there_only"]}: McNemar\'s exact test gives p = {mcnemar["p"]:.3f}. It takes images as '
            f'independent, which those of one patient are not; the intervals below do not.</p>',
            _table(('score', 'difference'), [(k, _cell(v)) for k, v in paired['differences'].items()])]
    body += ['<h2>Figures</h2>', ''.join(_embed(content, 'png', name) for name, content in figures.items())]
    if results['temperature'] is not None:
        body.append(f'<p>Temperature, fitted on val/: {results["temperature"]:.3f}. '
                    f'<code>timm-densese predict --calibration metrics.json</code> uses it.</p>')

    own = probabilities[np.arange(len(scored.labels)), scored.labels]
    wrong = [i for i in np.argsort(own) if probabilities[i].argmax() != scored.labels[i]][:_WORST]
    body += [f'<h2>Worst errors</h2><p>The {len(wrong)} that were most sure of something else.</p>',
             _table(('image', 'file', 'is', 'called', 'with'), [
                 (_embed(_thumbnail(scored.paths[i]), 'jpeg', scored.paths[i].name),
                  html.escape(results['predictions'][i]['file']), names[scored.labels[i]],
                  names[probabilities[i].argmax()], f'{probabilities[i].max():.1%}') for i in wrong])]
    if scored.unreadable:
        body += ['<h2>Not readable</h2>', _table(('file', 'reason'), [
            (html.escape(file), html.escape(reason)) for file, reason in scored.unreadable.items()])]
    return _PAGE.format(title=html.escape(f'{results["model"]} on {dataset["name"]}'), body='\n'.join(body))


def _thumbnail(path: Path) -> bytes:
    image = read_image(path)
    image.thumbnail((128, 128), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, 'jpeg', quality=85)
    return content.getvalue()


def _print(results: Dict[str, Any], report: Path) -> None:
    for warning in results['warnings']:
        print(f'WARNING: {warning}')
    for name, metric in results['metrics'].items():
        print(f'{name:22} {_cell(metric)}')
    if 'paired' in results:
        for name, metric in results['paired']['differences'].items():
            print(f'{name + ", difference":22} {_cell(metric)}')
    print(f'{report / "report.html"} shows it, {report / "metrics.json"} goes to `timm-densese publish --metrics`.')
