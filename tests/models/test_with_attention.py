"""Attention in other nets of timm leaves them as they were until they train, and is a registered model."""
import copy
import json
import logging
import pickle
import time

import pytest
import safetensors.torch
import timm
import torch
from conftest import SMALL
from timm.models._manipulate import group_modules, group_parameters
from timm.optim import param_groups_layer_decay

from timm_densese import ATTN_LAYERS, CheckpointMismatchError, add_attention
from timm_densese.errors import ModelConfigError

# The net, its attentions, and for each a parameter of what it follows.
NETS = {
    'resnet18': ['layer1.1.bn2', 'layer2.1.bn2', 'layer3.1.bn2', 'layer4.1.bn2'],
    'regnetx_002': ['s1.b1.conv3.bn', 's2.b1.conv3.bn', 's3.b4.conv3.bn', 's4.b7.conv3.bn'],
    'convnext_atto': [f'stages.{i}.blocks.{last}.mlp.fc2' for i, last in enumerate((1, 1, 5, 1))],
    'efficientnet_b0': ['blocks.0.0.bn2', 'blocks.1.1.bn3', 'blocks.2.1.bn3', 'blocks.4.2.bn3', 'blocks.6.0.bn3'],
    'mobilenetv3_small_050': ['blocks.0.0.bn2', 'blocks.1.1.bn3', 'blocks.3.1.bn3', 'blocks.5.0.bn1'],
    'vgg11_bn': ['features.1', 'features.5', 'features.12', 'features.19', 'features.26'],
    'densenet121': [f'features.denseblock{i}.denselayer{last}.conv2' for i, last in enumerate((2, 3, 2), 1)],
}
LITTLE = {'vgg11_bn': dict(mlp_ratio=1 / 64), 'densenet121': SMALL}  # smaller than they come
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def moved(base: str, **kwargs) -> torch.nn.Module:
    """A model whose gates do something."""
    model = timm.create_model('with_attention', base=base, num_classes=5, **LITTLE.get(base, {}), **kwargs).eval()
    for site in model.attn_sites:
        torch.nn.init.normal_(model.get_submodule(site).fc2.weight, std=.1)
    return model


@pytest.mark.slow
@pytest.mark.parametrize('name', NETS)
def test_same_outputs_same_keys_and_the_rate_of_the_stage_it_follows(name):
    model = timm.create_model(name, num_classes=10, **LITTLE.get(name, {})).eval()
    plain = copy.deepcopy(model)
    assert add_attention(model) is model
    assert len(model.attn_sites) == len(NETS[name])
    assert set(plain.state_dict()) < set(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(model(IMAGE), plain(IMAGE))
        assert all(torch.equal(a, b) for a, b in zip(
            model.forward_intermediates(IMAGE, intermediates_only=True),
            plain.forward_intermediates(IMAGE, intermediates_only=True), strict=True))
    for net in (model, copy.deepcopy(model)):
        of, of_plain = (group_parameters(n, n.group_matcher(False), reverse=True) for n in (net, plain))
        for site, follows in zip(net.attn_sites, NETS[name], strict=True):
            assert {of[f'{site}.fc1.weight'], of[f'{site}.fc2.bias']} == {of[f'{follows}.weight']}
        assert {k: of[k] for k in of_plain} == of_plain
        groups = param_groups_layer_decay(net, layer_decay=.5)
        assert sum(len(g['params']) for g in groups) == len(list(net.parameters()))
        assert group_modules(net, net.group_matcher(True))


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'attn_layer'), [
    *(('test_resnet', attn_layer) for attn_layer in ATTN_LAYERS), ('vgg11_bn', 'se'), ('mobilenetv3_small_050', 'se')])
def test_steps_with_frozen_gates_are_the_plain_nets(name, attn_layer):
    torch.manual_seed(1)
    plain = timm.create_model(name, num_classes=3, **LITTLE.get(name, {}))
    model = add_attention(copy.deepcopy(plain), attn_layer)
    for n, p in model.named_parameters():
        p.requires_grad_(not n.startswith(tuple(f'{site}.' for site in model.attn_sites)))
    for net in (plain, model):
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-3, weight_decay=.05)
        torch.manual_seed(2)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net.train()(IMAGE[..., :32, :32]), torch.tensor([0, 1])).backward()
            optimizer.step()
    trained = model.state_dict()
    assert all(torch.equal(v, trained[k]) for k, v in plain.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize('name', NETS)
def test_saved_and_loaded_like_a_model_of_timm(name, tmp_path):
    model = moved(name, **({} if name in ('vgg11_bn', 'densenet121') else {'drop_path_rate': .1}))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == 'with_attention'
    base_cfg = timm.get_pretrained_cfg(name)
    for key in ('input_size', 'mean', 'std'):
        assert tuple(config['pretrained_cfg'][key]) == getattr(base_cfg, key)
    with torch.inference_mode():
        expected = model(IMAGE)
        file = str(tmp_path / 'model.safetensors')
        for loaded in (
                timm.create_model(f'local-dir:{tmp_path}', pretrained=True),
                timm.create_model('with_attention', base=name, num_classes=5, checkpoint_path=file,
                                  **LITTLE.get(name, {})),
                copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(loaded.eval()(IMAGE), expected)
        # Other classes: timm loads the rest, and what does not fit is an error also there.
        features = model.forward_features(IMAGE)
        for other in (
                timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=2),
                timm.create_model('with_attention', base=name, num_classes=2, pretrained=True,
                                  pretrained_cfg_overlay=dict(file=file, num_classes=-1), **LITTLE.get(name, {}))):
            assert torch.equal(other.eval().forward_features(IMAGE), features)
            assert other(IMAGE).shape == (2, 2)
    state_dict = safetensors.torch.load_file(file)
    del state_dict[f'{model.attn_sites[0]}.fc1.weight']
    safetensors.torch.save_file(state_dict, file)
    with pytest.raises(CheckpointMismatchError, match=r'1 missing: .*\.fc1\.weight'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=2)


def test_added_by_hand_it_is_saved_as_the_registered_model(tmp_path):
    model = add_attention(timm.create_model('resnet18', num_classes=3), 'eca').eval()
    torch.nn.init.normal_(model.layer4.se.conv.weight)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(IMAGE), model(IMAGE))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18', 'convnext_atto'])
def test_starts_from_the_bases_weights(name, tmp_path):
    base = timm.create_model(name, num_classes=5).eval()
    torch.save(base.state_dict(), tmp_path / 'base.pth')
    file = str(tmp_path / 'base.pth')
    trained = moved(name)
    trained.load_state_dict(base.state_dict())  # the gates start anew
    with torch.inference_mode():
        for model in (
                trained,
                timm.create_model('with_attention', base=name, num_classes=5, checkpoint_path=file),
                timm.create_model('with_attention', base=name, num_classes=5, pretrained=True,
                                  pretrained_cfg_overlay=dict(file=file, num_classes=5))):
            assert torch.equal(model.eval()(IMAGE), base(IMAGE))


@pytest.mark.slow
def test_a_base_with_a_tag_comes_from_the_hub(hub):
    base = timm.create_model('resnet18').eval()
    hub.put('timm/resnet18.a1_in1k', {'model.safetensors': safetensors.torch.save(base.state_dict())})
    model = timm.create_model('with_attention', base='resnet18.a1_in1k', pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(model(IMAGE), base(IMAGE))


@pytest.mark.slow
def test_arguments_go_to_the_base():
    model = timm.create_model('with_attention', base='resnet18', in_chans=1, num_classes=2, global_pool='max',
                              attn_layer='cbam', rd_ratio=1 / 8)
    assert model(IMAGE[:, :1]).shape == (2, 2)
    assert model.global_pool.pool_type == 'max'
    assert type(model.layer1.se).__name__ == 'CbamModule'
    features = timm.create_model('with_attention', base='resnet18', features_only=True, out_indices=(1, 3))
    assert [t.shape[1] for t in features(IMAGE)] == [64, 256]
    features = timm.create_model('with_attention', base='test_convnext', features_only=True)
    assert len(features(IMAGE)) == 4
    with torch.inference_mode():
        model = moved('resnet18')
        assert torch.allclose(torch.jit.script(model)(IMAGE), model(IMAGE), atol=1e-4)
        assert torch.allclose(torch.compile(model, backend='aot_eager')(IMAGE), model(IMAGE), atol=1e-4)


def test_follows_the_models_type_and_mode_and_moves_no_statistics():
    model = timm.create_model('resnet18', dtype=torch.bfloat16).train()
    state = model.bn1.running_mean.clone()
    add_attention(model, rd_channels=4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(m.training for m in model.modules())
    assert torch.equal(model.bn1.running_mean, state)
    assert model.layer1.se.fc1.out_channels == 4


def test_says_that_se_densenet_exists(caplog):
    with caplog.at_level(logging.WARNING):
        add_attention(timm.create_model('densenet121', growth_rate=8, block_config=(2, 2)))
    assert 'se_densenet121 is this network with attention' in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'reason'), [
    ('vit_tiny_patch16_224', 'no entry of its feature_info is a module with a convolution'),
    ('swin_tiny_patch4_window7_224', 'its features are NHWC'),
    ('hrnet_w18_small', 'do not pass on single feature maps'),
    ('dla34', 'would not be run once in a forward pass'),
    ('inception_v4', 'would not be run once in a forward pass'),
    ('se_densenet121', 'has an attention already'),
])
def test_no_place(name, reason):
    model = timm.create_model(name, num_classes=2)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=reason):
        add_attention(model)
    assert list(model.state_dict()) == keys
    assert model.training


@pytest.mark.parametrize('wrap', [
    lambda: torch.nn.Conv2d(3, 3, 1),
    lambda: timm.create_model('resnet18', features_only=True),
    lambda: timm.create_model('hrnet_w18_small', features_only=True),
])
def test_what_is_no_classification_model_of_timm_gets_a_message(wrap):
    with pytest.raises(ValueError, match='feature_info'):
        add_attention(wrap())


@pytest.mark.parametrize(('kwargs', 'reason'), [
    ({}, "base=''"), ({'base': 'nope'}, "base='nope'"), ({'base': 'hf-hub:timm/resnet18'}, 'is none of timm'),
    ({'base': 'with_attention'}, 'another network'), ({'base': 5}, 'base=5'),
    ({'base': 'resnet18', 'gate_layer': 'tanh'}, 'erasing the features'),
    ({'base': 'resnet18', 'attn_layer': 'squeeze'}, "'se', 'ese'"),
    ({'base': 'vit_tiny_patch16_224'}, 'no place for attention'),
])
def test_wrong_arguments(kwargs, reason):
    with pytest.raises(ValueError, match=reason):
        timm.create_model('with_attention', **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize('change', [
    {'base': 'hf-hub:owner/name'}, {'base': '../resnet18'}, {'base': 'no_such_net'}, {'checkpoint_path': '/tmp/x.pth'},
    {'num_classes': 10 ** 9}, {'layers': [10 ** 5] * 4}, {'layers': [500] * 4}, {'nope': 1}, {'device': 'cpu'},
    {'block_args': {'a': 1}}, {'features_only': True}, {'base': None},
    {'base': 'vit_tiny_patch16_224', 'depth': 10 ** 6},
    {'input_size': [20000, 32, 32]}, {'input_size': [3, 10 ** 5, 10 ** 5]}, {'input_size': ['x', 1, 1]},
])
def test_a_config_that_asks_for_more_than_a_net_is_refused_at_once(change, published):
    config = json.loads((published / 'config.json').read_text())
    where = config['pretrained_cfg'] if 'input_size' in change else config['model_args']
    config['model_args'].pop('in_chans')
    where.update(change)
    config['num_classes'] = config['model_args'].get('num_classes', 5)
    folder = published / 'changed'
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    start = time.monotonic()
    with pytest.raises(ModelConfigError):
        timm.create_model(f'local-dir:{folder}')
    assert time.monotonic() - start < 30  # a depth of a million takes days


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """A folder with a small model whose gates have moved, and its weights in other forms."""
    folder = tmp_path_factory.mktemp('published')
    model = moved('test_resnet')
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


def own_features(published):
    return timm.create_model(f'local-dir:{published}', pretrained=True).eval().forward_features(IMAGE)


@pytest.mark.slow
@torch.inference_mode()
def test_its_own_weights_by_every_way_in(published, hub):
    """Also as timm's train.py gives them, which resolves the overlay into a whole cfg; classes apart."""
    file = str(published / 'model.safetensors')
    hub.put('owner/attention', {'model.safetensors': (published / 'model.safetensors').read_bytes()})
    overlay = dict(file=file, num_classes=-1)
    resolved = timm.models.resolve_model_input_args(
        'with_attention', {}, base='test_resnet', num_classes=2, pretrained_cfg_overlay=overlay)
    net = dict(model_name='with_attention', base='test_resnet', num_classes=2)
    ways = [
        {**net, 'pretrained_cfg_overlay': overlay}, resolved, {**net, 'pretrained_cfg': overlay},
        {**net, 'pretrained_cfg': timm.models.PretrainedCfg(**overlay)},
        {**net, 'pretrained_cfg_overlay': dict(state_dict=safetensors.torch.load_file(file), num_classes=-1)},
        {**net, 'pretrained_cfg_overlay': dict(hf_hub_id='owner/attention', num_classes=-1)}]
    expected = own_features(published)
    for way in ways:
        model = timm.create_model(**way, pretrained=True).eval()
        assert torch.equal(model.forward_features(IMAGE), expected), way
        assert model.pretrained_cfg['mean'] == timm.get_pretrained_cfg('test_resnet').mean
        assert not model.pretrained_cfg.get('state_dict')
        assert timm.create_model(**way).pretrained_cfg['architecture'] == 'with_attention'  # without reading weights


def test_weights_that_do_not_fit_are_named_where_timm_would_only_log(tmp_path):
    part = {k: v for k, v in timm.create_model('test_resnet').state_dict().items() if 'layer3' not in k}
    other = timm.create_model('se_densenet121', se_placement='layer', **SMALL).state_dict()
    for base, weights, kwargs in (('test_resnet', part, {}), ('densenet121', other, SMALL)):
        torch.save(weights, tmp_path / 'weights.pth')
        with pytest.raises(CheckpointMismatchError, match=r'missing: layer3|unexpected: .*\.se\.'):
            timm.create_model('with_attention', base=base, num_classes=2, pretrained=True, **kwargs,
                              pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.pth'), num_classes=-1))


@pytest.mark.parametrize(('base', 'sites'), [
    ('regnetz_b16', ['stages.0.se', 'stages.1.se', 'stages.2.se']),  # feature_info ends in the head
    ('vovnet39a', [f'stages.{i}.blocks.se' for i in range(4)]),  # a deep stem
])
def test_entries_without_a_place_are_left_out(base, sites):
    assert timm.create_model('with_attention', base=base, device='meta').attn_sites == sites


@pytest.mark.slow
def test_what_the_base_takes_is_saved_and_loaded(tmp_path):
    tagged = timm.create_model('test_resnet', num_classes=5)
    tagged.pretrained_cfg['tag'] = 'of_somebody'
    for i, model in enumerate((
            timm.create_model('with_attention', base='test_resnet', block_args=dict(attn_layer='eca')),
            timm.create_model('with_attention', base='test_resnet', global_pool='', num_classes=0),
            add_attention(tagged))):
        timm.models.save_for_hf(model, tmp_path / str(i), safe_serialization=True)
        loaded = timm.create_model(f'local-dir:{tmp_path / str(i)}', pretrained=True)
        with torch.inference_mode():
            assert torch.equal(loaded.eval()(IMAGE), model.eval()(IMAGE))
    sized = timm.create_model('with_attention', base='coatnet_nano_rw_224', img_size=160, device='meta')
    assert len(sized.attn_sites) == 4
