"""Wrong values of every command's options: a line that names the option, exit status 2."""
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
    ('publish', 'x.pth', 'owner/name', '--model-kwargs', 'depth'),
    ('train', 'data', '--output', 'out', '--model-kwargs', '=3'),
]


@pytest.mark.parametrize('args', WRONG)
def test_wrong_values(args):
    result = run_cli(*args)
    assert result.returncode == 2
    assert args[-2] in result.stderr
    assert args[-1] in result.stderr
    assert result.stderr.count('\n') == 1


@pytest.mark.parametrize('args', [
    (), ('predict',), ('nope',), ('predict', 'MODEL', 'x.jpg', '--nope'), ('data', 'split')])
def test_wrong_usage(args):
    result = run_cli(*args)
    assert result.returncode == 2
    assert result.stderr.count('\n') == 1
    assert '--help' in result.stderr
