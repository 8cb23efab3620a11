"""Small models, steps and comparisons that the tests of a dense block's executions share."""
import copy

import timm
import torch
import torch.nn as nn
from conftest import SMALL, relative_error

from timm_densese.models.dense_block import DenseBlock

CHANNELS_LAST = torch.channels_last


def create(name='se_densenet121', dtype=torch.float64, **kwargs):
    """A small model in training whose affine maps and gates are not at their start."""
    kwargs = {**SMALL, 'num_classes': 5, **kwargs} if name == 'se_densenet121' else kwargs
    model = timm.create_model(name, dtype=dtype, **kwargs).train().to(memory_format=CHANNELS_LAST)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.randn_like(param) * .3)
            else:
                param.add_(torch.randn_like(param) * .02)
    return model


def aside(**kwargs):
    model = create(**kwargs)
    model.set_grad_checkpointing()
    return model


def images(n=4, dtype=torch.float64, size=72):
    return torch.randn(n, 3, size, size, dtype=dtype).to(memory_format=CHANNELS_LAST)


def step(model, x, context=None):
    """Output, gradients of every parameter and of the input, and buffers after a step."""
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    if context:
        with context:
            out = model(x)
    else:
        out = model(x)
    (out.float() if context else out).square().sum().backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
    return out.detach(), {**grads, 'the input': x.grad}, dict(model.named_buffers())


def pair(model):
    """The same model, plain and in linear memory."""
    linear = copy.deepcopy(model)
    linear.set_grad_checkpointing()
    assert blocks_are_memory_efficient(linear)
    return model, linear


def blocks(model):
    return [m for m in model.modules() if isinstance(m, DenseBlock)]


def blocks_are_memory_efficient(model):
    dtype = next(model.parameters()).dtype
    verdicts = set()
    for block in blocks(model):
        verdicts.add(block.is_memory_efficient(torch.randn(2, block.denselayer1.conv1.in_channels, 8, 8, dtype=dtype)))
    assert len(verdicts) == 1
    return verdicts.pop()


def assert_same_step(ours, theirs, tolerance=1e-9):
    (out, grads, buffers), (expected, expected_grads, expected_buffers) = ours, theirs
    assert relative_error(out, expected) < tolerance
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert relative_error(grads[name], grad) < tolerance, name
    for name, buffer in expected_buffers.items():
        if name.endswith('num_batches_tracked'):
            assert torch.equal(buffers[name], buffer), name
        else:
            assert relative_error(buffers[name], buffer) < tolerance, name


def trained(name='se_densenet121', **kwargs):
    """A model in eval mode whose statistics are no start, with signs and zeros among the scales."""
    model = create(name, dtype=torch.float32, **kwargs).eval()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, .2)
                m.running_var.uniform_(.3, 2)
                m.weight.normal_()
                m.weight[::7] = 0
                m.weight[1::7] *= 1e-9
    return model


class Plus(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class Double(nn.Module):
    def forward(self, x):
        return 2 * x
