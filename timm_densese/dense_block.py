"""How a dense block is executed."""
from typing import List, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import densenet

__all__ = ['SEDenseLayer']


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
