"""A block in linear memory steps aside for what is not exactly timm's."""
import copy
import importlib.util
from types import MethodType

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import relative_error
from nets import (
    Double,
    Plus,
    aside,
    assert_same_step,
    blocks,
    blocks_are_memory_efficient,
    create,
    images,
    pair,
    step,
    trained,
)
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models import densenet, reparameterize_model
from torch.nn.utils.parametrize import register_parametrization

from timm_densese.models import plain as plain_module


def dense(model):
    return model.features.denseblock1.denselayer1


def forward(conv, x):
    return nn.Conv2d.forward(conv, x) + 1


def bottleneck_fn(layer, xs):
    return 2 * densenet.DenseLayer.bottleneck_fn(layer, xs)


def eval_norms(model):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()


def instead(model, name, kind=nn.Conv2d, **kwargs):
    conv = getattr(dense(model), name)
    kwargs = {'kernel_size': conv.kernel_size, 'padding': conv.padding, 'bias': False, **kwargs}
    setattr(dense(model), name, kind(conv.in_channels, conv.out_channels, dtype=torch.float64, **kwargs))


# What somebody may do to a layer of the first block.
OTHERS = {
    'frozen norms': lambda m: freeze_batch_norm_2d(dense(m)),
    'norms in eval': eval_norms,
    'one norm in eval': lambda m: dense(m).norm2.eval(),
    'another eps': lambda m: setattr(m.features.denseblock1.denselayer2.norm1, 'eps', 1e-3),
    'no running statistics': lambda m: setattr(dense(m).norm1, 'track_running_stats', False),
    'activation': lambda m: setattr(dense(m).norm1, 'act', nn.SiLU()),
    'dropped norm': lambda m: setattr(dense(m).norm2, 'drop', nn.Hardtanh()),
    'layernorm': lambda m: setattr(dense(m), 'norm1', timm.layers.LayerNorm2d(16, dtype=torch.float64)),
    'bias': lambda m: instead(m, 'conv1', bias=True),
    'subclass': lambda m: instead(m, 'conv2', Plus),
    'reflect': lambda m: instead(m, 'conv2', padding_mode='reflect'),
    'dilation': lambda m: instead(m, 'conv2', padding=2, dilation=2),
    'wrapped': lambda m: setattr(dense(m), 'conv2', nn.Sequential(dense(m).conv2, nn.Tanh())),
    'parametrization': lambda m: register_parametrization(dense(m).conv1, 'weight', Double()),
    'spectral norm': lambda m: nn.utils.spectral_norm(dense(m).conv2),
    'forward': lambda m: setattr(dense(m).conv1, 'forward', MethodType(forward, dense(m).conv1)),
    'part of it': lambda m: setattr(dense(m), 'bottleneck_fn', MethodType(bottleneck_fn, dense(m))),
    'another module': lambda m: dense(m).add_module('extra', nn.Identity()),
    'a child that is not called': lambda m: dense(m).add_module('se', nn.Tanh()),
    'hook': lambda m: dense(m).conv1.register_forward_hook(lambda module, args, out: out * 2),
    'pre-hook': lambda m: dense(m).norm1.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    'hook on a layer': lambda m: dense(m).register_forward_hook(lambda module, args, out: out * 2),
    'backward hook': lambda m: dense(m).register_full_backward_hook(
        lambda module, grads, out: tuple(g if g is None else g * 2 for g in grads)),
    'no checkpointing': lambda m: setattr(dense(m), 'grad_checkpointing', False),
}


def assert_steps_aside(model):
    """What is not known runs as in timm, to the last bit."""
    assert not model.features.denseblock1.is_memory_efficient(torch.randn(2, 16, 8, 8, dtype=torch.float64))
    plain = copy.deepcopy(model)
    plain.features.denseblock1.__class__ = densenet.DenseBlock
    x = images()
    (out, grads, _), (expected, expected_grads, _) = step(model, x), step(plain, x)
    assert torch.equal(out, expected)
    assert all(torch.equal(grads[n], g) for n, g in expected_grads.items())


@pytest.mark.parametrize('other', OTHERS)
def test_steps_aside_exactly(other):
    torch.manual_seed(0)
    model = aside()
    OTHERS[other](model)
    assert_steps_aside(model)


@pytest.mark.parametrize('kwargs', [{'norm_layer': 'layernorm2d'}, {'act_layer': 'silu'}], ids=str)
def test_other_norms_and_activations_step_aside(kwargs):
    assert_steps_aside(aside(**kwargs))


def test_sync_batch_norms_step_aside():
    assert not blocks_are_memory_efficient(convert_sync_batchnorm(aside()))  # they run on GPUs only


def test_hooks_of_all_modules_fire():
    model, fired = aside(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: fired.add(module))
    try:
        assert_steps_aside(model)
    finally:
        handle.remove()
    assert {m for block in blocks(model) for m in block.modules()} <= fired


def _sine(block):
    class Sine(type(block)):
        def forward(self, x):
            return super().forward(x).sin()

    block.__class__ = Sine


def _override(block):
    forward = block.forward
    block.forward = lambda x: forward(x).sin()


def _compile(block):
    block.compile(backend=lambda graph, _: graph.forward)
    compiled = block._compiled_call_impl
    block._compiled_call_impl = lambda x: compiled(x).sin()  # so that the call is seen


@pytest.mark.parametrize('change', [_sine, _override, _compile])
def test_a_block_of_another_kind_is_called(change):
    plain, linear = pair(create())
    for model in (plain, linear):
        change(model.features.denseblock1)
    x = images()
    assert_same_step(step(linear, x), step(plain, x))


def _circular(conv, x, weight, bias):
    padding = 2 * conv.padding
    return F.conv2d(F.pad(x, padding, mode='circular'), weight, bias, conv.stride, 0, conv.dilation, conv.groups)


def test_methods_of_all_convolutions_are_called(monkeypatch):
    """As who makes textures that repeat replaces them."""
    plain, linear = pair(create())
    model = trained()
    fused = reparameterize_model(model)
    x = images()
    monkeypatch.setattr(nn.Conv2d, '_conv_forward', _circular)
    (out, grads, _), (expected, expected_grads, _) = step(linear, x), step(plain, x)
    assert_same_step((out, grads, {}), (expected, expected_grads, {}))
    with torch.no_grad():
        assert relative_error(fused(x.float()), model(x.float())) < 1e-5


@pytest.mark.parametrize(('kind', 'name'), [
    (densenet.DenseLayer, 'forward'), (nn.AvgPool2d, 'forward'), (nn.Sequential, 'forward'), (nn.Conv2d, '__call__')])
def test_replaced_methods_of_a_class_are_called(monkeypatch, kind, name):
    plain, linear = pair(create())
    model = trained()
    method = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda module, x: method(module, x) * 1.5)
    x = images()
    (out, grads, _), (expected, expected_grads, _) = step(linear, x), step(plain, x)
    assert_same_step((out, grads, {}), (expected, expected_grads, {}))
    assert len(blocks(reparameterize_model(model))) == 3  # none is folded


def test_methods_that_were_replaced_before_the_import(monkeypatch):
    monkeypatch.setattr(nn.Conv2d, '_conv_forward', _circular)
    spec = importlib.util.spec_from_file_location('timm_densese.models.imported_later', plain_module.__file__)
    later = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(later)
    assert later.has_global_hooks()
    assert plain_module.has_global_hooks()
    monkeypatch.undo()
    assert not plain_module.has_global_hooks()


def test_types_that_differ_step_aside():
    model = aside(dtype=torch.float32)
    x = images(dtype=torch.float32)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.bfloat16()
    blocks_ = blocks(model)
    assert not any(b.is_memory_efficient(x.bfloat16()) for b in blocks_)
    with pytest.raises(RuntimeError):
        model(x)
