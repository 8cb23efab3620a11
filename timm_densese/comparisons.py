"""Whether one model is better than another: in pairs, by patient, over folds and seeds; numbers and words.

Papers:
    * `Inference for the Generalization Error` - https://doi.org/10.1023/A:1024068626366
    * `A Simple Sequentially Rejective Multiple Test Procedure` - https://www.jstor.org/stable/4615733
"""
from functools import lru_cache
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from .metrics import Scores, score, with_intervals

__all__ = [
    'TTest', 'compare_models', 'corrected_t_test', 'describe_difference', 'detectable_difference', 'holm',
    'mean_scores', 'paired_differences', 'power',
]

LEVEL = .05
POWER = .8
_MOST_TIMES = 100  # as many patients: more is no plan


def mean_scores(
        labels: np.ndarray,
        probabilities: np.ndarray,
        classes: Sequence[str],
        weights: Optional[np.ndarray] = None,
) -> Scores:
    """Compute every score for each seed, and average over seeds.

    Args:
        labels: (N,).
        probabilities: (seeds, N, num_classes).
        classes: Names of the classes.
        weights: As of `timm_densese.metrics.score`.

    Returns:
        Scores by name, (samples,).
    """
    every = [score(labels, p, classes, weights=weights) for p in probabilities]
    return {name: np.mean([scores[name] for scores in every], axis=0) for name in every[0]}


def paired_differences(
        labels: np.ndarray,
        probabilities: np.ndarray,
        baseline: np.ndarray,
        classes: Sequence[str],
        samples: np.ndarray,
        seed: int = 0,
) -> Dict[str, Dict[str, Any]]:
    """Compute the differences of two models' scores on the same images, with intervals over patients and seeds.

    Args:
        labels: (N,).
        probabilities: The model's, (seeds, N, num_classes).
        baseline: The baseline's, (seeds, N, num_classes), of the same seeds.
        classes: Names of the classes.
        samples: What `timm_densese.metrics.bootstrap` drew; each draws its seeds, too.
        seed: Seed of that.

    Returns:
        Model minus baseline: `value`, `low` and `high` by score, as of `timm_densese.metrics.with_intervals`.
    """
    seeds = len(probabilities)
    rng = np.random.default_rng(seed)

    def measure(weights: Optional[np.ndarray]) -> Scores:
        pairs = [(score(labels, ours, classes, weights=weights), score(labels, theirs, classes, weights=weights))
                 for ours, theirs in zip(probabilities, baseline, strict=True)]
        drawn = np.full((1, seeds), 1.) if weights is None else rng.multinomial(
            seeds, np.full(seeds, 1 / seeds), len(weights))
        return {name: sum(drawn[:, i] * (ours[name] - theirs[name]) for i, (ours, theirs) in enumerate(pairs)) / seeds
                for name in pairs[0][0] if '/' not in name}

    return with_intervals(measure, samples, 'comparison')


class TTest(NamedTuple):
    """A test of whether a mean difference over runs is zero.

    Attributes:
        mean: Mean difference.
        error: Its standard error.
        df: Degrees of freedom.
        p: Probability of a difference as large where there is none.
    """
    mean: float
    error: float
    df: int
    p: float


def corrected_t_test(differences: np.ndarray, train: float, test: float) -> TTest:
    """Test a difference over folds, whose training sets overlap, by Nadeau and Bengio.

    A plain t-test takes the folds as independent, which makes differences out of nothing: here the variance of the mean
    is not s^2 / J, but s^2 (1 / J + test / train).

    Args:
        differences: One of each fold, (J,).
        train: Images that a model was trained on.
        test: Images that it was tested on.

    Returns:
        The test; p is 1 where the differences do not vary, or there is one fold: nothing is known of their spread.

    Example:
        >>> import numpy as np
        >>> found = corrected_t_test(np.array([.02, .05, .01, .04, .03]), train=80, test=20)
        >>> round(found.error, 4), round(found.p, 3)
        (0.0106, 0.047)
    """
    from scipy import stats

    runs = len(differences)
    mean = float(differences.mean())
    spread = float(differences.std(ddof=1)) if runs > 1 else 0.
    if spread < 1e-12:
        return TTest(mean, 0., max(0, runs - 1), 1.)
    error = spread * float(np.sqrt(1 / runs + test / train))
    return TTest(mean, error, runs - 1, float(2 * stats.t.sf(abs(mean) / error, runs - 1)))


def holm(p: Sequence[float]) -> List[float]:
    """Adjust the p of several tests so that one false finding among all is as rare as in one test, by Holm.

    Example:
        >>> [round(q, 3) for q in holm([.01, .04, .03])]
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind='stable')
    adjusted = np.maximum.accumulate(np.array(p)[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted[np.argsort(order, kind='stable')].tolist()


def power(difference: float, error: float, df: int, level: float = LEVEL) -> float:
    """Give how often the test finds a difference that is there.

    Args:
        difference: The true difference.
        error: Standard error, of `corrected_t_test`.
        df: Degrees of freedom.
        level: Level of the test.
    """
    from scipy import special, stats

    bound, shift = stats.t.isf(level / 2, df) * _taken_errors(df), abs(difference) / error
    return float(np.mean(special.ndtr(shift - bound) + special.ndtr(-bound - shift)))


@lru_cache(maxsize=64)
def _taken_errors(df: int) -> np.ndarray:
    """What the runs may take an error of 1 for, as often; scipy's noncentral t is not a number for some shifts."""
    from scipy import stats

    return np.sqrt(stats.chi2.ppf((np.arange(4000) + .5) / 4000, df) / df)


def detectable_difference(error: float, df: int, level: float = LEVEL) -> float:
    """Give the difference that the test finds four times in five; arguments as of `power`."""
    from scipy import stats
    from scipy.optimize import brentq

    # The shift lies near the bound plus the normal's 0.84; few degrees of freedom put it higher.
    bound = float(stats.t.isf(level / 2, df))
    return error * float(brentq(lambda shift: power(shift, 1., df, level) - POWER, 1e-9, 4 * bound + 4))


def describe_difference(
        test: TTest,
        adjusted: float,
        interval: Dict[str, float],
        tests: int,
        patients: int,
        unit: str,
) -> Dict[str, Any]:
    """Say what a comparison found: better, worse, or that these data cannot tell, and how many patients would.

    Both must say so: the test over folds, which knows how trainings differ, and the interval over patients.

    Args:
        test: Over the folds, of the score that decides.
        adjusted: Its p after `holm`.
        interval: The difference by patient and seed: `value`, `low`, `high`.
        tests: How many comparisons there are.
        patients: How many patients or groups the images are of.
        unit: What they are: 'patients', for example.

    Returns:
        `verdict` ('better', 'worse' or 'cannot tell'), `words`, `detectable` (the difference that these data show four
        times in five), `power` (how often they show one as large as was found) and `patients_needed`, None where none
        can be told.
    """
    found: Dict[str, Any] = {'verdict': 'cannot tell', 'detectable': None, 'power': None, 'patients_needed': None}
    if not test.error:
        return {**found, 'words': 'these data cannot tell: the difference does not vary between the folds'}
    level = LEVEL / tests
    found['detectable'] = detectable_difference(test.error, test.df, level)
    found['power'] = power(test.mean, test.error, test.df, level)
    beyond = interval.get('low', 0.) * interval.get('high', 0.) > 0 and test.mean * interval['value'] > 0
    if adjusted < LEVEL and beyond:
        verdict = 'better' if test.mean > 0 else 'worse'
        return {**found, 'verdict': verdict, 'words': f'{verdict}, by {abs(interval["value"]):.3f}'}
    shown = f'they would show a difference of {found["detectable"]:.3f} four times in five' \
        if found['detectable'] <= 1 else 'they would show no difference that there can be'
    times = (found['detectable'] / max(abs(test.mean), 1e-12)) ** 2  # the variance falls with the number of patients
    if times > _MOST_TIMES:
        words = f'these data cannot tell, nor would {_MOST_TIMES} times as many {unit}; {shown}'
    elif times > 1:
        found['patients_needed'] = int(np.ceil(times * patients))
        words = f'these data cannot tell; about {_rounded(found["patients_needed"])} {unit} would, if the difference ' \
                f'is {test.mean:+.3f}; {shown}'
    else:
        words = f'these data cannot tell: the folds and the {unit} do not agree'
    return {**found, 'words': words}


def _rounded(number: int) -> str:
    """Two digits, which is all that such an estimate has."""
    return f'{float(f"{number:.2g}"):,.0f}'


def compare_models(
        labels: np.ndarray,
        probabilities: np.ndarray,
        baseline: np.ndarray,
        classes: Sequence[str],
        samples: np.ndarray,
        name: str,
) -> Dict[str, Any]:
    """Compare a model with a baseline on the same images: differences by patient, and McNemar's exact test.

    Args:
        labels: (N,).
        probabilities: The model's, (N, num_classes).
        baseline: The baseline's, (N, num_classes).
        classes: Names of the classes.
        samples: What `bootstrap` drew.
        name: Name of the baseline.

    Returns:
        `comparison`, the baseline's scores by its name, and `paired`: differences, model minus baseline, and `mcnemar`,
        which takes images as independent.
    """
    from scipy.stats import binomtest

    right, baseline_right = probabilities.argmax(1) == labels, baseline.argmax(1) == labels
    only_model, only_baseline = int((right & ~baseline_right).sum()), int((~right & baseline_right).sum())

    def measure(weights: Optional[np.ndarray]) -> Scores:
        ours, base = (score(labels, p, classes, weights=weights) for p in (probabilities, baseline))
        names = [k for k in ours if '/' not in k]
        return {**{f'baseline/{k}': base[k] for k in names}, **{f'difference/{k}': ours[k] - base[k] for k in names}}

    found = with_intervals(measure, samples, 'comparison')

    def part(prefix: str) -> Dict[str, Dict[str, Any]]:
        return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}

    differing = only_model + only_baseline
    return {
        'comparison': {name: part('baseline/')},
        'paired': {'with': name, 'differences': part('difference/'), 'mcnemar': {
            'right_model_only': only_model, 'right_baseline_only': only_baseline,
            'p': float(binomtest(only_model, differing).pvalue) if differing else 1.}},
    }
