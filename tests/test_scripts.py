"""timm's scripts are run with the installed timm and our models, wherever they lie."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from conftest import run_cli

# Stands in for a script of timm's: same way of starting, prints what it found.
SCRIPT = """
import sys
import pytest
import timm

def main():
    print('timm:', timm.__file__)
    print('registered:', timm.is_model('se_densenet121'))
    print('args:', sys.argv[1:])

if __name__ == '__main__':
    main()
"""


def run(*args, cwd=None, **env):
    return subprocess.run([sys.executable, '-c', 'import sys; sys.path.pop(0); from timm_densese.cli import main; '
                           'sys.exit(main())', 'run', *map(str, args)],
                          cwd=cwd, env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path)), **env},
                          capture_output=True, text=True, timeout=120)


def make_checkout(folder, version):
    (folder / 'timm').mkdir(parents=True)
    (folder / 'timm' / '__init__.py').write_text('raise ImportError("the timm of the checkout")\n')
    (folder / 'timm' / 'version.py').write_text(f"__version__ = '{version}'\n")
    (folder / 'train.py').write_text(SCRIPT)
    return folder


@pytest.mark.slow
def test_the_installed_timm_serves_a_script_in_a_checkout(tmp_path):
    checkout = make_checkout(tmp_path / 'checkout', timm.__version__)
    result = run('--timm-scripts', checkout, 'train.py', '--model', 'se_densenet121', '-b', '4', cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert f'timm: {timm.__file__}' in result.stdout
    assert 'registered: True' in result.stdout
    assert "args: ['--model', 'se_densenet121', '-b', '4']" in result.stdout
    assert result.stderr == ''


@pytest.mark.slow
def test_a_checkouts_timm_is_refused_where_python_finds_it_first(tmp_path):
    (tmp_path / 'train.py').write_text(SCRIPT)
    shutil.copytree(Path(timm.__file__).parent, tmp_path / 'timm')
    result = subprocess.run(
        [sys.executable, '-m', 'timm_densese', 'run', '--timm-scripts', '.', 'train.py'], cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}, capture_output=True, text=True)
    assert result.returncode == 1
    assert 'timm was imported from the checkout' in result.stderr
    assert 'registered' not in result.stdout


@pytest.mark.slow
def test_another_version_is_a_warning(tmp_path, run_alone):
    checkout = make_checkout(tmp_path / 'checkout', '0.9.0')
    result = run_alone('run', 'train.py', TIMM_SCRIPTS=str(checkout))
    assert result.returncode == 0
    assert f'timm 0.9.0; the installed timm is {timm.__version__}' in result.stderr


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    (tmp_path / 'validate.py').write_text(SCRIPT)
    monkeypatch.setenv('TIMM_SCRIPTS', '')
    for args, said in ((('--timm-scripts', tmp_path, 'train.py'), 'holds validate.py'),
                       (('train.py',), 'which its package does not bring')):
        result = run_cli('run', *args)
        assert result.returncode == 1
        assert said in result.stderr
        assert f'git clone --depth 1 --branch v{timm.__version__} ' in result.stderr
        assert 'Traceback' not in result.stderr


@pytest.mark.slow
def test_a_scripts_own_errors_are_shown_whole(tmp_path, run_alone):
    Path(tmp_path / 'train.py').write_text('raise ValueError("of the script")')
    result = run_alone('run', '--timm-scripts', tmp_path, 'train.py')
    assert result.returncode == 1
    assert 'Traceback' in result.stderr
    assert 'ValueError: of the script' in result.stderr
