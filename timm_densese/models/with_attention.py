"""The same attention in any convolutional network of timm: added to a model, or as a registered model of its own."""
import copy
import logging
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, TypeVar

import torch
import torch.nn as nn
from timm.layers import get_device_dtype
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    create_model,
    densenet,
    get_model_input_config,
    get_pretrained_cfg,
    is_model,
    list_models,
    load_pretrained,
    load_state_dict,
    load_state_dict_from_hf,
    register_model,
)
from timm.models._manipulate import group_with_matcher
from timm.models._registry import split_model_name_tag

from ..errors import ModelConfigError, hub_errors
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

    The stages are the entries of `model.feature_info` after the stem. A copy of the network on the meta device shows
    which of them run what is put after them exactly once, on the feature map of the stage. The others get none; where
    they are most, the network is put back as it was. Every key of the network's state dict stays; each attention's
    keys hold `.se.`. Its checkpoints still load, the attention then starts anew. Layer-wise learning rates give an
    attention the rate of the stage it follows. It is saved as the registered model 'with_attention' of this base,
    which `timm.create_model('with_attention', base=NAME)` creates at once.

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
    inserted = [site for site, attn in attns.items() if _insert(net, site, attn.train(model.training))]
    found, reasons = _try_sites(net, stages, inserted)
    if reasons:
        _restore(net, before)
    if len(found) < len(stages) / 2:
        raise ValueError(f'{arch} gives no place for attention: {"; ".join(reasons)}. The model is unchanged.')
    if reasons:
        for site in found:
            _insert(net, site, attns[site])
        _logger.info(f'{arch} gets attention as {", ".join(found)}; left out: {"; ".join(reasons)}.')
    net.attn_sites = found
    net.attn_layer = attn_layer
    cfg = net.pretrained_cfg
    tagged = f'{cfg["architecture"]}.{cfg.get("tag")}'
    attention = dict(attn_layer=attn_layer, rd_channels=rd_channels, rd_ratio=rd_ratio, gate_layer=gate_layer)
    net._model_args = {
        **getattr(net, '_model_args', {}), **{k: v for k, v in attention.items() if v is not None},
        'base': tagged if tagged in list_models(f'{cfg["architecture"]}.*', include_tags=True) else cfg['architecture']}
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
        if not name or module is None:
            continue
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
        raise ValueError(f'{arch} gives no place for attention: no entry of its feature_info is a module with a '
                         f'convolution.')
    return stages


def _insert(model: Any, site: str, attn: nn.Module) -> bool:
    """Put an attention in its place, a child of the stage or, in a DenseNet, of the features, if that is free."""
    home, _, name = site.rpartition('.')
    stage = model.get_submodule(home)
    if isinstance(stage, nn.ReLU):
        model.set_submodule(home, nn.Sequential(OrderedDict([('act', stage), ('se', attn)])))
    elif name == 'se':
        if hasattr(stage, 'se'):
            return False
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
    return True


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
def _try_sites(model: Any, stages: Mapping[str, int], inserted: List[str]) -> Tuple[List[str], List[str]]:
    """Give the attentions that are run exactly once, on maps of their channels; and why others are not."""
    probe = copy.deepcopy(model).to('meta').eval()
    shapes: Dict[str, List[Any]] = {site: [] for site in stages}

    def record(module: nn.Module, args: Any, site: str) -> None:
        shapes[site].append(tuple(args[0].shape))

    modules = dict(probe.named_modules())
    for site in stages:
        if site in inserted:
            modules[site].register_forward_pre_hook(partial(record, site=site))
    try:
        probe.forward_features(torch.empty(1, *get_model_input_config(model)['input_size'], device='meta',
                                           dtype=get_device_dtype(model)['dtype']))
    except Exception as e:  # what meets features that are no maps raises whatever it does
        return [], [f'its parts do not pass on single feature maps ({type(e).__name__}: {e})']
    found = [site for site, seen in shapes.items() if len(seen) == 1 and len(seen[0]) == 4
             and seen[0][1] == stages[site]]
    return found, [f'{site} would be run on {seen[0]}' if len(seen) == 1 else
                   f'{site} would not be run once in a forward pass'
                   for site, seen in shapes.items() if site not in found]


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
        pretrained: Load weights: the base's, or this model's own from the Hub, a folder or a file.
        base: Name of the network with or without a tag, `resnet50.a1_in1k` for example.
        attn_layer: As for `add_attention`, as are `rd_channels`, `rd_ratio` and `gate_layer`.
        rd_channels: Hidden units.
        rd_ratio: Hidden units as a fraction.
        gate_layer: The gate's activation.
        pretrained_cfg: From a config.json, all of it; else what replaces parts of the base's.
        pretrained_cfg_overlay: What replaces parts of that. Weights that it names may be the base's or this model's.
        cache_dir: Where downloads are kept.
        **kwargs: Arguments of the base.

    Raises:
        ValueError: The base is not a registered network without attention, or gives no place for it.
        CheckpointMismatchError: The weights are not this network's.
    """
    if isinstance(pretrained_cfg, str):
        raise ValueError(f'with_attention has no tag {pretrained_cfg!r}: tags go into the base, base=NAME.TAG.')
    given = pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else dict(pretrained_cfg or {})
    from_config = given.get('source') in ('hf-hub', 'local-dir')
    name = split_model_name_tag(str(base))[0]
    if not is_model(name) or name == 'with_attention':
        raise (ModelConfigError if from_config else ValueError)(
            f"with_attention takes the name of another network, timm.create_model('with_attention', base='resnet50') "
            f'for example (in scripts: --model with_attention --model-kwargs base=resnet50). base={base!r} is none of '
            f'timm.list_models().')
    attention: Dict[str, Any] = dict(
        attn_layer=attn_layer, rd_channels=rd_channels, rd_ratio=rd_ratio, gate_layer=gate_layer)
    overlay = dict(pretrained_cfg_overlay or {})
    if from_config:
        cfg = {**given, **overlay}
        args = {'num_classes': cfg.get('num_classes', 1000), 'in_chans': (cfg.get('input_size') or (3,))[0],
                **(kwargs.get('pretrained_model_args') or {})}
        check_net_args('with_attention', args)
        check_source('with_attention', cfg, lambda: with_attention(device='meta', **args))
    else:
        unset = PretrainedCfg().to_dict()  # timm's scripts give a whole cfg, mostly of what is not set
        cfg = {**get_pretrained_cfg(base).to_dict(),  # type: ignore[union-attr]
               **{k: v for k, v in given.items() if v != unset.get(k)}, **overlay}
    cfg['architecture'] = 'with_attention'
    named = not from_config and any(
        source.get(key) for source in (given, overlay) for key in ('state_dict', 'file', 'url', 'hf_hub_id'))
    weights = _read_weights(cfg, cache_dir) if pretrained and named else None
    hub_id = cfg.get('hf_hub_id') if pretrained and weights is None else None
    feature_cfg: Dict[str, Any] = dict(feature_cls='getter')

    def create(**base_kwargs: Any) -> nn.Module:
        load_base = pretrained and not from_config and weights is None
        model: Any = add_attention(create_model(
            base, pretrained=load_base, cache_dir=cache_dir, **base_kwargs), **attention)
        if weights is not None and not _is_native(weights, model):  # in another naming, which the base knows
            model = add_attention(create_model(
                base, pretrained=True, pretrained_cfg_overlay={
                    'state_dict': weights, 'num_classes': cfg['num_classes']}, **base_kwargs), **attention)
        elif weights is not None or (pretrained and from_config):
            load_pretrained(
                model, {**cfg, 'state_dict': weights}, model.num_classes, base_kwargs.get('in_chans', 3),
                _check_weights, cache_dir=cache_dir)
        if 'out_indices' not in kwargs:
            feature_cfg['out_indices'] = tuple(range(len(model.feature_info)))
        return model

    with hub_errors(hub_id, 'load') if hub_id else nullcontext():
        return build_model_with_cfg(
            create, 'with_attention', pretrained=False, pretrained_cfg=cfg, feature_cfg=feature_cfg, **kwargs)


def _read_weights(cfg: Dict[str, Any], cache_dir: Any) -> Dict[str, Any]:
    """Read the weights that a cfg names, in timm's order; the cfg forgets them, and keeps where they are from."""
    if cfg.get('state_dict'):
        return dict(cfg.pop('state_dict'))
    if cfg.get('file'):
        return load_state_dict(cfg['file'])
    if not cfg.get('hf_hub_id'):
        raise ValueError(f'with_attention does not take weights from {cfg["url"]}: download them, and give the file.')
    with hub_errors(cfg['hf_hub_id'], 'load'):
        return load_state_dict_from_hf(cfg['hf_hub_id'], 'model.safetensors', cache_dir=cache_dir)


def _is_native(weights: Mapping[str, Any], model: nn.Module) -> bool:
    """Tell whether weights are named as the model's are, if not all of them."""
    own = model.state_dict()
    return 2 * sum(key in own for key in weights) >= len(weights)


def _check_weights(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Any]:
    check_keys(state_dict, model)
    return state_dict
