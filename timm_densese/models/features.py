"""The normalised features of a dense block that trains in linear memory, by operators or by kernels for a GPU."""
import copy
import functools
from typing import Any, Dict, List, Tuple

import torch
import torch.nn.functional as F
from torch.autograd.variable import Variable

from .plain import has_autocast
from .pointwise import affine_relu, conv1x1, conv1x1_backward, find_kernels, relu_, relu_backward_

__all__ = ['Features', 'create_features']

Stats = Tuple[torch.Tensor, ...]


class Features:
    """The normalised features of one pass through a block, and, in a backward pass, the gradients of them.

    The functions of linear_memory.py read and write it beside the graph. What orders them is a token: whoever appends
    features makes a new one, and whoever reads features takes the latest. So in backward, the gradient of a slice is
    complete before the function that appended it runs. The buffer is saved for backward by the function that reads it
    last, so that it counts, and can be moved, as saved tensors are. Backward passes may be nested, or run in several
    threads, so each has a state of its own.
    """

    def __init__(self, x: torch.Tensor, dtype: torch.dtype, channels: int, eps: float) -> None:
        stats = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        shape = (x.shape[0], channels, *x.shape[2:])
        self.x_hat: Any = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
        # Mean, unbiased variance, 1 / std and, for kernels, the scale and the shift that normalise.
        self.stats = torch.zeros((5, channels), dtype=stats, device=x.device)
        self.mean, self.var, self.invstd = self.stats[:3]
        self.zero = x.new_zeros(())  # what tokens and their gradients are
        self.updates: List[Tuple[Any, torch.Tensor, torch.Tensor]] = []  # norms, means and variances
        self.eps = eps
        self.filled = 0
        self.grad: Any = None
        self.scratch: Any = None
        self.passes: Dict[int, Features] = {}  # by the numbers that autograd gives them

    @functools.cached_property
    def zeros(self) -> torch.Tensor:
        return torch.zeros_like(self.mean)

    @functools.cached_property
    def ones(self) -> torch.Tensor:
        return torch.ones_like(self.mean)

    def append(self, x: torch.Tensor) -> slice:
        """Normalise new features (B, C, H, W) into the buffer; give the channels that they have there."""
        channels = slice(self.filled, self.filled + x.shape[1])
        self.normalise(x, channels)
        self.filled = channels.stop
        return channels

    def normalise(self, x: torch.Tensor, channels: slice) -> None:
        # With a momentum of 1, the running statistics are the batch's.
        x_hat, _, invstd = torch.native_batch_norm(
            x, None, None, self.mean[channels], self.var[channels], True, 1., self.eps)
        self.x_hat[:, channels] = x_hat
        self.invstd[channels] = invstd

    def append_backward(self, channels: slice) -> torch.Tensor:
        """Give the gradient of the features that were appended as these channels."""
        grad = self.normalise_backward(channels)
        if channels.start == 0:  # the last to need them
            self.release()
        return grad

    def normalise_backward(self, channels: slice) -> torch.Tensor:
        # Dense copies of the slices: the fused kernel needs them.
        x_hat, grad = (t[:, channels].contiguous(memory_format=torch.channels_last) for t in (self.x_hat, self.grad))
        # x_hat has mean 0 and variance 1 already; the scale that made it goes in as the weight.
        grad_x, _, _ = self._norm_backward(grad, x_hat, self.invstd[channels], [True, False, False])
        return grad_x

    def _norm_backward(
            self,
            grad: torch.Tensor,
            x_hat: torch.Tensor,
            weight: torch.Tensor,
            mask: List[bool],
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give what `mask` asks for of the gradients of x, weight and bias of a norm, from what is normalised."""
        zeros, ones = self.zeros[:len(weight)], self.ones[:len(weight)]
        return torch.ops.aten.native_batch_norm_backward(
            grad, x_hat, weight, None, None, zeros, ones, True, self.eps, mask)

    def start_backward(self, x_hat: torch.Tensor) -> 'Features':
        """Give a backward pass its state, with the buffer as it was saved, until the pass ends, wherever that is."""
        state = copy.copy(self)
        state.x_hat, state.grad = x_hat, None
        state.passes = {}  # not those that hold it: a pass that fails would leave a cycle
        number = torch._C._current_graph_task_id()
        if number >= 0:  # else somebody looks at a saved tensor
            self.passes[number] = state
            Variable._execution_engine.queue_callback(  # type: ignore[attr-defined]
                functools.partial(self.passes.pop, number, None))  # type: ignore[arg-type]
        return state

    @property
    def current(self) -> Any:
        """The state of the backward pass that runs, None before it has one."""
        return self.passes.get(torch._C._current_graph_task_id())

    def release(self) -> None:
        self.x_hat = self.grad = self.scratch = None

    def _scratch_like(self, x: torch.Tensor) -> torch.Tensor:
        if self.scratch is None:
            self.scratch = torch.empty(self.x_hat.numel(), dtype=x.dtype, device=x.device)
        b, c, h, w = x.shape
        return self.scratch[:x.numel()].view(b, h, w, c).permute(0, 3, 1, 2)

    def bottleneck(self, channels: int, params: Any, norm: Any) -> Tuple[torch.Tensor, Stats, torch.Tensor]:
        """Compute a layer's bottleneck of the first channels.

        Args:
            channels: How many.
            params: The layer's (weight1, bias1, conv1).
            norm: The layer's second norm, whose running statistics are updated.

        Returns:
            The bottleneck, its statistics, and relu(norm(bottleneck)).
        """
        weight1, bias1, conv1 = params
        x = conv1x1(self.read(channels, weight1, bias1, scratch=True), conv1)
        norm.num_batches_tracked.add_(1)
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        out, mean, invstd = torch.native_batch_norm(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, True, momentum, norm.eps)
        scale = norm.weight * invstd
        return x, (mean, invstd, scale, norm.bias - mean * scale), relu_(out)

    def activate(self, x: torch.Tensor, stats: Stats) -> torch.Tensor:
        """Compute relu(norm(x)) again."""
        _, _, scale, shift = stats
        return affine_relu(x, _channels(scale, x.dtype), _channels(shift, x.dtype))

    def activate_backward(self, grad: Any, x: Any, stats: Stats, out: Any, weight: Any, eps: float) -> Any:
        """Give the gradients of x, and of its norm's weight and bias, from that of `out`.

        Args:
            grad: Gradient of `out`, which may be changed in place.
            x: The bottleneck.
            stats: Its statistics.
            out: What `activate` gave.
            weight: The norm's.
            eps: The norm's.
        """
        mean, invstd, _, _ = stats
        relu_backward_(grad, out)
        return torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, invstd, True, eps, [True, True, True])

    def bottleneck_backward(self, grad: Any, channels: int, params: Any, needs_conv1: bool) -> Any:
        """Add the gradient of a layer's bottleneck to the features'.

        Args:
            grad: That gradient.
            channels: How many of the features the bottleneck reads.
            params: As given to `bottleneck`.
            needs_conv1: Whether conv1's gradient is asked for.

        Returns:
            Gradients of weight1, bias1 and conv1.
        """
        weight1, bias1, conv1 = params
        out = self.read(channels, weight1, bias1, scratch=True)
        grad, grad_conv1 = conv1x1_backward(grad, out, conv1, needs_conv1)
        return *self.add_grad(grad, weight1, bias1, out), grad_conv1

    def read(self, channels: int, weight: torch.Tensor, bias: torch.Tensor, scratch: bool) -> torch.Tensor:
        """Compute relu(weight * x_hat + bias) for the first channels, where asked in memory that is used again."""
        x_hat = self.x_hat[:, :channels]
        dtype = x_hat.dtype
        out = self._scratch_like(x_hat) if scratch else torch.empty(
            x_hat.shape, dtype=dtype, device=x_hat.device, memory_format=torch.channels_last)
        return affine_relu(x_hat, _channels(weight, dtype), _channels(bias, dtype), out)

    def add_grad(self, grad: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> Any:
        """Add the gradient of `out`, which `read` gave, to the features'; give weight's and bias's.

        Args:
            grad: Gradient of `out`, which is changed in place.
            weight: As given to `read`.
            bias: As given to `read`.
            out: What `read` gave.
        """
        channels = grad.shape[1]
        x_hat = self.x_hat[:, :channels]
        relu_backward_(grad, out)
        # In a batch norm's backward pass the two sums are one kernel, which needs a dense copy.
        _, grad_weight, grad_bias = self._norm_backward(
            grad, out.copy_(x_hat), self.ones[:channels], [False, True, True])
        scale = _channels(weight, grad.dtype)
        if self.grad is None:  # that of the norm after the block, which reads all channels
            self.grad = torch.mul(grad, scale)
        else:
            self.grad[:, :channels].addcmul_(grad, scale)
        return grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)

    def tail(self, weight: torch.Tensor, bias: torch.Tensor, pool: bool) -> torch.Tensor:
        """Compute relu(weight * x_hat + bias) for all channels, averaged over 2x2 pixels if asked."""
        out = self.read(self.filled, weight, bias, scratch=pool)
        return F.avg_pool2d(out, 2) if pool else out

    def tail_backward(self, grad: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, pool: bool) -> Any:
        """Start the features' gradients with that of `tail`; give weight's and bias's."""
        out = self.read(self.filled, weight, bias, scratch=True)
        if pool:
            grad = torch.ops.aten.avg_pool2d_backward(
                grad.contiguous(memory_format=torch.channels_last), out, [2, 2], [2, 2], [0, 0], False, True, None)
        else:
            grad = grad.clone(memory_format=torch.channels_last)
        return self.add_grad(grad, weight, bias, out)


class KernelFeatures(Features):
    """The same by kernels."""

    def __init__(self, x: torch.Tensor, dtype: torch.dtype, channels: int, eps: float, kernels: Any) -> None:
        super().__init__(x, dtype, channels, eps)
        self.kernels = kernels

    def normalise(self, x: torch.Tensor, channels: slice) -> None:
        x = x.contiguous(memory_format=torch.channels_last)
        self.kernels.normalise(x, self.eps, self.x_hat[:, channels], self.stats[:, channels])

    def start_backward(self, x_hat: torch.Tensor) -> Features:
        # Hooks on saved tensors may give them back in another layout.
        return super().start_backward(x_hat.contiguous(memory_format=torch.channels_last))

    def normalise_backward(self, channels: slice) -> torch.Tensor:
        return self.kernels.normalise_backward(
            self.grad[:, channels], self.x_hat[:, channels], self.stats[:, channels])

    def bottleneck(self, channels: int, params: Any, norm: Any) -> Tuple[torch.Tensor, Stats, torch.Tensor]:
        x, stats = self.kernels.affine_conv_norm(
            self.x_hat[:, :channels], *params, norm.weight, norm.bias, norm.eps)
        self.updates.append((norm, stats[0], stats[1]))
        return x, (stats,), self.activate(x, (stats,))

    def activate(self, x: torch.Tensor, stats: Stats) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # as hooks may not give it
        return self.kernels.affine(x, stats[0][3], stats[0][4], torch.empty_like(x))

    def activate_backward(self, grad: Any, x: Any, stats: Stats, out: Any, weight: Any, eps: float) -> Any:
        grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
        return self.kernels.norm_relu_backward(grad, x, stats[0])

    def bottleneck_backward(self, grad: Any, channels: int, params: Any, needs_conv1: bool) -> Any:
        return self.kernels.affine_conv_backward(grad, self.x_hat[:, :channels], *params, self.grad)

    def tail(self, weight: torch.Tensor, bias: torch.Tensor, pool: bool) -> torch.Tensor:
        b, c, h, w = self.x_hat.shape
        out = torch.empty((b, c, h // 2, w // 2) if pool else (b, c, h, w), dtype=self.x_hat.dtype,
                          device=self.x_hat.device, memory_format=torch.channels_last)
        return self.kernels.affine(self.x_hat, weight, bias, out, pool=pool)

    def tail_backward(self, grad: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, pool: bool) -> Any:
        grad = grad.contiguous(memory_format=torch.channels_last)
        self.grad, grad_weight, grad_bias = self.kernels.affine_backward(grad, self.x_hat, weight, bias, pool)
        return grad_weight, grad_bias


def _channels(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).view(-1, 1, 1)


def create_features(layers: List[Any], x: torch.Tensor, eps: float) -> Features:
    """Make the empty buffer for a block's features, computed in autocast's type where there is one.

    Args:
        layers: The block's layers.
        x: The first features (B, C, H, W).
        eps: That of the norms that read the features.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if has_autocast(x) and x.dtype != torch.float64 else x.dtype
    channels = x.shape[1] + sum(layer.conv2.out_channels for layer in layers)
    kernels = find_kernels(x, dtype)
    if kernels and all(layer.conv1.out_channels <= kernels.MOST_OUTPUTS for layer in layers):
        return KernelFeatures(x, dtype, channels, eps, kernels)
    return Features(x, dtype, channels, eps)
