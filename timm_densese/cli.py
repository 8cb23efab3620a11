"""Command line: argument parsing only, every command is one call into another module."""
import argparse
import sys
from pathlib import Path
from typing import List, Optional

from . import __version__


def main(argv: Optional[List[str]] = None) -> int:
    """Run `timm-densese`.

    Args:
        argv: Arguments, those of the process if None.

    Returns:
        Exit status: 0, or 1 where the input was at fault (the reason goes to standard error).
    """
    parser = argparse.ArgumentParser(prog='timm-densese', description='SE-DenseNets for timm.')
    parser.add_argument('--version', action='version', version=f'timm-densese {__version__}')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    models = commands.add_parser('models', help='print the table of models: parameters, GMACs, where attention sits')
    models.set_defaults(run=_models)

    demo = commands.add_parser('demo', help='fine-tune se_densenet121 for a few minutes, reload it, predict an image')
    demo.add_argument('--data', type=Path, help='folder with a folder of images a class (default: a generated set)')
    demo.add_argument('--output', type=Path, default=Path('output/demo'), help='folder to write to (%(default)s)')
    demo.set_defaults(run=_demo)

    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as e:
        print(f'timm-densese: {e}', file=sys.stderr)
        return 1
    return 0


# The imports are inside the commands: --help answers at once, and no command needs what only another one uses.
def _models(args: argparse.Namespace) -> None:
    from .report import models_table
    print(models_table())


def _demo(args: argparse.Namespace) -> None:
    from .demo import run_demo
    run_demo(args.data, args.output)
