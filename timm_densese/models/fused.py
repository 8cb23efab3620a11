"""Dense blocks for inference.

A layer's second batch norm goes into its first convolution, the first becomes a scale and a shift. Each layer
writes its features into one channels_last buffer, from which the next ones read; nothing is concatenated.

The modules' parameters are all that there is. Each call reads them, and keeps nothing for the next.
"""
import functools
import operator
from typing import Any, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .plain import TENSORS, has_global_hooks, has_own_methods, is_transformed
from .pointwise import affine_relu, conv1x1, find_kernels, has_few_pixels, relu, relu_

__all__ = ['FusedDenseBlock', 'FusedReLU', 'NormConv', 'fold_after']


def _scale_shift(norm: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (C,) of a norm with running statistics, in float64 and without a gradient."""
    scale = norm.weight.detach().double() * (norm.running_var.double() + norm.eps).rsqrt()
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale


@torch.no_grad()
def fold_after(conv: Any, norm: Any) -> nn.Conv2d:
    """Give the convolution that computes norm(conv(x)), without the norm's ReLU.

    Args:
        conv: A convolution without a bias.
        norm: A batch norm with running statistics.
    """
    scale, shift = _scale_shift(norm)
    fused = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        device='meta')
    weight = (conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype)
    fused.weight = nn.Parameter(weight, conv.weight.requires_grad)
    fused.bias = nn.Parameter(shift.to(conv.weight.dtype), norm.bias.requires_grad)
    return fused.train(conv.training)


@torch.jit.ignore
def _is_only_run(x: torch.Tensor) -> bool:
    """Tell whether operators on this only run: no gradient, compiler, tracer or transform looks at them."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed(x))


@torch.jit.ignore
def _relu(x: torch.Tensor) -> torch.Tensor:
    return relu(x) if _is_only_run(x) else x.relu()


@torch.jit.ignore
def _relu_(x: torch.Tensor) -> torch.Tensor:
    return relu_(x) if _is_only_run(x) else x.relu_()


class FusedReLU(nn.ReLU):
    """ReLU in the quickest way where nothing looks at the operators; not in place, as a hook may keep what it reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() if torch.jit.is_scripting() else _relu(x)


# What a module must have for its parameters to be all that it computes with.
_read_hooks = operator.itemgetter('_forward_hooks', '_forward_pre_hooks')
_read_conv = operator.itemgetter(
    '_forward_hooks', '_forward_pre_hooks',
    'kernel_size', 'stride', 'padding', 'dilation', 'groups', 'padding_mode')
_NO_HOOKS: Any = {}, {}
_CONV1: Any = {}, {}, (1, 1), (1, 1), (0, 0), (1, 1), 1, 'zeros'
_CONV2: Any = {}, {}, (3, 3), (1, 1), (1, 1), (1, 1), 1, 'zeros'


def _is_as_built(conv: Any, attributes: Any) -> bool:
    """Tell whether a convolution has these attributes, and nobody watches it or has replaced a part."""
    return type(conv) is nn.Conv2d and _read_conv(conv.__dict__) == attributes and not has_own_methods(conv)


class NormConv(nn.Module):
    """conv(relu(norm(x))) for a 1x1 convolution and running statistics; optionally averages over 2x2 pixels between."""

    def __init__(self, norm: Any, conv: nn.Conv2d, pool: bool = False) -> None:
        super().__init__()
        scale, shift = _scale_shift(norm)
        self.scale = nn.Parameter(scale.to(norm.weight.dtype), norm.weight.requires_grad)
        self.shift = nn.Parameter(shift.to(norm.weight.dtype), norm.bias.requires_grad)
        self.conv = conv
        self.pool = pool
        self.train(conv.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # As a batch norm: ONNX Runtime runs it faster than a product and a sum. Some versions of torch want an eps
        # above 0. With this one, the variance makes 1.
        eps = 2. ** -20
        mean, var = torch.zeros_like(self.shift), torch.full_like(self.scale, 1. - eps)
        x = F.batch_norm(x, mean, var, self.scale, self.shift, False, 0., eps)
        x = x.relu_() if torch.jit.is_scripting() else _relu_(x)
        if self.pool:  # before the convolution, which has a quarter of the work then: the two commute
            x = F.avg_pool2d(x, 2)
        weight = None if torch.jit.is_scripting() else self._read_weight(x)
        return self.conv(x) if weight is None else conv1x1(x, weight)

    @torch.jit.ignore
    def _read_weight(self, x: torch.Tensor) -> Optional[torch.Tensor]:
        """Give the convolution's weight where it computes with nothing else, or None where it is to be called."""
        if not _is_only_run(x) or has_global_hooks() or not _is_as_built(self.conv, _CONV1):
            return None
        weight, bias = map(self.conv._parameters.get, ('weight', 'bias'))
        return weight if bias is None and type(weight) in TENSORS else None


class _FusedLayer(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.conv1 = NormConv(layer.norm1, fold_after(layer.conv1, layer.norm2))
        self.conv2 = layer.conv2
        self.se = getattr(layer, 'se', None)
        self.train(layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.conv1(x).relu())  # not in place, as a hook may keep what conv1 gave
        return x if self.se is None else self.se(x)


def _read_layer(layer: Any) -> Optional[Tuple[Any, ...]]:
    """Give scale, shift, weights, bias and attention of a layer that may be computed without calling its parts.

    This runs for each layer of each call, so it reads dictionaries, which is faster than attributes.

    Returns:
        None where a part is watched or is not what it was built as.
    """
    norm_conv, conv2, se = map(layer._modules.get, ('conv1', 'conv2', 'se'))
    if type(layer) is not _FusedLayer or type(norm_conv) is not NormConv:
        return None
    conv1: Any = norm_conv._modules['conv']
    if (
        _read_hooks(layer.__dict__) != _NO_HOOKS or _read_hooks(norm_conv.__dict__) != _NO_HOOKS
        or has_own_methods(layer) or has_own_methods(norm_conv)
        or layer.__dict__.get('se') is not None  # a function, which is no module
        or not _is_as_built(conv1, _CONV1) or not _is_as_built(conv2, _CONV2)
    ):
        return None
    ours, first, second = norm_conv._parameters, conv1._parameters, conv2._parameters
    tensors = tuple(map(dict.get, (ours, ours, first, first, second), ('scale', 'shift', 'weight', 'bias', 'weight')))
    if second.get('bias') is not None or not TENSORS.issuperset(map(type, tensors)):
        return None
    return *tensors, se


class FusedDenseBlock(nn.Module):
    """A dense block for inference: running statistics are folded into its convolutions, dropout is gone.

    Without a gradient it writes into a buffer. With one, for compilers, exporters and transforms of torch.func, and
    where a part of a layer is watched or changed, it calls its layers and concatenates.

    Args:
        layers: timm's dense layers, or those with an attention.
    """

    def __init__(self, layers: List[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_FusedLayer(layer) for layer in layers])
        self.train(layers[0].training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block's features.

        Args:
            x: (B, C, H, W).

        Returns:
            The features and those of all layers, (B, C + layers * growth_rate, H, W).
        """
        if not torch.jit.is_scripting():
            layers = self._read_layers(x)
            if layers is not None:
                return self._forward_buffer(x, layers)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x

    @torch.jit.ignore
    def _read_layers(self, x: torch.Tensor) -> Optional[List[Any]]:
        """Give what each layer computes with, or None where the layers are to be called."""
        if not _is_only_run(x) or has_global_hooks():
            return None
        layers = [_read_layer(layer) for layer in self.layers]
        return None if None in layers else layers

    @torch.jit.ignore
    def _forward_buffer(self, x: torch.Tensor, layers: List[Any]) -> torch.Tensor:
        batch_size, end, height, width = x.shape
        growth = [weight2.shape[0] for *_, weight2, _ in layers]
        channels = end + sum(growth)
        if x.is_cpu:
            _keep_freed_memory()
        pixels = torch.empty((batch_size * height * width, channels), dtype=x.dtype, device=x.device)
        buffer = pixels.view(batch_size, height, width, channels).permute(0, 3, 1, 2)  # channels_last
        first, *new = buffer.split([end, *growth], 1)
        first.copy_(x)
        is_product, kernels = has_few_pixels(x), find_kernels(x, x.dtype)
        small = [t for scale, shift, _, bias1, *_ in layers for t in (scale, shift, bias1)]
        if not kernels and {t.dtype for t in small} != {x.dtype}:  # autocast: all in one copy
            small = list(torch.cat(small).to(x.dtype).split([len(t) for t in small]))
        with torch.cuda.device_of(x):  # where kernels are launched
            for i, (_, _, weight1, _, weight2, se) in enumerate(layers):
                scale, shift, bias1 = small[3 * i:3 * i + 3]
                if kernels:
                    y = kernels.affine_conv(buffer[:, :end], scale, shift, weight1, bias1)
                else:
                    y = affine_relu(pixels.narrow(1, 0, end), scale, shift)
                    if is_product:
                        y = relu_(torch.mm(y, weight1.flatten(1).t()).add_(bias1))
                        y = y.view(batch_size, height, width, len(bias1)).permute(0, 3, 1, 2)
                    else:
                        y = y.view(batch_size, height, width, end).permute(0, 3, 1, 2)
                        y = relu_(F.conv2d(y, weight1, bias1))
                y = F.conv2d(y, weight2, None, 1, 1)
                if se is not None:
                    shape = y.shape
                    y = se(y)
                    if y.shape != shape:
                        raise ValueError(f'An attention made features of {tuple(y.shape)} of those of {tuple(shape)}.')
                new[i].copy_(y)
                end += growth[i]
        return buffer


@functools.lru_cache(maxsize=None)
def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor, once for a process.

    It gives memory back to the system at once until a block of this size has been freed; at batch 1, a seventh of the
    time would go to getting the buffers anew for each image.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
