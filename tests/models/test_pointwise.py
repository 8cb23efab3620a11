import pytest
import torch
import torch.nn.functional as F

from timm_densese.models.pointwise import conv1x1, conv1x1_backward, has_few_pixels, relu_, relu_backward_


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_relu_of_every_number(dtype):
    x = torch.arange(-2 ** 15, 2 ** 15).to(torch.int16).view(dtype)
    expected = x.relu()
    assert expected.isnan().any()
    assert torch.equal(relu_(x).nan_to_num(nan=-1.), expected.nan_to_num(nan=-1.))


def test_relu_of_other_types():
    x = torch.tensor([-1., -0., float('nan'), 2.], dtype=torch.float64)
    assert torch.equal(relu_(x).nan_to_num(nan=-1.), torch.tensor([0., 0., -1., 2.], dtype=torch.float64))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_gradient_of_relu(dtype):
    out = torch.arange(2 ** 15).to(torch.int16).view(torch.float16).to(dtype).nan_to_num()  # every number from 0
    grad = torch.randn(len(out)).to(dtype)
    grad[7::50] = float('nan')
    expected = torch.ops.aten.threshold_backward(grad, out, 0)
    assert (expected == 0).any()
    assert torch.equal(relu_backward_(grad, out).nan_to_num(nan=-9.), expected.nan_to_num(nan=-9.))


@pytest.mark.parametrize('memory_format', [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize('size', [3, 20])
def test_pointwise_convolution(size, memory_format):
    """As a product and as a convolution, whatever the memory format."""
    x = torch.randn(2, 8, size, size, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    weight = torch.randn(6, 8, 1, 1, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(x, weight)
    grad = torch.randn_like(expected)
    assert has_few_pixels(x) == (size == 3)
    with torch.no_grad():
        torch.testing.assert_close(conv1x1(x, weight), expected)
        found = conv1x1_backward(grad, x, weight, True)
        assert conv1x1_backward(grad, x, weight, False)[1] is None
    for ours, theirs in zip(found, torch.autograd.grad(expected, (x, weight), grad), strict=True):
        torch.testing.assert_close(ours, theirs)
