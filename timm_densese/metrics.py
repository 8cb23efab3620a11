"""Scores and intervals of predictions, and metrics.json, which holds them.

Papers:
    * `On Calibration of Modern Neural Networks` - https://arxiv.org/abs/1706.04599
"""
import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple

import numpy as np
import torch
from tqdm import tqdm  # comes with huggingface_hub

from .errors import MetricsError
from .files import replace_file

__all__ = [
    'bootstrap',
    'check_weights',
    'choose_temperature',
    'confusion_matrix',
    'expected_calibration_error',
    'fit_temperature',
    'format_metric',
    'read_metrics',
    'score',
    'softmax',
    'with_intervals',
    'write_metrics',
]

Scores = Dict[str, np.ndarray]
_CALIBRATION_BINS = 15
_TEMPERATURES, _FEWEST_IMAGES = (.05, 20.), 20
_WEIGHTS_AT_ONCE = 500_000


def softmax(logits: np.ndarray) -> np.ndarray:
    """Turn logits (N, num_classes) into probabilities."""
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

    return float(np.exp(minimize_scalar(loss, bounds=np.log(_TEMPERATURES), options={'xatol': 1e-6}).x))


def choose_temperature(logits: np.ndarray, labels: np.ndarray) -> Tuple[Optional[float], str]:
    """Fit a temperature on validation images where they can tell one.

    Args:
        logits: (N, num_classes).
        labels: (N,).

    Returns:
        The temperature, or None and the reason: under 20 images, images of one class, all right (the less the better,
        without end), or a fit at the bound of its search.
    """
    if len(labels) < _FEWEST_IMAGES:
        return None, f'val/ holds {len(labels)} images, and under {_FEWEST_IMAGES} tell no temperature'
    if len(np.unique(labels)) < 2:
        return None, 'val/ holds images of one class'
    if (logits.argmax(1) == labels).all():
        return None, 'the model is right on all of val/, where the lowest temperature is the best, without end'
    temperature = fit_temperature(logits, labels)
    low, high = _TEMPERATURES
    if not 1.01 * low < temperature < high / 1.01:
        return None, f'the fit ran to the bound of its search ({temperature:.2f})'
    return temperature, ''


def confusion_matrix(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Count images by class, (num_classes, num_classes): rows are what they are, columns what they are called."""
    classes = probabilities.shape[1]
    return np.bincount(labels * classes + probabilities.argmax(1), minlength=classes ** 2).reshape(classes, classes)


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean gap between confidence and accuracy over 15 bins of confidence, by Guo et al.

    Args:
        labels: (N,).
        probabilities: (N, num_classes).

    Example:
        >>> import numpy as np
        >>> round(expected_calibration_error(np.array([0, 0, 0, 1]), np.array([[.9, .1]] * 4)), 3)
        0.15
    """
    return float(_calibration_error(labels, probabilities, np.ones((1, len(labels))))[0])


def _calibration_error(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((confidence * _CALIBRATION_BINS).astype(int), _CALIBRATION_BINS - 1)
    gaps = weights @ ((confidence - right)[:, None] * (bins[:, None] == np.arange(_CALIBRATION_BINS)))
    return np.abs(gaps).sum(1) / weights.sum(1)


def score(
        labels: np.ndarray,
        probabilities: np.ndarray,
        classes: Sequence[str],
        calibrated: Optional[np.ndarray] = None,
        weights: Optional[np.ndarray] = None,
) -> Scores:
    """Compute every score, of the images as they are or of many samples of them at once.

    Args:
        labels: (N,).
        probabilities: (N, num_classes).
        classes: Names of the classes.
        calibrated: Probabilities after temperature scaling, for the scores that it changes.
        weights: How often each image is in each sample, (samples, N); by default one sample of each image once.

    Returns:
        Scores by name, (samples,), NAME/CLASS for one class; not a number where a class has no images or no others.

    Example:
        >>> import numpy as np
        >>> found = score(np.array([0, 1, 1]), np.array([[.9, .1], [.2, .8], [.6, .4]]), ['a', 'b'])
        >>> found['balanced_accuracy'].item(), found['auroc/b'].item()
        (0.75, 1.0)
    """
    if weights is None:
        weights = np.ones((1, len(labels)))
    every = np.arange(len(classes))
    called, total = probabilities.argmax(1), weights.sum(1)
    actual, predicted = (weights @ (column[:, None] == every) for column in (labels, called))
    right = weights @ ((labels[:, None] == every) & (called == labels)[:, None])
    with np.errstate(invalid='ignore', divide='ignore'):
        by_class = {
            'precision': right / predicted, 'recall': right / actual, 'f1': 2 * right / (actual + predicted),
            'specificity': 1 - (predicted - right) / (total[:, None] - actual)}
    curves = [_areas(labels == i, probabilities[:, i], weights) for i in every]
    by_class['auroc'], by_class['auprc'] = (np.stack(areas, 1) for areas in zip(*curves, strict=True))

    scores = {'accuracy': right.sum(1) / total, 'balanced_accuracy': _mean_of_known(by_class['recall'])}
    scores.update({name: _mean_of_known(by_class[name]) for name in ('auroc', 'auprc')})
    own = np.arange(len(labels)), labels
    for suffix, p in (('', probabilities), ('_calibrated', calibrated)):
        if p is not None:
            smallest = np.finfo(p.dtype).eps  # as scikit-learn has it
            scores[f'nll{suffix}'] = weights @ -np.log(p[own].clip(smallest, 1)) / total
            scores[f'brier{suffix}'] = weights @ ((p ** 2).sum(1) - 2 * p[own] + 1) / total
            scores[f'ece{suffix}'] = _calibration_error(labels, p, weights)
    scores.update({f'{name}/{label}': values[:, i] for name, values in by_class.items()
                   for i, label in enumerate(classes)})
    return scores


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over classes, (samples,), of those that are numbers."""
    known = ~np.isnan(values)
    with np.errstate(invalid='ignore'):
        return np.where(known, values, 0).sum(1) / known.sum(1)


def _areas(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> Sequence[np.ndarray]:
    """Area under the ROC curve and average precision, (samples,) each, with weights (samples, N).

    Images are sorted once. Each positive then needs what lies below, and what from it on upwards, counting ties:
    cumulative sums of the weights at two places.
    """
    order = np.argsort(scores)
    ranked = scores[order]
    w = weights[:, order]
    below = np.concatenate([np.zeros((len(w), 1)), np.cumsum(w, 1)], 1)
    places = np.flatnonzero(positive[order])
    first, last = (np.searchsorted(ranked, ranked[places], side) for side in ('left', 'right'))
    own = w[:, places]
    own_below = np.concatenate([np.zeros((len(w), 1)), np.cumsum(own, 1)], 1)
    own_first, own_last = (np.searchsorted(ranked[places], ranked[places], side) for side in ('left', 'right'))
    total, positives = below[:, -1], own_below[:, -1]
    with np.errstate(invalid='ignore', divide='ignore'):
        negatives_below = (below[:, first] - own_below[:, own_first] + below[:, last] - own_below[:, own_last]) / 2
        auroc = (own * negatives_below).sum(1) / (positives * (total - positives))
        at_least = total[:, None] - below[:, first]
        precision = (positives[:, None] - own_below[:, own_first]) / np.where(at_least > 0, at_least, 1)
        auprc = (own * precision).sum(1) / positives
    mixed = (positives > 0) & (positives < total)
    return np.where(mixed, auroc, np.nan), np.where(mixed, auprc, np.nan)


def bootstrap(groups: np.ndarray, samples: int, seed: int = 0) -> np.ndarray:
    """Draw bootstrap samples: for each, as many groups as there are, with replacement, with all their images.

    Args:
        groups: Number of the patient or group of each image, (N,).
        samples: How many samples.
        seed: Seed.

    Returns:
        How often each image is in each sample, (samples, N) in uint16; no samples where there is one group.
    """
    names, members = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return np.zeros((0, len(groups)), np.uint16)
    rng = np.random.default_rng(seed)
    draws = (np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names)) for _ in range(samples))
    return np.stack([drawn[members].astype(np.uint16) for drawn in draws])


def with_intervals(
        measure: Callable[[Optional[np.ndarray]], Scores],
        samples: np.ndarray,
        desc: str = 'bootstrap',
) -> Dict[str, Dict[str, Any]]:
    """Give each score its value and the 2.5 and 97.5 percentiles of its bootstrap.

    Args:
        measure: Gives the scores for weights as of `score`; for None, those of the images as they are.
        samples: What `bootstrap` drew.
        desc: What to call the progress.

    Returns:
        `value`, `low` and `high` by name. Where the samples do not differ (one image or patient, or all right) or there
        are none, `interval` is 'undefined' instead. Scores that are undefined themselves are left out.
    """
    values = {name: float(value[0]) for name, value in measure(None).items() if not np.isnan(value[0])}
    drawn = [measure(part) for part in tqdm(list(_parts(samples)), desc=desc, unit='part', leave=False)]
    found: Dict[str, Dict[str, Any]] = {}
    for name, value in values.items():
        spread = np.concatenate([part[name] for part in drawn]) if drawn else np.empty(0)
        spread = spread[~np.isnan(spread)]
        low, high = np.percentile(spread, (2.5, 97.5)) if len(spread) else (value, value)
        certain = {'low': float(low), 'high': float(high)} if high > low else {'interval': 'undefined'}
        found[name] = {'value': value, **certain}
    return found


def _parts(samples: np.ndarray) -> Iterator[np.ndarray]:
    """Samples in parts that fit the memory, in float."""
    step = max(1, _WEIGHTS_AT_ONCE // max(1, samples.shape[1]))
    for start in range(0, len(samples), step):
        yield samples[start:start + step].astype(np.float64)


# metrics.json.


def format_metric(metric: Optional[Dict[str, Any]]) -> str:
    """Format a score and its interval for a table.

    Example:
        >>> format_metric({'value': .8125, 'low': .7, 'high': .9})
        '0.812 (0.700 to 0.900)'
    """
    if metric is None:
        return 'undefined'
    if 'low' in metric:
        return f'{metric["value"]:.3f} ({metric["low"]:.3f} to {metric["high"]:.3f})'
    return f'{metric["value"]:.3f}' + (f' (interval {metric["interval"]})' if 'interval' in metric else '')


def write_metrics(file: Path, results: Dict[str, Any]) -> None:
    """Write metrics.json.

    Args:
        file: File, replaced if it is there.
        results: `dataset` (`name`, and `split`, `images`, `groups` where known), `command` (what measured it),
            `metrics` (name -> `value`, and `low` and `high` of an interval), and where known `interval` (which kind),
            `conditions`, `comparison` (model -> metrics as above), `model`, `weights` (their hash), `classes`,
            `temperature`.
    """
    replace_file(file, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + '\n')


def read_metrics(file: Path) -> Dict[str, Any]:
    """Read what `write_metrics` wrote, or somebody by hand.

    Args:
        file: JSON file; at least `dataset` with a `name`, `command` and `metrics`.

    Returns:
        What the file holds.

    Raises:
        MetricsError: It is not such a file.
    """
    try:
        results = json.loads(file.read_text(encoding='utf-8'))
        for text in (results['dataset']['name'], results['command']):
            if not isinstance(text, str):
                raise TypeError(f'{text!r} is not a text')
        for table in (results['metrics'], *results.get('comparison', {}).values()):
            for metric in table.values():
                float(metric['value'])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise MetricsError(
            f'--metrics {file} cannot be used ({type(e).__name__}: {e}). It must be JSON such as '
            f'{{"dataset": {{"name": "...", "split": "test"}}, "command": "what measured it", '
            f'"metrics": {{"accuracy": {{"value": 0.9, "low": 0.8, "high": 0.95}}}}}}.') from e
    return results


def check_weights(what: str, results: Dict[str, Any], weights: str) -> None:
    """Refuse what was measured on another model; where a file does not say on which, say so.

    Args:
        what: The option and file, for the message.
        results: What the file holds: `weights`, of one model, or `runs`, of a study, by them.
        weights: Hash of the weights that it is to be used with.

    Raises:
        MetricsError: It was measured on other weights.
    """
    if weights in results.get('runs', ()):
        return
    if 'weights' not in results and 'runs' not in results:
        print(f'{what} does not say on which weights it was measured: whether on these is not known.', file=sys.stderr)
    elif results.get('weights') != weights:
        raise MetricsError(
            f'{what} was measured on other weights, those of {results.get("model", "another model")}. Run '
            f'`timm-densese evaluate` with this model, and give its metrics.json.')
