"""timm's scripts are run with the installed timm and our models, wherever they lie."""
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm

from timm_densese import scripts
from timm_densese.errors import ScriptError

# Stands in for a script of timm's: same way of starting, prints what it found.
SCRIPT = """
import sys
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
    for cwd in (tmp_path, checkout):
        result = run('--timm-scripts', checkout, 'train.py', '--model', 'se_densenet121', '-b', '4', cwd=cwd)
        assert result.returncode == 0, result.stderr
        assert f'timm: {timm.__file__}' in result.stdout
        assert 'registered: True' in result.stdout
        assert "args: ['--model', 'se_densenet121', '-b', '4']" in result.stdout
        assert result.stderr == ''


def test_a_checkouts_timm_is_refused_where_python_finds_it_first(tmp_path):
    (tmp_path / 'train.py').write_text(SCRIPT)
    shutil.copytree(Path(timm.__file__).parent, tmp_path / 'timm')
    result = subprocess.run(
        [sys.executable, '-m', 'timm_densese', 'run', '--timm-scripts', '.', 'train.py'], cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}, capture_output=True, text=True)
    assert result.returncode == 1
    assert 'timm was imported from the checkout' in result.stderr
    assert 'registered' not in result.stdout


def test_another_version_is_a_warning(tmp_path):
    checkout = make_checkout(tmp_path / 'checkout', '0.9.0')
    result = run('train.py', TIMM_SCRIPTS=str(checkout))
    assert result.returncode == 0
    assert f'timm 0.9.0; the installed timm is {timm.__version__}' in result.stderr


def test_what_is_missing_is_said(tmp_path):
    (tmp_path / 'validate.py').write_text(SCRIPT)
    result = run('--timm-scripts', tmp_path, 'train.py')
    assert result.returncode == 1
    assert 'holds validate.py' in result.stderr
    assert f'--branch v{timm.__version__}' in result.stderr
    assert 'Traceback' not in result.stderr


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A server of scripts in place of timm's repository, and an empty cache."""
    root = tmp_path / 'source'
    root.mkdir()
    (root / 'train.py').write_text(SCRIPT)
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(QuietHandler, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(scripts, '_URL', f'http://127.0.0.1:{server.server_port}/{{script}}?{{release}}')
    monkeypatch.setattr(scripts, '_SCRIPTS_FOR', {timm.__version__: '9.9'})
    sha256 = hashlib.sha256(SCRIPT.encode()).hexdigest()
    monkeypatch.setattr(scripts, '_SHA256', {'9.9': {'train.py': sha256, 'validate.py': sha256}})
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.delenv('TIMM_SCRIPTS', raising=False)
    monkeypatch.setattr(sys, 'argv', [])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    yield root
    server.shutdown()
    server.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_downloads_once_and_checks(source, tmp_path, capsys):
    scripts.run_script('train.py', ['--x'])
    out, err = capsys.readouterr()
    assert "args: ['--x']" in out
    assert 'train.py of timm 9.9' in err
    (source / 'train.py').unlink()
    scripts.run_script('train.py', [])  # from the cache
    assert 'args: []' in capsys.readouterr().out

    cached, = (tmp_path / 'torch').rglob('train.py')
    cached.write_text('raise SystemExit("changed since")')
    with pytest.raises(ScriptError, match=r'could not be downloaded.*404[\s\S]*--timm-scripts'):
        scripts.run_script('train.py', [])
    (source / 'train.py').write_text('raise SystemExit("not what was recorded")')
    with pytest.raises(ScriptError, match='invalid hash value'):
        scripts.run_script('train.py', [])
    (source / 'train.py').write_text(SCRIPT)
    scripts.run_script('train.py', [])
    assert cached.read_text() == SCRIPT


def test_only_recorded_scripts_are_downloaded(source, monkeypatch):
    with pytest.raises(ScriptError, match=r'legacy_train.py is not one of train.py, validate.py'):
        scripts.run_script('legacy_train.py', [])
    monkeypatch.setattr(scripts, '_SCRIPTS_FOR', {'0.1': '9.9'})
    with pytest.raises(ScriptError, match=rf'No scripts are recorded for timm {timm.__version__}, only for 0\.1'):
        scripts.run_script('train.py', [])


def test_no_network_is_said(source, monkeypatch):
    monkeypatch.setattr(scripts, '_URL', 'http://127.0.0.1:9/{release}/{script}')
    with pytest.raises(ScriptError, match=r'could not be downloaded[\s\S]*git clone'):
        scripts.run_script('train.py', [])


def test_a_scripts_own_errors_are_shown_whole(tmp_path):
    Path(tmp_path / 'train.py').write_text('raise ValueError("of the script")')
    result = run('--timm-scripts', tmp_path, 'train.py')
    assert result.returncode == 1
    assert 'Traceback' in result.stderr
    assert 'ValueError: of the script' in result.stderr
