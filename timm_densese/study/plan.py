"""What a study is to do: its models, its runs, and the settings that it goes on with."""
import argparse
import hashlib
import io
import itertools
import shlex
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple
from urllib.parse import quote_plus

import yaml

from ..data.images import find_images
from ..data.splits import read_split, split_images
from ..data.tables import read_table
from ..errors import OptionError
from ..files import check_new_folder, check_writable, printable, replace_file, sha256
from ..options import parse_argument
from ..subgroups import read_subgroups
from ..thresholds import Goal, check_goal
from ..training import TrainConfig, train

__all__ = ['Run', 'configure', 'parse_model', 'plan_runs', 'prepare', 'read_study_subgroups']

_SETTINGS = 'study.yaml'
# What may differ between the sessions of a study: where and how it runs, not what is trained.
_NOT_COMPARED = {'data_dir', 'output', 'model', 'model_kwargs', 'resume', 'dry_run', 'device', 'workers',
                 'device_modules', 'validation_batch_size'}


@dataclass(frozen=True, eq=False)
class Run:
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
    try:
        given = dict(map(parse_argument, arguments))
    except argparse.ArgumentTypeError as e:
        raise OptionError(f'--models {text!r}: {e}. Put quotes around each model.') from e
    return ' '.join([name, *arguments]), name, given


def configure(models: Sequence[str], recipe: Dict[str, Any]) -> Dict[str, TrainConfig]:
    own = {'resume': '', 'dry_run': False, 'model_kwargs': {}, 'train_split': 'train', 'val_split': 'val'}
    for option, value in own.items():
        if recipe.get(option, value) != value:
            raise OptionError(f'{option} {recipe[option]!r} is no option of a study, which splits the images, gives '
                              f'each of --models its arguments, and goes on by itself.')
    configs: Dict[str, TrainConfig] = {}
    for text in models:
        spelled, name, arguments = parse_model(text)
        if spelled in configs:
            raise OptionError(f'--models names {spelled!r} twice.')
        configs[spelled] = TrainConfig(**{**recipe, 'model': name, 'model_kwargs': arguments})
    if not configs:
        raise OptionError('--models names no model.')
    return configs


def plan_runs(configs: Dict[str, TrainConfig], output: Path, folds: int, seeds: int) -> List[Run]:
    """Every run: seeds outermost, models innermost, so that wherever it is stopped, models have the same runs."""
    plan = []
    for i in range(seeds):
        for fold in range(folds):
            for name, config in configs.items():
                seed = config.seed + i
                folder = output / 'runs' / quote_plus(name, safe='=,()[]') / f'fold{fold}-seed{seed}'
                plan.append(Run(name, replace(
                    config, seed=seed, data_dir=str(output / 'split' / f'fold{fold}'), output=str(folder)),
                    fold, seed, folder))
    return plan


def prepare(
        data: Path,
        output: Path,
        configs: Dict[str, TrainConfig],
        plan: Sequence[Run],
        folds: int,
        goal: Goal,
        subgroups: Optional[Path],
        split: Dict[str, Any],
) -> None:
    """Check everything, split once, and try out each model; say how much there is to do."""
    _check_settings(data, output, next(iter(configs.values())), folds, split)
    if subgroups:
        read_table(subgroups)  # what cannot be read is told before the split
    begins = not (output / 'split').is_dir()
    if begins:
        split_images(src=data, output=output / 'split', folds=folds, **split)
    rows = [row for row in read_split(output / 'split' / 'fold0').rows if not row['error']]
    changed = [] if begins else [row['file'] for row in rows if sha256(data / row['file']) != row['sha256']]
    if changed:
        raise OptionError(f'{output} holds a study with other images: {len(changed)} of {len(rows)} have changed since '
                          f'it began, such as {printable(changed[0])}. Choose another --output, or put them back.')
    classes = sorted({row['label'] for row in rows})
    for fold, part in itertools.product(range(folds), ('train', 'val')):
        absent = sorted(set(classes) - {row['label'] for row in rows if row[f'fold{fold}'] == part})
        if absent:
            raise OptionError(f'{part} of fold {fold} has no images of {", ".join(absent[:5])}, so no model could be '
                              f'trained on it. Give fewer --folds, a larger --val or another --split-seed, and '
                              f'another --output.')
    check_goal(goal, classes, [sum(row['label'] == name for row in rows) for name in classes])
    if subgroups:
        read_study_subgroups(subgroups, data, output, [row['file'] for row in rows])
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
        'data': str(data.resolve()), 'images': _describe_files(data), 'folds': folds,
        'split': {name: str(value) if isinstance(value, Path) else value for name, value in sorted(split.items())
                  if name not in ('copy', 'report')},
        # Their contents, too: another table is another split, other weights another study.
        'files': {name: sha256(Path(value)) for name, value in (
            ('groups', split.get('groups')), ('labels', split.get('labels')),
            ('pretrained_path', config.pretrained_path), ('initial_checkpoint', config.initial_checkpoint))
            if value and Path(value).is_file()},
        'recipe': {name: value for name, value in asdict(config).items() if name not in _NOT_COMPARED}}
    file = output / _SETTINGS
    if not file.exists():
        check_new_folder(output, '--output', OptionError)
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
    return {'data': settings['data'], 'images': settings['images'], 'folds': settings['folds'],
            **{f'SHA-256 of {name}': value for name, value in settings['files'].items()},
            **{f'split {name}': value for name, value in settings['split'].items()},
            **(settings['recipe'] if with_recipe else {})}


def _describe_files(data: Path) -> str:
    """Tell whether the images are those of another time: their number, and a hash of their names."""
    if not data.is_dir():
        raise OptionError(f'{data} is not a folder.')
    names = sorted(printable(path.relative_to(data)) for path in find_images([str(data)]))
    return f'{len(names)}, named {hashlib.sha256(chr(10).join(names).encode()).hexdigest()[:16]}'


def read_study_subgroups(table: Path, data: Path, output: Path, images: Sequence[str]) -> Dict[str, List[str]]:
    patients = {row['file']: row.get('patient', '') for row in read_split(output / 'split' / 'fold0').rows}
    return read_subgroups(table, data, [data / name for name in images], [patients[name] for name in images])
