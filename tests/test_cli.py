"""The command line, the demo and the README, run as a new user would."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from conftest import put_on_hub, run_cli
from PIL import Image

from timm_densese.demo import generate_images
from timm_densese.models.stats import models_table

ROOT = Path(__file__).parent.parent


def run(*args, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-m', 'timm_densese', *map(str, args)], env={**os.environ, **env}, capture_output=True,
        text=True, timeout=280)


@pytest.mark.slow
def test_readme_table_is_what_the_command_prints():
    table = re.search(r'<!-- models -->\n(.*?)\n<!-- /models -->', (ROOT / 'README.md').read_text(), re.DOTALL)[1]
    assert table == models_table()


def test_readme_python_runs_as_printed(hub, tmp_path, monkeypatch):
    for tag in ('ra_in1k', 'tv_in1k'):
        put_on_hub(hub, f'timm/densenet121.{tag}', timm.create_model('densenet121'))
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, namespace)


def test_command_and_module_are_the_same():
    command = Path(sys.executable).with_name('timm-densese')
    if not command.exists():
        pytest.skip('the timm-densese command is missing: pip install -e .')
    out = subprocess.run([command, '--help'], capture_output=True, text=True, check=True).stdout
    assert out == run('--help').stdout != ''


@pytest.mark.slow
def test_demo_on_generated_images_without_a_hub(tmp_path):
    result = run('demo', '--output', tmp_path / 'out', HF_ENDPOINT='http://127.0.0.1:9', HF_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    for said in ('GENERATED', 'could not be reached', 'RANDOM weights', 'before,', 'from random weights', 'Reloaded'):
        assert said in result.stdout
    assert 'epoch 4: 100%' in result.stderr
    before, after = re.search(r': ([\d.]+)% before, ([\d.]+)% after', result.stdout).groups()
    assert float(after) > float(before) - 10
    assert (tmp_path / 'out' / 'training' / 'model_best.pth.tar').is_file()


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
