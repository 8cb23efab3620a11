"""Attention added to other timm nets leaves them as they were until they train."""
import copy
import pickle

import pytest
import timm
import torch

from timm_densese import ATTN_LAYERS, add_attention

NETS = {'resnet18': 4, 'resnet26d': 4, 'regnetx_002': 4, 'convnext_atto': 4, 'efficientnet_b0': 5, 'starnet_s1': 4,
        'mobilenetv3_small_050': 4}


def sites(model):
    return [m for m in model.modules() if type(m).__name__ == '_RescaledAttn']


@pytest.mark.parametrize('name', NETS)
def test_same_function_and_same_keys(name):
    model = timm.create_model(name, num_classes=10).eval()
    plain = copy.deepcopy(model)
    image = torch.randn(2, 3, 96, 96)
    assert add_attention(model) is model
    assert len(sites(model)) == NETS[name]
    assert set(plain.state_dict()) < set(model.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(model(image), plain(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('attn_layer', ATTN_LAYERS)
def test_each_attention(attn_layer):
    model = timm.create_model('resnet18', num_classes=10).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(image)
        torch.testing.assert_close(add_attention(model, attn_layer)(image), expected, rtol=1e-5, atol=1e-6)


def test_trains_moves_and_survives_copies():
    model = add_attention(timm.create_model('convnext_atto', num_classes=2), rd_ratio=1 / 16).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    assert all(site.attn.fc2.weight.abs().max() > 0 for site in sites(model))

    model.eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(image)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.jit.script(model)):
            torch.testing.assert_close(other(image), expected)
    fresh = add_attention(timm.create_model('convnext_atto', num_classes=2), rd_ratio=1 / 16).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(fresh(image), expected)


def test_follows_the_models_type_and_mode_and_leaves_the_seed():
    model = timm.create_model('resnet18', dtype=torch.bfloat16).train()
    state = model.bn1.running_mean.clone()
    add_attention(model, rd_channels=4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(m.training for m in model.modules())
    assert torch.equal(model.bn1.running_mean, state)
    assert model.layer1.se.attn.fc1.out_channels == 4


@pytest.mark.parametrize(('name', 'reason'), [
    ('vit_tiny_patch16_224', 'gives no place for attention'),  # tokens, not maps
    ('swin_tiny_patch4_window7_224', 'gives no place for attention'),  # channels last
    ('vgg11', 'no entry of its feature_info holds a convolution'),
])
def test_no_place(name, reason):
    model = timm.create_model(name, num_classes=2)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=reason):
        add_attention(model)
    assert list(model.state_dict()) == keys


def test_stage_that_does_not_run_what_is_added_is_refused_and_restored():
    model = timm.create_model('dla34', num_classes=2)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match='is not run once in a forward pass') as error:
        add_attention(model)
    assert 'The model is unchanged' in str(error.value)
    assert list(model.state_dict()) == keys


def test_other_errors():
    with pytest.raises(ValueError, match='feature_info'):
        add_attention(torch.nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match='feature_info'):
        add_attention(timm.create_model('resnet18', features_only=True))
    with pytest.raises(ValueError, match="'se', 'ese'"):
        add_attention(timm.create_model('resnet18'), 'squeeze')
    with pytest.raises(ValueError, match='Use a sigmoid gate'):
        add_attention(timm.create_model('resnet18'), gate_layer='tanh')
    model = add_attention(timm.create_model('resnet18'))
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match='has an attention already'):
        add_attention(model)
    assert list(model.state_dict()) == keys
