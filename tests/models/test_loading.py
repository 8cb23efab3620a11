"""A DenseNet's weights give an SE-DenseNet with the DenseNet's outputs, by every way timm has of loading them."""
import copy
import pickle

import pytest
import safetensors.torch
import timm
import torch
from conftest import MODELS, SMALL, put_on_hub, relative_error, trained_densenet

import timm_densese
from timm_densese import ATTN_LAYERS, GATE_LAYERS, SE_PLACEMENTS, CheckpointMismatchError


def from_state_dict(name, state_dict, **kwargs):
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=dict(state_dict)), **kwargs).eval()


def small_pair(densenet=None, **kwargs):
    densenet = densenet or trained_densenet('densenet121', **SMALL)
    return densenet, from_state_dict('se_densenet121', densenet.state_dict(), **SMALL, **kwargs)


def step(net, image):
    """Outputs in training mode, which also move the running statistics."""
    torch.manual_seed(0)
    return net.train()(image)


def assert_same_in_each_dtype(model, densenet, image, placement):
    """Bit for bit; the DenseNet ends in float32, rounded to bfloat16."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        densenet.to(dtype)
        model.to(dtype)
        assert torch.equal(model.eval()(image.to(dtype)), densenet.eval()(image.to(dtype))), (dtype, placement)
        assert torch.equal(step(model, image.to(dtype)), step(densenet, image.to(dtype))), (dtype, placement)
    densenet.to(torch.float32)


# The same outputs and the same training.


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
@torch.inference_mode()
def test_same_outputs_to_the_bit(name):
    """Depth 121 whole, of the others two layers a block: those with weights are loaded whole from the Hub, below."""
    kwargs = {} if name == 'se_densenet121' else {'block_config': (2, 2, 2, 2)}
    densenet = trained_densenet(name[len('se_'):], **kwargs)
    image = torch.randn(2, 3, 64, 64)
    for placement in SE_PLACEMENTS:
        model = from_state_dict(name, densenet.state_dict(), se_placement=placement, **kwargs)
        assert_same_in_each_dtype(model, densenet, image, placement)


@pytest.mark.slow
@pytest.mark.parametrize('attn_layer', ATTN_LAYERS)
@pytest.mark.parametrize('gate_layer', GATE_LAYERS)
@torch.inference_mode()
def test_same_outputs_with_each_attention(attn_layer, gate_layer):
    image = torch.randn(2, 3, 64, 64)
    densenet = trained_densenet('densenet121', **SMALL)
    for placement in SE_PLACEMENTS:
        _, model = small_pair(densenet, se_placement=placement, attn_layer=attn_layer, gate_layer=gate_layer)
        assert_same_in_each_dtype(model, densenet, image, placement)


@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_in_linear_memory_and_fused_as_close_as_the_densenet_is_to_itself(placement):
    densenet, model = small_pair(se_placement=placement)
    # The DenseNet under the same execution: 'final' with its attention taken out.
    _, bare = small_pair(densenet)
    bare.features.se3 = torch.nn.Identity()
    image = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        expected = densenet(image)
        own = relative_error(timm.models.reparameterize_model(bare)(image), expected)
        assert relative_error(timm.models.reparameterize_model(model)(image), expected) <= max(2 * own, 1e-6)
    for net in (densenet, bare, model):
        net.train()
    for net in (bare, model):
        net.set_grad_checkpointing()
    expected = densenet(image).detach()
    own = relative_error(bare(image).detach(), expected)
    assert relative_error(model(image).detach(), expected) <= max(2 * own, 1e-6)


OPTIMIZERS = {
    'sgd': lambda params: torch.optim.SGD(params, .05, momentum=.9),
    'adamw': lambda params: torch.optim.AdamW(params, 1e-3, weight_decay=.05),
}


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize(('placement', 'attn_layer'), [
    *((placement, 'se') for placement in SE_PLACEMENTS), *(('layer', attn_layer) for attn_layer in ATTN_LAYERS[1:])])
def test_ten_steps_with_frozen_gates_are_the_densenets(placement, attn_layer, optimizer):
    densenet, model = small_pair(se_placement=placement, attn_layer=attn_layer, num_classes=1000)
    for name, param in model.named_parameters():
        param.requires_grad_(not name.startswith(tuple(f'{site}.' for site in model.attn_sites)))
    images, labels = torch.randn(10, 4, 3, 32, 32), torch.randint(1000, (10, 4))
    for net in (densenet, model):
        net.train()
        optimize = OPTIMIZERS[optimizer]([p for p in net.parameters() if p.requires_grad])
        for image, label in zip(images, labels, strict=True):
            optimize.zero_grad()
            torch.nn.functional.cross_entropy(net(image), label).backward()
            optimize.step()
    trained = model.state_dict()
    assert all(torch.equal(tensor, trained[key]) for key, tensor in densenet.state_dict().items())


@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_gradient_reaches_fc2_at_once_and_fc1_after_it(placement):
    _, model = small_pair(se_placement=placement)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)
    gates = [model.get_submodule(name) for name in model.attn_sites]
    image, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])

    def grads():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(image), labels).backward()
        found = [(se.fc1.weight.grad.abs().max().item(), se.fc2.weight.grad.abs().max().item()) for se in gates]
        optimizer.step()
        return found

    assert all(fc1 == 0 and fc2 > 0 for fc1, fc2 in grads())
    assert all(se.fc2.weight.abs().max() > 0 for se in gates)
    assert all(fc1 > 0 for fc1, _ in grads())


@torch.inference_mode()
def test_random_gates_are_what_the_start_avoids():
    densenet, model = small_pair()
    model.features.se3.fc2.reset_parameters()
    image = torch.randn(2, 3, 64, 64)
    assert relative_error(model(image), densenet(image)) > 1e-2


@torch.inference_mode()
@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_intermediate_features_are_the_densenets(placement):
    densenet, model = small_pair(se_placement=placement)
    image = torch.randn(1, 3, 64, 64)
    for ours, expected in zip(
            model.forward_intermediates(image, intermediates_only=True),
            densenet.forward_intermediates(image, intermediates_only=True), strict=True):
        assert torch.equal(ours, expected)


# Loading into something else than a fresh model of its own.


def trained_gates(placement='stage', **kwargs):
    """A model whose gates have moved."""
    model = timm.create_model('se_densenet121', se_placement=placement, **SMALL, **kwargs)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=.1)
    return model.eval()


@torch.inference_mode()
def test_with_strict_false_and_keys_of_other_tools():
    densenet = trained_densenet('densenet121', **SMALL)
    image = torch.randn(2, 3, 64, 64)
    # thop leaves counts in every module, timm's train.py drops another classifier.
    counts = {f'{name}.total_ops'.lstrip('.'): torch.zeros(1) for name, _ in densenet.named_modules()}
    for stray in ({}, {'total_ops': torch.zeros(1)}, counts):
        model = trained_gates()
        result = model.load_state_dict({**densenet.state_dict(), **stray}, strict=False)
        assert set(result.unexpected_keys) == set(stray)
        assert result.missing_keys == []
        assert torch.equal(model(image), densenet(image))
    # Another first convolution, as with other channels: the rest is the DenseNet's, and so the gates start anew.
    model = trained_gates()
    model.load_state_dict({k: v for k, v in densenet.state_dict().items() if 'conv0' not in k}, strict=False)
    assert all(model.get_submodule(site).fc2.weight.abs().max() == 0 for site in model.attn_sites)
    body = {k: v for k, v in densenet.state_dict().items() if 'classifier' not in k}
    model = trained_gates()
    model.load_state_dict(body, strict=False)
    assert torch.equal(model.forward_features(image), densenet.forward_features(image))


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('wrap', [
    lambda model: torch.nn.ModuleDict({'net': model}), lambda model: torch.nn.ModuleDict({'net': Parent(model)}),
    torch.nn.DataParallel, torch.compile])
@torch.inference_mode()
def test_as_a_child_of_another_module(wrap, strict):
    densenet = trained_densenet('densenet121', **SMALL)
    model, other = trained_gates(), trained_gates()
    image = torch.randn(2, 3, 64, 64)
    parent = wrap(model)
    prefix = next(n for n, m in parent.named_modules() if m is model) + '.'
    parent.load_state_dict({prefix + k: v for k, v in torchvision_names(densenet.state_dict()).items()}
                           if not strict else {prefix + k: v for k, v in densenet.state_dict().items()}, strict=strict)
    assert torch.equal(model(image), densenet(image))
    parent.load_state_dict({prefix + k: v for k, v in other.state_dict().items()}, strict=strict)
    assert torch.equal(model(image), other(image))


class Parent(torch.nn.Module):
    def __init__(self, child):
        super().__init__()
        self.body = child


@torch.inference_mode()
def test_into_a_copy_and_a_pickled_model():
    densenet = trained_densenet('densenet121', **SMALL)
    image = torch.randn(2, 3, 64, 64)
    for model in (copy.deepcopy(trained_gates()), pickle.loads(pickle.dumps(trained_gates()))):
        model.load_state_dict(densenet.state_dict())
        assert torch.equal(model(image), densenet(image))


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('attn_layer', ATTN_LAYERS)
@torch.inference_mode()
def test_onto_the_meta_device_with_assign(attn_layer, dtype):
    densenet = trained_densenet('densenet121', **SMALL).to(dtype)
    image = torch.randn(2, 3, 64, 64).to(dtype)
    for placement in SE_PLACEMENTS:
        model = timm.create_model(
            'se_densenet121', device='meta', se_placement=placement, attn_layer=attn_layer, **SMALL)
        state = torch.random.get_rng_state()
        model.load_state_dict(densenet.state_dict(), assign=True)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(model.eval()(image), densenet(image))
    site = model.get_submodule(model.attn_sites[0])
    others = [p for n, p in site.named_parameters() if p.dim() > 1]
    assert any(p.abs().max() > 0 for p in others) or attn_layer in ('ese', 'eca', 'ceca', 'strip')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_half_precision_files(dtype, tmp_path):
    densenet = trained_densenet('densenet121', **SMALL)
    halves = {k: v.to(dtype) if v.is_floating_point() else v for k, v in densenet.state_dict().items()}
    densenet.load_state_dict(halves)
    safetensors.torch.save_file(halves, tmp_path / 'half.safetensors')
    image = torch.randn(2, 3, 64, 64)
    for placement in SE_PLACEMENTS:
        model = timm.create_model('se_densenet121', se_placement=placement, pretrained=True, **SMALL,
                                  pretrained_cfg_overlay=dict(file=str(tmp_path / 'half.safetensors')))
        assert torch.equal(model.eval()(image), densenet(image))
        assert {p.dtype for p in model.parameters()} == {torch.float32}


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


@pytest.mark.slow
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
    assert torch.equal(model(image), densenet(image))

    # Other classes and channels, as timm adapts them.
    gray = timm.create_model(f'{name}.{tag}', pretrained=True, in_chans=1, num_classes=5).eval()
    gray_densenet = timm.create_model(
        name[len('se_'):], pretrained=True, pretrained_cfg_overlay=dict(state_dict=densenet.state_dict()),
        in_chans=1, num_classes=5).eval()
    assert gray(image[:, :1]).shape == (1, 5)
    assert torch.equal(gray.forward_features(image[:, :1]), gray_densenet.forward_features(image[:, :1]))


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
            assert torch.equal(a, b)


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
            assert torch.equal(model.eval()(image), densenet(image))


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


@pytest.mark.slow
def test_untrained_variant_says_so():
    with pytest.raises(RuntimeError, match='No pretrained weights exist'):
        timm.create_model('se_densenet264d', pretrained=True)


def test_public_names_exist():
    assert all(hasattr(timm_densese, name) for name in timm_densese.__all__)
