"""Pointwise passes over feature maps, 1x1 convolutions among them, and which way to compute them is the quickest."""
import functools
import warnings
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F

__all__ = [
    'affine_relu', 'conv1x1', 'conv1x1_backward', 'find_kernels', 'has_few_pixels', 'relu', 'relu_', 'relu_backward_']

# Minus infinity read as an integer. Above it, among the negative integers, are the negative NaNs alone.
_MINUS_INFINITY = {torch.bfloat16: -128, torch.float16: -1024}


def relu(x: torch.Tensor) -> torch.Tensor:
    """Compute ReLU.

    A CPU converts types of 16 bits to float32 and back. Read as integers, they are compared three times as fast, with
    the same result; NaNs stay NaNs.

    Args:
        x: Any shape.
    """
    minus_infinity = _MINUS_INFINITY.get(x.dtype) if x.is_cpu else None
    return x.relu() if minus_infinity is None else torch.threshold(x.view(torch.int16), minus_infinity, 0).view(x.dtype)


def relu_(x: torch.Tensor) -> torch.Tensor:
    """Compute ReLU in place, as above; gives x."""
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


def has_few_pixels(x: torch.Tensor) -> bool:
    """Tell whether a 1x1 convolution of this is quicker as a matrix product.

    A convolution on a CPU reorders its weights on every call. For few pixels, that takes longer than its kernel saves.

    Args:
        x: Features (B, C, H, W).
    """
    if torch.compiler.is_compiling():  # which has its own ways, for any number of pixels
        return False
    return x.is_cpu and x.shape[0] * x.shape[2] * x.shape[3] <= 512


def find_kernels(x: torch.Tensor, dtype: torch.dtype) -> Any:
    """Give the module of kernels where they are known to be faster than operators, else None.

    Args:
        x: Features.
        dtype: What they are computed in.
    """
    if not (x.is_cuda and dtype in _MINUS_INFINITY and x.numel()) or _are_operators_watched():
        return None
    return _import_kernels(x.get_device())


def _are_operators_watched() -> bool:
    """Tell whether something sees every operator, as torch's counter of operations does; it sees no kernel."""
    return torch._C._len_torch_dispatch_stack() > 0


@functools.lru_cache(maxsize=None)
def _import_kernels(device: int) -> Any:
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):  # Hopper's, as measured
        return None
    return _try_kernels(torch.device('cuda', device))


def _try_kernels(device: torch.device) -> Any:
    """Give the kernels if one runs here. Triton is not everywhere, and needs a C compiler at run time."""
    x = torch.ones((1, 16, 1, 1), dtype=torch.float16, device=device)
    ones = torch.ones(16, device=device)
    try:
        from . import kernels

        with torch.cuda.device_of(x):
            kernels.affine(x, ones, ones, torch.empty_like(x))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f'Dense blocks run without kernels for this GPU, as they do not run here: {reason}', stacklevel=2)
        return None
    return kernels


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute a 1x1 convolution as a matrix product."""
    out = torch.mm(_pixels(x), weight.flatten(1).t())
    return out.view(x.shape[0], *x.shape[2:], weight.shape[0]).permute(0, 3, 1, 2)


def conv1x1(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute a 1x1 convolution without a bias, in the quickest way.

    Args:
        x: Features (B, C, H, W), in channels_last.
        weight: (C_out, C, 1, 1), of x's type where there is no autocast.

    Returns:
        (B, C_out, H, W), in channels_last.
    """
    return _product(x, weight) if has_few_pixels(x) else F.conv2d(x, weight)


def conv1x1_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        needs_weight: bool,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Compute the gradients of x and, if needed, of the weight, from that of what `conv1x1` gave."""
    if has_few_pixels(x):
        with torch.autocast(x.device.type, enabled=False):  # which changes the types of products, of convolutions not
            grad_weight = torch.mm(_pixels(grad).t(), _pixels(x)).view_as(weight) if needs_weight else None
            return _product(grad, weight.transpose(0, 1)), grad_weight
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, needs_weight, False])
    return grad_x, grad_weight


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """Give features (B, C, H, W) as (B * H * W, C), which in channels_last copies nothing."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)
