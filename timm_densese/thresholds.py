"""Where to call an image positive: thresholds chosen on validation images, and what they attain on others."""
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .errors import MetricsError, OptionError
from .metrics import Scores, check_weights, format_metric, with_intervals

__all__ = [
    'FEWEST', 'NOT_SURE', 'Calibration', 'Goal', 'Thresholds', 'call', 'check_goal', 'choose_thresholds',
    'describe_point', 'describe_thresholds', 'name_call', 'operating_point', 'read_calibration', 'wants_threshold',
]

NOT_SURE = 'not sure'
FEWEST = 20  # positive images, or others, under which a threshold rests on few


class Goal(NamedTuple):
    """What a threshold is to attain, and what for.

    Attributes:
        sensitivity: Share of the positive images that are to be found, None where it is not asked for.
        specificity: Share of the others that are not to be called positive, None where it is not asked for.
        positive: The positive class; empty for the rarer one of two.
        prevalence: Share of positive images where the model is to be used; None for the data's.
    """
    sensitivity: Optional[float] = None
    specificity: Optional[float] = None
    positive: str = ''
    prevalence: Optional[float] = None


class Thresholds(NamedTuple):
    """Below `low` an image is called negative, from `high` on positive, and between them not sure.

    Attributes:
        positive: The positive class.
        low: Threshold on its probability.
        high: The same, or a higher one.
    """
    positive: str
    low: float
    high: float


class Calibration(NamedTuple):
    """What turns a model's logits into an answer.

    Attributes:
        temperature: What the logits are divided by.
        thresholds: What the probabilities are compared with; None where the most probable class is the answer.
    """
    temperature: float = 1.
    thresholds: Optional[Thresholds] = None

    @property
    def is_fitted(self) -> bool:
        """Whether the probabilities are calibrated: there may be thresholds where no temperature could be fitted."""
        return self.temperature != 1.


def wants_threshold(goal: Goal) -> bool:
    """Tell whether a threshold is asked for.

    Raises:
        OptionError: It is not, and what it would be for is.
    """
    if goal.sensitivity is None and goal.specificity is None:
        given = [name for name, value in (('--positive', goal.positive), ('--prevalence', goal.prevalence)) if value]
        if given:
            raise OptionError(f'{given[0]} is of a threshold: give --sensitivity, or --specificity, too.')
        return False
    return True


def check_goal(goal: Goal, classes: Sequence[str], counts: Sequence[int]) -> Optional[str]:
    """Give the positive class, None where no threshold is asked for.

    Args:
        goal: What is asked for.
        classes: Names of the classes.
        counts: Images of each.

    Raises:
        OptionError: There is no such class, or none is given and there are more than two.
    """
    if not wants_threshold(goal):
        return None
    names = ', '.join(classes[:20])
    if goal.positive and goal.positive not in classes:
        raise OptionError(f'--positive {goal.positive}: there is no such class. Choose one of {names}.')
    if not goal.positive and len(classes) > 2:
        raise OptionError(f'--sensitivity and --specificity need --positive: one of {names}.')
    return goal.positive or classes[int(np.argmin(counts))]


def choose_thresholds(
        labels: np.ndarray,
        probabilities: np.ndarray,
        classes: Sequence[str],
        positive: str,
        goal: Goal,
) -> Tuple[Optional[Thresholds], str]:
    """Choose thresholds on validation images.

    The one for a sensitivity is the highest that attains it; the one for a specificity the lowest that does. Where
    both are asked for and one threshold attains both, it is one.

    Args:
        labels: (N,).
        probabilities: (N, num_classes).
        classes: Names of the classes.
        positive: The positive class.
        goal: What to attain.

    Returns:
        The thresholds and what they rest on; None where no image, or every one, is positive.

    Example:
        >>> import numpy as np
        >>> labels, p = np.array([0, 0, 0, 1, 1]), np.array([.1, .2, .6, .5, .9])
        >>> found, _ = choose_thresholds(labels, np.stack([1 - p, p], 1), ['no', 'yes'], 'yes', Goal(sensitivity=.9))
        >>> found.low, found.high
        (0.5, 0.5)
    """
    column = list(classes).index(positive)
    mine = probabilities[labels == column, column]
    others = probabilities[labels != column, column]
    if not len(mine) or not len(others):
        return None, f'the validation images hold {len(mine)} of {positive} and {len(others)} others'
    low = high = None
    if goal.sensitivity is not None:
        low = float(np.sort(mine)[::-1][max(1, _least(goal.sensitivity, len(mine))) - 1])
    if goal.specificity is not None:
        # The others below it are enough; where all must be, it lies above the highest.
        kept = _least(goal.specificity, len(others))
        high = float(np.nextafter(np.sort(others)[kept - 1], 2)) if kept else 0.
    if low is None or high is None:
        low = high = low if high is None else high
    assert low is not None
    assert high is not None
    few = min(len(mine), len(others))
    said = f'chosen on {len(mine)} validation images of {positive} and {len(others)} others'
    return Thresholds(positive, low, max(low, high)), said + (', which are few' if few < FEWEST else '')


def _least(share: float, count: int) -> int:
    """The smallest number that is this share of a count, or more."""
    return int(np.ceil(share * count - 1e-9))


def call(probability: np.ndarray, thresholds: Thresholds) -> np.ndarray:
    """Call images by thresholds: 1 positive, 0 negative, -1 not sure, from probabilities of the positive class (N,)."""
    return np.where(probability >= thresholds.high, 1, np.where(probability < thresholds.low, 0, -1))


def name_call(probability: float, thresholds: Thresholds, classes: Sequence[str]) -> str:
    """Name what an image is called: the positive class, the other (`not CLASS` of several), or 'not sure'.

    Args:
        probability: Of the positive class.
        thresholds: What it is compared with.
        classes: Names of the classes.

    Example:
        >>> name_call(.4, Thresholds('ill', low=.3, high=.7), ['ill', 'well'])
        'not sure'
    """
    called = call(np.array(probability), thresholds)
    others = [name for name in classes if name != thresholds.positive]
    negative = others[0] if len(others) == 1 else f'not {thresholds.positive}'
    return {1: thresholds.positive, 0: negative, -1: NOT_SURE}[int(called)]


def operating_point(
        positive: np.ndarray,
        called: np.ndarray,
        samples: np.ndarray,
        prevalence: Optional[float] = None,
) -> Dict[str, Dict[str, Any]]:
    """Give what thresholds attain, with intervals.

    Args:
        positive: Whether each image is of the positive class, (N,).
        called: What `call` gives, for each seed, (seeds, N).
        samples: What `timm_densese.metrics.bootstrap` drew.
        prevalence: Share of positive images where the model is to be used.

    Returns:
        `sensitivity` (share of the positive images not called negative), `specificity` (share of the others not called
        positive), `ppv` and `npv` (share of those called so that are; at the data's prevalence), where a prevalence is
        given `ppv_at_prevalence` and `npv_at_prevalence`, and where some images are not sure, `not_sure`, their share.
    """
    uncertain = bool((called < 0).any())

    def measure(weights: Optional[np.ndarray]) -> Scores:
        if weights is None:
            weights = np.ones((1, len(positive)))
        every = [_rates(positive, one, weights, prevalence) for one in called]
        return {name: np.mean([rates[name] for rates in every], axis=0)
                for name in every[0] if uncertain or name != 'not_sure'}

    return with_intervals(measure, samples, 'threshold')


def _rates(positive: np.ndarray, called: np.ndarray, weights: np.ndarray, prevalence: Optional[float]) -> Scores:
    table = {(truth, said): weights @ ((positive == truth) & (called == said))
             for truth in (True, False) for said in (1, 0, -1)}
    mine, others = (sum(table[truth, said] for said in (1, 0, -1)) for truth in (True, False))
    with np.errstate(invalid='ignore', divide='ignore'):
        found = {
            'sensitivity': 1 - table[True, 0] / mine, 'specificity': 1 - table[False, 1] / others,
            'ppv': table[True, 1] / (table[True, 1] + table[False, 1]),
            'npv': table[False, 0] / (table[False, 0] + table[True, 0]),
            'not_sure': (table[True, -1] + table[False, -1]) / (mine + others)}
        if prevalence is not None:
            # By Bayes' rule, from the rates within each class.
            for name, said, truth in (('ppv', 1, True), ('npv', 0, False)):
                right, wrong = ((mine, others) if truth else (others, mine))
                share = prevalence if truth else 1 - prevalence
                right, wrong = table[truth, said] / right * share, table[not truth, said] / wrong * (1 - share)
                found[f'{name}_at_prevalence'] = right / (right + wrong)
    return found


def describe_point(threshold: Dict[str, Any]) -> str:
    """Say in a line what thresholds attain.

    Args:
        threshold: What metrics.json holds of them.
    """
    if 'left_out' in threshold:
        return f'no threshold could be chosen: {threshold["left_out"]}'
    scores = ', '.join(' '.join([name.replace('_', ' '), format_metric(value)])
                       for name, value in threshold['metrics'].items())
    return f'at its threshold {threshold["where"]} for {threshold["positive"]}, {threshold["rests_on"]}: {scores}'


def describe_thresholds(thresholds: List[Thresholds]) -> str:
    """Say in words where the thresholds lie."""
    lows, highs = [t.low for t in thresholds], [t.high for t in thresholds]
    words = f'{np.median(lows):.3f}' + (f' ({min(lows):.3f} to {max(lows):.3f})' if len(lows) > 1 else '')
    if lows != highs:
        words += f' and {np.median(highs):.3f}' + (f' ({min(highs):.3f} to {max(highs):.3f})' if len(highs) > 1 else '')
    return words


def read_calibration(file: Optional[Path], weights: str, classes: Sequence[str]) -> Calibration:
    """Read the temperature and thresholds that an evaluation or a study chose; neither without a file.

    Args:
        file: metrics.json.
        weights: Hash of the weights that they are to be used with, of `timm_densese.checkpoints.Checkpoint`.
        classes: Names of the model's classes.

    Raises:
        MetricsError: The file holds neither, or another model's.
    """
    if file is None:
        return Calibration()
    given = f'--calibration {file}'
    try:
        results = json.loads(file.read_text(encoding='utf-8'))
        threshold = results.get('runs', {}).get(weights, results).get('threshold')
        threshold = None if threshold is not None and 'left_out' in threshold else threshold
        temperature = results.get('temperature')
        if threshold is None and temperature is None:
            raise ValueError(results.get('temperature_left_out') or 'neither a temperature nor a threshold')
        temperature = 1. if temperature is None else float(temperature)
        thresholds = None if threshold is None else Thresholds(
            str(threshold['positive']), float(threshold['low']), float(threshold['high']))
        if thresholds and not 0 <= thresholds.low <= thresholds.high < float('inf'):
            raise ValueError(f'thresholds of {thresholds.low} and {thresholds.high}')
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise MetricsError(
            f'{given} holds no temperature and no threshold ({type(e).__name__}: {e}). Give the metrics.json of '
            f'`timm-densese evaluate MODEL DIR --output OUT`, where DIR has a val/, or of a study.') from e
    if not 0 < temperature < float('inf'):
        raise MetricsError(f'{given} has the temperature {temperature}, which is not a positive number.')
    check_weights(given, results, weights)
    if thresholds and thresholds.positive not in classes:
        raise MetricsError(f'{given} has a threshold for {thresholds.positive}, which is none of the classes '
                           f'{", ".join(classes[:20])}.')
    return Calibration(temperature, thresholds)
