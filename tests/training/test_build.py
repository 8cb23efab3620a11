"""What a training is made of: folders, images and checkpoints that do not do, and the options' ways in."""
import shutil
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import SMALL_RUN, load_saved, read_summary, run_cli, run_training

from timm_densese.cli import main
from timm_densese.errors import CheckpointMismatchError, OptionError, TrainingError
from timm_densese.training import TrainConfig, train

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
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


def test_a_model_without_values_is_refused(small_split, tmp_path):
    with pytest.raises(OptionError, match='leave device out of --model-kwargs'):
        run_training(small_split, tmp_path / 'run', model_kwargs={**SMALL_RUN['model_kwargs'], 'device': 'meta'})
    assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def another(small_split, tmp_path_factory):
    """A checkpoint of another architecture."""
    output = tmp_path_factory.mktemp('another')
    run_training(small_split, output, model='resnet10t', model_kwargs={})
    return output / 'last.pth.tar'


@pytest.mark.parametrize('how', ['initial_checkpoint', 'pretrained_path'])
def test_a_checkpoint_of_another_architecture(small_split, another, tmp_path, how):
    with pytest.raises(CheckpointMismatchError, match='does not fit'):
        run_training(small_split, tmp_path / 'run', **{how: str(another)})
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_what_cannot_be_resumed(small_split, another, tmp_path):
    """Another architecture, another folder, a file without the optimizer, no checkpoint, no file, a finished run."""
    shutil.copytree(another.parent, tmp_path / 'run')
    run = tmp_path / 'run'
    saved = load_saved(run)
    torch.save(saved['state_dict'], run / 'weights.pth')
    torch.save({key: value for key, value in saved.items() if key != 'optimizer'}, run / 'no_optimizer.pth.tar')
    (run / 'text.pth').write_text('no checkpoint')
    before = {path: path.read_bytes() for path in run.iterdir()}
    own = dict(model='resnet10t', model_kwargs={})
    for file, output, options, message in (
            ('last.pth.tar', run, {}, 'is no checkpoint that this training can go on from'),
            ('last.pth.tar', tmp_path / 'other', own, rf'goes on with the run in {run}, so give --output {run}'),
            ('weights.pth', run, own, r'no state of the optimizer.*--initial-checkpoint'),
            ('no_optimizer.pth.tar', run, own, 'no state of the optimizer'),
            ('text.pth', run, own, 'is no checkpoint that'),
            ('nowhere.pth', run, own, 'there is no such file'),
    ):
        with pytest.raises(OptionError, match=f'--resume {run / file}.*{message}'):
            run_training(small_split, output, epochs=2, resume=str(run / file), **options)
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    assert not (tmp_path / 'other').exists()
    with pytest.raises(TrainingError, match=r'is finished: 1 epochs are done, and --epochs is 1.*raise --epochs'):
        run_training(small_split, run, resume=str(run / 'last.pth.tar'), **own)


@pytest.mark.slow
@pytest.mark.parametrize(('change', 'message'), [
    (lambda train: (train / 'spots').rename(train / 'zspots'), 'began with the classes spots, stripes, .* stripes, zs'),
    (lambda train: min((train / 'spots').iterdir()).unlink(), 'began with other images'),
    (lambda train: min((train / 'spots').iterdir()).rename(train / 'stripes' / 'moved.png'), 'began with other images'),
    (lambda train: shutil.copy(*sorted((train / 'spots').iterdir())[:2]), 'began with other images'),
])
def test_a_run_goes_on_with_its_images_alone(small_split, tmp_path, change, message):
    shutil.copytree(small_split, tmp_path / 'data')
    run_training(tmp_path / 'data', tmp_path / 'run')
    change(tmp_path / 'data' / 'train')
    if 'classes' in message:
        change(tmp_path / 'data' / 'val')
    with pytest.raises(OptionError, match=f'{message}.*--initial-checkpoint'):
        run_training(tmp_path / 'data', tmp_path / 'run', epochs=2, resume=str(tmp_path / 'run' / 'last.pth.tar'))
    assert len(read_summary(tmp_path / 'run')) == 1


@pytest.mark.slow
def test_a_run_goes_on_with_its_model_and_metric_alone(small_split, tmp_path):
    shutil.copytree(small_split, tmp_path / 'data')
    run_training(tmp_path / 'data', tmp_path / 'run')
    saved = load_saved(tmp_path / 'run')['args']
    before = (tmp_path / 'run' / 'args.yaml').read_bytes()
    for options, message in (
            ({'model_kwargs': {**saved.model_kwargs, 'gate_layer': 'hard_sigmoid'}}, 'model args .*hard_sigmoid'),
            ({'eval_metric': 'top1' if saved.eval_metric != 'top1' else 'loss'}, 'eval metric'),
            ({'img_size': 64}, r'input size \[3, .*\[3, 64, 64\]'),
            ({}, 'validated on')):
        if not options:
            min((tmp_path / 'data' / 'val' / 'spots').iterdir()).unlink()
        with pytest.raises(OptionError, match=f'the run began with the {message}'):
            run_training(tmp_path / 'data', tmp_path / 'run', epochs=2,
                         resume=str(tmp_path / 'run' / 'last.pth.tar'), **options)
    assert (tmp_path / 'run' / 'args.yaml').read_bytes() == before


@pytest.mark.slow
def test_a_finished_run_without_its_weights_is_not_written_over(small_split, tmp_path):
    run_training(small_split, tmp_path / 'run')
    for file in (tmp_path / 'run').glob('*.tar'):
        file.unlink()
    with pytest.raises(TrainingError, match=r'holds args.yaml, summary.csv, curves.png, which would be written over'):
        run_training(small_split, tmp_path / 'run')


def test_a_checkpoint_tells_of_itself_and_what_contradicts_it_does_not_fit(another, tmp_path):
    shutil.copytree(another.parent, tmp_path / 'run')
    args = yaml.safe_load((another.parent / 'args.yaml').read_text())
    (tmp_path / 'run' / 'args.yaml').write_text(yaml.safe_dump({**args, 'model': 'se_densenet169'}))  # of another run
    command = ['publish', str(tmp_path / 'run' / 'last.pth.tar'), 'owner/name', '--output']
    assert main([*command, str(tmp_path / 'out')]) == 0
    assert main([*command, str(tmp_path / 'out2'), '--model-kwargs', 'growth_rate=24']) == 1
    assert main([*command, str(tmp_path / 'out2'), '--model', 'se_densenet169']) == 1
    assert not (tmp_path / 'out2').exists()


@pytest.mark.parametrize(('options', 'message'), [
    (dict(output=''), '--output'),
    (dict(data_dir=''), 'folder of the images'),
    (dict(output='/dev/null/here'), '--output /dev/null/here: /dev/null is a file'),
    (dict(pretrained_path='nowhere.pth'), '--pretrained-path nowhere.pth: there is no such file'),
    (dict(initial_checkpoint='nowhere.pth'), '--initial-checkpoint nowhere.pth: there is no such file'),
    (dict(model_kwargs=dict(nope=1)), r"--model-kwargs nope=1: .*unexpected keyword argument 'nope'"),
    (dict(model_kwargs=dict(se_placement='nope')), "--model-kwargs se_placement=nope: .*'final', 'stage', 'layer'"),
    (dict(model_kwargs=dict(in_chans=1)), 'takes 1 channels, and images are read in RGB'),
    (dict(model='se_densenet264d', pretrained=True), '--model se_densenet264d.*: No pretrained weights exist'),
    (dict(img_size=8), '--img-size 8: .*too small'),
    (dict(batch_size=1, model_kwargs=dict(growth_rate=4, block_config=(2, 2, 2, 2))), '--batch-size 1: .*Give 2 or mo'),
    (dict(opt='adahessian'), '--opt adahessian: '),
    (dict(sched='wsd', epochs=2, warmup_epochs=2), '--sched wsd: .*decay_epochs'),
    (dict(model='alexnet_of_nobody'), "--model: 'alexnet_of_nobody' is no model"),
])
def test_options_that_are_refused(small_split, tmp_path, options, message):
    given = {**SMALL_RUN, 'data_dir': str(small_split), 'output': str(tmp_path / 'out'), 'epochs': 1, **options}
    with pytest.raises(OptionError, match=message) as error:
        train(TrainConfig(**given))
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_a_transformer_trains_at_the_size_that_is_asked_for(small_split, tmp_path):
    run_training(small_split, tmp_path, model='vit_tiny_patch16_224', model_kwargs=dict(depth=1), img_size=64)
    args = yaml.safe_load((tmp_path / 'args.yaml').read_text())
    assert args['input_size'] == [3, 64, 64]
    assert args['model_args'].pop('num_classes') == 2
    model = timm.create_model(args['architecture'], num_classes=2, checkpoint_path=str(tmp_path / 'last.pth.tar'),
                              **args['model_args'])
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2)


def test_a_net_with_attention_trains(small_split, tmp_path):
    run_training(small_split, tmp_path, model='with_attention', model_kwargs=dict(base='resnet10t'))
    args = yaml.safe_load((tmp_path / 'args.yaml').read_text())
    assert (args['architecture'], args['model_args']['base']) == ('with_attention', 'resnet10t')
    model = timm.create_model(
        args['architecture'], checkpoint_path=str(tmp_path / 'last.pth.tar'), **args['model_args'])
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    with pytest.raises(OptionError, match=r'--model with_attention: .*base'):
        run_training(small_split, tmp_path / 'no_base', model='with_attention', model_kwargs={})


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    dict(sched='step', decay_epochs=1),
    dict(sched='multistep', decay_milestones=[2]),
    dict(sched='tanh'),
    dict(sched='poly', decay_rate=2.),
    dict(sched='wsd'),
    dict(sched='rsqrt', warmup_epochs=1, decay_epochs=1),
    dict(sched='constant'),
])
def test_schedules(small_split, tmp_path, options):
    run_training(small_split, tmp_path, **{'epochs': 3, 'warmup_epochs': 0, 'warmup_lr': .02, 'lr': .01, **options})
    rates = [row['lr'] for row in read_summary(tmp_path)]
    expected = {'step': [.01, .001, .0001], 'multistep': [.01, .001, .001], 'constant': [.01] * 3}
    assert rates == pytest.approx(expected.get(options['sched'], sorted(rates, reverse=True)))


@pytest.mark.slow
def test_no_network_is_said_within_seconds(small_split, tmp_path, run_alone):
    start = time.monotonic()
    process = run_alone('train', small_split, '-c', ROOT / 'configs' / 'msld.yaml', '--output', tmp_path / 'run',
                        HF_ENDPOINT='http://127.0.0.1:9', HF_HOME=str(tmp_path / 'home'))
    assert process.returncode == 1
    assert 'could not be reached' in process.stderr
    assert '--no-pretrained' in process.stderr
    assert 'Traceback' not in process.stderr
    assert time.monotonic() - start < 30
    assert not (tmp_path / 'run').exists()
