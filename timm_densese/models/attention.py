"""Channel attention that starts as the identity, so that it can enter a trained network unnoticed.

The layers before each gate start at zero, and each gate is divided by its value at zero: sigmoid(z) / sigmoid(0) =
2 * sigmoid(z). So it starts at exactly 1. The network computes the same bits as before, and since none of its tensors
is touched, it trains as before, too. The gradient reaches the zeroed layer at the first step, and everything before it
from the second step on.

Papers:
    * `Squeeze-and-Excitation Networks` - https://arxiv.org/abs/1709.01507. Its gate is this one divided by 2: it can
      weaken a channel, and this one can strengthen it as well.
"""
import copy
import inspect
from functools import partial
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import create_attn, get_attn

from ..errors import CheckpointMismatchError

__all__ = ['ATTN_LAYERS', 'GATE_LAYERS', 'IdentityGate', 'add_start', 'check_keys', 'create_channel_attn',
           'is_attn_key', 'layer_names', 'register_start_hook']

# timm's name of each channel attention -> its last layers before a gate.
# Left out: 'ge', on which timm 1.0.31 raises a TypeError, and 'lcbam', one of whose gates is a function in its forward.
_GATE_INPUTS: Dict[str, Tuple[str, ...]] = {
    'se': ('fc2',),
    'ese': ('fc',),
    'eca': ('conv',),
    'ecam': ('conv2',),
    'ceca': ('conv',),
    'gc': ('mlp_scale.fc2',),
    'gca': ('mlp_add.fc2',),
    'cbam': ('channel.fc2', 'spatial.conv.bn'),
    'coord': ('conv_h', 'conv_w'),
    'scoord': ('fc_h', 'fc_w'),
    'ela': ('norm_h', 'norm_w'),
    'strip': ('conv_h', 'conv_w'),
}
ATTN_LAYERS = tuple(_GATE_INPUTS)
GATE_LAYERS = ('sigmoid', 'hard_sigmoid')

DEFAULT_RD_CHANNELS = 16


class IdentityGate(nn.Module):
    """A gate divided by its value at zero, so that it starts at exactly 1."""

    def __init__(self, gate: nn.Module) -> None:
        """Wrap a gate.

        Args:
            gate: One of `GATE_LAYERS`: 0.5 at zero, and without parameters, so that no key of a state dict changes.
        """
        super().__init__()
        self.gate = gate
        self.scale = 2.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(x) * self.scale


def _check_choice(name: str, value: Any, choices: Tuple[str, ...], reason: str = '') -> None:
    if value not in choices:
        raise ValueError(f'{name}={value!r} is not one of {", ".join(map(repr, choices))}.{reason}')


def create_channel_attn(
        attn_layer: str,
        channels: int,
        rd_channels: Optional[int] = None,
        rd_ratio: Optional[float] = None,
        gate_layer: str = 'sigmoid',
        device=None,
        dtype=None,
) -> nn.Module:
    """Create one of timm's channel attentions, starting as the identity.

    Args:
        attn_layer: Name of the attention, one of `ATTN_LAYERS`.
        channels: Channels of the feature map, (B, channels, H, W) in and out.
        rd_channels: Hidden units of the excitation, 16 if neither this nor `rd_ratio` is given.
        rd_ratio: Hidden units as a fraction of `channels`, rounded by timm.
        gate_layer: Name of the gate's activation, one of `GATE_LAYERS`.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Returns:
        The attention, by timm's names. It gives its input, bit for bit, until it is trained.

    Raises:
        ValueError: A name is unknown, a size is not positive, or this attention does not take the size.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 8, 4, 4)
        >>> torch.equal(create_channel_attn('se', 8)(x), x)
        True
    """
    _check_choice('attn_layer', attn_layer, ATTN_LAYERS)
    _check_choice(
        'gate_layer', gate_layer, GATE_LAYERS, ' A gate is divided by its value at zero, 0.5 for these, to start at '
        '1. One that is 0 there, as tanh is, would begin by erasing the features.')
    if rd_channels is not None and rd_ratio is not None:
        raise ValueError(f'Give rd_channels or rd_ratio, not both (got {rd_channels!r} and {rd_ratio!r}).')
    if rd_channels is not None and (not isinstance(rd_channels, int) or rd_channels < 1):
        raise ValueError(f'rd_channels={rd_channels!r} is not a positive whole number.')
    if rd_ratio is not None and not 0 < rd_ratio <= 1:
        raise ValueError(f'rd_ratio={rd_ratio!r} is not in (0, 1].')

    reduction: Dict[str, Any] = {}
    takes_reduction = 'rd_channels' in inspect.signature(get_attn(attn_layer)).parameters
    if takes_reduction and rd_ratio is not None:
        reduction['rd_ratio'] = rd_ratio
    elif takes_reduction:
        reduction['rd_channels'] = rd_channels or DEFAULT_RD_CHANNELS
    elif rd_channels is not None or rd_ratio is not None:
        sized = [a for a in ATTN_LAYERS if 'rd_channels' in inspect.signature(get_attn(a)).parameters]
        raise ValueError(
            f'attn_layer={attn_layer!r} has no hidden units to set: leave out rd_channels and rd_ratio, '
            f'or take one of {", ".join(map(repr, sized))}.')

    attn = create_attn(attn_layer, channels, gate_layer=gate_layer, device=device, dtype=dtype, **reduction)
    for name, gate in list(attn.named_modules()):
        if name.split('.')[-1] == 'gate':
            attn.set_submodule(name, IdentityGate(gate))
    _zero_gate_inputs(attn, attn_layer)
    return attn


def _zero_gate_inputs(attn: nn.Module, attn_layer: str) -> None:
    for name in _GATE_INPUTS[attn_layer]:
        for param in attn.get_submodule(name).parameters():
            nn.init.zeros_(param)


# Checkpoints of the network without attention.


def is_attn_key(key: str, model: Any) -> bool:
    """Tell whether a tensor's name is of one of a model's attentions."""
    return key.startswith(tuple(f'{site}.' for site in model.attn_sites))


def check_keys(state_dict: Mapping[str, Any], model: Any, adapted: bool = False) -> None:
    """Raise where a checkpoint's tensors are not the model's, or not those of the network without attention.

    Not looked at: num_batches_tracked, which checkpoints older than torch 0.4.1 lack, and before timm has adapted them
    the classifier and the first convolution's input channels.

    Args:
        state_dict: Tensors by the model's names.
        model: The model, with its `attn_sites`.
        adapted: timm has adapted the classifier and the first convolution already, so that these must fit, too.

    Raises:
        CheckpointMismatchError: Some are missing, left over, or of another shape.
    """
    cfg = getattr(model, 'pretrained_cfg', {})
    classifiers, first_convs = (layer_names(cfg.get(key)) for key in ('classifier', 'first_conv'))
    with_attention = any(is_attn_key(key, model) for key in state_dict)
    expected = {k: v for k, v in model.state_dict().items() if with_attention or not is_attn_key(k, model)}

    def is_checked(key: str) -> bool:
        owner = key.rpartition('.')[0]
        return (adapted or owner not in classifiers) and not key.endswith('.num_batches_tracked')

    def shape(key: str, tensor: torch.Tensor) -> Tuple[int, ...]:
        is_first = key.rpartition('.')[0] in first_convs and not adapted
        return tensor.shape[:1] + tensor.shape[2:] if is_first else tensor.shape

    missing = [k for k in expected if is_checked(k) and k not in state_dict]
    unexpected = [k for k in state_dict if is_checked(k) and k not in expected]
    misshapen = [
        f'{k} ({tuple(state_dict[k].shape)}, not {tuple(v.shape)})' for k, v in expected.items()
        if is_checked(k) and k in state_dict and shape(k, state_dict[k]) != shape(k, v)]
    if missing or unexpected or misshapen:
        args = getattr(model, '_model_args', {})
        name = cfg.get('architecture') or type(model).__name__
        what = {'se_placement': getattr(model, 'se_placement', None), 'base': args.get('base')}
        described = ' and '.join(f'{k}={v!r}' for k, v in what.items() if v)
        raise CheckpointMismatchError(f'{name} with {described}' if described else name, missing, unexpected, misshapen)


def layer_names(value: Any) -> Tuple[str, ...]:
    """Give the layers that an entry of a pretrained cfg names: one name, several or none."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def add_start(state_dict: Mapping[str, Any], model: Any) -> Dict[str, Any]:
    """Add the attention's start to a checkpoint of the network without attention.

    Args:
        state_dict: Tensors by the model's names.
        model: The model, on any device, with its `attn_sites` and `attn_layer`.

    Returns:
        A new dict, which shares the given tensors. What holds attention already, or less than half of the network
        (its classifier apart), gets nothing added.
    """
    out = dict(state_dict)
    cfg = getattr(model, 'pretrained_cfg', {})
    classifiers = layer_names(cfg.get('classifier'))
    needed = [k for k in model.state_dict() if not is_attn_key(k, model) and not k.endswith('.num_batches_tracked')
              and k.rpartition('.')[0] not in classifiers]
    present = [k for k in needed if k in out]
    if any(is_attn_key(k, model) for k in out) or not needed or len(present) < len(needed) / 2:
        return out
    like = out[present[0]]
    names = {name for name, _ in model.named_modules()}  # fused or pruned models have not all of them
    with torch.random.fork_rng(devices=[]):  # the caller's seed is not ours to advance
        for site in filter(names.__contains__, model.attn_sites):
            # Made anew, not copied from the model: that one may have been trained, or be on the meta device.
            attn = copy.deepcopy(model.get_submodule(site)).to_empty(device='cpu')
            for module in reversed(list(attn.modules())):
                if callable(reset := getattr(module, 'reset_parameters', None)):
                    reset()
            _zero_gate_inputs(attn, model.attn_layer)
            out.update({f'{site}.{k}': v for k, v in attn.to(like.device, like.dtype).state_dict().items()})
    return out


def register_start_hook(model: nn.Module, filter_fn: Callable[..., Dict[str, Any]] = add_start) -> None:
    """Let a model take checkpoints of the network without attention, also as a child of another module.

    Args:
        model: The model.
        filter_fn: Gives, for a state dict and the model, the state dict to load.
    """
    model.register_load_state_dict_pre_hook(partial(_filter_before_loading, filter_fn=filter_fn))


def _filter_before_loading(
        model: nn.Module,
        state_dict: Dict[str, Any],
        prefix: str,
        *args: Any,
        filter_fn: Callable[..., Dict[str, Any]],
) -> None:
    own = {key[len(prefix):]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    state_dict.update({prefix + key: value for key, value in filter_fn(own, model).items()})
