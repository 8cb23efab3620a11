"""Scores, intervals and comparisons of predictions: numbers only.

Papers:
    * `On Calibration of Modern Neural Networks` - https://arxiv.org/abs/1706.04599
"""
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import torch
from tqdm import tqdm  # comes with huggingface_hub

__all__ = ['expected_calibration_error', 'fit_temperature']

Scores = Dict[str, float]


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
        labels: np.ndarray,
        ours: np.ndarray,
        theirs: np.ndarray,
        classes: Sequence[str],
        samples: Sequence[np.ndarray],
        name: str,
) -> Dict[str, Any]:
    """Compare two models on the same images: differences by patient, and McNemar's exact test on the images."""
    from scipy.stats import binomtest

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
