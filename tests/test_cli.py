"""The command line, the demo and the README, run as a new user would."""
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import forked
import pytest
import timm
from conftest import put_on_hub, run_cli, start_cli
from PIL import Image

from timm_densese.commands import create_parser
from timm_densese.demo import generate_images
from timm_densese.models.stats import models_table

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_tables_of_models_are_what_the_command_prints():
    """docs/models.md has the whole table, the README some of its columns."""
    printed = models_table()
    whole, short = (re.search(r'<!-- models -->\n(.*?)\n<!-- /models -->', (ROOT / file).read_text(), re.DOTALL)[1]
                    for file in ('docs/models.md', 'README.md'))
    assert whole == printed
    rows, shown = ([line.strip('|').split('|') for line in table.splitlines()] for table in (printed, short))
    columns = [rows[0].index(name) for name in shown[0]]
    assert len(columns) == 4
    assert shown == [[row[i] for i in columns] for row in rows]


def test_readme_python_runs_as_printed(hub, tmp_path, monkeypatch):
    for tag in ('ra_in1k', 'tv_in1k'):
        put_on_hub(hub, f'timm/densenet121.{tag}', timm.create_model('densenet121'))
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, namespace)


@pytest.mark.parametrize('page', ['README.md', *(f'docs/{p.name}' for p in sorted((ROOT / 'docs').glob('*.md')))])
def test_commands_in_the_docs_are_understood(page, monkeypatch):
    """Every line of a block that starts with our command, or with python -m timm_densese, parses as it stands."""
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r'^```\w*\n(.*?)^```', (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace('\\\n', ' ').splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if re.match(r'(timm-densese|torchrun) ', line)]
    assert commands or page != 'README.md'
    for command in commands:
        args = command[command.index('timm_densese') + 1:] if command[0] == 'torchrun' else command[1:]
        create_parser().parse_args(args)


@pytest.mark.slow
def test_command_and_module_are_the_same(run_alone):
    command = Path(sys.executable).with_name('timm-densese')
    if not command.exists():
        pytest.skip('the timm-densese command is missing: pip install -e .')
    out = subprocess.run([command, '--help'], capture_output=True, text=True, check=True).stdout
    assert out == run_alone('--help', function=forked.module).stdout != ''


@pytest.mark.slow
def test_demo_on_generated_images_without_a_hub(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_densese.demo.IMG_SIZE', 48)
    monkeypatch.setattr('timm_densese.demo.generate_images', partial(generate_images, per_class=16, size=48))
    monkeypatch.setattr('huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE',
                        'http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    result = run_cli('demo', '--output', tmp_path / 'out')
    assert result.returncode == 0, result.stderr
    for said in ('GENERATED', 'could not be reached', 'RANDOM weights', 'before,', 'from random weights', 'Reloaded'):
        assert said in result.stdout
    assert 'epoch 4: 100%' in result.stderr
    before, after = re.search(r': ([\d.]+)% before, ([\d.]+)% after', result.stdout).groups()
    assert float(after) > float(before) - 10
    assert (tmp_path / 'out' / 'training' / 'model_best.pth.tar').is_file()


def test_the_demo_writes_over_nothing_but_a_demo(tmp_path):
    """A folder with files, the data's own, one in it, one around it; an earlier demo's is taken."""
    data = tmp_path / 'photos' / 'images'
    generate_images(data, per_class=1, size=32)
    (tmp_path / 'demo').mkdir()
    (tmp_path / 'demo' / '.timm-densese-demo').touch()
    (tmp_path / 'demo' / 'images').mkdir()
    (tmp_path / 'demo' / 'images' / 'old.txt').write_text('of a demo')
    before = sorted(tmp_path.rglob('*'))
    for output in (tmp_path / 'photos', data, data / 'demo', tmp_path):
        result = run_cli('demo', '--data', data, '--output', output)
        assert result.returncode == 2
        assert f'--output {output}' in result.stderr
    assert run_cli('demo', '--output', tmp_path / 'photos').returncode == 2
    assert sorted(tmp_path.rglob('*')) == before
    result = run_cli('demo', '--data', data, '--output', tmp_path / 'demo')  # refused for its few images, later
    assert result.returncode == 1
    assert not (tmp_path / 'demo' / 'images').exists()


@pytest.mark.slow
@pytest.mark.parametrize('args', [('train', '--help'), ('predict', 'MODEL', 'IMAGES', '--json')])
def test_a_closed_pipe_is_no_error(trained, tmp_path, args):
    """As `| head` closes it, here before anything is written."""
    names = {'MODEL': trained[1], 'IMAGES': trained[0] / 'test'}
    os.mkfifo(tmp_path / 'pipe')
    process = start_cli(*(names.get(arg, arg) for arg in args), stdout=tmp_path / 'pipe', stderr=tmp_path / 'stderr')
    os.close(os.open(tmp_path / 'pipe', os.O_RDONLY))
    process.join(120)
    said = (tmp_path / 'stderr').read_text()
    assert process.exitcode in (0, 141), said  # argparse itself takes no notice
    assert 'rror' not in said
    assert 'Exception' not in said


@pytest.mark.slow
def test_ctrl_c_is_one_line(trained, tmp_path):
    (tmp_path / 'many').mkdir()
    for i in range(2000):  # some seconds of work
        os.link(min((trained[0] / 'test' / 'spots').iterdir()), tmp_path / 'many' / f'{i}.png')
    process = start_cli('predict', trained[1], tmp_path / 'many', '-b', 1, stderr=tmp_path / 'stderr')
    while not re.search(r'[1-9]\d*/2000', (tmp_path / 'stderr').read_text() if (tmp_path / 'stderr').exists() else ''):
        assert process.is_alive()
        time.sleep(.005)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    said = (tmp_path / 'stderr').read_text()
    assert said.splitlines()[-1] == (
        'timm-densese: stopped. Nothing half-done is left: run the same command again.')
    assert 'Traceback' not in said


@pytest.mark.slow
def test_a_module_with_a_model_of_ones_own(small_split, tmp_path, monkeypatch):
    """Trained and used through --device-modules, from the current folder; without it, the message names it."""
    (tmp_path / 'my_models.py').write_text("""
import timm
from timm.models import register_model


@register_model
def my_own_net(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
    return timm.create_model('resnet10t', **kwargs)
""")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if path])
    args = ('train', small_split, '--output', tmp_path / 'run', '--model', 'my_own_net', '--img-size', 32,
            '--epochs', 1, '--workers', 0)
    result = run_cli(*args)
    assert result.returncode == 2
    assert '--device-modules' in result.stderr
    assert run_cli(*args, '--device-modules', 'my_models').returncode == 0
    assert (tmp_path / 'run' / 'model_best.pth.tar').is_file()


def test_demo_needs_two_classes(tmp_path):
    (tmp_path / 'images' / 'only').mkdir(parents=True)
    Image.new('RGB', (32, 32)).save(tmp_path / 'images' / 'only' / 'a.png')
    result = run_cli('demo', '--data', tmp_path / 'images', '--output', tmp_path / 'out')
    assert result.returncode == 1
    assert "found {'only': 1}" in result.stderr


def test_generated_images_are_the_same_for_a_seed(tmp_path):
    for folder in ('a', 'b'):
        generate_images(tmp_path / folder, per_class=2, size=32)
    images = sorted(p.relative_to(tmp_path / 'a') for p in (tmp_path / 'a').glob('*/*.png'))
    assert len(images) == 4
    assert all((tmp_path / 'a' / p).read_bytes() == (tmp_path / 'b' / p).read_bytes() for p in images)
