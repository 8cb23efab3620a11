"""Several models, folds and seeds on one data set: trained under one recipe, tested in pairs, by patient.

    OUTPUT/split/           the folds and split.csv, of `timm-densese data split`
    OUTPUT/study.yaml       what was asked for, so that the same command goes on
    OUTPUT/runs/MODEL/FOLD/ model_best.pth.tar, predictions.csv, log.txt, and run.json, which is there when it is done
    OUTPUT/predictions.csv  every run's, so that any other score can be computed later
    OUTPUT/report.html, metrics.json, scores.csv, table.md
"""
import ast
import csv
import gc
import io
import json
import os
import re
import shlex
import sys
import time
import traceback
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout  # comes with huggingface_hub
from torch.distributed.rendezvous import rendezvous

from .checkpoints import load_model
from .data.splits import read_split, split_images
from .errors import OptionError, TrainingError, TrainingFinishedError, UserError
from .evaluate import run_split
from .files import check_new_folder, check_writable, replace_file
from .metrics import bootstrap, format_metric, score, softmax, write_metrics
from .pooled import PRIMARY, PROBABILITY, pool_predictions, score_pool
from .study_page import draw_differences, write_study
from .subgroups import read_subgroups, subgroup_scores
from .thresholds import Goal, check_goal, wants_threshold
from .training import TrainConfig, train

__all__ = ['parse_model', 'study', 'write_table']

_SETTINGS, _NO_GOAL = 'study.yaml', Goal()
# What may differ between the sessions of a study: where and how it runs, not what is trained.
_NOT_COMPARED = {'data_dir', 'output', 'model', 'model_kwargs', 'resume', 'dry_run', 'device', 'workers',
                 'device_modules', 'validation_batch_size'}
_OF_TORCHRUN = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')


@dataclass(frozen=True, eq=False)
class _Run:
    """One training: a model, a fold and a seed."""
    name: str
    config: TrainConfig
    fold: int
    seed: int
    folder: Path

    @property
    def title(self) -> str:
        return f'{self.name}, fold {self.fold}, seed {self.seed}'

    @property
    def is_done(self) -> bool:
        return (self.folder / 'run.json').exists()

    @property
    def error(self) -> str:
        """Why it failed, the last line of it; empty where it did not."""
        file = self.folder / 'error.txt'
        return file.read_text(encoding='utf-8').strip().splitlines()[-1] if file.exists() else ''


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
    if not device and 'LOCAL_RANK' in os.environ and torch.cuda.is_available():
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
    configs = _configure(models, {**(recipe or {}), 'device': device})
    wants_threshold(goal)
    plan = _plan(configs, output, folds, seeds)
    rank = _in_first_process(lambda: _prepare(data, output, configs, plan, folds, goal, subgroups, split))
    try:
        _run_all(plan, wait=rank == 0)
        if rank:
            return {}
        return _report(data, output, plan, folds, goal, subgroups, resamples)
    except KeyboardInterrupt:
        done = sum(run.is_done for run in plan)
        raise KeyboardInterrupt(f'{done} of {len(plan)} runs are done and kept: the same command goes on.') from None


# Before the first run.


def parse_model(text: str) -> Tuple[str, str, Dict[str, Any]]:
    """Read a model and its arguments.

    Returns:
        The text in one spelling, the name, and the arguments.

    Raises:
        OptionError: It is not a name and NAME=VALUE after it.

    Example:
        >>> parse_model("se_densenet121  se_placement=stage")
        ('se_densenet121 se_placement=stage', 'se_densenet121', {'se_placement': 'stage'})
    """
    try:
        name, *arguments = shlex.split(text)
    except ValueError as e:
        raise OptionError(f'--models {text!r}: give a name, and arguments as NAME=VALUE after it ({e}).') from e
    given: Dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition('=')
        if not (key.isidentifier() and equals):
            raise OptionError(f'--models {text!r}: {argument!r} is not NAME=VALUE. Put quotes around each model.')
        try:
            given[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            given[key] = value
    return ' '.join([name, *arguments]), name, given


def _configure(models: Sequence[str], recipe: Dict[str, Any]) -> Dict[str, TrainConfig]:
    for option in ('resume', 'dry_run'):
        if recipe.get(option):
            raise OptionError(f'--{option.replace("_", "-")} is no option of a study, which goes on by itself.')
    configs: Dict[str, TrainConfig] = {}
    for text in models:
        spelled, name, arguments = parse_model(text)
        if spelled in configs:
            raise OptionError(f'--models names {spelled!r} twice.')
        configs[spelled] = TrainConfig(**{
            **recipe, 'model': name, 'model_kwargs': arguments, 'train_split': 'train', 'val_split': 'val'})
    if not configs:
        raise OptionError('--models names no model.')
    return configs


def _plan(configs: Dict[str, TrainConfig], output: Path, folds: int, seeds: int) -> List[_Run]:
    """Every run: seeds outermost, models innermost, so that wherever it is stopped, models have the same runs."""
    plan = []
    for i in range(seeds):
        for fold in range(folds):
            for name, config in configs.items():
                seed = config.seed + i
                folder = output / 'runs' / re.sub(r'[^\w.=-]+', '_', name) / f'fold{fold}-seed{seed}'
                plan.append(_Run(name, replace(
                    config, seed=seed, data_dir=str(output / 'split' / f'fold{fold}'), output=str(folder)),
                    fold, seed, folder))
    return plan


def _in_first_process(prepare: Callable[[], None]) -> int:
    """Prepare in the first of torchrun's processes while the others wait; where it fails, all stop.

    After it, torch and timm see one process: each run is a training of its own.

    Returns:
        This process's rank.
    """
    if int(os.environ.get('WORLD_SIZE', 1)) == 1:
        prepare()
        return 0
    store, rank, _ = next(rendezvous('env://'))
    for name in _OF_TORCHRUN:
        os.environ.pop(name, None)
    key = f'study-{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}'
    if rank:
        store.wait([key], timedelta(days=1))
        if problem := store.get(key).decode():
            raise UserError(f'process {rank} stops, for the first one did: {problem}')
        return rank
    problem = 'it was stopped'
    try:
        prepare()
        problem = ''
    except UserError as e:
        problem = str(e)
        raise
    finally:
        store.set(key, problem)
    return 0


def _prepare(
        data: Path,
        output: Path,
        configs: Dict[str, TrainConfig],
        plan: Sequence[_Run],
        folds: int,
        goal: Goal,
        subgroups: Optional[Path],
        split: Dict[str, Any],
) -> None:
    """Check everything, split once, and try out each model; say how much there is to do."""
    _check_settings(data, output, next(iter(configs.values())), folds, split)
    if not (output / 'split').is_dir():
        split_images(src=data, output=output / 'split', folds=folds, **split)
    rows = [row for row in read_split(output / 'split' / 'fold0').rows if not row['error']]
    classes = sorted({row['label'] for row in rows})
    check_goal(goal, classes, [sum(row['label'] == name for row in rows) for name in classes])
    if subgroups:
        _read_subgroups(subgroups, data, output, [row['file'] for row in rows])
    for run in plan:
        (run.folder / 'error.txt').unlink(missing_ok=True)  # what failed is tried again
    for name in configs:
        runs = [run for run in plan if run.name == name]
        if not any(run.folder.exists() for run in runs):
            with redirect_stdout(io.StringIO()):  # its summary goes into the log of each run
                train(replace(runs[0].config, dry_run=True))
    left = sum(not run.is_done for run in plan)
    seeds = len({run.seed for run in plan})
    print(f'{len(plan)} runs: {len(configs)} models, {folds} folds, {seeds} {"seed" if seeds == 1 else "seeds"}; '
          f'{left} are to be done.', flush=True)


def _check_settings(data: Path, output: Path, config: TrainConfig, folds: int, split: Dict[str, Any]) -> None:
    """Refuse a folder of something else, or of a study with other settings; write down this one's."""
    settings = {
        'data': str(data.resolve()), 'folds': folds,
        'split': {name: str(value) if isinstance(value, Path) else value for name, value in sorted(split.items())
                  if name not in ('copy', 'report')},
        'recipe': {name: value for name, value in asdict(config).items() if name not in _NOT_COMPARED}}
    file = output / _SETTINGS
    if not file.exists():
        check_new_folder(output, '--output', OptionError)
        if not data.is_dir():
            raise OptionError(f'{data} is not a folder.')
        if output.resolve().is_relative_to(data.resolve()):
            raise OptionError(f'--output {output} lies inside {data}, where nothing is to be written.')
        replace_file(file, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        return
    check_writable(output, '--output')
    before = yaml.safe_load(file.read_text(encoding='utf-8'))
    if not (output / 'split').is_dir():  # it stopped before there was anything to keep
        replace_file(file, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        return
    old, new = (_flat(found, with_recipe=(output / 'runs').exists()) for found in (before, settings))
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if differing:
        name = differing[0]
        raise OptionError(f'{output} holds a study with other settings: {name} was {old.get(name)}, and is '
                          f'{new.get(name)}. Choose another --output, or give what was given.')
    replace_file(file, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _flat(settings: Dict[str, Any], with_recipe: bool) -> Dict[str, Any]:
    """Settings by names that can be shown; before the first run, the recipe may still change."""
    return {'data': settings['data'], 'folds': settings['folds'],
            **{f'split {name}': value for name, value in settings['split'].items()},
            **(settings['recipe'] if with_recipe else {})}


def _read_subgroups(table: Path, data: Path, output: Path, images: Sequence[str]) -> Dict[str, List[str]]:
    patients = {row['file']: row.get('patient', '') for row in read_split(output / 'split' / 'fold0').rows}
    return read_subgroups(table, data, [data / name for name in images], [patients[name] for name in images])


# The runs.


def _run_all(plan: Sequence[_Run], wait: bool) -> None:
    """Do every run that no other process does; where one of those dies, its run is taken over."""
    durations: List[float] = []
    while left := [run for run in plan if not run.is_done and not run.error]:
        did = False
        for run in left:
            run.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(run.folder / '.study.lock', timeout=0)  # the system frees it when the process dies
            try:
                lock.acquire()
            except Timeout:
                continue
            with lock:
                if not run.is_done and not run.error:
                    did = True
                    started = time.monotonic()
                    _do(run)
                    durations.append(time.monotonic() - started)
                    _tell(run, plan, durations)
        if not did:
            if not wait:
                return
            time.sleep(.2)


def _tell(run: _Run, plan: Sequence[_Run], durations: Sequence[float]) -> None:
    done = sum(other.is_done for other in plan)
    left = len(plan) - done - sum(bool(other.error) for other in plan)
    what = f'FAILED ({run.error})' if run.error else (
        f'{PRIMARY.replace("_", " ")} {json.loads((run.folder / "run.json").read_text())[PRIMARY]:.3f}')
    remaining = f'; {left} left, about {_minutes(left * float(np.mean(durations)))} in one process' if left else ''
    print(f'[{done}/{len(plan)}] {run.title}: {what}, in {_minutes(durations[-1])}{remaining}', flush=True)


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'


def _do(run: _Run) -> None:
    """Train a model, or go on with it, and write what it says of its validation and test images."""
    try:
        with open(run.folder / 'log.txt', 'a', encoding='utf-8') as log, redirect_stdout(log):
            last = run.folder / 'last.pth.tar'
            with suppress(TrainingFinishedError):  # it was stopped between its last epoch and its predictions
                train(replace(run.config, resume=str(last) if last.exists() else ''))
            _write_predictions(run)
    except Exception as e:  # whatever a training meets: the other runs stand
        replace_file(run.folder / 'error.txt',
                     f'{traceback.format_exc()}\n{type(e).__name__}: {" ".join(str(e).split())}\n')
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _write_predictions(run: _Run) -> None:
    best = run.folder / 'model_best.pth.tar'
    loaded = load_model(str(best), run.config.device)
    classes, data = loaded.class_names, Path(run.config.data_dir)
    table = read_split(data)
    known = {row['stored_sha256']: row for row in table.rows}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['image', 'label', 'group', 'fold', 'seed', 'model', 'split',
                     *(PROBABILITY + name for name in classes)])
    result: Dict[str, Any] = {'weights': loaded.hash_weights()}
    for split in ('val', 'test'):
        scored = run_split(loaded, data, split, classes, run.config.validation_batch_size or 32, run.config.workers)
        probabilities = softmax(scored.logits)
        result[split] = len(scored.labels)
        if split == 'test':
            result[PRIMARY] = float(score(scored.labels, probabilities, classes)[PRIMARY][0])
        for digest, label, p in zip(scored.hashes, scored.labels, probabilities, strict=True):
            row = known[digest]
            writer.writerow([row['file'], classes[label], row['group'], run.fold, run.seed, run.name, split,
                             *map(repr, map(float, p))])
    result['train'] = len([row for row in table.rows if row[table.column] == 'train'])
    replace_file(run.folder / 'predictions.csv', text.getvalue())
    replace_file(run.folder / 'run.json', json.dumps(result, indent=1) + '\n')
    # The optimizer's state, which only resuming needs, is most of what a run leaves.
    saved = torch.load(best, map_location='cpu', weights_only=False)  # this run wrote it
    saved.pop('optimizer', None)
    torch.save(saved, best.with_name('tmp.pth.tar'))
    os.replace(best.with_name('tmp.pth.tar'), best)
    for file in (run.folder / 'last.pth.tar', *run.folder.glob('checkpoint-*.pth.tar')):
        file.unlink(missing_ok=True)


# What came out of it.


def _report(
        data: Path,
        output: Path,
        plan: Sequence[_Run],
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
    unit = 'patients or groups' if grouped else 'images'
    train_size, test_size = (float(np.mean([fact[split] for fact in facts.values()])) for split in ('train', 'test'))
    found = score_pool(pool, names[0], goal, samples, unit, train_size, test_size)
    best, thresholds = found['best'], found['thresholds']
    parts = subgroup_scores(pool.labels, pool.probabilities[best], pool.classes, pool.groups,
                            _read_subgroups(subgroups, data, output, pool.images), samples) if subgroups else {}

    warnings = []
    if failed:
        title, error = next(iter(failed.items()))
        warnings.append(f'{len(failed)} of {len(plan)} runs failed, the first {title}: {error}')
    missing = [name for name in names if name not in pool.probabilities]
    if missing:
        warnings.append(f'Left out, for no seed has all folds: {", ".join(missing)}.')
    if not grouped:
        warnings.append('Each image counts as a patient of its own: where one has several, intervals are too narrow. '
                        'Give --groups or --group-regex.')
    warnings += [f'{column} {value}: {part["groups"]} {unit} are few, and its scores tell little.'
                 for column, values in parts.items() for value, part in values.items() if part['few']]
    results: Dict[str, Any] = {
        'dataset': {'name': data.resolve().name, 'split': f'out of {folds} folds', 'images': len(pool.labels),
                    'groups': len(set(pool.groups)) if grouped else None},
        'command': 'timm-densese study',
        'interval': f'95% interval, percentiles of {len(samples)} bootstrap samples of {unit}' if len(samples) else '',
        'conditions': f'Each image was scored by models that never saw its patient or a copy of it. '
                      f'{_describe_recipe(plan[0].config)}',
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


def _whole(plan: Sequence[_Run]) -> List[_Run]:
    """The runs of the models and seeds whose folds are all done."""
    lacking = {(run.name, run.seed) for run in plan if not run.is_done}
    return [run for run in plan if (run.name, run.seed) not in lacking]


def _describe_recipe(config: TrainConfig) -> str:
    start = ('the weights of ' + Path(config.initial_checkpoint or config.pretrained_path).name
             if config.initial_checkpoint or config.pretrained_path else
             'pretrained weights' if config.pretrained else 'random weights')
    size = f' at {config.img_size} pixels' if config.img_size else ''
    return f'Trained from {start}{size}, for up to {config.epochs} epochs.'


def _write(output: Path, plan: Sequence[_Run], results: Dict[str, Any]) -> None:
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
    if results['threshold'] and 'metrics' in results['threshold']:
        point = results['threshold']
        print(f'{results["model"]} at its threshold {point["where"]} for {point["positive"]}: ' + ', '.join(
            f'{name.replace("_", " ")} {format_metric(value)}' for name, value in point['metrics'].items()))
    for title, error in results['failed'].items():
        print(f'failed: {title}: {error}', file=sys.stderr)
    print(f'{output / "report.html"} shows it; {output / "predictions.csv"} has every prediction.')
