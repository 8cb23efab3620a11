"""Dense blocks for inference.

A layer's second batch norm goes into its first convolution, the first becomes a scale and a shift. Each layer
writes its features into one channels_last buffer, from which the next ones read; nothing is concatenated.
"""
import weakref
from typing import Any, Callable, List, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['FusedDenseBlock', 'NormConv', 'fold_after', 'is_foldable']


def is_foldable(norm: Any) -> bool:
    tensors = ('weight', 'bias', 'running_mean', 'running_var')
    return (
        all(isinstance(getattr(norm, name, None), torch.Tensor) for name in tensors)
        and isinstance(getattr(norm, 'act', None), nn.ReLU) and isinstance(getattr(norm, 'drop', None), nn.Identity))


def _scale_shift(norm: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (C,) of a norm with running statistics, in float64 and without a gradient."""
    scale = norm.weight.detach().double() * (norm.running_var.double() + norm.eps).rsqrt()
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale


@torch.no_grad()
def fold_after(conv: Any, norm: Any) -> nn.Conv2d:
    """Give the convolution that computes norm(conv(x)), without the norm's ReLU."""
    scale, shift = _scale_shift(norm)
    fused = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        device=conv.weight.device, dtype=conv.weight.dtype)
    fused.weight.copy_(conv.weight.double() * scale[:, None, None, None])
    fused.bias.copy_(shift)  # type: ignore[union-attr]
    return fused.train(conv.training)


class NormConv(nn.Module):
    """conv(relu(norm(x))) for a 1x1 convolution and running statistics; optionally averages over 2x2 pixels between."""

    def __init__(self, norm: Any, conv: nn.Conv2d, pool: bool = False) -> None:
        super().__init__()
        self.norm = norm
        self.conv = conv
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # As a batch norm, whatever the mode: ONNX Runtime runs it faster than a product and a sum.
        norm = self.norm
        x = F.relu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0., norm.eps))
        if self.pool:  # before the convolution, which has a quarter of the work then: the two commute
            x = F.avg_pool2d(x, 2)
        return self.conv(x)


@torch.jit.ignore
def _is_graph() -> bool:
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()


class _FusedLayer(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.conv1 = NormConv(layer.norm1, fold_after(layer.conv1, layer.norm2))
        self.conv2 = layer.conv2
        self.se = getattr(layer, 'se', nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.se(self.conv2(self.conv1(x).relu_()))


class FusedDenseBlock(nn.Module):
    """A dense block for inference: running statistics are folded into its convolutions, dropout is gone."""

    def __init__(self, layers: List[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_FusedLayer(layer) for layer in layers])
        self.new_channels = sum(layer.conv2.out_channels for layer in layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block's features.

        Args:
            x: (B, C, H, W).

        Returns:
            The features and those of all layers, (B, C + layers * growth_rate, H, W).
        """
        if not torch.jit.is_scripting() and not _is_graph():
            return self._forward_buffer(x)
        # With a gradient, and for compilers and exporters, which fuse the concatenation themselves.
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x

    @torch.jit.ignore
    def _forward_buffer(self, x: torch.Tensor) -> torch.Tensor:
        start = x.shape[1]
        out = torch.empty(
            (x.shape[0], start + self.new_channels, *x.shape[2:]), dtype=x.dtype, device=x.device,
            memory_format=torch.channels_last)
        out[:, :start] = x
        for scale, shift, conv1, conv2, se in self._prepare(x):
            x = conv2(conv1(torch.addcmul(shift, out[:, :start], scale).relu_()))
            if se is not None:
                x = se(x)
            end = start + x.shape[1]
            out[:, start:end] = x
            start = end
        return out

    def _prepare(self, x: torch.Tensor) -> List[Any]:
        """Make ready what the layers need for x's type and shape, once for as long as their weights do not change."""
        sources, versions, dtype, shape, steps = _prepared.get(self, ([], -1, None, None, []))
        if not steps or dtype != x.dtype or shape != x.shape or versions != _count_changes(sources):
            layers: List[Any] = list(self.layers)
            steps = [(
                *(t[:, None, None].to(x.dtype) for t in _scale_shift(layer.conv1.norm)),
                _pack_conv(layer.conv1.conv, x, relu=True), _pack_conv(layer.conv2, x, relu=False),
                None if isinstance(layer.se, nn.Identity) else layer.se) for layer in layers]
            # glibc gives memory back to the system at once until a block of this size has been freed; at batch 1, a
            # seventh of the time would go to getting the buffers anew for each image.
            torch.empty(31 << 20, dtype=torch.uint8)
            sources = [*self.parameters(), *self.buffers()]
            _prepared[self] = (sources, _count_changes(sources), x.dtype, x.shape, steps)
        return steps

    def _apply(self, fn: Any, recurse: bool = True) -> 'FusedDenseBlock':
        _prepared.pop(self, None)  # moved or cast
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _prepared.pop(self, None)
        super()._load_from_state_dict(*args, **kwargs)


# Beside the modules, not in them: packed weights cannot be copied or saved.
_prepared: 'weakref.WeakKeyDictionary[FusedDenseBlock, Any]' = weakref.WeakKeyDictionary()


def _count_changes(tensors: List[torch.Tensor]) -> int:
    return sum(0 if t.is_inference() else t._version for t in tensors)


def _pack_conv(conv: Any, x: torch.Tensor, relu: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Give conv, then ReLU if asked, as a function.

    On a CPU, a convolution reorders its weights on every call, a tenth of the time at batch 1. Here they are reordered
    once, with the operators that torch.compile's freezing uses. They are told the input's shape: without it, oneDNN
    takes a slow kernel for some channels (192 to 48 on 7x7, as in DenseNet-161: 45 times as slow).
    """
    onednn = x.device.type == 'cpu' and torch.backends.mkldnn.is_available()
    if not onednn or x.dtype not in (torch.float32, torch.bfloat16):
        return (lambda x: conv(x).relu_()) if relu else conv
    size = [conv.padding, conv.stride, conv.dilation, conv.groups]
    shape = [x.shape[0], conv.in_channels, *x.shape[2:]]
    weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach().to(x.dtype), *size, shape)
    bias = None if conv.bias is None else conv.bias.detach().to(x.dtype)
    run, after = torch.ops.mkldnn._convolution_pointwise.default, 'relu' if relu else 'none'
    return lambda x: run(x, weight, bias, *size, after, [], '')
