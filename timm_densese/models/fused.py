"""Dense blocks for inference.

A layer's second batch norm goes into its first convolution, the first becomes a scale and a shift. Each layer
writes its features into one channels_last buffer, from which the next ones read; nothing is concatenated.

The modules' parameters are all that there is. Each call reads them, and keeps nothing for the next.
"""
import functools
from typing import Any, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .plain import is_plain_conv, is_transformed

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
        writes = not torch.jit.is_scripting() and _can_write(x)
        if writes:
            scale, shift = self.scale.to(x.dtype)[:, None, None], self.shift.to(x.dtype)[:, None, None]
            x = torch.addcmul(shift, x, scale).relu_()
        else:
            # As a batch norm: ONNX Runtime runs it faster than a product and a sum.
            mean, var = torch.zeros_like(self.shift), torch.ones_like(self.scale)
            x = F.relu(F.batch_norm(x, mean, var, self.scale, self.shift, False, 0., 0.))
        if self.pool:  # before the convolution, which has a quarter of the work then: the two commute
            x = F.avg_pool2d(x, 2)
        if writes and _is_faster_as_product(x, self.conv):
            return F.linear(x.permute(0, 2, 3, 1), self.conv.weight.flatten(1), self.conv.bias).permute(0, 3, 1, 2)
        return self.conv(x)


@torch.jit.ignore
def _can_write(x: torch.Tensor) -> bool:
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed(x))


@torch.jit.ignore
def _is_faster_as_product(x: torch.Tensor, conv: Any) -> bool:
    """Tell whether to run a 1x1 convolution as a matrix product.

    On a CPU, a convolution reorders its weights on every call. For few pixels that takes longer than what its kernel
    is faster by.
    """
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return x.device.type == 'cpu' and pixels <= 1024 and is_plain_conv(conv, 1, bias=None)


class _FusedLayer(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.conv1 = NormConv(layer.norm1, fold_after(layer.conv1, layer.norm2))
        self.conv2 = layer.conv2
        self.se = getattr(layer, 'se', nn.Identity())
        self.train(layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.se(self.conv2(self.conv1(x).relu_()))


class FusedDenseBlock(nn.Module):
    """A dense block for inference: running statistics are folded into its convolutions, dropout is gone.

    Without a gradient it writes into a buffer. With one, and for compilers, exporters and transforms of torch.func, it
    concatenates, which they differentiate or fuse themselves.

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
        buffer: Optional[torch.Tensor] = None
        if not torch.jit.is_scripting() and _can_write(x):
            buffer = self._create_buffer(x)
            x = buffer[:, :x.shape[1]]
        new_shape = [x.shape[0], self.growth_rate, x.shape[2], x.shape[3]]
        for layer in self.layers:
            new_features = layer(x)
            if buffer is not None and new_features.shape == new_shape and new_features.dtype == x.dtype:
                start, end = x.shape[1], x.shape[1] + self.growth_rate
                buffer[:, start:end] = new_features
                x = buffer[:, :end]
            else:
                buffer = None
                x = torch.cat([x, new_features], 1)
        return x

    @torch.jit.ignore
    def _create_buffer(self, x: torch.Tensor) -> torch.Tensor:
        """Give a buffer for the block's features, with those that enter it."""
        if x.device.type == 'cpu':
            _keep_freed_memory()
        channels = x.shape[1] + len(self.layers) * self.growth_rate
        buffer = torch.empty(
            (x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        buffer[:, :x.shape[1]] = x
        return buffer


@functools.lru_cache(maxsize=None)
def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor, once for a process.

    It gives memory back to the system at once until a block of this size has been freed; at batch 1, a seventh of the
    time would go to getting the buffers anew for each image.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
