"""What `import timm_densese` loads, and what it says of a timm that is too old."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import timm_densese
from timm_densese.errors import _TIMM_NEEDED

ROOT = Path(timm_densese.__file__).parents[1]


def python(code, *paths, **env):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, env={
        **os.environ, 'PYTHONPATH': os.pathsep.join(map(str, (*paths, ROOT))), **env})


@pytest.mark.slow
def test_the_import_loads_the_plugin_alone():
    result = python('import sys, timm_densese; print(*sys.modules)')
    own = [name for name in result.stdout.split() if name.startswith('timm_densese')]
    assert 'timm_densese.models.se_densenet' in own, result.stderr
    assert [name for name in own if not re.fullmatch(r'timm_densese(\.errors|\.models(\.\w+)?)?', name)] == []
    assert {'matplotlib', 'scipy', 'sklearn'} & set(result.stdout.split()) == set()


@pytest.mark.slow
def test_a_timm_that_is_too_old_is_named(tmp_path):
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / '__init__.py').write_text('from .version import __version__\n')
    for version, refused in (('1.0.30', True), ('1.0.31.dev0', False)):
        (tmp_path / 'timm' / 'version.py').write_text(f"__version__ = '{version}'\n")
        result = python('import timm, timm_densese', tmp_path)
        assert result.returncode == 1  # those that are new enough are still no timm
        said = result.stderr.splitlines()[-1]
        assert ('TimmVersionError' in said) == refused, said
        if refused:
            assert 'needs timm 1.0.31 or newer' in said
            assert f'timm {version} in {tmp_path / "timm"}' in said


@pytest.mark.slow
def test_ctrl_c_during_the_imports_is_one_line(tmp_path):
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / 'version.py').write_text("__version__ = '9.0.0'\n")
    for stopped in ('raise KeyboardInterrupt', 'try:\n raise KeyboardInterrupt\nfinally:\n 1 / 0'):
        (tmp_path / 'timm' / '__init__.py').write_text(stopped)
        result = subprocess.run([sys.executable, '-m', 'timm_densese', 'models'], capture_output=True, text=True, env={
            **os.environ, 'PYTHONPATH': os.pathsep.join(map(str, (tmp_path, ROOT)))})
        assert result.returncode == 130, result.stderr
        assert result.stderr.strip().startswith('timm-densese: stopped.')
        assert len(result.stderr.strip().splitlines()) == 1
    assert 'KeyboardInterrupt' in python('import timm_densese', tmp_path).stderr  # of a script, it is that script's


def test_the_version_needed_is_the_one_that_pip_installs():
    needed = re.search(r'"timm>=([\d.]+)"', (ROOT / 'pyproject.toml').read_text())[1]
    assert needed == '.'.join(map(str, _TIMM_NEEDED))
