"""Kernels for GPUs against torch in float64: on a GPU where there is one, else in Triton's interpreter."""
import copy
import os
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from nets import CHANNELS_LAST, create, images, pair, step, trained
from timm.models import reparameterize_model

from timm_densese import SE_PLACEMENTS
from timm_densese.models import features, fused, pointwise

triton = pytest.importorskip('triton')
DEVICE = os.environ.get('DEVICE') or ('cuda' if torch.cuda.is_available() else 'cpu')
pytestmark = pytest.mark.skipif(
    DEVICE == 'cpu' and tuple(map(int, triton.__version__.split('.')[:2])) < (3, 7),
    reason="needs the interpreter of Triton 3.7: an older one's loops fail with newer versions of NumPy")
# The interpreter multiplies no matrices of bfloat16.
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == 'cuda' else [torch.float32, torch.float16]
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# Images, height, width, channels of the buffer, channels, outputs.
SHAPES = [(2, 14, 14, 96, 64, 128), (3, 7, 9, 50, 37, 8), (1, 5, 4, 240, 144, 192), (5, 1, 1, 48, 32, 16),
          (4, 3, 1, 48, 32, 16)]
# As many programs as there are, or so few that each goes through several blocks of rows.
PROGRAMS = [{}, {'_PROGRAMS': 1, '_PROGRAMS_BACKWARD': 1, '_MOST_SPLITS': 1, '_MOST_STATS': 2}]


@pytest.fixture
def kernels(monkeypatch):
    from timm_densese.models import kernels

    for user in (features, fused):
        monkeypatch.setattr(user, 'find_kernels', lambda x, dtype: kernels)
    return kernels


def maps(n, channels, height, width, dtype):
    x = torch.randn(n, channels, height, width, device=DEVICE) + torch.randn(channels, 1, 1, device=DEVICE)
    return x.to(dtype).to(memory_format=CHANNELS_LAST)


def exact(*tensors):
    return [t.double().requires_grad_() for t in tensors]


def test_kernels_that_do_not_run_step_aside(kernels, monkeypatch):
    assert pointwise._try_kernels(torch.device(DEVICE)) is kernels

    def affine(*args):
        raise RuntimeError('Failed to find C compiler.\nPlease specify via CC')

    monkeypatch.setattr(kernels, 'affine', affine)
    with pytest.warns(UserWarning, match='do not run here: Failed to find C compiler'):
        assert pointwise._try_kernels(torch.device(DEVICE)) is None


@pytest.fixture(params=PROGRAMS, ids=['many programs', 'few'])
def programs(request, kernels, monkeypatch):
    for name, number in request.param.items():
        monkeypatch.setattr(kernels, name, number)


@pytest.mark.usefixtures('programs')
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('dtype', DTYPES)
class TestKernels:
    @pytest.mark.parametrize('pool', [False, True])
    def test_affine(self, kernels, dtype, shape, pool):
        n, h, w, width, channels, _ = shape
        pool = pool and min(h, w) > 1
        x = maps(n, width, h, w, dtype)[:, :channels]
        scale, shift = torch.randn(2, channels, device=DEVICE)
        inputs = exact(x, scale, shift)
        expected = (inputs[0] * inputs[1][:, None, None] + inputs[2][:, None, None]).relu()
        expected = F.avg_pool2d(expected, 2) if pool else expected
        out = maps(*expected.shape, dtype)
        kernels.affine(x, scale, shift, out, pool=pool)
        assert relative_error(out, expected) < TOLERANCES[dtype]
        grad = torch.randn_like(out)
        expected.backward(grad.double())
        for ours, theirs in zip(kernels.affine_backward(grad, x, scale, shift, pool), inputs, strict=True):
            assert relative_error(ours, theirs.grad) < TOLERANCES[dtype]

    def test_normalise(self, kernels, dtype, shape):
        n, h, w, width, channels, _ = shape
        x, buffer, grad = (maps(n, width, h, w, dtype) for _ in range(3))
        x, channels = x[:, :channels].contiguous(memory_format=CHANNELS_LAST), slice(5, 5 + channels)
        stats = torch.zeros(5, width, device=DEVICE)
        untouched = buffer[:, channels.stop:].clone()
        kernels.normalise(x, 1e-5, buffer[:, channels], stats[:, channels])
        inputs, = exact(x)
        expected = F.batch_norm(inputs, None, None, training=True, eps=1e-5)
        x_hat, grad = buffer[:, channels], grad[:, channels]
        assert relative_error(x_hat, expected) < TOLERANCES[dtype]
        assert torch.equal(buffer[:, channels.stop:], untouched)
        mean, var, invstd, *_ = stats[:, channels]
        assert relative_error(mean, inputs.mean((0, 2, 3))) < 1e-5
        assert relative_error(var, inputs.var((0, 2, 3))) < 1e-5
        assert relative_error(invstd, (inputs.var((0, 2, 3), unbiased=False) + 1e-5).rsqrt()) < 1e-5
        expected.backward(grad.double())
        ours = kernels.normalise_backward(grad, x_hat, stats[:, channels])
        assert relative_error(ours, inputs.grad) < TOLERANCES[dtype]

    def test_convolution(self, kernels, dtype, shape):
        n, h, w, width, channels, outputs = shape
        x, total = (maps(n, width, h, w, dtype) for _ in range(2))
        x = x[:, :channels]
        scale, shift = torch.randn(2, channels, device=DEVICE)
        weight = (torch.randn(outputs, channels, 1, 1, device=DEVICE) / channels ** .5).to(dtype)
        norm_weight, norm_bias = torch.randn(2, outputs, device=DEVICE)
        out, stats = kernels.affine_conv_norm(x, scale, shift, weight, norm_weight, norm_bias, 1e-5)
        inputs = exact(x, scale, shift, weight)
        expected = F.conv2d((inputs[0] * inputs[1][:, None, None] + inputs[2][:, None, None]).relu(), inputs[3])
        assert relative_error(out, expected) < TOLERANCES[dtype]
        with_bias = kernels.affine_conv(x, scale, shift, weight, norm_bias)
        assert relative_error(with_bias, (expected + norm_bias[:, None, None]).relu()) < TOLERANCES[dtype]

        values, norm_weights, norm_biases = exact(out, norm_weight, norm_bias)
        activated = F.batch_norm(values, None, None, norm_weights, norm_biases, True, eps=1e-5).relu()
        assert relative_error(kernels.affine(out, stats[3], stats[4], torch.empty_like(out)), activated) < \
            TOLERANCES[dtype]
        grad = torch.randn_like(out)
        activated.backward(grad.double())
        grads = kernels.norm_relu_backward(grad, out, stats)
        for ours, theirs in zip(grads, (values, norm_weights, norm_biases), strict=True):
            assert relative_error(ours, theirs.grad) < TOLERANCES[dtype]

        expected.backward(grad.double())
        total_before = total.double()
        grads = kernels.affine_conv_backward(grad, x, scale, shift, weight, total)
        for ours, theirs in zip(grads, inputs[1:], strict=True):
            assert relative_error(ours, theirs.grad) < TOLERANCES[dtype]
        assert relative_error(total[:, :channels], total_before[:, :channels] + inputs[0].grad) < TOLERANCES[dtype]
        assert torch.equal(total[:, channels:].double(), total_before[:, channels:])


@pytest.mark.parametrize('dtype', DTYPES)
def test_statistics_far_from_zero(kernels, dtype):
    """Of 300 pixels in several blocks, whose mean is 50 times their standard deviation."""
    x = (1 + torch.randn(3, 16, 10, 10, device=DEVICE) / 10).to(dtype).to(memory_format=CHANNELS_LAST)
    ones = torch.ones(16, device=DEVICE)
    weight = (1 + torch.rand(32, 16, 1, 1, device=DEVICE) / 10).to(dtype)
    out, stats = kernels.affine_conv_norm(x, ones, ones, weight, *torch.ones(2, 32, device=DEVICE), 1e-5)
    var, mean = torch.var_mean(out.double(), (0, 2, 3))
    assert (mean.square() / var).mean() > 2500
    assert relative_error(stats[1], var) < 1e-5
    assert relative_error(stats[0], mean) < 1e-6


def check_step(model, context=None):
    """Against float64, a step by kernels in float32 is about as exact as a plain one."""
    plain, linear = pair(model)
    x = images(2, dtype=torch.float32, size=36)
    exact_out, exact_grads, exact_buffers = step(copy.deepcopy(plain).double(), x.double())
    with context or nullcontext():
        out, grads, buffers = step(linear, x)
    _, plain_grads, _ = step(plain, x)
    assert relative_error(out, exact_out) < 1e-5
    for name, grad in exact_grads.items():
        assert relative_error(grads[name], grad) < 1e-5 + 10 * relative_error(plain_grads[name], grad), name
    for name, buffer in exact_buffers.items():
        assert relative_error(buffers[name], buffer.double()) < 1e-5, name


@pytest.mark.skipif(DEVICE == 'cuda', reason='float32: test_device.py has steps in the types that kernels are for')
@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_a_step_by_kernels_is_the_plain_one(kernels, placement):
    """With an odd size, which the transition cuts."""
    check_step(create(dtype=torch.float32, se_placement=placement, block_config=(1, 2)))


@pytest.mark.skipif(DEVICE == 'cuda', reason='float32, as above')
def test_saved_tensors_come_back_in_another_layout(kernels):
    """As from torch.autograd.graph.save_on_cpu(pin_memory=True)."""
    check_step(create(dtype=torch.float32, se_placement='stage', block_config=(1, 2)),
               torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().contiguous(), lambda t: t))


def test_weights_that_are_cut_from_others(kernels):
    x = maps(2, 32, 5, 5, torch.float16)
    weight, scale = torch.randn(16, 64, 1, 1, device=DEVICE).half() / 6, torch.randn(64, device=DEVICE)
    ours = kernels.affine_conv_norm(x, scale[::2], scale[1::2], weight[:, ::2], scale[:32:2], scale[1:32:2], 1e-5)
    theirs = kernels.affine_conv_norm(x, *(t.clone().contiguous() for t in (
        scale[::2], scale[1::2], weight[:, ::2], scale[:32:2], scale[1:32:2])), 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_other_layouts_are_refused(kernels):
    x = torch.randn(2, 16, 4, 4, device=DEVICE)
    ones = torch.ones(16, device=DEVICE)
    with pytest.raises(ValueError, match='channels_last'):
        kernels.affine(x, ones, ones, torch.empty_like(x))


def test_sizes_that_do_not_fit_are_refused(kernels):
    x = torch.randn(2, 16, 4, 4, device=DEVICE).to(memory_format=torch.channels_last)
    ones, weight = torch.ones(16, device=DEVICE), torch.ones(8, 16, 1, 1, device=DEVICE)
    for scale, shift, w in ((ones[:8], ones, weight), (ones, ones[:8], weight), (ones, ones, weight[:, :8])):
        with pytest.raises(ValueError, match='16 channels'):
            kernels.affine_conv(x, scale, shift, w, ones[:8])


def test_fused_by_kernels(kernels):
    model, x = trained(block_config=(1, 2)).to(DEVICE), images(2, dtype=torch.float32, size=36).to(DEVICE)
    fused_model = reparameterize_model(model)
    with torch.inference_mode():
        assert relative_error(fused_model(x), model(x)) < (1e-2 if DEVICE == 'cuda' else 1e-5)
