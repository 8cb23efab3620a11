"""The dense block, its layers and the features around it, with timm's weights and names, and which execution runs.

    * timm's own, the plain one, is the default. It also runs wherever one of the others does not know what it finds.
    * Linear memory (linear_memory.py) runs in training where `grad_checkpointing` is set, see
      `DenseBlock.is_memory_efficient`.
    * Fused (fused.py) are modules of their own for inference, which `timm.models.reparameterize_model` puts in the
      place of these, see `DenseBlock.fuse` and `DenseFeatures.fuse`.

The last two run kernels (kernels.py) on the GPUs where `pointwise.find_kernels` knows them to be faster.
"""
import warnings
from collections import OrderedDict
from typing import Any, Callable, List, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models import densenet
from torch.autograd import forward_ad

from .fused import FusedDenseBlock, FusedReLU, NormConv, fold_after
from .linear_memory import normalise, restore, run
from .plain import (
    has_autocast,
    has_hooks,
    has_own_methods,
    is_plain_module,
    is_plain_norm,
    is_plain_parts,
    is_plain_transition,
    is_transformed,
    same_dtype_and_device,
)

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
        if not torch.jit.is_scripting() and self.is_memory_efficient(init_features):
            return self.forward_memory_efficient(init_features)
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)

    @torch.jit.ignore
    def is_memory_efficient(self, x: torch.Tensor) -> bool:
        """Tell whether this block trains in linear memory on these features.

        It does not without `grad_checkpointing` or a gradient, in tracing, in transforms of torch.func, for norms that
        are not timm's batch norms with batch statistics of their own process, activations that are not ReLU, layers
        that somebody changed, types that differ without autocast, or hooks, which this execution would pass by.
        """
        layers: List[Any] = list(self.values())
        if not (torch.is_grad_enabled() and layers and all(
                type(layer) in (densenet.DenseLayer, SEDenseLayer) and layer.grad_checkpointing for layer in layers)):
            return False
        if is_transformed(x):
            if forward_ad._current_level >= 0:
                warnings.warn(
                    'Linear memory has no forward-mode derivatives: the dense blocks run as in timm. '
                    'Call set_grad_checkpointing(False) to get rid of this message.', stacklevel=2)
            return False
        return (
            x.shape[0] * x.shape[2] * x.shape[3] > 1
            and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
            and all(
                is_plain_module(layer, densenet.DenseLayer, SEDenseLayer) and is_plain_parts(layer)
                and layer.norm1.training and layer.norm1.eps == layers[0].norm1.eps and layer.norm2.training
                for layer in layers)
            and _is_dtype_known(x, [t for layer in layers for t in (
                layer.norm1.weight, layer.conv1.weight, layer.norm2.weight, layer.conv2.weight)]))

    @torch.jit.ignore
    def forward_memory_efficient(
            self,
            x: torch.Tensor,
            tail: Optional[nn.Module] = None,
            pool: bool = False,
    ) -> torch.Tensor:
        """Compute the block's features, or what a norm makes of them, in linear memory.

        Args:
            x: The block's input (B, C, H, W).
            tail: The batch norm with ReLU that alone reads the block's output.
            pool: Average the tail's output over 2x2 pixels.

        Returns:
            The features (B, C_out, H, W), or with a tail its output, halved in size by `pool`.
        """
        layers: List[Any] = list(self.values())
        return run(layers, x, layers[0].norm1.eps, tail, pool)

    def fuse(self) -> nn.Module:
        """Give the block for inference, or this one where it is not exactly timm's (timm's reparameterize_model).

        A block in training stays too: whether its whole model trains is known to `DenseFeatures.fuse`.
        """
        return self if any(part.training for part in self.modules()) else self.fold()

    def fold(self) -> nn.Module:
        """Give the block for inference whatever mode its parts are in, or this one where it is not exactly timm's."""
        layers: List[Any] = list(self.values())
        if (
            layers and is_plain_module(self, DenseBlock) and same_dtype_and_device(self)
            and all(is_plain_module(layer, densenet.DenseLayer, SEDenseLayer) and is_plain_parts(layer)
                    for layer in layers)
        ):
            return FusedDenseBlock(layers)
        return self


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
        modules: List[Any] = list(self)
        while modules:
            module = modules.pop(0)
            if type(module) is not DenseBlock or has_own_methods(module) or not module.is_memory_efficient(x):
                x = module(x)
            elif modules and not has_hooks(module) and _can_read(modules[0], x, module):
                x = _read(module.forward_memory_efficient, modules.pop(0), x)
            else:
                x = module(x) if has_hooks(module) else module.forward_memory_efficient(x)
                if modules:  # an attention, or a transition of another kind
                    with restore(x):
                        x = modules.pop(0)(x)
                    if modules and _can_read(modules[0], x):
                        x = _read(normalise, modules.pop(0), x)
        return x

    def fuse(self) -> 'DenseFeatures':
        """Change these features for inference, as timm's reparameterize_model asks.

        What is not exactly timm's stays, and in evaluation mode what is in training mode by itself: norms that take a
        batch's statistics, dropout that draws. The children keep their names, so features are tapped in the same
        places.
        """
        previous: Any = None
        for name, module in list(self.named_children()):
            if not self.training and any(part.training for part in module.modules()):
                previous = None
                continue
            if (
                is_plain_module(previous, nn.Conv2d) and previous.bias is None and previous.padding_mode == 'zeros'
                and is_plain_norm(module) and same_dtype_and_device(nn.ModuleList([previous, module]))
            ):
                self[list(self).index(previous)] = fold_after(previous, module)
                setattr(self, name, FusedReLU().train(module.training))
            elif isinstance(module, DenseBlock):
                setattr(self, name, module.fold())
            elif is_plain_transition(module) and same_dtype_and_device(module):
                transition: Any = module
                fused: nn.Module = NormConv(transition.norm, transition.conv, pool=True)
                if hasattr(transition, 'se'):
                    fused = nn.Sequential(OrderedDict(conv=fused, se=transition.se)).train(module.training)
                setattr(self, name, fused)
            previous = module
        return self


def _can_read(reader: Any, x: torch.Tensor, block: Optional[DenseBlock] = None) -> bool:
    """Tell whether a norm or a transition can read normalised features, those of a block with the block's eps."""
    layers: List[Any] = list(block.values()) if block is not None else []
    eps = layers[0].norm1.eps if layers else None
    if is_plain_module(reader, BatchNormAct2d):
        return _reads_normalised(reader, eps) and _is_dtype_known(x, [reader.weight])
    return (
        is_plain_transition(reader) and _reads_normalised(reader.norm, eps)
        and _is_dtype_known(x, [reader.norm.weight, reader.conv.weight]))


def _read(run: Callable[..., torch.Tensor], reader: Any, x: torch.Tensor) -> torch.Tensor:
    if isinstance(reader, BatchNormAct2d):
        return run(x, reader)
    # A 1x1 convolution and an average commute: pooled first, the convolution has a quarter of the work.
    x = F.conv2d(run(x, reader.norm, pool=True), reader.conv.weight)
    return reader.se(x) if hasattr(reader, 'se') else x


def _reads_normalised(norm: Any, eps: Optional[float]) -> bool:
    return is_plain_norm(norm) and norm.training and eps in (None, norm.eps)


def _is_dtype_known(x: torch.Tensor, weights: List[torch.Tensor]) -> bool:
    dtypes = {weight.dtype for weight in weights}
    return len(dtypes) == 1 and (dtypes == {x.dtype} or has_autocast(x))
