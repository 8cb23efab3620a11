import pytest
import torch

from timm_densese.models.pointwise import relu_, relu_backward_


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
