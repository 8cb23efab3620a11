"""SE-DenseNet: DenseNet with squeeze-and-excitation, or another channel attention, that starts from DenseNet weights.

Papers:
    * `Densely Connected Convolutional Networks` - https://arxiv.org/abs/1608.06993
    * `Squeeze-and-Excitation Networks` - https://arxiv.org/abs/1709.01507
    * `Making Convolutional Networks Shift-Invariant Again` - https://arxiv.org/abs/1904.11486
"""
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import BlurPool2d
from timm.models import build_model_with_cfg, densenet, generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models._manipulate import MATCH_PREV_GROUP

from ..errors import CheckpointMismatchError, ModelConfigError, hub_errors
from .attention import create_channel_attn
from .dense_block import DenseBlock, DenseFeatures, SEDenseLayer
from .transfer import checkpoint_filter_fn
from .untrusted import MAX_PARAMETERS, check_checkpoint_file, check_model_args

__all__ = ['SEDenseNet']

SE_PLACEMENTS = ('final', 'stage', 'layer')


class SEDenseNet(densenet.DenseNet):
    """DenseNet with channel attention.

    A DenseNet checkpoint's names are a subset of this model's. Loading one gives a model with the DenseNet's outputs,
    see `timm_densese.transfer`. `feature_info` and `forward_intermediates` give the dense blocks' outputs before
    their attention: after a transfer, these too are the DenseNet's.

    Args:
        se_placement: Where attention sits.
            'final': on the last dense block's output, before the final norm (one attention).
            'stage': on the output of every dense block and of every transition.
            'layer': on every dense layer's new features, before they join the concatenation.
        attn_layer: Name of one of timm's channel attentions, one of `timm_densese.ATTN_LAYERS`.
        rd_channels: Hidden units of each excitation, 16 if neither this nor `rd_ratio` is given.
        rd_ratio: Hidden units of each excitation as a fraction of its channels.
        gate_layer: Name of the gates' activation, one of `timm_densese.GATE_LAYERS`.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: Arguments of `timm.models.densenet.DenseNet`.

    Raises:
        ValueError: A placement, name or size is wrong.
    """
    attn_sites: Dict[str, str]  # each attention and the neighbour that absorbs its gates' starting constant

    def __init__(
            self,
            se_placement: str = 'final',
            attn_layer: str = 'se',
            rd_channels: Optional[int] = None,
            rd_ratio: Optional[float] = None,
            gate_layer: str = 'sigmoid',
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        if se_placement not in SE_PLACEMENTS:
            raise ValueError(f'se_placement={se_placement!r} is not one of {", ".join(map(repr, SE_PLACEMENTS))}.')
        super().__init__(device=device, dtype=dtype, **kwargs)
        self.se_placement = se_placement
        self.attn_layer = attn_layer
        self.gate_layer = gate_layer

        def create_se(channels: int) -> nn.Module:
            return create_channel_attn(attn_layer, channels, rd_channels, rd_ratio, gate_layer, device, dtype)

        self.attn_sites = {}
        blocks = [name for name, module in self.features.named_children() if isinstance(module, densenet.DenseBlock)]
        features: OrderedDict[str, nn.Module] = OrderedDict()
        for name, module in self.features.named_children():
            if not isinstance(module, densenet.DenseBlock):
                features[name] = module
                continue
            features[name] = module = DenseBlock(module)
            index = name[len('denseblock'):]
            if se_placement == 'layer':
                for layer_name, layer in list(module.items()):
                    assert isinstance(layer, densenet.DenseLayer)
                    module[layer_name] = SEDenseLayer(layer, create_se(_get_conv(layer, 'conv2').out_channels))
                    site = f'features.{name}.{layer_name}'
                    self.attn_sites[f'{site}.se'] = f'{site}.conv2'
            elif name == blocks[-1]:
                features[f'se{index}'] = create_se(self.num_features)
                self.attn_sites[f'features.se{index}'] = 'features.norm5'
            elif se_placement == 'stage':
                transition = self.features.get_submodule(f'transition{index}')
                conv = _get_conv(transition, 'conv')
                features[f'se{index}'] = create_se(conv.in_channels)
                self.attn_sites[f'features.se{index}'] = f'features.transition{index}.norm'
                transition.add_module('se', create_se(conv.out_channels))
                self.attn_sites[f'features.transition{index}.se'] = f'features.transition{index}.conv'
        self.features = DenseFeatures(features)
        # The taps have moved: feature_info names them, feature_ends counts them.
        taps = [str(info['module']).split('.', 1)[1] for info in self.feature_info]
        self.feature_ends = [list(features).index(tap) for tap in taps]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Group parameters for layer-wise learning rates: an attention goes with the block it follows."""
        matcher = super().group_matcher(coarse)
        if coarse:
            matcher['blocks'] = r'^features\.(?:denseblock|transition|se)(\d+)'
        else:
            matcher['blocks'].append((r'^features\.se(\d+)', MATCH_PREV_GROUP))
        return matcher

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for the given intermediates, see DenseNet; their attention goes too."""
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        left = {name for name, _ in self.named_modules()}
        self.attn_sites = {site: neighbour for site, neighbour in self.attn_sites.items() if site in left}
        return take_indices

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """Load a state dict; a plain DenseNet's is transferred first, so that it keeps its outputs.

        Args:
            state_dict: Tensors of this model, or of the DenseNet it extends, by timm's or torchvision's names.
            strict: Raise where names are missing or left over. If False, whatever fits is loaded.
            assign: Assign the tensors instead of copying them.

        Returns:
            Missing and unexpected names, as torch gives them.

        Raises:
            CheckpointMismatchError: With `strict`, a tensor does not fit; the model is as it was.
        """
        try:
            state_dict = checkpoint_filter_fn(state_dict, self, adapted=strict)
        except CheckpointMismatchError:
            if strict:
                raise
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _get_conv(module: nn.Module, name: str) -> nn.Conv2d:
    conv = module.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    return conv


def _create_se_densenet(
        variant: str,
        growth_rate: int,
        block_config: Tuple[int, ...],
        pretrained: bool,
        **kwargs,
) -> SEDenseNet:
    """Create an SE-DenseNet, with the weights of its DenseNet or of its own."""
    kwargs['growth_rate'] = growth_rate
    kwargs['block_config'] = block_config
    cfg = kwargs.get('pretrained_cfg')
    if isinstance(cfg, dict) and cfg.get('source') in ('hf-hub', 'local-dir'):
        model_args = {'num_classes': cfg.get('num_classes', 1000), **(kwargs.get('pretrained_model_args') or {})}
        _check_config(variant, cfg, dict(growth_rate=growth_rate, block_config=block_config), model_args)
    source = resolve_pretrained_cfg(variant, cfg, kwargs.get('pretrained_cfg_overlay'))
    hub_id = None if not pretrained or source.file or source.state_dict else source.hf_hub_id
    with hub_errors(hub_id, 'load') if hub_id else nullcontext():
        return build_model_with_cfg(
            SEDenseNet,
            variant,
            pretrained,
            feature_cfg=dict(flatten_sequential=True),
            pretrained_filter_fn=checkpoint_filter_fn,
            **kwargs,
        )


def _check_config(
        variant: str,
        cfg: Dict[str, Any],
        defaults: Dict[str, Any],
        model_args: Dict[str, Any],
) -> None:
    """Refuse a config.json, from a repository or a folder, before memory is taken for what it describes."""
    check_model_args(variant, model_args)
    params = sum(p.numel() for p in SEDenseNet(device='meta', **{**defaults, **model_args}).parameters())
    if params > MAX_PARAMETERS:
        raise ModelConfigError(
            f'The config.json for {variant} is refused, nothing was built from it: it describes {params / 1e9:.1f} '
            f'billion parameters, {MAX_PARAMETERS / 1e9:.1f} billion is the limit.')
    cfg['custom_load'] = False
    if cfg['source'] == 'hf-hub':
        cfg['hf_hub_filename'] = 'model.safetensors'  # never a pickle
    else:
        folder = Path(cfg['file'])
        if not (folder / 'model.safetensors').exists():
            for file in folder.iterdir():
                if file.suffix in ('.bin', '.pth', '.tar'):
                    check_checkpoint_file(file)


def _cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    """Create the default configuration of SE-DenseNet models."""
    return {
        'url': url, 'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'features.conv0', 'classifier': 'classifier', 'license': 'apache-2.0',
        'hf_hub_filename': 'model.safetensors',  # never a pickle
        **kwargs,
    }


# The tags are those of the DenseNets whose weights the models start from.
default_cfgs = generate_default_cfgs({
    'se_densenet121.ra_in1k': _cfg(
        hf_hub_id='timm/densenet121.ra_in1k',
        test_input_size=(3, 288, 288), test_crop_pct=0.95),
    'se_densenetblur121d.ra_in1k': _cfg(
        hf_hub_id='timm/densenetblur121d.ra_in1k',
        test_input_size=(3, 288, 288), test_crop_pct=0.95),
    'se_densenet264d.untrained': _cfg(),
    'se_densenet121.tv_in1k': _cfg(hf_hub_id='timm/densenet121.tv_in1k'),
    'se_densenet169.tv_in1k': _cfg(hf_hub_id='timm/densenet169.tv_in1k'),
    'se_densenet201.tv_in1k': _cfg(hf_hub_id='timm/densenet201.tv_in1k'),
    'se_densenet161.tv_in1k': _cfg(hf_hub_id='timm/densenet161.tv_in1k'),
})


@register_model
def se_densenet121(pretrained=False, **kwargs) -> SEDenseNet:
    """DenseNet-121 with channel attention."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 24, 16))
    return _create_se_densenet('se_densenet121', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def se_densenetblur121d(pretrained=False, **kwargs) -> SEDenseNet:
    """DenseNet-121 with blur-pooling, a stem of three 3x3 convolutions, and channel attention."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 24, 16), stem_type='deep', aa_layer=BlurPool2d)
    return _create_se_densenet('se_densenetblur121d', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def se_densenet169(pretrained=False, **kwargs) -> SEDenseNet:
    """DenseNet-169 with channel attention."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 32, 32))
    return _create_se_densenet('se_densenet169', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def se_densenet201(pretrained=False, **kwargs) -> SEDenseNet:
    """DenseNet-201 with channel attention."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 48, 32))
    return _create_se_densenet('se_densenet201', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def se_densenet161(pretrained=False, **kwargs) -> SEDenseNet:
    """DenseNet-161 with channel attention."""
    model_args = dict(growth_rate=48, block_config=(6, 12, 36, 24))
    return _create_se_densenet('se_densenet161', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def se_densenet264d(pretrained=False, **kwargs) -> SEDenseNet:
    """DenseNet-264 with a stem of three 3x3 convolutions and channel attention."""
    model_args = dict(growth_rate=48, block_config=(6, 12, 64, 48), stem_type='deep')
    return _create_se_densenet('se_densenet264d', pretrained=pretrained, **dict(model_args, **kwargs))
