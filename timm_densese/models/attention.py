"""Channel attention that starts as a constant factor, so that it can enter a trained network unnoticed.

The last layer before each gate starts at zero. The gate then reads the same constant everywhere (a sigmoid: 0.5),
whatever the input, and that constant can be divided out. The gradient reaches the zeroed layer at the first step,
and everything before it from the second step on.

Papers:
    * `Squeeze-and-Excitation Networks` - https://arxiv.org/abs/1709.01507
"""
import functools
import inspect
from typing import Any, Dict, List, Optional, Tuple, TypeVar

import torch
import torch.nn as nn
from timm.layers import create_attn, get_attn, get_device_dtype

__all__ = ['ATTN_LAYERS', 'GATE_LAYERS', 'add_attention', 'create_channel_attn', 'gate_constant', 'gate_inputs']

ModelT = TypeVar('ModelT', bound=nn.Module)

# timm's name of each channel attention -> its last layers before a gate.
# 'ge' is left out: timm 1.0.31 raises a TypeError on creating one.
_GATE_INPUTS: Dict[str, Tuple[str, ...]] = {
    'se': ('fc2',),
    'ese': ('fc',),
    'eca': ('conv',),
    'ecam': ('conv2',),
    'ceca': ('conv',),
    'gc': ('mlp_scale.fc2',),
    'gca': ('mlp_add.fc2',),
    'cbam': ('channel.fc2', 'spatial.conv.bn'),
    'lcbam': ('channel.fc2', 'spatial.conv.bn'),
    'coord': ('conv_h', 'conv_w'),
    'scoord': ('fc_h', 'fc_w'),
    'ela': ('norm_h', 'norm_w'),
    'strip': ('conv_h', 'conv_w'),
}
ATTN_LAYERS = tuple(_GATE_INPUTS)
GATE_LAYERS = ('sigmoid', 'hard_sigmoid', 'tanh')

DEFAULT_RD_CHANNELS = 16


def _check_choice(name: str, value: Any, choices: Tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f'{name}={value!r} is not one of {", ".join(map(repr, choices))}.')


def create_channel_attn(
        attn_layer: str,
        channels: int,
        rd_channels: Optional[int] = None,
        rd_ratio: Optional[float] = None,
        gate_layer: str = 'sigmoid',
        device=None,
        dtype=None,
) -> nn.Module:
    """Create one of timm's channel attentions with its gates at their constant starting point.

    Args:
        attn_layer: Name of the attention, one of `ATTN_LAYERS`.
        channels: Channels of the feature map, (B, channels, H, W) in and out.
        rd_channels: Hidden units of the excitation, 16 if neither this nor `rd_ratio` is given.
        rd_ratio: Hidden units as a fraction of `channels`, rounded by timm.
        gate_layer: Name of the gate's activation, one of `GATE_LAYERS`.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Returns:
        The attention. With a sigmoid gate, the last layer before the gate is zero.

    Raises:
        ValueError: A name is unknown, a size is not positive, or this attention does not take the size.
    """
    _check_choice('attn_layer', attn_layer, ATTN_LAYERS)
    _check_choice('gate_layer', gate_layer, GATE_LAYERS)
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
    if gate_constant(attn_layer, gate_layer) is not None:
        _zero_gate_inputs(attn, attn_layer)
    return attn


def gate_inputs(attn_layer: str) -> Tuple[str, ...]:
    """Names, inside the attention, of the layers that are zero where the gates start."""
    return _GATE_INPUTS[attn_layer]


def _zero_gate_inputs(attn: nn.Module, attn_layer: str) -> None:
    for name in gate_inputs(attn_layer):
        for param in attn.get_submodule(name).parameters():
            nn.init.zeros_(param)


@functools.lru_cache(maxsize=None)
def gate_constant(attn_layer: str, gate_layer: str) -> Optional[float]:
    """Measure the factor that an attention multiplies its input by where its gates start.

    Measured rather than tabulated, so that it holds for attentions with several gates, and for those that ignore
    `gate_layer`.

    Args:
        attn_layer: Name of the attention, one of `ATTN_LAYERS`.
        gate_layer: Name of the gate's activation, one of `GATE_LAYERS`.

    Returns:
        The factor, 0.5 for one sigmoid; None where it is not one positive constant (a tanh starts at 0).
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # the caller's seed is not ours to advance
        attn = create_attn(attn_layer, 8, gate_layer=gate_layer, device='cpu', dtype=torch.float64).eval()
        _zero_gate_inputs(attn, attn_layer)
        x = 1 + torch.rand(2, 8, 4, 4, dtype=torch.float64, device='cpu')
        factor = attn(x) / x
    constant = factor.mean().item()
    return constant if constant > 0 and torch.allclose(factor, factor.mean(), rtol=1e-12, atol=0) else None


class _RescaledAttn(nn.Module):
    """An attention divided by its own starting constant, so that it starts as the identity."""

    def __init__(self, attn: nn.Module, constant: float) -> None:
        super().__init__()
        self.attn = attn
        self.scale = 1. / constant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x) * self.scale


def add_attention(
        model: ModelT,
        attn_layer: str = 'se',
        rd_channels: Optional[int] = None,
        rd_ratio: Optional[float] = None,
        gate_layer: str = 'sigmoid',
) -> ModelT:
    """Add an attention after each stage of a timm network, without changing what the network computes.

    The stages are the entries of `model.feature_info` that hold convolutions of their own (the stem does not count).
    The network runs twice on one image, before and after: where an attention was not run exactly once, or the output
    moved, the network is put back as it was. Every key of the network's state dict stays; each attention's keys hold
    `.se.`. timm's layer-wise learning rate decay gives them the head's rate.

    Args:
        model: A convolutional network made by `timm.create_model`, changed in place.
        attn_layer: Name of the attention, one of `ATTN_LAYERS`.
        rd_channels: Hidden units of the excitation, 16 if neither this nor `rd_ratio` is given.
        rd_ratio: Hidden units as a fraction of the stage's channels.
        gate_layer: Name of the gate's activation, one of `GATE_LAYERS` that starts at a positive constant.

    Returns:
        The same model.

    Raises:
        ValueError: A name or size is wrong, or the network gives no place for attention.

    Example:
        >>> import timm, timm_densese
        >>> model = timm_densese.add_attention(timm.create_model('resnet18'))
        >>> model.layer4.se.attn.fc2.weight.abs().max().item()
        0.0
    """
    arch = type(model).__name__
    feature_info = getattr(model, 'feature_info', None)
    first_conv = getattr(model, 'pretrained_cfg', {}).get('first_conv') or ''
    if not isinstance(feature_info, list) or not isinstance(first_conv, str):
        raise ValueError(
            f'add_attention finds the stages of a network in the feature_info of timm.create_model(name), and '
            f'{arch} has none. Call it on the classification model, before features_only or other wrapping.')
    stages = {
        info['module']: info['num_chs'] for info in feature_info
        if not first_conv.startswith(info['module'] + '.')
        and any(isinstance(m, nn.Conv2d) for m in model.get_submodule(info['module']).modules())
    }
    if not stages:
        raise ValueError(f'{arch} gives no place for attention: no entry of its feature_info holds a convolution.')

    # Built before the network is touched, so that a wrong name or size leaves it as it was.
    attns: Dict[str, nn.Module] = {}
    for name, num_chs in stages.items():
        attn = create_channel_attn(attn_layer, num_chs, rd_channels, rd_ratio, gate_layer, **get_device_dtype(model))
        constant = gate_constant(attn_layer, gate_layer)
        if constant is None:
            raise ValueError(
                f'attn_layer={attn_layer!r} with gate_layer={gate_layer!r} does not start at a positive constant, '
                f'so it would change what {arch} computes. Use a sigmoid gate.')
        attns[name] = _RescaledAttn(attn, constant).train(model.training)

    homes: List[nn.Module] = []
    calls: List[str] = []
    expected = _probe(model)
    try:
        for name, attn in attns.items():
            stage = model.get_submodule(name)
            # Some stages run their children in order, others (ConvNeXt) a Sequential of that name after a downsample.
            blocks = getattr(stage, 'blocks', None)
            home = blocks if isinstance(blocks, nn.Sequential) else stage
            if hasattr(home, 'se'):
                raise ValueError(f'{name} has an attention already')
            home.add_module('se', attn)
            homes.append(home)
        handles = [a.register_forward_hook(lambda *_, name=n: calls.append(name)) for n, a in attns.items()]
        output = _probe(model)
        for handle in handles:
            handle.remove()
        unused = [name for name in attns if calls.count(name) != 1]
        if unused:
            raise ValueError(f'what is added to {", ".join(unused)} is not run once in a forward pass')
        error = ((output - expected).norm() / expected.norm()).item()
        if not error < 1e-3:
            raise ValueError(f'its output moved by {error:.1e}')
    except Exception as e:
        for home in homes:
            del home.se
        raise ValueError(
            f'{arch} gives no place for attention after {", ".join(stages)}: {e}. The model is unchanged.') from e
    return model


@torch.no_grad()
def _probe(model: Any) -> torch.Tensor:
    """Output in eval mode for one fixed image of the model's input size."""
    dd = get_device_dtype(model)
    size = model.pretrained_cfg['input_size'][1:]
    image = torch.randn(1, model.in_chans, *size, generator=torch.Generator().manual_seed(0))
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        return model(image.to(**dd)).double()
    finally:
        for module, mode in modes.items():
            module.training = mode
