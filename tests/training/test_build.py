"""What a training is made of: folders, images and checkpoints that do not do, and the options' ways in."""
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import run_cli, run_training

from timm_densese.cli import main
from timm_densese.errors import CheckpointMismatchError, TrainingError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(('change', 'message'), [
    (lambda d: (d / 'val' / 'spots').rename(d / 'val' / 'dots'), r"\['spots', 'stripes'\] and \['dots', 'stripes'\]"),
    (lambda d: shutil.rmtree(d / 'val' / 'spots'), 'the same two or more classes'),
    (lambda d: [p.unlink() for p in (d / 'train' / 'spots').iterdir()], 'the same two or more classes'),
    (lambda d: shutil.rmtree(d / 'train' / 'spots'), 'the same two or more classes'),
    (lambda d: [p.unlink() for c in (d / 'train').iterdir() for p in c.iterdir()], 'holds no images'),
    (lambda d: shutil.rmtree(d / 'train'), 'is not there.*data split SRC'),
])
def test_folders_that_cannot_be_trained_on(small_split, tmp_path, change, message):
    shutil.copytree(small_split, tmp_path / 'data')
    change(tmp_path / 'data')
    with pytest.raises(TrainingError, match=message):
        run_training(tmp_path / 'data', tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_an_image_that_is_damaged_after_the_split(small_split, tmp_path):
    shutil.copytree(small_split, tmp_path / 'data')
    broken = min((tmp_path / 'data' / 'train' / 'spots').iterdir())
    broken.write_bytes(broken.read_bytes()[:100])
    result = run_cli('train', tmp_path / 'data', '--output', tmp_path / 'run', '--epochs', 1, '--workers', 0,
                     '--img-size', 32, '-b', 2, '--model-kwargs', 'growth_rate=4', 'block_config=(2,2,2)')
    assert result.returncode == 0
    assert result.stderr.count(f'not readable, the next image takes its place: {broken}') == 1


@pytest.fixture(scope='module')
def another(small_split, tmp_path_factory):
    """A checkpoint of another architecture."""
    output = tmp_path_factory.mktemp('another')
    run_training(small_split, output, model='resnet10t', model_kwargs={})
    return output / 'last.pth.tar'


@pytest.mark.parametrize('how', ['resume', 'initial_checkpoint', 'pretrained_path'])
def test_a_checkpoint_of_another_architecture(small_split, another, tmp_path, how):
    with pytest.raises((TrainingError, CheckpointMismatchError), match=r'last.pth.tar is no checkpoint|does not fit'):
        run_training(small_split, tmp_path / 'run', **{how: str(another)})
    assert not (tmp_path / 'run').exists()


def test_publish_told_the_wrong_model_says_what_does_not_fit(another, tmp_path):
    shutil.copytree(another.parent, tmp_path / 'run')
    args = yaml.safe_load((another.parent / 'args.yaml').read_text())
    (tmp_path / 'run' / 'args.yaml').write_text(yaml.safe_dump({**args, 'model': 'se_densenet169'}))
    checkpoint = str(tmp_path / 'run' / 'last.pth.tar')
    assert main(['publish', checkpoint, 'owner/name', '--output', str(tmp_path / 'out')]) == 1


@pytest.mark.parametrize(('options', 'message'), [
    (dict(output=''), '--output'),
    (dict(eval_metric='f1'), 'one of loss, top1'),
    (dict(resume='nowhere.pth.tar'), 'there is no such file'),
    (dict(pretrained_path='nowhere.pth'), 'could not be loaded'),
    (dict(initial_checkpoint='nowhere.pth'), '--pretrained-path FILE'),
])
def test_options_that_are_refused(small_split, tmp_path, options, message):
    with pytest.raises(TrainingError, match=message):
        run_training(small_split, **{'output': tmp_path / 'out', **options})
    assert not (tmp_path / 'out').exists()


def test_command_line_and_recipe(small_split, tmp_path, capsys, monkeypatch):
    got = []
    monkeypatch.setattr('timm_densese.training.train', got.append)
    recipe = str(ROOT / 'configs' / 'msld.yaml')
    assert main(['train', str(small_split), '-c', recipe, '--output', 'out', '--no-pretrained', '--lr', '2e-4',
                 '--model-kwargs', 'se_placement=stage', 'rd_channels=8']) == 0
    config = got[0]
    values = yaml.safe_load(Path(recipe).read_text())
    for key, value in values.items():
        if key not in ('lr', 'pretrained'):
            assert getattr(config, key) == value, key
    assert (config.lr, config.pretrained, config.data_dir) == (2e-4, False, str(small_split))
    assert config.model_kwargs == {'se_placement': 'stage', 'rd_channels': 8}

    (tmp_path / 'wrong.yaml').write_text('learning_rate: 1\n')
    assert main(['train', str(small_split), '-c', str(tmp_path / 'wrong.yaml')]) == 1
    assert 'has no option learning_rate' in capsys.readouterr().err
    assert main(['train', str(small_split), '-c', str(tmp_path / 'nowhere.yaml')]) == 1
    assert 'there is no such file' in capsys.readouterr().err
