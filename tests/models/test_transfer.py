"""A DenseNet's weights give an SE-DenseNet with the DenseNet's outputs, by every way timm has of loading them."""
import logging
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from conftest import MODELS, SMALL, put_on_hub, relative_error, trained_densenet

import timm_densese
from timm_densese import ATTN_LAYERS, SE_PLACEMENTS, CheckpointMismatchError

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def from_state_dict(name, state_dict, **kwargs):
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=dict(state_dict)), **kwargs).eval()


def small_pair(densenet=None, **kwargs):
    densenet = densenet or trained_densenet('densenet121', **SMALL)
    return densenet, from_state_dict('se_densenet121', densenet.state_dict(), **SMALL, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
@torch.inference_mode()
def test_same_outputs(name):
    densenet = trained_densenet(name[len('se_'):])
    near_zero = [b.min().item() < 1e-5 for n, b in densenet.named_buffers() if n.endswith('norm5.running_var')]
    assert near_zero == [True]
    image = torch.randn(2, 3, 64, 64)
    for dtype, tolerance in TOLERANCE.items():
        expected = densenet.to(dtype)(image.to(dtype))
        for placement in SE_PLACEMENTS:
            model = from_state_dict(name, densenet.state_dict(), se_placement=placement, dtype=dtype)
            assert relative_error(model(image.to(dtype)), expected) < tolerance, (dtype, placement)


@pytest.mark.parametrize('attn_layer', ATTN_LAYERS)
@pytest.mark.parametrize('gate_layer', ['sigmoid', 'hard_sigmoid'])
@torch.inference_mode()
def test_same_outputs_with_each_attention(attn_layer, gate_layer):
    densenet = trained_densenet('densenet121', dtype=torch.float64, **SMALL)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for placement in SE_PLACEMENTS:
        _, model = small_pair(
            densenet, se_placement=placement, attn_layer=attn_layer, gate_layer=gate_layer, dtype=torch.float64)
        assert relative_error(model(image), densenet(image)) < 1e-12, placement


@torch.inference_mode()
def test_random_insertion_is_what_transfer_avoids():
    densenet, model = small_pair()
    model.features.se3.fc2.reset_parameters()
    image = torch.randn(2, 3, 64, 64)
    assert relative_error(model(image), densenet(image)) > 1e-2


@torch.inference_mode()
@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_intermediate_features_are_the_densenets(placement):
    densenet, model = small_pair(se_placement=placement)
    image = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(
            model.forward_intermediates(image, intermediates_only=True),
            densenet.forward_intermediates(image, intermediates_only=True), strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_first_training_step_starts_from_the_densenets_gradients(placement):
    """In training mode too: with batch statistics, the backbone's gradients are those of the plain DenseNet."""
    densenet, model = small_pair(
        trained_densenet('densenet121', dtype=torch.float64, **SMALL), se_placement=placement, dtype=torch.float64)
    image = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for net in (densenet, model):
        net.train()
        net(image).square().sum().backward()
    ours, theirs = model.classifier.weight.grad, densenet.classifier.weight.grad
    # Batch norm's eps is not scaled with the batch's variance, hence no 1e-12 here.
    assert relative_error(ours, theirs) < 1e-3
    assert torch.equal(model.features.norm0.num_batches_tracked, densenet.features.norm0.num_batches_tracked)


@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_gradient_reaches_fc2_at_once_and_fc1_after_it(placement):
    _, model = small_pair(se_placement=placement)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)
    gates = [model.get_submodule(name) for name in model.attn_sites]
    image, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(image), labels).backward()
        grads = [(se.fc1.weight.grad.abs().max().item(), se.fc2.weight.grad.abs().max().item()) for se in gates]
        optimizer.step()
        return grads

    first = step()
    assert all(fc1 == 0 and fc2 > 0 for fc1, fc2 in first)
    assert all(se.fc2.weight.abs().max() > 0 for se in gates)
    assert all(fc1 > 0 for fc1, _ in step())


def test_every_gate_reads_one_half():
    for placement in SE_PLACEMENTS:
        _, model = small_pair(se_placement=placement)
        read = []
        for name in model.attn_sites:
            model.get_submodule(name).gate.register_forward_hook(lambda m, x, y, read=read: read.append(y))
        with torch.inference_mode():
            model(torch.randn(1, 3, 64, 64))
        assert len(read) == len(model.attn_sites)
        assert all((gate == .5).all() for gate in read)


def test_attention_without_a_starting_constant_is_loaded_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        small_pair(gate_layer='tanh')
    assert 'does not compute what the checkpoint did' in caplog.text


def test_norm_that_cannot_absorb_is_loaded_with_a_warning(caplog):
    densenet = timm.create_model('densenet121', norm_layer='layernorm2d', **SMALL)
    with caplog.at_level(logging.WARNING):
        small_pair(densenet, norm_layer='layernorm2d')
    assert 'features.se3' in caplog.text
    assert 'does not compute what the checkpoint did' in caplog.text


# Ways in.


def torchvision_names(state_dict):
    """Rename as in torchvision's first checkpoints: `norm.1` for `norm1`, and no num_batches_tracked."""
    names = {f'{kind}{i}': f'{kind}.{i}' for kind in ('norm', 'conv') for i in (1, 2)}
    renamed = {}
    for key, tensor in state_dict.items():
        parts = key.split('.')
        if len(parts) > 3 and parts[2].startswith('denselayer'):
            parts[3] = names[parts[3]]
        if parts[-1] != 'num_batches_tracked':
            renamed['.'.join(parts)] = tensor
    return renamed


@pytest.mark.parametrize('tag', ['se_densenet121.ra_in1k', 'se_densenet121.tv_in1k', 'se_densenetblur121d.ra_in1k',
                                 'se_densenet161.tv_in1k', 'se_densenet169.tv_in1k', 'se_densenet201.tv_in1k'])
@torch.inference_mode()
def test_pretrained_downloads_the_densenet_from_the_hub(tag, hub):
    name, tag = tag.split('.')
    densenet = trained_densenet(name[len('se_'):])
    repo = f'timm/{name[len("se_"):]}.{tag}'
    put_on_hub(hub, repo, densenet)
    image = torch.randn(1, 3, 64, 64)

    model = timm.create_model(f'{name}.{tag}', pretrained=True).eval()
    assert f'HEAD /{repo}/resolve/main/model.safetensors' in hub.requests
    assert relative_error(model(image), densenet(image)) < 1e-5

    # Other classes and channels, as timm adapts them.
    gray = timm.create_model(f'{name}.{tag}', pretrained=True, in_chans=1, num_classes=5).eval()
    gray_densenet = timm.create_model(
        name[len('se_'):], pretrained=True, pretrained_cfg_overlay=dict(state_dict=densenet.state_dict()),
        in_chans=1, num_classes=5).eval()
    assert gray(image[:, :1]).shape == (1, 5)
    assert relative_error(
        gray.forward_features(image[:, :1]), gray_densenet.forward_features(image[:, :1])) < 1e-5


@torch.inference_mode()
def test_features_only_keeps_the_densenets_features():
    densenet = trained_densenet('densenet121', **SMALL)
    source = dict(pretrained=True, features_only=True, out_indices=(0, 1, 2, 3), **SMALL)
    overlay = dict(state_dict=densenet.state_dict())
    image = torch.randn(1, 3, 64, 64)
    for placement in SE_PLACEMENTS:
        ours = timm.create_model(
            'se_densenet121', pretrained_cfg_overlay=dict(overlay), se_placement=placement, **source)
        theirs = timm.create_model('densenet121', pretrained_cfg_overlay=dict(overlay), **source)
        for a, b in zip(ours.eval()(image), theirs.eval()(image), strict=True):
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize('rename', [dict, torchvision_names])
@torch.inference_mode()
def test_files(rename, tmp_path):
    densenet = trained_densenet('densenet121', **SMALL)
    image = torch.randn(1, 3, 64, 64)
    state_dict = rename(densenet.state_dict())
    torch.save(state_dict, tmp_path / 'densenet.pth')
    torch.save({'state_dict': {f'module.{k}': v for k, v in state_dict.items()}}, tmp_path / 'train.pth.tar')
    safetensors.torch.save_file(state_dict, tmp_path / 'model.safetensors')
    for file in ('densenet.pth', 'train.pth.tar', 'model.safetensors'):
        file = str(tmp_path / file)
        pretrained_path = timm.create_model(
            'se_densenet121', pretrained=True, pretrained_cfg_overlay=dict(file=file), **SMALL)
        initial_checkpoint = timm.create_model('se_densenet121', checkpoint_path=file, **SMALL)
        for model in (pretrained_path, initial_checkpoint):
            assert relative_error(model.eval()(image), densenet(image)) < 1e-5


@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_own_checkpoint_loads_byte_for_byte(placement, tmp_path):
    _, model = small_pair(se_placement=placement, num_classes=7)
    for param in model.parameters():  # trained: no gate is at its start
        param.data.normal_()
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'model.safetensors')
    file = str(tmp_path / 'model.safetensors')
    ways = [
        timm.create_model('se_densenet121', checkpoint_path=file, num_classes=7, se_placement=placement, **SMALL),
        timm.create_model(
            'se_densenet121', pretrained=True, pretrained_cfg_overlay=dict(file=file, num_classes=7),
            num_classes=7, se_placement=placement, **SMALL)]
    for loaded in ways:
        state_dict = loaded.state_dict()
        assert state_dict.keys() == model.state_dict().keys()
        assert all(torch.equal(state_dict[k], v) for k, v in model.state_dict().items())


def test_loading_leaves_the_given_state_dict_as_it_is():
    densenet = trained_densenet('densenet121', **SMALL)
    state_dict = torchvision_names(densenet.state_dict())
    copies = {k: v.clone() for k, v in state_dict.items()}
    timm.create_model('se_densenet121', **SMALL).load_state_dict(state_dict, strict=False)
    assert list(state_dict) == list(copies)
    assert all(torch.equal(state_dict[k], v) for k, v in copies.items())


# Checkpoints that do not fit.


@pytest.mark.parametrize(('way', 'num_classes'), [('checkpoint_path', 1000), ('pretrained', 1000), ('pretrained', 5)])
def test_damage_is_named(way, num_classes, tmp_path):
    state_dict = timm.create_model('densenet121', **SMALL).state_dict()
    del state_dict['features.denseblock1.denselayer2.norm1.weight']
    state_dict['features.denseblock9.extra'] = torch.zeros(1)
    state_dict['features.conv0.weight'] = torch.zeros(16, 3, 3, 3)
    torch.save(state_dict, tmp_path / 'damaged.pth')
    file = str(tmp_path / 'damaged.pth')
    way = dict(checkpoint_path=file) if way == 'checkpoint_path' else dict(
        pretrained=True, pretrained_cfg_overlay=dict(file=file))
    with pytest.raises(CheckpointMismatchError) as error:
        timm.create_model('se_densenet121', num_classes=num_classes, **way, **SMALL)
    assert error.value.missing == ['features.denseblock1.denselayer2.norm1.weight']
    assert error.value.unexpected == ['features.denseblock9.extra']
    for name in ('features.denseblock1.denselayer2.norm1.weight', 'features.denseblock9.extra',
                 'features.conv0.weight ((16, 3, 3, 3), not (16, 3, 7, 7))'):
        assert name in str(error.value)


def test_another_depth_is_refused_when_num_classes_differs():
    state_dict = timm.create_model('densenet169', device='cpu').state_dict()
    with pytest.raises(CheckpointMismatchError, match=r'features\.denseblock3\.denselayer25'):
        from_state_dict('se_densenet121', state_dict, num_classes=2)


@pytest.mark.parametrize('trained', SE_PLACEMENTS)
@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_checkpoint_of_another_placement_is_refused(trained, placement):
    state_dict = timm.create_model('se_densenet121', se_placement=trained, **SMALL).state_dict()
    if trained == placement:
        from_state_dict('se_densenet121', state_dict, se_placement=placement, num_classes=3, **SMALL)
    else:
        with pytest.raises(CheckpointMismatchError, match='se_placement'):
            from_state_dict('se_densenet121', state_dict, se_placement=placement, num_classes=3, **SMALL)


def test_non_strict_loading_takes_what_fits():
    model = timm.create_model('se_densenet121', **SMALL)
    weight = torch.full_like(model.classifier.weight, 3)
    result = model.load_state_dict({'classifier.weight': weight}, strict=False)
    assert torch.equal(model.classifier.weight, weight)
    assert 'features.se3.fc1.weight' in result.missing_keys


def test_missing_repository_is_an_error(hub):
    assert 'timm/nothing' not in hub.repos
    with pytest.raises(Exception, match=r'timm/nothing|Repository'):
        timm.create_model('se_densenet121', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id='timm/nothing'))


def test_untrained_variant_says_so():
    with pytest.raises(RuntimeError, match='No pretrained weights exist'):
        timm.create_model('se_densenet264d', pretrained=True)


@pytest.mark.slow
def test_offline_from_a_warm_cache(hub, tmp_path):
    """The README's first use, in a process of its own, which then goes offline."""
    put_on_hub(hub, 'timm/densenet121.cache_test', timm.create_model('densenet121'))
    code = ('import timm, timm_densese\n'
            'timm.create_model("se_densenet121", pretrained=True, '
            'pretrained_cfg_overlay=dict(hf_hub_id="timm/densenet121.cache_test"))')
    env = dict(
        HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path), PATH='', PYTHONPATH=':'.join(sys.path), HF_HUB_DISABLE_XET='1')
    for offline in ('0', '1'):
        subprocess.run([sys.executable, '-c', code], env={**env, 'HF_HUB_OFFLINE': offline}, check=True, timeout=120)
    assert sum('GET /cdn/timm/densenet121.cache_test/' in r for r in hub.requests) == 1


def test_public_names_exist():
    assert all(hasattr(timm_densese, name) for name in timm_densese.__all__)
