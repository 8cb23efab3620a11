import pytest
import torch

from timm_densese.models.pointwise import relu_


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_relu_of_every_number(dtype):
    x = torch.arange(-2 ** 15, 2 ** 15).to(torch.int16).view(dtype)
    expected = x.relu()
    assert expected.isnan().any()
    assert torch.equal(relu_(x).nan_to_num(nan=-1.), expected.nan_to_num(nan=-1.))


def test_relu_of_other_types():
    x = torch.tensor([-1., -0., float('nan'), 2.], dtype=torch.float64)
    assert torch.equal(relu_(x).nan_to_num(nan=-1.), torch.tensor([0., 0., -1., 2.], dtype=torch.float64))
