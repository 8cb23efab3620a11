"""State dicts that do not fit."""
import pytest
import timm
import torch
import torch.nn as nn
from conftest import SMALL, same, trained_densenet
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_densese.errors import CheckpointMismatchError


@pytest.fixture(scope='module')
def densenet():
    torch.manual_seed(0)
    return trained_densenet('densenet121', **SMALL)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damaged_checkpoint_is_refused_by_name_or_loads_exactly(densenet, data):
    state_dict = {k: v.clone() for k, v in densenet.state_dict().items()}
    names = [k for k in state_dict if not k.endswith('num_batches_tracked')]
    damaged = data.draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
    fatal = []
    for name in damaged:
        how = data.draw(st.sampled_from(['drop', 'rename', 'pad', 'flatten', 'scalar', 'add', 'contiguous', 'double']))
        value = state_dict[name]
        if how in ('drop', 'rename'):
            del state_dict[name]
        if how == 'rename':
            state_dict[f'{name}x'] = value
        elif how == 'pad':
            state_dict[name] = torch.cat([value, value])
        elif how == 'flatten':
            state_dict[name] = value[None]
        elif how == 'scalar':
            state_dict[name] = value.sum()
        elif how == 'add':
            state_dict[f'{name}.more'] = value
        elif how == 'contiguous':
            state_dict[name] = value.clone(memory_format=torch.contiguous_format)
        elif how == 'double':
            state_dict[name] = value.double()
        if how not in ('contiguous', 'double'):
            fatal.append(f'{name}.more' if how == 'add' else name)
    placement = data.draw(st.sampled_from(['final', 'stage', 'layer']))
    model: nn.Module = timm.create_model('se_densenet121', se_placement=placement, **SMALL).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if fatal:
        with pytest.raises(CheckpointMismatchError) as error:
            model.load_state_dict(state_dict)
        for name in fatal:
            assert name in str(error.value)
        assert same(dict(model.state_dict()), before)
    else:
        model.load_state_dict(state_dict)
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            expected = densenet.eval()(x)
            assert (model(x) - expected).norm() / expected.norm() < 1e-5
