"""SE-DenseNet: DenseNet with squeeze-and-excitation, or another channel attention, that starts from DenseNet weights.

Papers:
    * `Densely Connected Convolutional Networks` - https://arxiv.org/abs/1608.06993
    * `Squeeze-and-Excitation Networks` - https://arxiv.org/abs/1709.01507
    * `Making Convolutional Networks Shift-Invariant Again` - https://arxiv.org/abs/1904.11486
"""
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import BlurPool2d
from timm.models import build_model_with_cfg, densenet, generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models._manipulate import MATCH_PREV_GROUP
from timm.models.densenet import _filter_torchvision_pretrained

from ..errors import hub_errors
from .attention import add_start, check_keys, create_channel_attn, register_start_hook
from .dense_block import DenseBlock, DenseFeatures, SEDenseLayer
from .untrusted import check_model_args, check_source

__all__ = ['SEDenseNet']

SE_PLACEMENTS = ('final', 'stage', 'layer')


class SEDenseNet(densenet.DenseNet):
    """DenseNet with channel attention.

    A DenseNet checkpoint's names are a subset of this model's. Loading one, also into a parent module, gives a model
    with the DenseNet's outputs: its tensors are taken as they are, and the attention starts as the identity.
    `feature_info` and `forward_intermediates` give the dense blocks' outputs before their attention.

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
    attn_sites: List[str]  # names of the attentions

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

        self.attn_sites = []
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
                    module[layer_name] = SEDenseLayer(layer, create_se(layer.conv2.out_channels))  # type: ignore
                    self.attn_sites.append(f'features.{name}.{layer_name}.se')
            elif name == blocks[-1]:
                features[f'se{index}'] = create_se(self.num_features)
                self.attn_sites.append(f'features.se{index}')
            elif se_placement == 'stage':
                transition = self.features.get_submodule(f'transition{index}')
                features[f'se{index}'] = create_se(transition.conv.in_channels)  # type: ignore[union-attr,arg-type]
                transition.add_module('se', create_se(transition.conv.out_channels))  # type: ignore
                self.attn_sites += [f'features.se{index}', f'features.transition{index}.se']
        self.features = DenseFeatures(features)
        # The taps have moved: feature_info names them, feature_ends counts them.
        taps = [str(info['module']).split('.', 1)[1] for info in self.feature_info]
        self.feature_ends = [list(features).index(tap) for tap in taps]
        register_start_hook(self, _filter_densenet)

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
        self.attn_sites = [site for site in self.attn_sites if site in left]
        return take_indices

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """Load a state dict, this model's or a plain DenseNet's.

        Args:
            state_dict: Tensors of this model, or of the DenseNet it extends, by timm's or torchvision's names.
            strict: Raise where names are missing or left over. If False, whatever fits is loaded.
            assign: Assign the tensors instead of copying them.

        Returns:
            Missing and unexpected names, as torch gives them.

        Raises:
            CheckpointMismatchError: With `strict`, a tensor does not fit; the model is as it was.
        """
        if strict:
            check_keys(_filter_torchvision_pretrained(dict(state_dict)), self, adapted=True)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: SEDenseNet) -> Dict[str, Any]:
    """Fit a checkpoint to an SE-DenseNet: to a DenseNet's, the attention's start is added.

    Args:
        state_dict: Tensors by timm's or torchvision's names, of a DenseNet or of this model. The classifier's classes
            and the first convolution's channels may be others, which timm adapts.
        model: The SE-DenseNet that they are for.

    Returns:
        A new dict by the model's names.

    Raises:
        CheckpointMismatchError: The backbone's tensors, or the attention's, are not the model's.
    """
    state_dict = _filter_torchvision_pretrained(dict(state_dict))
    check_keys(state_dict, model)
    return add_start(state_dict, model)


def _filter_densenet(state_dict: Dict[str, Any], model: SEDenseNet) -> Dict[str, Any]:
    """As checkpoint_filter_fn, for the model's own loading, which checks what it is asked to."""
    return add_start(_filter_torchvision_pretrained(state_dict), model)


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
        # As build_model_with_cfg completes them.
        model_args = {'num_classes': cfg.get('num_classes', 1000), 'in_chans': (cfg.get('input_size') or (3,))[0],
                      **(kwargs.get('pretrained_model_args') or {})}
        check_model_args(variant, model_args)
        defaults: Dict[str, Any] = dict(growth_rate=growth_rate, block_config=block_config)
        check_source(variant, cfg, lambda: SEDenseNet(device='meta', **{**defaults, **model_args}))
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
