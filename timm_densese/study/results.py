"""What came out of a study: scores, comparisons, a threshold, subgroups; written and printed."""
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import yaml

from ..data.splits import read_split
from ..errors import TrainingError
from ..files import replace_file
from ..metrics import bootstrap, format_metric, write_metrics
from ..recipes import recorded_images
from ..subgroups import subgroup_scores, warn_of_few
from ..thresholds import Goal, describe_point
from ..training import TrainConfig
from .page import draw_differences, write_study
from .plan import Run, read_study_subgroups
from .pooled import PRIMARY, pool_predictions, score_pool

__all__ = ['report_study', 'write_table']


def report_study(
        data: Path,
        output: Path,
        plan: Sequence[Run],
        folds: int,
        goal: Goal,
        subgroups: Optional[Path],
        resamples: int,
) -> Dict[str, Any]:
    names = list(dict.fromkeys(run.name for run in plan))
    failed = {run.title: run.error for run in plan if run.error}
    whole = _whole(plan)
    if not whole:
        raise TrainingError(f'No model has a whole set of {folds} folds. {next(iter(failed))} failed: '
                            f'{next(iter(failed.values()))}')
    pool = pool_predictions({(run.name, run.seed, run.fold): run.folder / 'predictions.csv' for run in whole})
    facts = {run: json.loads((run.folder / 'run.json').read_text(encoding='utf-8')) for run in whole}
    samples = bootstrap(pool.groups, resamples)
    grouped = len(set(pool.groups)) < len(pool.groups)
    with_patients = any(row['patient'] for row in read_split(output / 'split' / 'fold0').rows)
    unit = 'patients or groups' if with_patients else 'pictures' if grouped else 'images'
    train_size, test_size = (float(np.mean([fact[split] for fact in facts.values()])) for split in ('train', 'test'))
    found = score_pool(pool, names[0], goal, samples, unit, train_size, test_size)
    best, thresholds = found['best'], found['thresholds']
    parts = subgroup_scores(pool.labels, pool.probabilities[best], pool.classes, pool.groups,
                            read_study_subgroups(subgroups, data, output, pool.images), samples) if subgroups else {}

    warnings = []
    if failed:
        title, error = next(iter(failed.items()))
        warnings.append(f'{len(failed)} of {len(plan)} runs failed, the first {title}: {error}')
    missing = [name for name in names if name not in pool.probabilities]
    if missing:
        warnings.append(f'Left out, for no seed has all folds: {", ".join(missing)}.')
    if not with_patients:
        warnings.append('No patients are known: each picture counts as one. Where a patient has several, they may lie '
                        'on both sides of a fold, and intervals are too narrow. Give --groups or --group-regex.')
    earlier = _trained_on_before(plan)
    if earlier:
        warnings.append(f'The weights that the training started from were trained on {", ".join(earlier)}: images of '
                        f'this study that are among those are tested by models that saw them.')
    warnings += warn_of_few(parts, unit)
    results: Dict[str, Any] = {
        'dataset': {'name': data.resolve().name, 'split': f'out of {folds} folds', 'images': len(pool.labels),
                    'groups': len(set(pool.groups)) if grouped else None},
        'command': 'timm-densese study',
        'interval': f'95% interval, percentiles of {len(samples)} bootstrap samples of {unit}' if len(samples) else '',
        'conditions': f'Each image was scored by models that never saw {"its patient or " if with_patients else ""}a '
                      f'copy of it. {_describe_recipe(plan[0].config)}',
        'model': best, 'baseline': names[0], 'primary': PRIMARY, 'classes': pool.classes,
        'folds': folds, 'seeds': sorted({run.seed for run in plan}), 'unit': unit,
        'temperature': None, 'temperature_left_out': 'a study fits none', 'warnings': warnings, 'failed': failed,
        'metrics': found['models'][best]['metrics'],
        'comparison': {name: model['metrics'] for name, model in found['models'].items() if name != best},
        'models': found['models'], 'threshold': found['threshold'], 'subgroups': parts,
        # By the hash of the weights, so that each checkpoint finds the threshold that was chosen with it.
        'runs': {fact['weights']: {
            'checkpoint': (run.folder / 'model_best.pth.tar').relative_to(output).as_posix(),
            **({'threshold': thresholds[run.seed, run.fold]} if thresholds else {})}
            for run, fact in facts.items() if run.name == best}}
    _write(output, plan, results)
    _print(results, output)
    return results


def _whole(plan: Sequence[Run]) -> List[Run]:
    """The runs of the models and seeds whose folds are all done."""
    lacking = {(run.name, run.seed) for run in plan if not run.is_done}
    return [run for run in plan if (run.name, run.seed) not in lacking]


def _trained_on_before(plan: Sequence[Run]) -> List[str]:
    """Folders of images that reached the weights before the study."""
    files = [run.folder / 'args.yaml' for run in plan if run.is_done]
    recipes = [yaml.safe_load(file.read_text(encoding='utf-8')) for file in files if file.is_file()]
    return sorted({str(folder) for recipe in recipes for folder, _ in recorded_images(recipe)[1:]})


def _describe_recipe(config: TrainConfig) -> str:
    start = ('the weights of ' + Path(config.initial_checkpoint or config.pretrained_path).name
             if config.initial_checkpoint or config.pretrained_path else
             'pretrained weights' if config.pretrained else 'random weights')
    size = f' at {config.img_size} pixels' if config.img_size else ''
    return f'Trained from {start}{size}, for up to {config.epochs} epochs.'


def _write(output: Path, plan: Sequence[Run], results: Dict[str, Any]) -> None:
    lines: List[str] = []
    for run in plan:
        if run.is_done:
            header, *rows = (run.folder / 'predictions.csv').read_text(
                encoding='utf-8', errors='surrogateescape').splitlines(keepends=True)
            lines += rows if lines else [header, *rows]
    replace_file(output / 'predictions.csv', ''.join(lines))
    write_metrics(output / 'metrics.json', results)
    scores = io.StringIO()
    writer = csv.writer(scores, lineterminator='\n')
    writer.writerow(['model', 'score', 'value', 'low', 'high', 'difference', 'difference_low', 'difference_high'])
    for name, model in results['models'].items():
        for metric, value in model['metrics'].items():
            difference = model.get('differences', {}).get(metric, {})
            writer.writerow([name, metric, *(found.get(key, '') for found in (value, difference)
                                             for key in ('value', 'low', 'high'))])
    replace_file(output / 'scores.csv', scores.getvalue())
    replace_file(output / 'table.md', write_table(results))
    figure = draw_differences(results)
    write_study(output / 'report.html', results, figure)


def write_table(results: Dict[str, Any]) -> str:
    """Make the table of a study, in Markdown.

    Args:
        results: What metrics.json holds.
    """
    lines = [f'| model | balanced accuracy | AUROC | difference from {results["baseline"]} | in words |',
             '|---|---|---|---|---|']
    for name, model in results['models'].items():
        difference = format_metric(model['differences'][PRIMARY]) if 'differences' in model else ''
        lines.append(f'| {name} | {format_metric(model["metrics"][PRIMARY])} | '
                     f'{format_metric(model["metrics"].get("auroc"))} | {difference} | '
                     f'{model.get("test", {}).get("words", "")} |')
    return '\n'.join([*lines, ''])


def _print(results: Dict[str, Any], output: Path) -> None:
    for warning in results['warnings']:
        print(f'WARNING: {warning}')
    for name, model in results['models'].items():
        words = model['test']['words'] if 'test' in model else (
            'the baseline' if name == results['baseline'] else 'not compared')
        print(f'{name}: balanced accuracy {format_metric(model["metrics"][PRIMARY])}; {words}')
    if results['threshold']:
        print(f'{results["model"]} {describe_point(results["threshold"])}')
    for title, error in results['failed'].items():
        print(f'failed: {title}: {error}', file=sys.stderr)
    print(f'{output / "report.html"} shows it; {output / "predictions.csv"} has every prediction.')
