"""The same attention in any convolutional network of timm: added to a model, or as a registered model of its own."""
import logging
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, TypeVar

import torch
import torch.nn as nn
from timm.layers import get_device_dtype
from timm.models import build_model_with_cfg, create_model, densenet, get_pretrained_cfg, is_model, register_model
from timm.models._helpers import load_state_dict
from timm.models._manipulate import group_with_matcher
from timm.models._registry import split_model_name_tag

from ..errors import hub_errors
from .attention import check_keys, create_channel_attn, is_attn_key, layer_names, register_start_hook
from .untrusted import check_net_args, check_source

__all__ = ['add_attention']

ModelT = TypeVar('ModelT', bound=nn.Module)
_logger = logging.getLogger(__name__)


def add_attention(
        model: ModelT,
        attn_layer: str = 'se',
        rd_channels: Optional[int] = None,
        rd_ratio: Optional[float] = None,
        gate_layer: str = 'sigmoid',
) -> ModelT:
    """Add an attention after each stage of a timm network, without changing what the network computes or learns.

    The stages are the entries of `model.feature_info` after the stem. The network runs once on one image: where an
    attention was not run exactly once, on a feature map of its stage, the network is put back as it was. Every key of
    the network's state dict stays; each attention's keys hold `.se.`. Its checkpoints still load, the attention then
    starts anew. Layer-wise learning rates give an attention the rate of the stage it follows.
    It is saved as the registered model 'with_attention' of this base, which
    `timm.create_model('with_attention', base=NAME)` creates at once.

    Args:
        model: A convolutional network made by `timm.create_model`, changed in place.
        attn_layer: Name of the attention, one of `ATTN_LAYERS`.
        rd_channels: Hidden units of the excitation, 16 if neither this nor `rd_ratio` is given.
        rd_ratio: Hidden units as a fraction of the stage's channels.
        gate_layer: Name of the gate's activation, one of `GATE_LAYERS`.

    Returns:
        The same model, with the names of its attentions as `attn_sites`.

    Raises:
        ValueError: A name or size is wrong, or the network gives no place for attention.

    Example:
        >>> import timm, timm_densese
        >>> model = timm_densese.add_attention(timm.create_model('resnet18'))
        >>> model.attn_sites
        ['layer1.se', 'layer2.se', 'layer3.se', 'layer4.se']
        >>> model.layer4.se.fc2.weight.abs().max().item()
        0.0
    """
    net: Any = model
    arch = type(model).__name__
    if getattr(net, 'attn_sites', None):
        raise ValueError(f'{arch} has an attention already: {", ".join(net.attn_sites)}.')
    stages = _find_stages(net)
    # Built before the network is touched, so that a wrong name or size leaves it as it was.
    attns = {site: create_channel_attn(attn_layer, channels, rd_channels, rd_ratio, gate_layer, **get_device_dtype(net))
             for site, channels in stages.items()}
    if isinstance(model, densenet.DenseNet):
        name = (net.pretrained_cfg or {}).get('architecture') or 'densenet...'
        _logger.warning(
            f'se_{name} is this network with attention as a model of its own. It trains in linear memory, can be '
            f'fused, and has attention in other places as well.')

    before = _structure(net)
    try:
        for site, attn in attns.items():
            _insert(net, site, attn.train(model.training))
        _check_sites(net, stages)
    except Exception as e:
        _restore(net, before)
        raise ValueError(f'{arch} gives no place for attention as {", ".join(stages)}: {e}. The model is unchanged.'
                         ) from e
    net.attn_sites = list(stages)
    net.attn_layer = attn_layer
    cfg, tag = net.pretrained_cfg, net.pretrained_cfg.get('tag')
    attention = dict(attn_layer=attn_layer, rd_channels=rd_channels, rd_ratio=rd_ratio, gate_layer=gate_layer)
    net._model_args = {
        **getattr(net, '_model_args', {}), **{k: v for k, v in attention.items() if v is not None},
        'base': f'{cfg["architecture"]}.{tag}' if tag else cfg['architecture']}
    net.pretrained_cfg = net.default_cfg = {**cfg, 'architecture': 'with_attention'}
    if hasattr(net, 'group_matcher'):
        net.group_matcher = partial(_group_matcher, net)
    register_start_hook(net)
    return model


def _find_stages(model: Any) -> 'OrderedDict[str, int]':
    """Find the names that attentions get, and their channels, from a network's feature_info.

    Raises:
        ValueError: There is none, or none of its entries is a place for attention.
    """
    arch = type(model).__name__
    feature_info = getattr(model, 'feature_info', None)
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    if not isinstance(feature_info, list) or 'architecture' not in cfg:
        raise ValueError(
            f'add_attention finds the stages of a network in the feature_info of timm.create_model(name), and '
            f'{arch} has none. Call it on the classification model, before features_only or other wrapping.')
    if getattr(model, 'output_fmt', 'NCHW') != 'NCHW':
        raise ValueError(f'{arch} gives no place for attention: its features are {model.output_fmt}, and channel '
                         f'attention takes NCHW, the maps of a convolutional network.')
    modules = dict(model.named_modules())
    stages: OrderedDict[str, int] = OrderedDict()
    for info in feature_info:
        name = str(info.get('module'))
        module = modules.get(name)
        if module is None:
            raise ValueError(f'{arch} gives no place for attention: its feature_info names {name!r}, which is none of '
                             f'its modules.')
        parent, _, child = name.rpartition('.')
        if any(conv.startswith(f'{name}.') or conv == name for conv in layer_names(cfg.get('first_conv'))):
            continue  # the stem
        if isinstance(module, densenet.DenseBlock):
            stages[f'{parent}.se{child.removeprefix("denseblock")}'] = info['num_chs']
        elif isinstance(modules[parent], nn.Sequential) and isinstance(module, nn.ReLU):
            stages[f'{name}.se'] = info['num_chs']  # VGG: one Sequential, its stages end in their activations
        elif any(isinstance(m, nn.Conv2d) for m in module.modules()):
            # Some stages run their children in order, others (ConvNeXt) a Sequential of that name after a downsample.
            blocks = isinstance(getattr(module, 'blocks', None), nn.Sequential)
            stages[f'{name}.blocks.se' if blocks else f'{name}.se'] = info['num_chs']
    if isinstance(model, densenet.DenseNet):
        last = [name for name, m in model.features.named_children() if isinstance(m, densenet.DenseBlock)][-1]
        stages[f'features.se{last.removeprefix("denseblock")}'] = model.num_features
    if not stages:
        raise ValueError(f'{arch} gives no place for attention: no entry of its feature_info holds a convolution.')
    return stages


def _insert(model: Any, site: str, attn: nn.Module) -> None:
    """Put an attention in its place, a child of the stage or, in a DenseNet, of the features."""
    home, _, name = site.rpartition('.')
    stage = model.get_submodule(home)
    if isinstance(stage, nn.ReLU):
        model.set_submodule(home, nn.Sequential(OrderedDict([('act', stage), ('se', attn)])))
    elif name == 'se':
        if hasattr(stage, 'se'):
            raise ValueError(f'{home} has a part of that name already')
        stage.add_module('se', attn)
    else:
        children = OrderedDict()
        for child_name, child in stage.named_children():
            children[child_name] = child
            if child_name == f'denseblock{name.removeprefix("se")}':
                children[name] = attn
        model.set_submodule(home, nn.Sequential(children))
        taps = [str(info['module']).split('.', 1)[1] for info in model.feature_info]
        model.feature_ends = [list(children).index(tap) for tap in taps]


def _structure(model: nn.Module) -> Any:
    """The children of every module, by which `_restore` undoes insertions."""
    return [(m, dict(m._modules)) for m in model.modules()], getattr(model, 'feature_ends', None)


def _restore(model: Any, structure: Any) -> None:
    for module, children in structure[0]:
        module._modules.clear()
        module._modules.update(children)
    if structure[1] is not None:
        model.feature_ends = structure[1]


@torch.no_grad()
def _check_sites(model: Any, stages: Mapping[str, int]) -> None:
    """Run the network on one image of its input size, in eval mode, and see that each attention is run as it should."""
    calls: List[str] = []

    def record(module: nn.Module, args: Any, output: Any, site: str) -> None:
        if args[0].dim() != 4 or args[0].shape[1] != stages[site]:
            raise ValueError(f'at {site}, the features are {tuple(args[0].shape)} and not (B, {stages[site]}, H, W)')
        calls.append(site)

    handles = [model.get_submodule(site).register_forward_hook(partial(record, site=site)) for site in stages]
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        model(torch.zeros(1, model.in_chans, *model.pretrained_cfg['input_size'][1:], **get_device_dtype(model)))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    unused = [site for site in stages if calls.count(site) != 1]
    if unused:
        raise ValueError(f'{", ".join(unused)} would not be run once in a forward pass')


def _group_matcher(model: Any, coarse: bool = False) -> Callable[[str], int]:
    """Group parameters for layer-wise learning rates: an attention goes with what stands before it."""
    names = [name for name, _ in model.named_parameters()]
    matcher = type(model).group_matcher(model, coarse)
    own = [(name, name) for name in names if not is_attn_key(name, model)]
    groups: Dict[str, int] = group_with_matcher(own, matcher, reverse=True)  # type: ignore[assignment,arg-type]
    previous = 0
    for name in names:
        previous = groups.setdefault(name, previous)
    # timm also asks for modules, which go with their first parameter.
    return lambda name: groups[name] if name in groups else next(
        group for param, group in groups.items() if param.startswith(f'{name}.'))


@register_model
def with_attention(
        pretrained: bool = False,
        base: str = '',
        attn_layer: str = 'se',
        rd_channels: Optional[int] = None,
        rd_ratio: Optional[float] = None,
        gate_layer: str = 'sigmoid',
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Any = None,
        **kwargs: Any,
) -> nn.Module:
    """Any convolutional network of timm, named by `base`, with the attention that `add_attention` adds.

    Args:
        pretrained: Load weights: the base's, or this model's own from the Hub or a folder.
        base: Name of the network with or without a tag, `resnet50.a1_in1k` for example.
        attn_layer: As for `add_attention`, as are `rd_channels`, `rd_ratio` and `gate_layer`.
        rd_channels: Hidden units.
        rd_ratio: Hidden units as a fraction.
        gate_layer: The gate's activation.
        pretrained_cfg: This model's own, from a config.json.
        pretrained_cfg_overlay: What replaces parts of it, or of the base's.
        cache_dir: Where downloads are kept.
        **kwargs: Arguments of the base.

    Raises:
        ValueError: The base is not a registered network without attention, or gives no place for it.
    """
    name = split_model_name_tag(str(base))[0]
    if not is_model(name) or name == 'with_attention':
        raise ValueError(
            f"with_attention takes the name of another network, timm.create_model('with_attention', base='resnet50') "
            f'for example (in scripts: --model with_attention --model-kwargs base=resnet50). base={base!r} is none of '
            f'timm.list_models().')
    if isinstance(pretrained_cfg, str):
        raise ValueError(f'with_attention has no tag {pretrained_cfg!r}: tags go into the base, base={name}.TAG.')
    attention: Dict[str, Any] = dict(
        attn_layer=attn_layer, rd_channels=rd_channels, rd_ratio=rd_ratio, gate_layer=gate_layer)
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = dict(pretrained_cfg or {})
    is_own = cfg.get('source') in ('hf-hub', 'local-dir')
    if is_own:
        args = {'num_classes': cfg.get('num_classes', 1000), **(kwargs.get('pretrained_model_args') or {})}
        check_net_args('with_attention', args)
        check_source('with_attention', cfg, lambda: with_attention(device='meta', **args))
    else:
        cfg = {**get_pretrained_cfg(base).to_dict(), 'architecture': 'with_attention'}  # type: ignore[union-attr]
        if overlay.get('file'):
            overlay['state_dict'] = load_state_dict(overlay.pop('file'))
        if overlay.get('state_dict'):
            sites = tuple(f'{site}.' for site in _find_stages(create_model(base, device='meta')))
            is_own = any(key.startswith(sites) for key in overlay['state_dict'])
    # The base loads its own weights, as it knows how to. This model loads those that have attention.
    from_base: Dict[str, Any] = dict(cache_dir=cache_dir) if is_own else dict(
        cache_dir=cache_dir, pretrained=pretrained, pretrained_cfg_overlay=overlay)
    pretrained = pretrained and is_own

    def create(**base_kwargs: Any) -> nn.Module:
        return add_attention(create_model(base, **from_base, **base_kwargs), **attention)

    def filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Any]:
        check_keys(state_dict, model)
        return state_dict

    hub_id = cfg.get('hf_hub_id') if pretrained and cfg.get('source') == 'hf-hub' else None
    with hub_errors(hub_id, 'load') if hub_id else nullcontext():
        return build_model_with_cfg(
            create,
            'with_attention',
            pretrained=pretrained,
            pretrained_cfg=cfg,
            pretrained_cfg_overlay={k: v for k, v in overlay.items() if is_own or k != 'state_dict'},
            pretrained_filter_fn=filter_fn,
            feature_cfg=dict(feature_cls='getter'),
            cache_dir=cache_dir,
            **kwargs,
        )
