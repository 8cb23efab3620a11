"""The options: from Python, from YAML and from the command line they are checked by the same rules, before anything is
read."""
from pathlib import Path

import pytest
import yaml
from conftest import run_cli
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_densese.errors import OptionError
from timm_densese.training import TrainConfig

ROOT = Path(__file__).parents[2]
WRONG = {
    'device_modules': (['no_such_module'], 'no_such_module', 'os'),
    'data_dir': (3,), 'train_split': (None,), 'output': (['a'],), 'pretrained_path': (1.5,), 'resume': (True,),
    'model': ('nope121', 'se_densenet121.nope', 'se_densenet120', '', 5, None, 'hf-hub:', 'hf-hub:a/b/c',
              'local-dir:nowhere'),
    'model_kwargs': ('depth', ['depth=1'], {1: 2}),
    'pretrained': ('no', 1), 'model_ema': ('false',), 'dry_run': (0,),
    'img_size': (0, -5, 'large', 32.5, [32]), 'batch_size': (0, -1, 1.5, None, 'x', True),
    'validation_batch_size': (0,), 'grad_accum_steps': (0,), 'epochs': (0, -1), 'patience': (-1,),
    'workers': (-1, 'two'), 'seed': (-1, 2 ** 32), 'warmup_epochs': (-1,),
    'device': ('nope', 'cuda:99', 'meta', 'cpu:x'),
    'opt': ('nope', '', None, 'adamv'), 'sched': ('nope', 'plateau', 'step', 'multistep', None),
    'lr': ('fast', -1e-3, float('nan'), float('inf'), None), 'weight_decay': (-1,), 'layer_decay': (0, 1.5),
    'clip_grad': (0,),
    'decay_epochs': (0,), 'decay_milestones': ([0], [3, 2], 3), 'decay_rate': (0,), 'min_lr': (-1,), 'warmup_lr': (-1,),
    'scale': (.5, [.5], [.9, .1], [0, 1], [.1, .2, .3]), 'ratio': ([2, 1], ['a', 'b'], [0, 1]),
    'hflip': (1.5,), 'vflip': (-.1,), 'reprob': (2,), 'color_jitter': (-1,), 'smoothing': (1, 1.5), 'drop': (1,),
    'model_ema_decay': (1.1,), 'aa': ('nope', 5), 'eval_metric': ('f1',),
}


@pytest.mark.parametrize(('name', 'value'), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_values(name, value):
    """Each is refused by its name, with what was given and what is allowed, in a line."""
    with pytest.raises(OptionError) as error:
        TrainConfig(**{name: value})
    message = str(error.value)
    assert message.startswith(f'--{name.replace("_", "-")}')
    assert '\n' not in message
    assert len(message) < 250
    assert ' object at ' not in message
    first = value[0] if isinstance(value, list) else str(value).rpartition('.')[2]
    assert str(first) in message or str(value) in message


@pytest.mark.parametrize(('name', 'value', 'meant'), [
    ('model', 'se_densenet12', 'se_densenet121'), ('model', 'resnet5O', 'resnet50'), ('opt', 'adamww', 'adamw'),
    ('model', 'se_densenet121.ra_in1', 'ra_in1k'), ('sched', 'cosin', 'cosine'),
    ('eval_metric', 'balanced', 'balanced_top1'),
])
def test_close_names_are_told(name, value, meant):
    with pytest.raises(OptionError, match=rf'did you mean.*\b{meant}'):
        TrainConfig(**{name: value})


def test_yaml_and_command_line_are_refused_alike(small_split, tmp_path):
    """The same wrong value, three ways; nothing is written."""
    for name, value in (('epochs', 0), ('lr', -1.), ('sched', 'nope'), ('workers', -1), ('aa', 'nope')):
        (tmp_path / 'config.yaml').write_text(yaml.safe_dump({name: value}))
        with pytest.raises(OptionError, match=f'--{name}: '):
            TrainConfig(**{name: value})
        for args in (('-c', tmp_path / 'config.yaml'), (f'--{name}={value}',)):
            result = run_cli('train', small_split, '--output', tmp_path / 'run', *args)
            assert result.returncode == 2
            assert f'--{name}' in result.stderr
            assert result.stderr.count('\n') == 1
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('text', 'message'), [
    ('', 'holds nothing'), ('lr: [\n', 'is no YAML'), ('[1, 2]', 'no lines such as'), ('just text', 'no lines such as'),
    ('learning_rate: 1', "no option 'learning_rate'"), ('epoch: 3', 'did you mean epochs'), ('3: 4', 'no option 3'),
    ('lr: !!python/object:os.system 1', 'is no YAML'),
    ('pretrained: "no"', "--pretrained: 'no'"), ('scale: 0.5', '--scale'),
])
def test_yaml_files(small_split, tmp_path, text, message):
    (tmp_path / 'config.yaml').write_text(text)
    result = run_cli('train', small_split, '--output', tmp_path / 'run', '-c', tmp_path / 'config.yaml')
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count('\n') == 1


def test_yaml_that_is_no_file(small_split, tmp_path):
    (tmp_path / 'binary.yaml').write_bytes(b'\xff\xfe\x00')
    for file, message in (('nowhere.yaml', 'there is no such file'), ('.', 'cannot be read'),
                          ('binary.yaml', 'cannot be read')):
        result = run_cli('train', small_split, '-c', tmp_path / file)
        assert (result.returncode, message in result.stderr) == (2, True), result.stderr


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(WRONG)), st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3)),
    min_size=1, max_size=3))
def test_any_yaml_is_taken_or_refused(values):
    try:
        config = TrainConfig(**values)
    except OptionError as e:
        assert any(f'--{name.replace("_", "-")}' in str(e) for name in values)  # noqa: PT017
    else:
        assert config.epochs >= 1


def test_command_line_and_recipe(small_split, monkeypatch):
    got = []
    monkeypatch.setattr('timm_densese.training.train', got.append)
    recipe = ROOT / 'configs' / 'msld.yaml'
    assert run_cli('train', small_split, '-c', recipe, '--output', 'out', '--no-pretrained', '--lr', '2e-4',
                   '--model-kwargs', 'se_placement=stage', 'rd_channels=8', 'block_config=(2,2)').returncode == 0
    config = got[0]
    for key, value in yaml.safe_load(recipe.read_text()).items():
        if key not in ('lr', 'pretrained'):
            assert getattr(config, key) == value, key
    assert (config.lr, config.pretrained, config.data_dir) == (2e-4, False, str(small_split))
    assert config.model_kwargs == {'se_placement': 'stage', 'rd_channels': 8, 'block_config': (2, 2)}


def test_numbers_that_yaml_reads_as_text(small_split, tmp_path, monkeypatch):
    got = []
    monkeypatch.setattr('timm_densese.training.train', got.append)
    (tmp_path / 'config.yaml').write_text('lr: 1e-3\nimg_size: null\n')
    assert run_cli('train', small_split, '-c', tmp_path / 'config.yaml').returncode == 0
    assert (got[0].lr, got[0].img_size) == (.001, None)
