"""Dense blocks for inference.

A layer's second batch norm goes into its first convolution, the first becomes a scale and a shift. Each layer
writes its features into one channels_last buffer, from which the next ones read; nothing is concatenated.

The modules' parameters are all that there is. Each call reads them, and keeps nothing for the next.
"""
import functools
from typing import Any, List, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .plain import has_global_hooks, is_transformed

__all__ = ['FusedDenseBlock', 'NormConv', 'fold_after']


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
        # As a batch norm: ONNX Runtime runs it faster than a product and a sum.
        mean, var = torch.zeros_like(self.shift), torch.ones_like(self.scale)
        x = F.batch_norm(x, mean, var, self.scale, self.shift, False, 0., 0.).relu_()
        if self.pool:  # before the convolution, which has a quarter of the work then: the two commute
            x = F.avg_pool2d(x, 2)
        return self.conv(x)


class _FusedLayer(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.conv1 = NormConv(layer.norm1, fold_after(layer.conv1, layer.norm2))
        self.conv2 = layer.conv2
        self.se = getattr(layer, 'se', nn.Identity())
        self.train(layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.se(self.conv2(self.conv1(x).relu_()))


def _is_as_built(layer: Any) -> bool:
    """Tell whether `FusedDenseBlock` may compute a layer without calling its parts, as quickly as can be told."""
    parts = layer._modules  # not by attribute, which takes longer
    norm_conv, conv2 = parts.get('conv1'), parts.get('conv2')
    if type(layer) is not _FusedLayer or type(norm_conv) is not NormConv or type(conv2) is not nn.Conv2d:
        return False
    conv = norm_conv._modules['conv']
    return (
        type(conv) is nn.Conv2d and conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0)
        and conv.groups == 1 and type(conv._parameters.get('weight')) in (nn.Parameter, torch.Tensor)
        and not (layer._forward_hooks or layer._forward_pre_hooks or norm_conv._forward_hooks
                 or norm_conv._forward_pre_hooks or conv._forward_hooks or conv._forward_pre_hooks)
        and not ('forward' in vars(layer) or 'forward' in vars(norm_conv) or 'forward' in vars(conv)))


class FusedDenseBlock(nn.Module):
    """A dense block for inference: running statistics are folded into its convolutions, dropout is gone.

    Without a gradient it writes into a buffer. With one, for compilers, exporters and transforms of torch.func, and
    where a part of a layer is watched or changed, it calls its layers and concatenates.

    Args:
        layers: timm's dense layers, or those with an attention, all of one growth rate.
    """

    def __init__(self, layers: List[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_FusedLayer(layer) for layer in layers])
        self.growth_rate = layers[0].conv2.out_channels
        self.train(layers[0].training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block's features.

        Args:
            x: (B, C, H, W).

        Returns:
            The features and those of all layers, (B, C + layers * growth_rate, H, W).
        """
        if not torch.jit.is_scripting() and self._can_write(x):
            return self._forward_buffer(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x

    @torch.jit.ignore
    def _can_write(self, x: torch.Tensor) -> bool:
        layers: List[Any] = list(self.layers)
        return (
            not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transformed(x)
            and not has_global_hooks() and all(map(_is_as_built, layers))
            and all(layer._modules['conv2'].out_channels == self.growth_rate for layer in layers))

    @torch.jit.ignore
    def _forward_buffer(self, x: torch.Tensor) -> torch.Tensor:
        layers: List[Any] = list(self.layers)
        end = x.shape[1]
        batch_size, height, width = x.shape[0], x.shape[2], x.shape[3]
        channels = end + self.growth_rate * len(layers)
        if x.device.type == 'cpu':
            _keep_freed_memory()
        pixels = torch.empty((batch_size * height * width, channels), dtype=x.dtype, device=x.device)
        buffer = pixels.view(batch_size, height, width, channels).permute(0, 3, 1, 2)  # channels_last
        buffer[:, :end] = x
        # A convolution on a CPU reorders its weights on every call. For few pixels that takes longer than its kernel
        # saves against that of a matrix product.
        is_product = x.device.type == 'cpu' and len(pixels) <= 1024
        for layer in layers:
            norm_conv, conv = layer.conv1, layer.conv1.conv
            scale, shift = norm_conv.scale, norm_conv.shift
            if scale.dtype != x.dtype:  # autocast
                scale, shift = scale.to(x.dtype), shift.to(x.dtype)
            y = torch.addcmul(shift, pixels.narrow(1, 0, end), scale).relu_()
            if is_product:
                y = F.linear(y, conv.weight.flatten(1), conv.bias).relu_()
                y = y.view(batch_size, height, width, -1).permute(0, 3, 1, 2)
            else:
                y = conv(y.view(batch_size, height, width, end).permute(0, 3, 1, 2)).relu_()
            y = layer.se(layer.conv2(y))
            if y.shape != (batch_size, self.growth_rate, height, width):
                raise ValueError(
                    f'A layer gave features of {tuple(y.shape)}, and the block has room for '
                    f'{(batch_size, self.growth_rate, height, width)}.')
            buffer.narrow(1, end, self.growth_rate).copy_(y)
            end += self.growth_rate
        return buffer


@functools.lru_cache(maxsize=None)
def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor, once for a process.

    It gives memory back to the system at once until a block of this size has been freed; at batch 1, a seventh of the
    time would go to getting the buffers anew for each image.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
