"""Out-of-fold predictions of several models, pooled: scores, comparisons by patient, a threshold for the best."""
import csv
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from ..comparisons import corrected_t_test, describe_difference, holm, mean_scores, paired_differences
from ..errors import MetricsError
from ..metrics import Scores, with_intervals
from ..thresholds import (
    FEWEST,
    Goal,
    Thresholds,
    call,
    check_goal,
    choose_thresholds,
    describe_thresholds,
    operating_point,
)

__all__ = ['PRIMARY', 'Pool', 'compare', 'pool_predictions', 'score_pool']

PRIMARY = 'balanced_accuracy'  # what verdicts are about: chosen before, so that none is picked for its result
PROBABILITY = 'probability '  # and the class: columns of predictions.csv


class Pool(NamedTuple):
    """Out-of-fold predictions: each image by models that never saw its patient.

    Attributes:
        classes: Names of the classes.
        images: Files of the source, (N,).
        labels: (N,).
        groups: Number of each image's patient or group, (N,).
        folds: Fold that tests each image, (N,).
        seeds: Seeds of each model.
        probabilities: Of each model, (seeds, N, num_classes).
        validation: Labels (V,) and probabilities (V, num_classes) of the validation images, by model, seed and fold.
    """
    classes: List[str]
    images: List[str]
    labels: np.ndarray
    groups: np.ndarray
    folds: np.ndarray
    seeds: Dict[str, List[int]]
    probabilities: Dict[str, np.ndarray]
    validation: Dict[Tuple[str, int, int], Tuple[np.ndarray, np.ndarray]]


def pool_predictions(files: Dict[Tuple[str, int, int], Path]) -> Pool:
    """Put the predictions of runs together.

    Args:
        files: A run's predictions.csv by model, seed and fold: of each model and seed, every fold.

    Raises:
        MetricsError: The runs did not predict the same images.
    """
    places: Dict[str, int] = {}
    facts: List[Tuple[str, int, int]] = []
    values: Dict[Tuple[str, int], Dict[int, List[float]]] = {}
    validation: Dict[Tuple[str, int, int], List[Tuple[str, List[float]]]] = {}
    classes: List[str] = []
    for (name, seed, fold), file in files.items():
        with open(file, encoding='utf-8', errors='surrogateescape', newline='') as table:
            for row in csv.DictReader(table):
                columns = [key for key in row if key.startswith(PROBABILITY)]
                classes = [key.removeprefix(PROBABILITY) for key in columns]
                p = [float(row[key]) for key in columns]
                if row['split'] == 'val':
                    validation.setdefault((name, seed, fold), []).append((row['label'], p))
                    continue
                place = places.setdefault(row['image'], len(places))
                if place == len(facts):
                    facts.append((row['label'], int(row['group']), fold))
                values.setdefault((name, seed), {})[place] = p
    for (name, seed), found in values.items():
        if len(found) < len(places):
            raise MetricsError(f'{name} with seed {seed} predicted {len(found)} of {len(places)} images: some could '
                               f'not be read in its runs. Delete its folders in runs/ and give the same command.')
    labels, groups, folds = zip(*facts, strict=True)
    seeds: Dict[str, List[int]] = {}
    for name, seed in values:
        seeds.setdefault(name, []).append(seed)
    return Pool(
        classes, list(places), np.array([classes.index(label) for label in labels]),
        np.unique(np.array(groups), return_inverse=True)[1], np.array(folds), seeds,
        {name: np.array([[values[name, seed][i] for i in range(len(places))] for seed in of])
         for name, of in seeds.items()},
        {run: (np.array([classes.index(label) for label, _ in rows]), np.array([p for _, p in rows]))
         for run, rows in validation.items()})


def score_pool(
        pool: Pool,
        baseline: str,
        goal: Goal,
        samples: np.ndarray,
        unit: str,
        train: float,
        test: float,
) -> Dict[str, Any]:
    """Score each model, compare it with the first, and choose thresholds for the best.

    Args:
        pool: Predictions.
        baseline: The model that the others are compared with.
        goal: What the thresholds are to attain.
        samples: What `timm_densese.metrics.bootstrap` drew of the pool's groups.
        unit: What these are: 'patients', for example.
        train: Images that a run was trained on.
        test: Images that it was tested on.

    Returns:
        `models` (by name: `seeds`, `metrics`, `per_class`, and of those that are compared `differences` and `test`),
        `best` (name of the model with the highest balanced accuracy), `threshold` (what its thresholds attain; None
        where none is asked for), `thresholds` (those of its runs, by seed and fold).
    """
    models = {name: _score_model(pool, name, samples) for name in pool.probabilities}
    compare(pool, models, baseline, samples, unit, train, test)
    best = max(models, key=lambda name: models[name]['metrics'][PRIMARY]['value'])
    threshold, thresholds = _choose(pool, best, goal, samples)
    return {'models': models, 'best': best, 'threshold': threshold, 'thresholds': thresholds}


def _score_model(pool: Pool, name: str, samples: np.ndarray) -> Dict[str, Any]:
    def measure(weights: Optional[np.ndarray]) -> Scores:
        return mean_scores(pool.labels, pool.probabilities[name], pool.classes, weights)

    scores = with_intervals(measure, samples, name)
    return {'seeds': pool.seeds[name], 'metrics': {k: v for k, v in scores.items() if '/' not in k},
            'per_class': {label: {k.split('/')[0]: v for k, v in scores.items() if k.endswith(f'/{label}')}
                          for label in pool.classes}}


def compare(
        pool: Pool,
        models: Dict[str, Dict[str, Any]],
        baseline: str,
        samples: np.ndarray,
        unit: str,
        train: float,
        test: float,
) -> None:
    """Compare each model with the baseline, on the seeds that both have; arguments as of `score_pool`.

    Args:
        models: Results by name, which get `differences` and `test`.
    """
    tests = {}
    for name, model in models.items():
        shared = [seed for seed in pool.seeds[name] if seed in pool.seeds.get(baseline, ())]
        if name == baseline or not shared:
            continue
        ours, theirs = (pool.probabilities[which][[pool.seeds[which].index(seed) for seed in shared]]
                        for which in (name, baseline))
        model['differences'] = paired_differences(pool.labels, ours, theirs, pool.classes, samples)
        tests[name] = corrected_t_test(_by_fold(pool, ours) - _by_fold(pool, theirs), train, test)
    adjusted = holm([found.p for found in tests.values()])
    for (name, found), p in zip(tests.items(), adjusted, strict=True):
        models[name]['test'] = {**found._asdict(), 'p_holm': p, **describe_difference(
            found, p, models[name]['differences'][PRIMARY], len(tests), len(set(pool.groups)), unit)}


def _by_fold(pool: Pool, probabilities: np.ndarray) -> np.ndarray:
    """The deciding score of each fold, the mean over its seeds: these share their test images, and are no test more."""
    return np.array([mean_scores(pool.labels[mine], probabilities[:, mine], pool.classes)[PRIMARY][0]
                     for mine in (pool.folds == fold for fold in np.unique(pool.folds))])


def _choose(
        pool: Pool,
        best: str,
        goal: Goal,
        samples: np.ndarray,
) -> Tuple[Optional[Dict[str, Any]], Dict[Tuple[int, int], Dict[str, Any]]]:
    positive = check_goal(goal, pool.classes, np.bincount(pool.labels, minlength=len(pool.classes)).tolist())
    if positive is None:
        return None, {}
    column = pool.classes.index(positive)
    called = np.zeros(pool.probabilities[best].shape[:2], dtype=int)
    chosen: Dict[Tuple[int, int], Thresholds] = {}
    rests_on: List[Tuple[int, int]] = []
    for i, seed in enumerate(pool.seeds[best]):
        for fold in np.unique(pool.folds).tolist():
            labels, probabilities = pool.validation.get((best, seed, fold), (np.empty(0), np.empty((0, 2))))
            found, said = choose_thresholds(labels, probabilities, pool.classes, positive, goal)
            if found is None:
                return {'left_out': f'in fold {fold} with seed {seed}, {said}'}, {}
            mine = pool.folds == fold
            called[i, mine] = call(pool.probabilities[best][i, mine, column], found)
            chosen[seed, fold] = found
            rests_on.append((int((labels == column).sum()), int((labels != column).sum())))
    mine, others = map(min, zip(*rests_on, strict=True))
    said = f'chosen in each run on {mine} or more validation images of {positive} and {others} or more others'
    return {
        **goal._asdict(), 'positive': positive, 'where': describe_thresholds(list(chosen.values())),
        'rests_on': said + (', which are few' if min(mine, others) < FEWEST else ''),
        'low': float(np.median([t.low for t in chosen.values()])),
        'high': float(np.median([t.high for t in chosen.values()])),
        'metrics': operating_point(pool.labels == column, called, samples, goal.prevalence),
    }, {run: found._asdict() for run, found in chosen.items()}
