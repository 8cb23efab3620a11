"""Models from wherever they are: whatever can be trained can be loaded, and what would mislead is refused."""
import argparse
import json
import shutil
import sys

import pytest
import safetensors.torch
import timm
import torch
import yaml
from conftest import SMALL, put_on_hub, run_cli, run_training
from PIL import Image

from timm_densese.checkpoints import load_model
from timm_densese.cli import main
from timm_densese.errors import (
    CheckpointError,
    CheckpointFileError,
    CheckpointMismatchError,
    HubError,
    ImagesError,
    MetricsError,
    OptionError,
    UserError,
)
from timm_densese.evaluate import evaluate
from timm_densese.explain import explain
from timm_densese.predict import predict, predict_files
from timm_densese.publish import publish

NAMES = ['Measles', 'chickenpox', 'Monkeypox']  # neither in the order of ASCII nor in that of timm


def save(folder, saved=None, args=None, name='a.pth', arch='resnet10t', **kwargs):
    """A checkpoint of a small net, by default a bare state dict, with what lies beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    net = timm.create_model(arch, **{'num_classes': 3, **kwargs}).eval()
    torch.save(net.state_dict() if saved is None else saved(net.state_dict()), folder / name)
    if args:
        (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    return folder / name, net


def same_weights(loaded, net):
    own = loaded.model.state_dict()
    return list(own) == list(net.state_dict()) and all(torch.equal(v, own[k]) for k, v in net.state_dict().items())


# Files as people have them.


@pytest.mark.parametrize('wrap', [
    lambda weights: weights,
    lambda weights: {'state_dict': {f'module.{k}': v for k, v in weights.items()}, 'epoch': 3},
    lambda weights: {'model_state_dict': weights, 'optimizer_state_dict': {}, 'loss': .5},
    lambda weights: {'state_dict': {f'model.{k}': v for k, v in weights.items()}, 'pytorch-lightning_version': '2.4'},
    lambda weights: {'state_dict': {**{f'net.model.{k}': v for k, v in weights.items()}, 'loss.weight': torch.ones(3)}},
    lambda weights: {'state_dict': {k: v * 0 for k, v in weights.items()}, 'state_dict_ema': weights},
    lambda weights: {'state_dict': weights, 'state_dict_ema': {}},
    lambda weights: {f'_orig_mod.{k}': v for k, v in weights.items()},
])
def test_wrappers_and_prefixes(wrap, tmp_path):
    file, net = save(tmp_path, wrap)
    assert same_weights(load_model(str(file), 'cpu', architecture='resnet10t'), net)


def test_two_models_in_one_file_are_not_guessed_at(tmp_path):
    file, _ = save(tmp_path, lambda weights: {'state_dict': {
        f'{prefix}.{k}': v.clone() for prefix in ('student', 'teacher') for k, v in weights.items()}})
    with pytest.raises(CheckpointError, match=r'several models: student\., teacher\.'):
        load_model(str(file), architecture='resnet10t')


@pytest.mark.slow
def test_safetensors_with_its_config_and_without(trained, tmp_path):
    publish(trained[1], 'owner/name', output=tmp_path / 'published')
    expected, image = load_model(str(trained[1]), 'cpu'), torch.randn(1, 3, 32, 32)
    found = load_model(str(tmp_path / 'published' / 'model.safetensors'), 'cpu')
    with torch.inference_mode():
        assert torch.equal(found.model(image), expected.model(image))
    assert found.class_names == ['spots', 'stripes']
    assert found.hash_weights() == expected.hash_weights()
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in found.data_config.items()} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in expected.data_config.items()}

    moved = shutil.copy(tmp_path / 'published' / 'model.safetensors', tmp_path / 'moved.safetensors')
    with pytest.raises(CheckpointError, match='--model'):
        load_model(str(moved))
    kwargs = dict(SMALL, se_placement='stage')
    assert load_model(str(moved), architecture='se_densenet121', model_kwargs=kwargs).model.num_classes == 2
    (tmp_path / 'broken.safetensors').write_bytes(b'\xff' * 20)
    with pytest.raises(CheckpointFileError, match='damaged'):
        load_model(str(tmp_path / 'broken.safetensors'))


@pytest.mark.slow
@pytest.mark.parametrize(('arch', 'kwargs'), [
    ('resnet10t', {'drop_path_rate': .1}),
    ('vit_tiny_patch16_224', {'img_size': 32, 'depth': 2}),
    ('levit_128s', {'img_size': 64}),  # two classifiers
    ('densenet121', SMALL),  # the plain baseline
])
def test_any_architecture_is_used_and_published(arch, kwargs, tmp_path):
    file, net = save(tmp_path / 'run', lambda weights: {'state_dict': weights, 'arch': arch}, args={
        'model': arch, 'model_kwargs': {k: list(v) if isinstance(v, tuple) else v for k, v in kwargs.items()},
        'class_names': NAMES}, arch=arch, **kwargs)
    loaded = load_model(str(file), 'cpu')
    assert same_weights(loaded, net)
    (tmp_path / 'images' / 'Monkeypox').mkdir(parents=True)
    Image.new('RGB', (40, 30), (200, 30, 30)).save(tmp_path / 'images' / 'Monkeypox' / 'a.png')
    rows = predict(loaded, [str(tmp_path / 'images')])
    assert {p['class'] for p in rows[0]['predictions']} == set(NAMES)
    explain(loaded, [str(tmp_path / 'images')], tmp_path / 'explained')
    publish(file, 'owner/name', output=tmp_path / 'published')
    again = load_model(f'local-dir:{tmp_path / "published"}', 'cpu')
    assert (again.hash_weights(), again.class_names) == (loaded.hash_weights(), NAMES)
    assert predict(again, [str(tmp_path / 'images')]) == rows
    card = (tmp_path / 'published' / 'README.md').read_text()
    assert f'`{arch}`' in card
    assert 'squeeze-and-excitation' not in card


@pytest.mark.slow
def test_what_started_from_a_folder_is_used_without_it(trained, tmp_path):
    publish(trained[1], 'owner/name', output=tmp_path / 'published')
    run_training(trained[0], tmp_path / 'run', model=f'local-dir:{tmp_path / "published"}', pretrained=True,
                 model_kwargs={})
    shutil.rmtree(tmp_path / 'published')
    checkpoint = shutil.move(tmp_path / 'run' / 'last.pth.tar', tmp_path / 'moved.pth.tar')
    loaded = load_model(str(checkpoint), 'cpu')
    assert loaded.class_names == ['spots', 'stripes']
    assert loaded.model.attn_sites
    publish(checkpoint, 'owner/again', output=tmp_path / 'again')
    # Of an older run, which did not record what the name stands for.
    saved = torch.load(checkpoint, weights_only=False)
    del saved['args'].architecture
    torch.save(saved, checkpoint)
    with pytest.raises(CheckpointError, match=r'was trained from .*not there'):
        load_model(str(checkpoint))


def test_models_of_a_module_of_the_users(tmp_path, monkeypatch):
    (tmp_path / 'my_nets.py').write_text(
        'import timm\n'
        'from timm.models import register_model\n'
        '@register_model\n'
        'def my_net(pretrained=False, **kwargs):\n'
        '    return timm.create_model("resnet10t", **{k: v for k, v in kwargs.items() if k == "num_classes"})\n')
    save(tmp_path, lambda weights: {'state_dict': weights, 'arch': 'my_net',
                                    'args': argparse.Namespace(model='my_net', class_names=NAMES, num_classes=3)})
    Image.new('RGB', (40, 30)).save(tmp_path / 'a.png')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    assert run_cli('predict', 'a.pth', 'a.png').returncode == 1
    result = run_cli('predict', 'a.pth', 'a.png', '--device-modules', 'my_nets', '--json')
    assert result.returncode == 0, result.stderr
    assert 'Monkeypox' in result.stdout
    result = run_cli('predict', 'a.pth', 'a.png', '--device-modules', 'no_such_nets')
    assert "'no_such_nets' cannot be imported" in result.stderr


def test_grey(tmp_path):
    file, net = save(tmp_path / 'run', args={'model': 'resnet10t', 'in_chans': 1, 'img_size': 32,
                                             'class_names': NAMES}, in_chans=1)
    Image.new('RGB', (32, 32), (250, 0, 0)).save(tmp_path / 'a.png')
    loaded = load_model(str(file), 'cpu')
    assert loaded.data_config['input_size'] == (1, 32, 32)
    row, = predict(loaded, [str(tmp_path / 'a.png')])
    grey = round(.299 * 250) / 255
    image = torch.full((1, 1, 32, 32), (grey - loaded.data_config['mean'][0]) / loaded.data_config['std'][0])
    with torch.inference_mode():
        expected = net(image).softmax(1)[0].sort(descending=True).values
    assert [p['probability'] for p in row['predictions']] == pytest.approx(expected.tolist(), rel=1e-3)
    explain(loaded, [str(tmp_path / 'a.png')], tmp_path / 'explained')
    publish(file, 'owner/grey', output=tmp_path / 'published')
    five, _ = save(tmp_path / 'five', args={'model': 'resnet10t', 'class_names': NAMES}, in_chans=5)
    with pytest.raises(CheckpointError, match='takes 5 channels'):
        predict(str(five), [str(tmp_path / 'a.png')])


@pytest.mark.slow
def test_training_refuses_what_it_could_not_feed(small_split, tmp_path):
    with pytest.raises(OptionError, match='takes 1 channels'):
        run_training(small_split, tmp_path / 'run', model_kwargs=dict(SMALL, in_chans=1))
    assert not (tmp_path / 'run').exists()


# What would mislead.


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_no_numbers_are_named(value, tmp_path):
    file, _ = save(tmp_path, lambda weights: {**weights, 'fc.bias': weights['fc.bias'] * value})
    with pytest.raises(CheckpointError, match=r'not numbers.*: fc\.bias\.'):
        load_model(str(file), architecture='resnet10t')


def test_outputs_that_are_no_numbers_are_refused(tmp_path):
    file, _ = save(tmp_path, lambda weights: {**weights, 'fc.weight': weights['fc.weight'] * 1e38 * 1e3})
    Image.new('RGB', (32, 32), (250, 0, 0)).save(tmp_path / 'a.png')
    with pytest.raises(CheckpointError, match=r'no numbers|not numbers'):
        predict(load_model(str(file), architecture='resnet10t'), [str(tmp_path / 'a.png')])


def test_one_output_is_refused(tmp_path):
    file, _ = save(tmp_path, num_classes=1)
    with pytest.raises(CheckpointError, match='has 1 output'):
        load_model(str(file), architecture='resnet10t')


def test_class_names_travel_with_the_checkpoint(trained, tmp_path):
    moved = tmp_path / 'moved.pth.tar'
    saved = torch.load(trained[1], weights_only=False)
    saved['args'].data_dir = '/not/on/this/machine'
    torch.save(saved, moved)
    assert load_model(str(moved), 'cpu').label_names == ['spots', 'stripes']
    # The args.yaml of another run beside it is another run's.
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump({'model': 'resnet18', 'class_names': ['x', 'y']}))
    assert load_model(str(moved), 'cpu').label_names == ['spots', 'stripes']
    with pytest.raises(CheckpointError, match='recorded'):
        load_model(str(moved), class_names=['stripes', 'spots'])


def test_an_order_that_is_not_known_is_asked_for(trained, tmp_path, capsys):
    """As timm's train.py leaves it: no names, and its data elsewhere."""
    saved = torch.load(trained[1], weights_only=False)
    for name in ('class_names', 'architecture', 'model_args'):
        delattr(saved['args'], name)
    saved['args'].data_dir = '/not/on/this/machine'
    torch.save(saved, tmp_path / 'timm.pth.tar')
    model = str(tmp_path / 'timm.pth.tar')
    with pytest.raises(ImagesError, match=r'--class-names in the order.*spots stripes'):
        evaluate(model, trained[0], tmp_path / 'a', resamples=2, workers=0)
    image = str(min((trained[0] / 'test' / 'spots').iterdir()))
    assert main(['predict', model, image]) == 0
    assert 'names are not known' in capsys.readouterr().err
    (tmp_path / 'names.txt').write_text('spots\nstripes\n')
    for names in (['spots', 'stripes'], [str(tmp_path / 'names.txt')]):
        assert main(['predict', model, image, '--class-names', *names]) == 0
        assert 'spots' in capsys.readouterr().out.split('  ', 1)[1]
    with pytest.raises(CheckpointError, match='--class-names are 1'):
        load_model(model, class_names=['spots'])
    assert load_model(model, data=trained[0]).label_names == ['spots', 'stripes']
    # Other readers than timm's of folders, and class maps, have orders of their own.
    for name, value in (('dataset', 'torch/folder'), ('class_map', 'classes.txt')):
        saved['args'].data_dir = str(trained[0])
        setattr(saved['args'], name, value)
        torch.save(saved, tmp_path / 'other.pth.tar')
        assert not load_model(str(tmp_path / 'other.pth.tar')).label_names
        with pytest.raises(CheckpointError, match=f'does not tell the order .*{value}.*--class-names'):
            load_model(str(tmp_path / 'other.pth.tar'), data=trained[0])
        delattr(saved['args'], name)
    saved['args'].data_dir = '/not/on/this/machine'
    # Where the folder that it was trained on is there, its order is timm's: natural, without case.
    for name in ('b10', 'B9'):
        (tmp_path / 'data' / 'Train' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'data' / 'Train' / name / 'a.png')
    saved['args'].data_dir, saved['args'].train_split = str(tmp_path / 'data'), 'Train'
    torch.save(saved, tmp_path / 'timm.pth.tar')
    assert load_model(model).label_names == ['B9', 'b10']


def test_arguments_that_do_not_fit_say_so(tmp_path):
    file, _ = save(tmp_path)
    with pytest.raises(CheckpointError, match=r"resnet10t with .*nope.*cannot be created"):
        load_model(str(file), architecture='resnet10t', model_kwargs={'nope': 1})
    with pytest.raises(CheckpointMismatchError, match='of another shape'):
        load_model(str(file), architecture='resnet10t', model_kwargs={'stem_width': 64})
    with pytest.raises(CheckpointError, match=r"Which model is .*--model"):
        load_model(str(file))
    with pytest.raises(CheckpointError, match=r'holds no head\.weight or no patch_embed'):
        load_model(str(file), architecture='vit_tiny_patch16_224')
    for name, hint in (('se_densnet121', 'se_densenet121'), ('C:\\models\\best.pth', 'no file and no model'),
                       ('s3:bucket/x', 'no file and no model')):
        with pytest.raises(UserError, match=hint):
            load_model(name)
    (tmp_path / 'args.yaml').write_text('lr: [\n')
    with pytest.raises(CheckpointFileError, match=r'args\.yaml cannot be read'):
        load_model(str(file))


@pytest.mark.slow
@pytest.mark.parametrize(('recorded', 'said'), [
    ({'model_kwargs': 3}, 'model_kwargs is recorded as 3'),
    ({'class_names': 'abc'}, 'class_names is recorded as .abc'),
    ({'class_names': ['a', 'b', 'a']}, 'a name twice: a, b, a'),
    ({'data_dir': 5}, 'data_dir is recorded as 5'),
    ({'img_size': 'large'}, r"'img_size': 'large'.*prepares no image"),
    ({'input_size': [3, 20000, 20000]}, '20000 numbers'),
    ({'interpolation': 'nearly'}, 'prepares no image'),
    ({'crop_pct': -1.}, 'prepares no image'),
    ({'std': [0, 0, 0]}, 'prepares no image'),
])
def test_what_a_run_recorded_is_of_the_kind_that_runs_write(recorded, said, tmp_path):
    file, _ = save(tmp_path, args={'model': 'resnet10t', **recorded})
    with pytest.raises(CheckpointFileError, match=said):
        load_model(str(file))


@pytest.mark.parametrize('config', [[], {'architecture': 'resnet10t', 'model_args': [1]}])
def test_a_config_that_is_none(config, tmp_path):
    safetensors.torch.save_file(timm.create_model('resnet10t').state_dict(), tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(CheckpointFileError, match=r'config\.json cannot be read'):
        load_model(str(tmp_path / 'model.safetensors'))


def test_class_names_are_read_from_any_text_file(tmp_path):
    file, _ = save(tmp_path)
    Image.new('RGB', (32, 32)).save(tmp_path / 'a.png')
    (tmp_path / 'names.txt').write_bytes('\ufeff水痘\r\n麻疹\r\n 猴痘 \r\n\r\n'.encode())
    result = run_cli('predict', file, tmp_path / 'a.png', '--model', 'resnet10t', '--class-names',
                     tmp_path / 'names.txt', '--json')
    found = {p['class'] for p in json.loads(result.stdout)['predictions'][0]['predictions']}
    assert found == {'水痘', '麻疹', '猴痘'}


def test_two_classes_of_one_name_are_refused(small_split, tmp_path):
    file, _ = save(tmp_path)
    with pytest.raises(OptionError, match="'spots' more than once"):
        load_model(str(file), architecture='resnet10t', class_names=['spots', 'stripes', 'spots'])
    loaded = load_model(str(file), architecture='resnet10t')._replace(label_names=['spots', 'stripes', 'spots'])
    with pytest.raises(ImagesError, match='two outputs of the name spots'):
        evaluate(loaded, small_split, tmp_path / 'report')


@pytest.mark.parametrize(('of', 'options', 'said'), [
    ('se_densenet121', {'model_kwargs': {'se_placement': 'layer'}}, 'se_densenet121 is none'),
    ('hf-hub:owner/name', {'architecture': 'resnet18'}, 'hf-hub:owner/name is none'),
    ('densenet121.nope', {}, "no tag 'nope'; choose one of"),
    ('hf-hub:', {}, 'names no repository: give hf-hub:OWNER/NAME'),
    ('hf_hub:a/b/c', {}, 'names no repository: give hf_hub:OWNER/NAME'),
])
def test_names_that_are_none_and_options_that_would_be_ignored(of, options, said):
    with pytest.raises(OptionError, match=said):
        load_model(of, **options)


def test_a_model_that_is_no_name_is_that_options_error(tmp_path):
    file, _ = save(tmp_path)
    result = run_cli('predict', file, file, '--model', 'resnet10')
    assert result.returncode == 2
    assert "--model: 'resnet10' is no model" in result.stderr
    assert 'resnet10t' in result.stderr


def test_a_hub_that_is_not_there_is_told_at_once(monkeypatch):
    monkeypatch.setattr('timm_densese.hub.hf_hub_url', lambda *args: 'http://127.0.0.1:9/x')
    with pytest.raises(HubError, match='could not be reached and the cache does not have it'):
        load_model('hf-hub:owner/not-in-the-cache')


# Scores belong to a model.


@pytest.mark.slow
def test_another_models_scores_are_refused(trained, tmp_path):
    evaluate(str(trained[1]), trained[0], tmp_path / 'report', resamples=2, workers=0)
    metrics = tmp_path / 'report' / 'metrics.json'
    other = tmp_path / 'other.pth.tar'
    saved = torch.load(trained[1], weights_only=False)
    saved['state_dict_ema']['classifier.bias'] += .01
    torch.save(saved, other)
    image = [str(min((trained[0] / 'test' / 'spots').iterdir()))]
    publish(trained[1], 'owner/name', metrics=metrics, output=tmp_path / 'published')
    assert predict_files(str(trained[1]), image, calibration=metrics) == 0
    assert predict_files(f'local-dir:{tmp_path / "published"}', image, calibration=metrics) == 0
    with pytest.raises(MetricsError, match='other weights'):
        predict_files(str(other), image, calibration=metrics)
    with pytest.raises(MetricsError, match='other weights'):
        publish(other, 'owner/other', metrics=metrics, output=tmp_path / 'other')
    assert not (tmp_path / 'other').exists()


def test_hash_is_of_the_weights(tmp_path):
    file, net = save(tmp_path, lambda weights: {'state_dict': weights})
    safetensors.torch.save_file(net.state_dict(), tmp_path / 'b.safetensors')
    first, second = (load_model(str(f), 'cpu', architecture='resnet10t') for f in (file, tmp_path / 'b.safetensors'))
    assert first.hash_weights() == second.hash_weights()
    with torch.no_grad():
        first.model.bn1.running_mean[0] += 1e-6
    assert first.hash_weights() != second.hash_weights()


def test_outputs_of_one_name_are_told_apart(hub):
    """ImageNet has two cranes."""
    put_on_hub(hub, 'timm/densenet121.ra_in1k', timm.create_model('densenet121'))
    names = load_model('se_densenet121', 'cpu').label_names
    assert (names[134], names[517]) == ('crane (134)', 'crane (517)')
    assert len(set(names)) == 1000
