"""Wrong values of every command's options: a line that names the option, exit status 2."""
import socket

import pytest
from conftest import run_cli

WRONG = [
    ('predict', 'MODEL', 'x.jpg', '-k', '0'),
    ('predict', 'MODEL', 'x.jpg', '-k', 'many'),
    ('predict', 'MODEL', 'x.jpg', '--batch-size', '0'),
    ('predict', 'MODEL', 'x.jpg', '--workers', '-1'),
    ('predict', 'MODEL', 'x.jpg', '--device', 'nope'),
    ('predict', 'MODEL', 'x.jpg', '--device', 'cuda:77'),
    ('predict', 'MODEL', 'x.jpg', '--device-modules', 'no_such_module'),
    ('evaluate', 'MODEL', 'data', '--output', 'out', '--seed', '-1'),
    ('evaluate', 'MODEL', 'data', '--output', 'out', '--batch-size', '1.5'),
    ('evaluate', 'MODEL', 'data', '--output', 'out', '--device', 'meta'),
    ('explain', 'MODEL', 'x.jpg', '--output', 'out', '--device', 'tpu'),
    ('serve', 'MODEL', '--port', '99999'),
    ('serve', 'MODEL', '--port', '0'),
    ('data', 'split', 'src', '--output', 'out', '--val', '1.5'),
    ('data', 'split', 'src', '--output', 'out', '--test', '-.1'),
    ('data', 'split', 'src', '--output', 'out', '--folds', '1'),
    ('data', 'split', 'src', '--output', 'out', '--seed', '-3'),
    ('data', 'split', 'src', '--output', 'out', '--report', 'x.txt'),
    ('predict', 'MODEL', 'x.jpg', '--output', 'x.txt'),
    ('evaluate', 'MODEL', 'data', '--output', 'out', '--sensitivity', '1.5'),
    ('evaluate', 'MODEL', 'data', '--output', 'out', '--specificity', 'inf'),
    ('evaluate', 'MODEL', 'data', '--output', 'out', '--prevalence', '1'),
    ('study', 'data', '--models', 'resnet18', '--output', 'out', '--val', '0'),
    ('study', 'data', '--output', 'out', '--models', 'resnet18 depth'),
    ('study', 'data', '--output', 'out', '--models', 'hf-hub:a/b/c'),
    ('train', 'data', '--output', 'out', '--lr', 'inf'),
    ('train', 'data', '--output', 'out', '--model', 'local-dir:nowhere'),
    ('card', 'se_densenet121', '--output', 'x.pth'),
    ('publish', 'x.pth', 'owner/name', '--model-kwargs', 'depth'),
    ('train', 'data', '--output', 'out', '--model-kwargs', '=3'),
]


@pytest.mark.parametrize('args', WRONG)
def test_wrong_values(args):
    result = run_cli(*args)
    assert result.returncode == 2
    assert args[-2] in result.stderr or args[-2] == '--models'  # each is a --model
    assert args[-1] in result.stderr
    assert result.stderr.count('\n') == 1


@pytest.mark.parametrize('args', [
    (), ('predict',), ('nope',), ('predict', 'MODEL', 'x.jpg', '--nope'), ('data', 'split')])
def test_wrong_usage(args):
    result = run_cli(*args)
    assert result.returncode == 2
    assert result.stderr.count('\n') == 1
    assert '--help' in result.stderr


@pytest.mark.parametrize(('args', 'said'), [
    (('predict', 'MODEL', 'nowhere.jpg'), 'there are no images'),
    (('predict', 'MODEL', 'nowhere.jpg', '--output', 'file/x.csv'), 'file is a file, not a folder'),
    (('explain', 'MODEL', 'nowhere.jpg', '--output', 'out'), 'there are no images'),
    (('explain', 'MODEL', 'nowhere.jpg', '--output', 'file'), 'is a file'),
    (('evaluate', 'MODEL', 'nowhere', '--output', 'out'), 'is not a folder'),
    (('evaluate', 'MODEL', 'nowhere', '--output', 'out', '--positive', 'C'), '--positive is of a threshold'),
    (('study', 'nowhere', '--models', 'resnet18', '--output', 'out', '--prevalence', '.1'), '--prevalence is of a'),
    (('card', 'MODEL', 'owner/name', '--output', 'file/x.md'), 'file is a file, not a folder'),
    (('publish', 'MODEL', 'owner/name', '--output', 'file'), 'is a file'),
    (('predict', 'MODEL', 'x.jpg', '--class-names', 'binary'), '--class-names binary cannot be read'),
])
def test_what_is_wrong_is_said_before_a_model_is_loaded(args, said, tmp_path, monkeypatch):
    """MODEL is not there, and nobody has looked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    (tmp_path / 'binary').write_bytes(b'\xff\xfe\x00')
    result = run_cli(*args)
    assert result.returncode in (1, 2)
    assert said in result.stderr
    assert result.stderr.count('\n') == 1
    assert {path.name for path in tmp_path.iterdir()} == {'file', 'binary'}


def test_a_port_is_tried_before_a_model_is_loaded():
    with socket.create_server(('127.0.0.1', 0)) as taken:
        for args in (('--port', taken.getsockname()[1]), ('--host', '203.0.113.1')):
            result = run_cli('serve', 'MODEL', *args)
            assert result.returncode == 1
            assert 'Choose another --port' in result.stderr.splitlines()[-1]


def test_what_the_system_refuses_is_one_line(tmp_path):
    """Here a name that is too long for it."""
    result = run_cli('evaluate', 'x' * 5000, tmp_path, '--output', tmp_path / 'out')
    assert result.returncode == 1
    assert 'timm-densese: ' in result.stderr
    assert 'File name too long' in result.stderr
    assert result.stderr.count('\n') == 1
