"""The commands and their options: argument parsing only, every command is one call into another module."""
import argparse
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from . import __version__, options
from .errors import OptionError

__all__ = ['create_parser']

_COUNT = options.Number(int, least=1)
_NOT_NEGATIVE = options.Number(int, least=0)
_SHARE = options.Number(float, least=0, below=1)
_PART = options.Number(float, above=0, most=1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise OptionError(f'{message} (see {self.prog} --help)')


class _KeywordArguments(argparse.Action):
    """NAME=VALUE ..., as timm's ParseKwargs, which raises on a value that is neither Python's nor text."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Optional[str] = None) -> None:
        try:
            setattr(namespace, self.dest, dict(map(options.parse_argument, values)))
        except argparse.ArgumentTypeError as e:
            raise argparse.ArgumentError(self, str(e)) from e


def create_parser() -> argparse.ArgumentParser:
    """Create the parser of all commands."""
    parser = _Parser(prog='timm-densese', description='SE-DenseNets for timm.')
    parser.add_argument('--version', action='version', version=f'timm-densese {__version__}')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    _add_models(commands)
    _add_demo(commands)
    _add_data(commands)
    _add_run(commands)
    _add_evaluate(commands)
    _add_explain(commands)
    _add_predict(commands)
    _add_serve(commands)
    _add_publish(commands)
    _add_card(commands)
    _add_train(commands)
    _add_study(commands)
    return parser


# Each command imports what it runs when it runs, so that none needs another's extras.


def _add_output(parser: Any, old: str, metavar: str = 'DIR', **kwargs: Any) -> None:
    """Add --output; the spelling that 0.1.0 had is still understood, and not shown."""
    parser.add_argument('--output', old, type=Path, metavar=metavar, **kwargs).option_strings = ['--output']


def _add_models(commands: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from .models.stats import models_table
        print(models_table())

    parser = commands.add_parser('models', help='print the table of models: parameters, GMACs, where attention sits')
    parser.set_defaults(run=run)


def _add_demo(commands: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from .demo import run_demo
        run_demo(data=args.data, output=args.output)

    parser = commands.add_parser('demo', help='fine-tune se_densenet121 for a few minutes, reload it, predict an image')
    parser.add_argument('--data', type=Path, help='folder with a folder of images a class (default: a generated set)')
    parser.add_argument('--output', type=Path, default=Path('output/demo'), help='folder to write to (%(default)s)')
    parser.set_defaults(run=run)


def _add_data(commands: Any) -> None:
    def run_msld(args: argparse.Namespace) -> None:
        from .data.msld import download_msld
        download_msld(args.output, **({'base_url': args.base_url} if args.base_url else {}))

    def run_split(args: argparse.Namespace) -> None:
        from .data.splits import split_images
        split_images(
            src=args.src, output=args.output, val=args.val, test=args.test, seed=args.seed, folds=args.folds,
            groups=args.groups, group_regex=args.group_regex, report=args.report,
            labels=args.labels, keep_test=args.keep_test, copy=args.copy)

    parser = commands.add_parser('data', help='get and split image folders')
    actions = parser.add_subparsers(required=True, metavar='ACTION')

    msld = actions.add_parser('msld', help='download the monkeypox images (research only, never for diagnosis)')
    _add_output(msld, '--out', required=True, help='folder to write to')
    msld.add_argument('--base-url', help='a mirror of the source repository')
    msld.set_defaults(run=run_msld)

    split = actions.add_parser('split', help='split a folder of class folders, parting no patient and no copies')
    split.add_argument('src', type=Path, metavar='SRC', help='folder with a folder of images a class')
    _add_output(split, '--out', required=True, help='folder to write train/, val/, test/ and split.csv to')
    split.add_argument('--val', type=_SHARE, default=.1, help='share to validate on (%(default)s)')
    split.add_argument('--test', type=_SHARE, help='share to test on (0.2); not with --folds and --keep-test')
    split.add_argument('--seed', type=_NOT_NEGATIVE, default=0, help='seed (%(default)s)')
    split.add_argument('--folds', type=options.Number(int, least=2),
                       help='write this many folds, each tested on its own share')
    split.add_argument('--keep-test', action='store_true', help='SRC has train/ and test/: keep test/, carve val')
    _add_split_options(split)
    split.set_defaults(run=run_split)


def _add_split_options(parser: Any) -> None:
    parser.add_argument('--groups', type=Path, default=None,
                        help='table with a column for the file, and one for the patient')
    parser.add_argument('--group-regex', default=None,
                        help='pattern whose first group, in the path below the class, is the patient')
    parser.add_argument('--labels', type=Path, default=None,
                        help='table with a column for the file, and one for the class')
    parser.add_argument('--copy', action='store_true', default=False,
                        help='copy the files, where hard links share edits with their source')
    parser.add_argument('--report', type=Path, default=None,
                        help='picture to write of the images that show the same picture')


def _add_run(commands: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from .scripts import run_script
        run_script(script=args.script, args=args.args, scripts_dir=args.timm_scripts)

    parser = commands.add_parser('run', help="run one of timm's own scripts with the models registered")
    parser.add_argument('--timm-scripts', type=Path, metavar='DIR',
                        help='folder of the scripts (default: the environment variable TIMM_SCRIPTS)')
    parser.add_argument('script', help='train.py, validate.py, inference.py, benchmark.py, onnx_export.py, ...')
    parser.add_argument('args', nargs=argparse.REMAINDER, help="the script's arguments")
    parser.set_defaults(run=run)


def _add_model(parser: Any) -> None:
    parser.add_argument('of', metavar='MODEL', help='checkpoint, hf-hub:OWNER/NAME, local-dir:DIR, or a name')
    parser.add_argument('--device', type=options.Device(), default='',
                        help='device (default: cuda where there is one, else cpu)')
    _add_what_a_file_lacks(parser)


def _add_what_a_file_lacks(parser: Any) -> None:
    parser.add_argument('--model', default='', help="name of a checkpoint's model, if its file does not say")
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=_KeywordArguments, metavar='NAME=VALUE',
                        help='arguments of the model, over those that the run recorded')
    parser.add_argument('--class-names', nargs='+', metavar='NAME',
                        help='classes in the order of the outputs, or a file with one a line, if the model has none')
    _add_device_modules(parser)


def _add_device_modules(parser: Any) -> None:
    parser.add_argument('--device-modules', nargs='+', metavar='MODULE',
                        help='modules to import, with models of your own')


def _load_model(args: argparse.Namespace) -> Any:
    """What loads the model, once the command has checked its other options."""
    from .checkpoints import load_model

    return partial(load_model, of=args.of, device=args.device, architecture=args.model, model_kwargs=args.model_kwargs,
                   class_names=_class_names(args))


def _class_names(args: argparse.Namespace) -> Optional[List[str]]:
    names = args.class_names
    if names and len(names) == 1 and Path(names[0]).is_file():
        try:
            lines = Path(names[0]).read_text(encoding='utf-8-sig').splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise OptionError(f'--class-names {names[0]} cannot be read ({e}): give a text file in UTF-8 with a name a '
                              f'line.') from e
        return [line.strip() for line in lines if line.strip()]
    return names


def _add_batches(parser: Any) -> None:
    parser.add_argument('-b', '--batch-size', type=_COUNT, default=32, help='images a batch (%(default)s)')
    parser.add_argument('-j', '--workers', type=_NOT_NEGATIVE, default=2,
                        help='processes that read images (%(default)s)')


def _add_evaluate(commands: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from .evaluate import evaluate
        evaluate(model=_load_model(args), data=args.data, output=args.output, split=args.split, compare=args.compare,
                 device=args.device, batch_size=args.batch_size, workers=args.workers, seed=args.seed,
                 goal=_goal(args), subgroups=args.subgroups)

    parser = commands.add_parser('evaluate', help='score a model, with intervals by patient, and write a report')
    _add_model(parser)
    parser.add_argument('data', type=Path, metavar='DIR', help='folder with test/CLASS/ and val/CLASS/, or CLASS/')
    _add_output(parser, '--report', required=True, help='folder to write')
    parser.add_argument('--split', default='', help='folder of DIR to score (default: test, or DIR itself)')
    parser.add_argument('--compare', default='', metavar='MODEL', help='another model to compare with in pairs')
    parser.add_argument('--seed', type=_NOT_NEGATIVE, default=0, help='seed of the bootstrap (%(default)s)')
    _add_goal(parser)
    _add_batches(parser)
    parser.set_defaults(run=run)


def _add_explain(commands: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from .explain import explain
        explained = explain(
            model=_load_model(args), images=args.images, output=args.output, before=args.before, device=args.device)
        return min(1, len(explained['unreadable']))

    parser = commands.add_parser('explain', help='draw Grad-CAM overlays and what the gates do')
    _add_model(parser)
    parser.add_argument('images', nargs='+', metavar='IMAGES', help='files, folders (of class folders) or patterns')
    _add_output(parser, '--out', required=True, help='folder to write')
    parser.add_argument('--before', default='', metavar='MODEL', help='the model before fine-tuning, for its gates')
    parser.set_defaults(run=run)


def _add_predict(commands: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from .predict import predict_files
        return min(1, predict_files(
            model=_load_model(args), images=args.images, top_k=args.top_k, calibration=args.calibration,
            as_json=args.json, output=args.output, batch_size=args.batch_size, workers=args.workers))

    parser = commands.add_parser('predict', help='print the most probable classes of images')
    _add_model(parser)
    parser.add_argument('images', nargs='+', metavar='IMAGES', help='files, folders or patterns')
    parser.add_argument('-k', '--top-k', type=_COUNT, default=5, help='classes to show (%(default)s)')
    _add_calibration(parser)
    parser.add_argument('--json', action='store_true', help='print JSON')
    _add_output(parser, '--csv', metavar='FILE', help='CSV file to write, too')
    _add_batches(parser)
    parser.set_defaults(run=run)


def _add_calibration(parser: Any) -> None:
    parser.add_argument('--calibration', type=Path, metavar='JSON', help='metrics.json of an evaluation or a study')


def _add_serve(commands: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from .serve import serve
        serve(model=_load_model(args), calibration=args.calibration, device=args.device, port=args.port,
              host=args.host)

    parser = commands.add_parser('serve', help='open a local web page to try a model')
    _add_model(parser)
    _add_calibration(parser)
    parser.add_argument('--host', default='127.0.0.1',
                        help='address to listen on (%(default)s); 0.0.0.0 for all, in a container')
    parser.add_argument('--port', type=options.Number(int, least=1, most=65535), default=7860,
                        help='port (%(default)s)')
    parser.set_defaults(run=run)


def _add_checkpoint_options(parser: Any) -> None:
    _add_what_a_file_lacks(parser)
    parser.add_argument('--metrics', type=Path, metavar='JSON', help='measured results')
    parser.add_argument('--data', type=Path, metavar='DIR', help='folder that it was trained on, for the class names')


def _add_publish(commands: Any) -> None:
    def confirm(question: str) -> bool:
        return sys.stdin.isatty() and input(f'{question} [y/N] ').strip().lower() in ('y', 'yes')

    def run(args: argparse.Namespace) -> None:
        from .publish import publish
        publish(checkpoint=args.checkpoint, repo_id=args.repo, model=args.model, model_kwargs=args.model_kwargs,
                metrics=args.metrics, data=args.data, class_names=_class_names(args), private=args.private,
                revision=args.revision, create_pr=args.pr, output=args.output, confirm=confirm)

    parser = commands.add_parser('publish', help='push a checkpoint to the Hugging Face Hub, with a model card')
    parser.add_argument('checkpoint', type=Path, metavar='CHECKPOINT', help='OUTPUT/model_best.pth.tar, for example')
    parser.add_argument('repo', metavar='OWNER/NAME', help='repository, made if there is none')
    _add_checkpoint_options(parser)
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    parser.add_argument('--revision', help='branch to commit to, made if there is none')
    parser.add_argument('--pr', action='store_true', help='open a pull request instead of committing')
    _add_output(parser, '--to', help='write the files to this folder instead')
    parser.set_defaults(run=run)


def _add_card(commands: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from .publish import write_card
        write_card(of=args.of, repo_id=args.repo, model=args.model, model_kwargs=args.model_kwargs,
                   metrics=args.metrics, data=args.data, class_names=_class_names(args), output=args.output)

    parser = commands.add_parser('card', help='make the model card of a registered model or of a checkpoint')
    parser.add_argument('of', metavar='MODEL|CHECKPOINT', help='se_densenet121, or OUTPUT/model_best.pth.tar')
    parser.add_argument('repo', nargs='?', metavar='OWNER/NAME', help='where a checkpoint is published')
    _add_checkpoint_options(parser)
    _add_output(parser, '--out', metavar='FILE', help='file to write (default: print it)')
    parser.set_defaults(run=run)


def _add_train(commands: Any) -> None:
    from .training import TrainConfig, train

    def run(args: argparse.Namespace) -> None:
        values = _train_options(args)
        if args.data:
            values['data_dir'] = args.data
        train(TrainConfig(**values))

    # What is not given is not in the namespace: the file's values go before the defaults.
    parser = commands.add_parser(
        'train', help="fine-tune a model; the option names are those of timm's train.py",
        argument_default=argparse.SUPPRESS)
    parser.add_argument('data', nargs='?', default=None, metavar='DIR', help='folder with train/CLASS/ and val/CLASS/')
    _add_train_options(parser)
    parser.set_defaults(run=run)


def _add_train_options(parser: Any, but: Sequence[str] = ()) -> None:
    from .training import TrainConfig

    parser.add_argument('-c', '--config', type=Path, default=None,
                        help='YAML file of options, which the command line overrides')
    short = {'batch_size': '-b', 'validation_batch_size': '-vb', 'workers': '-j'}
    defaults = TrainConfig()
    for option in fields(TrainConfig):
        if option.name in but:
            continue
        names = [f'--{option.name.replace("_", "-")}', *filter(None, [short.get(option.name)])]
        kind = option.metadata['kind']
        how: Dict[str, Any] = {}
        if isinstance(kind, options.Flag):
            how = {'action': argparse.BooleanOptionalAction}
        elif isinstance(kind, options.Mapping):
            how = {'nargs': '*', 'action': _KeywordArguments, 'metavar': 'NAME=VALUE'}
        elif isinstance(kind, options.ListOf):
            how = {'nargs': '+'}
        default = getattr(defaults, option.name)
        shown = f' (default: {default})' if default or isinstance(default, (bool, int)) else ''
        parser.add_argument(*names, help=f'{option.metadata["help"]}{shown}'.replace('%', '%%'), **how)


def _train_options(args: argparse.Namespace) -> Dict[str, Any]:
    """The options of a training that were given, in a file or, before it, on the command line."""
    from .training.config import TrainConfig, read_config

    given = vars(args)
    values = read_config(args.config) if args.config else {}
    values.update({option.name: given[option.name] for option in fields(TrainConfig) if option.name in given})
    return values


def _add_study(commands: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from .study import study
        found = study(
            data=args.src, models=args.models, output=args.to, recipe=_train_options(args), folds=args.folds,
            seeds=args.seeds, goal=_goal(args), subgroups=args.subgroups, val=args.val, seed=args.split_seed,
            groups=args.groups, group_regex=args.group_regex, labels=args.labels, copy=args.copy, report=args.report)
        return min(1, len(found.get('failed', ())))

    parser = commands.add_parser(
        'study', help='compare models by cross-validation, by patient, with one recipe; the options of train, too',
        argument_default=argparse.SUPPRESS)
    parser.add_argument('src', type=Path, metavar='DIR', help='folder with a folder of images a class')
    parser.add_argument('--models', nargs='+', required=True, metavar='MODEL',
                        help="what to train, the baseline first: densenet121 'se_densenet121 se_placement=stage'")
    parser.add_argument('--output', dest='to', type=Path, required=True, metavar='DIR',
                        help='folder of the study; the same command goes on there')
    parser.add_argument('--folds', type=options.Number(int, least=2), default=5,
                        help='parts, each tested once (%(default)s)')
    parser.add_argument('--seeds', type=_COUNT, default=1, help='trainings of each fold, from --seed on (%(default)s)')
    parser.add_argument('--val', type=options.Number(float, above=0, below=1), default=.1,
                        help='share to validate on (%(default)s)')
    parser.add_argument('--split-seed', type=_NOT_NEGATIVE, default=0, help='seed of the split (%(default)s)')
    _add_split_options(parser)
    _add_goal(parser)
    _add_train_options(parser, ('data_dir', 'output', 'model', 'model_kwargs', 'resume', 'dry_run', 'train_split',
                                'val_split'))
    parser.set_defaults(run=run)


def _add_goal(parser: Any) -> None:
    parser.add_argument('--sensitivity', type=_PART, default=None,
                        help='choose a threshold on validation images that finds this share of the positive ones')
    parser.add_argument('--specificity', type=_PART, default=None,
                        help='choose one that leaves this share of the others; with both, "not sure" lies between')
    parser.add_argument('--positive', default='', metavar='CLASS', help='positive class (default: the rarer of two)')
    parser.add_argument('--prevalence', type=options.Number(float, above=0, below=1), default=None,
                        help='share of positive images where the model is to be used, for PPV and NPV')
    parser.add_argument('--subgroups', type=Path, default=None, metavar='TABLE',
                        help='table by file or patient; its other columns (site, device) get scores of their own')


def _goal(args: argparse.Namespace) -> Any:
    from .thresholds import Goal

    return Goal(sensitivity=args.sensitivity, specificity=args.specificity, positive=args.positive,
                prevalence=args.prevalence)
