"""The study itself: what `timm-densese study` calls."""
import os
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import torch

from ..thresholds import Goal, wants_threshold
from .plan import configure, plan_runs, prepare
from .results import report_study
from .runs import do_runs, in_first_process

__all__ = ['study']

_NO_GOAL = Goal()


def study(
        data: Path,
        models: Sequence[str],
        output: Path,
        recipe: Optional[Dict[str, Any]] = None,
        folds: int = 5,
        seeds: int = 1,
        goal: Goal = _NO_GOAL,
        subgroups: Optional[Path] = None,
        resamples: int = 1000,
        **split: Any,
) -> Dict[str, Any]:
    """Compare models by cross-validation: train each on every fold and seed, and test them in pairs, by patient.

    The same call goes on after an interruption, and adds models and seeds. Under torchrun the runs are dealt out, one
    process each.

    Args:
        data: Folder of class folders.
        models: What to train, the baseline first: a name, and arguments as NAME=VALUE after it.
        output: Folder of the study: new, empty, or that of the same study.
        recipe: Options of `timm_densese.training.TrainConfig`, for all models.
        folds: Parts that each image is tested in once.
        seeds: Trainings of each fold, from the recipe's seed on.
        goal: What a threshold of the best model is to attain.
        subgroups: Table, see `timm_densese.subgroups.read_subgroups`.
        resamples: Samples of the bootstrap.
        **split: Other options of `timm_densese.data.splits.split_images`: val, seed, groups, group_regex, labels, copy,
            report.

    Returns:
        What metrics.json holds.

    Raises:
        OptionError: An option, a model or its arguments cannot be used, or another study is in `output`.
        SplitError: The images cannot be split.
        TrainingError: No model has a whole set of runs.
    """
    import matplotlib  # noqa: F401  they are missed before there is work to lose
    import sklearn.metrics  # noqa: F401

    data, output = Path(data), Path(output)
    device = str((recipe or {}).get('device') or '')
    if device in ('', 'cuda') and 'LOCAL_RANK' in os.environ and torch.cuda.is_available():
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
    wants_threshold(goal)  # what needs no images is checked before they are split
    configs = configure(models, {**(recipe or {}), 'device': device})
    plan = plan_runs(configs, output, folds, seeds)
    rank = in_first_process(lambda: prepare(data, output, configs, plan, folds, goal, subgroups, split))
    try:
        do_runs(plan, wait=rank == 0)
        if rank:
            return {}
        return report_study(data, output, plan, folds, goal, subgroups, resamples)
    except KeyboardInterrupt:
        done = sum(run.is_done for run in plan)
        raise KeyboardInterrupt(f'{done} of {len(plan)} runs are done and kept: the same command goes on.') from None
