"""The dense block, its layers and the features around it, and which execution runs: plain, linear memory or fused.

The weights are timm's, with timm's names, in the first two.
"""
from collections import OrderedDict
from typing import Any, List, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models import densenet

from .fused import FusedDenseBlock, NormConv, fold_after, is_foldable
from .linear_memory import run_compiled, run_eager

__all__ = ['DenseBlock', 'DenseFeatures', 'SEDenseLayer']


class SEDenseLayer(densenet.DenseLayer):
    """timm's dense layer with an attention on its new features, before they join the concatenation."""

    def __init__(self, layer: densenet.DenseLayer, se: nn.Module) -> None:
        """Take over a layer.

        Args:
            layer: The layer, whose modules become this one's, so that weights and names stay.
            se: Attention for its growth_rate new feature maps.
        """
        nn.Module.__init__(self)  # not DenseLayer's, which would create and initialise the modules a second time
        for name, module in layer.named_children():
            self.add_module(name, module)
        self.se = se
        self.drop_rate = layer.drop_rate
        self.grad_checkpointing = layer.grad_checkpointing

    def forward(self, x: Union[torch.Tensor, List[torch.Tensor]]) -> torch.Tensor:
        """Compute the layer's new features.

        Args:
            x: The block's features so far, as one map or a list of maps, (B, C_i, H, W) each.

        Returns:
            New features (B, growth_rate, H, W).
        """
        features = [x] if isinstance(x, torch.Tensor) else x
        if self.grad_checkpointing and self.any_requires_grad(features):
            if torch.jit.is_scripting():
                raise Exception('Memory Efficient not supported in JIT')
            bottleneck_output = self.call_checkpoint_bottleneck(features)
        else:
            bottleneck_output = self.bottleneck_fn(features)
        new_features = self.se(self.conv2(self.norm2(bottleneck_output)))  # type: ignore[operator]
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return new_features


class DenseBlock(densenet.DenseBlock):
    """timm's dense block, which trains in linear memory where `grad_checkpointing` is set and it can."""

    def __init__(self, block: densenet.DenseBlock) -> None:
        """Take over a block.

        Args:
            block: The block, whose layers become this one's, so that weights and names stay.
        """
        nn.ModuleDict.__init__(self, dict(block.items()))  # not DenseBlock's, which would create the layers again

    def forward(self, init_features: torch.Tensor) -> torch.Tensor:
        """Compute the block's features.

        Args:
            init_features: (B, C, H, W).

        Returns:
            The features and those of all layers, (B, C + layers * growth_rate, H, W).
        """
        if not torch.jit.is_scripting() and self.is_linear(init_features):
            return self.forward_linear(init_features)
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)

    @torch.jit.ignore
    def is_linear(self, x: torch.Tensor) -> bool:
        """Tell whether this block trains in linear memory on these features.

        It does not without `grad_checkpointing` or a gradient, in tracing, for norms that are not batch norms with
        batch statistics of their own process, activations that are not ReLU, layers that somebody replaced, or hooks
        on a part of a layer, which this execution would pass by.
        """
        layers: List[Any] = list(self.values())
        return (
            torch.is_grad_enabled() and not torch.jit.is_tracing()
            and all(type(layer) in (densenet.DenseLayer, SEDenseLayer) and layer.grad_checkpointing for layer in layers)
            and x.shape[0] * x.shape[2] * x.shape[3] > 1
            and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
            and all(_reads_normalised(layer.norm1, layers[0].norm1.eps) and _reads_normalised(layer.norm2)
                    and _is_plain_conv(layer.conv1) and _is_plain_conv(layer.conv2) and not _has_hooks(layer)
                    for layer in layers))

    @torch.jit.ignore
    def forward_linear(self, x: torch.Tensor, tail: Optional[nn.Module] = None, pool: bool = False) -> torch.Tensor:
        """Compute the block's features, or what a norm makes of them, in linear memory.

        Args:
            x: The block's input (B, C, H, W).
            tail: The batch norm with ReLU that alone reads the block's output.
            pool: Average the tail's output over 2x2 pixels.

        Returns:
            The features (B, C_out, H, W), or with a tail its output, halved in size by `pool`.
        """
        layers: List[Any] = list(self.values())
        norm1 = layers[0].norm1
        run = run_compiled if torch.compiler.is_compiling() else run_eager
        return run(layers, x, norm1.eps, tail, pool)

    def fuse(self) -> nn.Module:
        """Give the block for inference, or this one where its norms cannot be folded (timm's reparameterize_model)."""
        layers: List[Any] = list(self.values())
        if not all(is_foldable(norm) for layer in layers for norm in (layer.norm1, layer.norm2)):
            return self
        return FusedDenseBlock(layers)


class DenseFeatures(nn.Sequential):
    """DenseNet's stem, dense blocks, transitions and final norm, in their order.

    Where a block trains in linear memory, the norm that follows it reads the block's normalised features.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the final features.

        Args:
            x: Images (B, in_chans, H, W).

        Returns:
            Features (B, num_features, H / 32, W / 32).
        """
        if torch.jit.is_scripting():
            for module in self:
                x = module(x)
            return x
        else:
            return self._forward(x)

    @torch.jit.ignore
    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        modules: List[Any] = [*self, None]
        i = 0
        while i < len(modules) - 1:
            module, following = modules[i], modules[i + 1]
            i += 1
            pool = _is_plain_transition(following) and not _has_hooks(following)
            norm = following.norm if pool else following
            if not isinstance(module, DenseBlock) or not _can_read(norm, module) or not module.is_linear(x):
                x = module(x)
                continue
            # A 1x1 convolution and an average commute: pooled first, the convolution has a quarter of the work.
            x = module.forward_linear(x, norm, pool)
            x = following.conv(x) if pool else x
            i += 1
        return x

    def fuse(self) -> nn.Sequential:
        """Give the features for inference, as timm's reparameterize_model asks; what cannot be folded stays.

        The result has the same children's names, so features are tapped in the same places.
        """
        fused: OrderedDict[str, nn.Module] = OrderedDict()
        previous = ''
        for name, module in self.named_children():
            conv: Any = fused.get(previous)
            if type(conv) is nn.Conv2d and conv.bias is None and is_foldable(module):
                fused[previous] = fold_after(conv, module)
                fused[name] = nn.ReLU(inplace=True)
            elif isinstance(module, DenseBlock):
                fused[name] = module.fuse()
            elif _is_plain_transition(module) and is_foldable(module.norm):  # type: ignore[union-attr]
                fused[name] = NormConv(module.norm, module.conv, pool=True)  # type: ignore[union-attr,arg-type]
            else:
                fused[name] = module
            previous = name
        return nn.Sequential(fused)


def _is_plain_transition(module: Any) -> bool:
    return (
        isinstance(module, densenet.DenseTransition)
        and [name for name, _ in module.named_children()] == ['norm', 'conv', 'pool'] and _is_plain_conv(module.conv)
        and type(module.pool) is nn.AvgPool2d and module.pool.kernel_size == module.pool.stride == 2)


def _can_read(norm: Any, block: DenseBlock) -> bool:
    """Tell whether a norm after a block can read the block's normalised features, and is all that does."""
    first: Any = next(iter(block.values()))
    watched = any(getattr(block, hooks) for hooks in _HOOKS)
    return _reads_normalised(norm, first.norm1.eps) and not _has_hooks(norm) and not watched


def _reads_normalised(norm: Any, eps: Optional[float] = None) -> bool:
    return (
        type(norm) is BatchNormAct2d and norm.training and norm.affine and norm.track_running_stats
        and isinstance(norm.act, nn.ReLU) and isinstance(norm.drop, nn.Identity) and eps in (None, norm.eps))


def _is_plain_conv(conv: Any) -> bool:
    return type(conv) is nn.Conv2d and conv.bias is None and conv.padding_mode == 'zeros'


_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(m, hooks) for m in module.modules() for hooks in _HOOKS)
