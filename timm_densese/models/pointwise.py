"""Pointwise passes over feature maps."""
from typing import Optional

import torch

__all__ = ['affine_relu', 'relu_', 'relu_backward_']

# Minus infinity read as an integer. Above it, among the negative integers, are the negative NaNs alone.
_MINUS_INFINITY = {torch.bfloat16: -128, torch.float16: -1024}


def relu_(x: torch.Tensor) -> torch.Tensor:
    """Compute ReLU in place.

    A CPU converts types of 16 bits to float32 and back. Read as integers, they are compared three times as fast, with
    the same result; NaNs stay NaNs.

    Args:
        x: Any shape.

    Returns:
        x.
    """
    minus_infinity = _MINUS_INFINITY.get(x.dtype) if x.is_cpu else None
    if minus_infinity is None:
        return x.relu_()
    torch.threshold_(x.view(torch.int16), minus_infinity, 0)  # without the checks of F.threshold
    return x


def relu_backward_(grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Compute the gradient before a ReLU, in place of that after it; of 16 bits read as integers, as above.

    Args:
        grad: Gradient of `out`.
        out: What the ReLU gave; what follows from a NaN in it is not defined.

    Returns:
        grad.
    """
    g, y = grad, out
    if grad.dtype in _MINUS_INFINITY and grad.device.type == 'cpu':
        g, y = grad.view(torch.int16), out.view(torch.int16)
    torch.ops.aten.threshold_backward.grad_input(g, y, 0, grad_input=g)
    return grad


def affine_relu(
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Compute relu(scale * x + shift).

    Args:
        x: Features.
        scale: Of x's type, such that it broadcasts to x.
        shift: The same.
        out: Where to write.
    """
    return relu_(torch.addcmul(shift, x, scale, out=out))
