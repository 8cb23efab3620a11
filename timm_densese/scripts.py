"""Runs timm's own scripts (train.py, validate.py, inference.py, benchmark.py, onnx_export.py) with our models."""
import os
import re
import runpy
import sys
from importlib import metadata
from pathlib import Path
from typing import List, Optional

import timm

from .errors import ScriptError

__all__ = ['run_script']


def run_script(script: str, args: List[str], scripts_dir: Optional[Path] = None) -> None:
    """Run one of timm's scripts, unmodified, in this process, as if it had been started with python.

    The installed timm serves the script, also where the script lies in a checkout with a timm of its own: a script
    started directly would import that one, and its models would not be the registry that ours are in.

    Args:
        script: Name of the script, `train.py` for example.
        args: Its arguments.
        scripts_dir: Folder that holds it, usually a checkout of timm. If None, the environment's TIMM_SCRIPTS; if
            that is not set either, the error says how to get the scripts.

    Raises:
        ScriptError: There is no such folder or script, or a checkout's timm was imported instead of the installed
            one.
    """
    if scripts_dir is None and os.environ.get('TIMM_SCRIPTS'):
        scripts_dir = Path(os.environ['TIMM_SCRIPTS'])
    if scripts_dir is None:
        raise ScriptError(f"{script} is one of timm's scripts, which its package does not bring. {_how_to_get()}")
    path = Path(scripts_dir).resolve() / script
    if not path.is_file():
        found = ', '.join(sorted(p.name for p in path.parent.glob('*.py'))) or 'no scripts'
        raise ScriptError(f'{path} is not there; {path.parent} holds {found}. {_how_to_get()}')
    _check_timm(path.parent)

    # Not on sys.path: this folder, where the script would find a checkout's timm first.
    sys.path[:] = [p for p in sys.path if Path(p or '.').resolve() != path.parent]
    sys.argv[:] = [str(path), *args]
    runpy.run_path(str(path), run_name='__main__')


def _how_to_get() -> str:
    return (
        f'Get the scripts of the installed timm with\n  git clone --depth 1 --branch v{metadata.version("timm")} '
        f'https://github.com/huggingface/pytorch-image-models\nand give their folder with --timm-scripts DIR, or set '
        f'TIMM_SCRIPTS.')


def _check_timm(scripts_dir: Path) -> None:
    """Warn of scripts made for another timm, and refuse to go on with a checkout's timm in place of the installed."""
    version_file = scripts_dir / 'timm' / 'version.py'
    match = re.search(r"__version__ = '([^']+)'", version_file.read_text()) if version_file.is_file() else None
    installed = metadata.version('timm')
    if match and match[1] != installed:
        print(f'timm-densese: the scripts in {scripts_dir} are those of timm {match[1]}; the installed timm is '
              f'{installed}. Where they disagree, check out v{installed} there.', file=sys.stderr)
    imported = Path(timm.__file__).resolve().parent
    if imported == scripts_dir / 'timm' and imported != Path(str(metadata.distribution('timm').locate_file('timm'))):
        raise ScriptError(
            f'timm was imported from the checkout {scripts_dir}, because this was started there. Start it from '
            f'another folder, or as `timm-densese run` instead of `python -m timm_densese run`.')
