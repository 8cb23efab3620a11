"""Whether a module is exactly what timm builds, and a call of it no more than a call.

Linear memory and fused inference compute a dense layer in other ways than by calling it. That is the same only where
the layer is of exactly timm's type, with exactly its parts, and nobody watches or has changed them. What is not known
here runs as timm runs it.
"""
from typing import Any

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d
from timm.models import densenet
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

__all__ = [
    'TENSORS', 'has_autocast', 'has_global_hooks', 'has_hooks', 'has_own_methods', 'is_plain_conv', 'is_plain_module',
    'is_plain_norm', 'is_plain_parts', 'is_plain_transition', 'is_transformed', 'same_dtype_and_device']

# What a call of a block, a layer, a transition, a convolution or a norm calls.
_METHODS = (
    '_call_impl', 'forward', '_conv_forward', '_check_input_dim', 'any_requires_grad', 'bottleneck_fn',
    'call_checkpoint_bottleneck', 'is_memory_efficient', 'forward_memory_efficient', '_compiled_call_impl')
# What people replace in a class itself.
_OF_CLASSES = (
    (nn.Module, '__call__'), (nn.Module, '_call_impl'), (nn.Conv2d, '__call__'), (nn.Conv2d, 'forward'),
    (nn.Conv2d, '_conv_forward'), (nn.ReLU, 'forward'), (nn.AvgPool2d, 'forward'), (nn.Sequential, 'forward'),
    (BatchNormAct2d, 'forward'), (densenet.DenseLayer, 'forward'), (densenet.DenseLayer, 'bottleneck_fn'))
# None, which no method is, where somebody had replaced it before.
_AS_DEFINED = [
    method if getattr(method, '__globals__', {}).get('__name__', '').startswith(('torch.', 'timm.')) else None
    for method in (getattr(kind, name) for kind, name in _OF_CLASSES)]
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith('_hooks'))
TENSORS = frozenset((nn.Parameter, torch.Tensor))
_TENSORS_OR_NONE = TENSORS | {type(None)}


def has_global_hooks() -> bool:
    """Tell whether hooks are registered for all modules, or all modules of a kind have another method."""
    return bool(nn_module._has_any_global_hook()) or (
        not torch.compiler.is_compiling()  # which has no list of methods
        and [getattr(kind, name) for kind, name in _OF_CLASSES] != _AS_DEFINED)


def has_own_methods(module: nn.Module) -> bool:
    """Tell whether somebody gave this one module a method beside those of its kind."""
    return any(map(vars(module).get, _METHODS))


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module itself has hooks of any kind, or all modules have."""
    return has_global_hooks() or any(map(vars(module).get, _HOOKS))


def is_plain_module(module: Any, *kinds: type) -> bool:
    """Tell whether a module is what its type says.

    It is of exactly one of these types, without hooks, with its type's methods, and its tensors are torch's own. This
    runs for each part of each layer at every step, so it reads dictionaries, which is faster than attributes.
    """
    if type(module) not in kinds or has_hooks(module) or has_own_methods(module):
        return False
    tensors = *vars(module)['_parameters'].values(), *vars(module)['_buffers'].values()
    return _TENSORS_OR_NONE.issuperset(map(type, tensors))


def is_plain_norm(norm: Any) -> bool:
    """Tell whether this is timm's batch norm with ReLU, affine and with running statistics."""
    return (
        is_plain_module(norm, BatchNormAct2d) and list(norm._modules) == ['drop', 'act']
        and is_plain_module(norm._modules['act'], nn.ReLU) and is_plain_module(norm._modules['drop'], nn.Identity)
        and list(norm._parameters) == ['weight', 'bias']
        and list(norm._buffers) == ['running_mean', 'running_var', 'num_batches_tracked']
        and TENSORS.issuperset(map(type, (*norm._parameters.values(), *norm._buffers.values())))
        and norm.track_running_stats)


def is_plain_conv(conv: Any, kernel_size: int) -> bool:
    """Tell whether this is a dense convolution without a bias that keeps height and width, padded by zeros."""
    return (
        is_plain_module(conv, nn.Conv2d) and conv.kernel_size == (kernel_size, kernel_size)
        and conv.padding == (kernel_size // 2, kernel_size // 2) and conv.padding_mode == 'zeros'
        and conv.stride == conv.dilation == (1, 1) and conv.groups == 1
        and list(conv._parameters) == ['weight', 'bias']
        and conv._parameters['weight'] is not None and conv._parameters['bias'] is None)


def is_plain_parts(layer: Any) -> bool:
    """Tell whether a dense layer's norms and convolutions are timm's, with nothing between, and fit each other."""
    parts = layer._modules
    return (
        list(parts) == ['norm1', 'conv1', 'norm2', 'conv2', *(['se'] if type(layer) is not densenet.DenseLayer else [])]
        and is_plain_norm(parts['norm1']) and is_plain_conv(parts['conv1'], 1)
        and is_plain_norm(parts['norm2']) and is_plain_conv(parts['conv2'], 3))


def is_plain_transition(module: Any) -> bool:
    """Tell whether this is timm's transition with an average pool, with or without an attention at its end."""
    return (
        is_plain_module(module, densenet.DenseTransition)
        and list(module._modules) in (['norm', 'conv', 'pool'], ['norm', 'conv', 'pool', 'se'])
        and is_plain_norm(module.norm) and is_plain_conv(module.conv, 1)
        and is_plain_module(module.pool, nn.AvgPool2d)
        and all(size in (2, (2, 2)) for size in (module.pool.kernel_size, module.pool.stride))
        and module.pool.padding in (0, (0, 0)) and not module.pool.ceil_mode and not module.pool.divisor_override)


def same_dtype_and_device(module: nn.Module) -> bool:
    """Tell whether a module's floating-point tensors are of one type and on one device."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    return len({(t.dtype, t.device) for t in tensors}) <= 1


@torch.jit.ignore
def is_transformed(x: torch.Tensor) -> bool:
    """Tell whether operators on this do more than run: a tracer, torch.func, forward-mode AD, a tensor's subclass."""
    return (
        type(x) is not torch.Tensor or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0)


def has_autocast(x: torch.Tensor) -> bool:
    """Tell whether operators on this choose their types by themselves."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
