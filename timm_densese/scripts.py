"""Runs timm's own scripts (train.py, validate.py, inference.py, benchmark.py, onnx_export.py) with our models."""
import hashlib
import os
import re
import runpy
import sys
from importlib import metadata
from pathlib import Path
from typing import List, Optional

import timm
import torch

from .errors import ScriptError

__all__ = ['run_script']

_URL = 'https://raw.githubusercontent.com/huggingface/pytorch-image-models/v{release}/{script}'
# For each timm: the release whose scripts were recorded and have run with it. Those of 1.0.31 itself could not be had
# where this was written; add a release below, and its scripts' SHA-256, once they have run.
_SCRIPTS_FOR = {'1.0.31': '1.0.28'}
_SHA256 = {
    '1.0.28': {
        'benchmark.py': 'c2257b70ef9cd6e1dbc19a86cc5d0daea0505649a82352add58013d0382ed1ba',
        'inference.py': 'fc36c81ae3372b60fb7dc3a2b8676fd3de84afb79152134073109ac0333c95d4',
        'onnx_export.py': 'f685366d0f814c3764445b3d2edb2966f0e3194b19511a280d9e3cbb72c82418',
        'train.py': '1fb02d26fe16536bc7de2c987980644353117c2b2b8046532261464093cd1ac6',
        'validate.py': '1ff87867c808997ce443eb8ff8b2c7324519cdd0ec9dafbc3d5e666f89436749',
    },
}


def run_script(script: str, args: List[str], scripts_dir: Optional[Path] = None) -> None:
    """Run one of timm's scripts, unmodified, in this process, as if it had been started with python.

    The installed timm serves the script, also where the script lies in a checkout with a timm of its own: a script
    started directly would import that one, and its models would not be the registry that ours are in.

    Args:
        script: Name of the script, `train.py` for example.
        args: Its arguments.
        scripts_dir: Folder that holds it, usually a checkout of timm. If None, the environment's TIMM_SCRIPTS; if
            that is not set either, the script is downloaded once, checked, and kept in torch.hub's folder.

    Raises:
        ScriptError: There is no such folder or script, it could not be downloaded or is another than was recorded,
            or a checkout's timm was imported instead of the installed one.
    """
    if scripts_dir is None and os.environ.get('TIMM_SCRIPTS'):
        scripts_dir = Path(os.environ['TIMM_SCRIPTS'])
    if scripts_dir is None:
        path = _download(script)
    else:
        path = Path(scripts_dir).resolve() / script
        if not path.is_file():
            found = ', '.join(sorted(p.name for p in path.parent.glob('*.py'))) or 'no scripts'
            raise ScriptError(f'{path} is not there; {path.parent} holds {found}. {_by_hand()}')
        _check_timm(path.parent)

    # Not on sys.path: this folder, where the script would find a checkout's timm first.
    sys.path[:] = [p for p in sys.path if Path(p or '.').resolve() != path.parent]
    sys.argv[:] = [str(path), *args]
    runpy.run_path(str(path), run_name='__main__')


def _by_hand() -> str:
    return (
        f'Get the scripts of the installed timm with\n  git clone --depth 1 --branch v{metadata.version("timm")} '
        f'https://github.com/huggingface/pytorch-image-models\nand give their folder with --timm-scripts DIR, or set '
        f'TIMM_SCRIPTS.')


def _download(script: str) -> Path:
    """Fetch a script of the release that goes with the installed timm, unless it is there already."""
    installed = metadata.version('timm')
    release = _SCRIPTS_FOR.get(installed)
    if release is None:
        raise ScriptError(f'No scripts are recorded for timm {installed}, only for {", ".join(_SCRIPTS_FOR)}. '
                          f'{_by_hand()}')
    sha256 = _SHA256[release].get(script)
    if sha256 is None:
        raise ScriptError(f'{script} is not one of {", ".join(_SHA256[release])}. {_by_hand()}')
    path = Path(torch.hub.get_dir()) / 'timm-densese' / f'v{release}' / script
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        path.parent.mkdir(parents=True, exist_ok=True)
        url = _URL.format(release=release, script=script)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except (OSError, RuntimeError) as e:  # no connection, no such file, or other bytes than were recorded
            raise ScriptError(f'{url} could not be downloaded: {e}. {_by_hand()}') from e
    if release != installed:
        print(f'timm-densese: running {script} of timm {release}, which was tested with the installed timm '
              f'{installed}. For another, give --timm-scripts DIR.', file=sys.stderr)
    return path


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
