"""Attention starts as the identity, to the bit, and trains from there."""
import pytest
import torch
from timm.layers import create_act_layer, create_attn

from timm_densese import ATTN_LAYERS, GATE_LAYERS
from timm_densese.models.attention import IdentityGate, create_channel_attn

every_attention = pytest.mark.parametrize('attn_layer', ATTN_LAYERS)


@every_attention
@pytest.mark.parametrize('gate_layer', GATE_LAYERS)
def test_gives_its_input_bit_for_bit(attn_layer, gate_layer):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        attn = create_channel_attn(attn_layer, 24, gate_layer=gate_layer, dtype=dtype)
        x = torch.randn(3, 24, 7, 9, dtype=dtype)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = x.contiguous(memory_format=memory_format)
            assert torch.equal(attn.train()(x), x)
            assert torch.equal(attn.eval()(x), x)
    assert list(attn.state_dict()) == list(create_attn(attn_layer, 24).state_dict())


@every_attention
def test_the_gradient_reaches_the_gates_at_the_first_step(attn_layer):
    attn = create_channel_attn(attn_layer, 24, dtype=torch.float64)
    x = torch.randn(3, 24, 7, 9, dtype=torch.float64)
    optimizer = torch.optim.SGD(attn.parameters(), 1e-3)
    moved = []
    for _ in range(3):
        before = [p.detach().clone() for p in attn.parameters()]
        optimizer.zero_grad()
        (attn(x) * torch.linspace(-1, 1, 24)[:, None, None]).square().sum().backward()
        optimizer.step()
        moved.append([not torch.equal(p, b) for p, b in zip(attn.parameters(), before, strict=True)])
    assert any(moved[0])
    # A convolution's bias before a norm never moves; nor does a softmax's bias, which all positions share.
    still = {'conv_attn.bias'} if attn_layer in ('gc', 'gca') else set()
    names = [name for name, _ in attn.named_parameters()]
    assert {n for n, m in zip(names, moved[2], strict=True) if not m} <= still
    assert not torch.equal(attn(x), x)


@pytest.mark.parametrize('gate_layer', GATE_LAYERS)
def test_a_gate_is_timms_divided_by_its_value_at_zero(gate_layer):
    gate = create_act_layer(gate_layer)
    z = torch.linspace(-8, 8, 101, dtype=torch.float64)
    torch.testing.assert_close(IdentityGate(gate)(z), gate(z) / gate(torch.zeros_like(z)), rtol=0, atol=0)
    assert IdentityGate(gate)(z).max() > 1.9  # it strengthens, too


def test_a_gate_that_starts_at_zero_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"'tanh' is not one of 'sigmoid', 'hard_sigmoid'.*erasing the features"):
        create_channel_attn('se', 8, gate_layer='tanh')
