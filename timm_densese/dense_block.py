"""How dense blocks are executed: plainly, in linear memory for training, or fused for inference.

The weights are timm's, with timm's names, in the first two.

In linear memory: with batch statistics, a batch norm is x_hat = (x - mean) / sqrt(var + eps), then an affine map of
each channel. Every layer of a dense block normalises the same earlier features with the same statistics, and only the
affine map is its own. So each feature map is normalised once, when it is new, into one buffer that the layers after it
read, and so does the norm that follows the block. Saved for backward are that buffer and each layer's bottleneck, which
grow linearly with the layers; what lies between is recomputed in backward, by pointwise passes and never by a
convolution.

Fused: a layer's second batch norm goes into its first convolution, the first becomes a scale and a shift. Each layer
writes its features into one channels_last buffer, from which the next ones read; nothing is concatenated.

Papers:
    * `Memory-Efficient Implementation of DenseNets` - https://arxiv.org/abs/1707.06990, which keeps concatenations
      out of memory by computing norms, and convolutions, twice.
"""
import weakref
from collections import OrderedDict
from typing import Any, Callable, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models import densenet
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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
        run = _run_compiled if torch.compiler.is_compiling() else _run_eager
        return run(layers, x, norm1.eps, tail, pool)

    def fuse(self) -> nn.Module:
        """Give the block for inference, or this one where its norms cannot be folded (timm's reparameterize_model)."""
        layers: List[Any] = list(self.values())
        if not all(_is_foldable(norm) for layer in layers for norm in (layer.norm1, layer.norm2)):
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
            if type(conv) is nn.Conv2d and conv.bias is None and _is_foldable(module):
                fused[previous] = _fold_after(conv, module)
                fused[name] = nn.ReLU(inplace=True)
            elif isinstance(module, DenseBlock):
                fused[name] = module.fuse()
            elif _is_plain_transition(module) and _is_foldable(module.norm):  # type: ignore[union-attr]
                fused[name] = _NormConv(module.norm, module.conv, pool=True)  # type: ignore[union-attr,arg-type]
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


def _update_running_stats(norm: Any, mean: torch.Tensor, var: torch.Tensor) -> None:
    """Update a norm's running statistics with a batch's mean and unbiased variance."""
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        factor = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), factor)
        norm.running_var.lerp_(var.to(norm.running_var.dtype), factor)


def _after_conv2(layer: Any, x: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, SEDenseLayer):
        x = layer.se(x)
    if layer.drop_rate > 0:
        x = F.dropout(x, p=layer.drop_rate, training=layer.training)
    return x


# Compiled: written for the compiler, which fuses the passes and recomputes them in backward by itself.


def _normalise(x: torch.Tensor, eps: float) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    precise = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    var, mean = torch.var_mean(precise, (0, 2, 3), unbiased=False)
    x_hat = (x - mean[:, None, None]) * (var + eps).rsqrt()[:, None, None]
    n = x.shape[0] * x.shape[2] * x.shape[3]
    return x_hat.to(x.dtype), mean.detach(), var.detach() * (n / (n - 1))


def _run_compiled(layers: List[Any], x: torch.Tensor, eps: float, tail: Any, pool: bool) -> torch.Tensor:
    features: List[torch.Tensor] = [x]
    normalised: List[torch.Tensor] = []
    means: List[torch.Tensor] = []
    variances: List[torch.Tensor] = []

    def read(norm: Any) -> torch.Tensor:
        _update_running_stats(norm, torch.cat(means), torch.cat(variances))
        x_hat = torch.cat(normalised, 1)
        return F.relu(x_hat * norm.weight[:, None, None] + norm.bias[:, None, None]).to(x_hat.dtype)

    def append(x: torch.Tensor) -> None:
        x_hat, mean, var = _normalise(x, eps)
        normalised.append(x_hat)
        means.append(mean)
        variances.append(var)

    append(x)
    for layer in layers:
        new_features = _after_conv2(layer, layer.conv2(layer.norm2(layer.conv1(read(layer.norm1)))))
        features.append(new_features)
        append(new_features)
    if tail is None:
        return torch.cat(features, 1)
    out = read(tail)
    return F.avg_pool2d(out, 2) if pool else out


# Eager: functions that share the buffer of normalised features.


class _Features:
    """The normalised features of one pass through a block, and, in backward, the gradients with respect to them.

    The functions below read and write it beside the graph. What orders them is a token: whoever appends features makes
    a new one, and whoever reads features takes the latest. So in backward, the gradient of a slice is complete before
    the function that appended it runs. The buffer is saved for backward by the function that reads it last, so that it
    counts, and can be moved, as saved tensors are.
    """

    def __init__(self, x: torch.Tensor, channels: int, eps: float) -> None:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        dtype = x.dtype if x.dtype == torch.float64 else dtype
        stats = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        shape = (x.shape[0], channels, *x.shape[2:])
        self.x_hat: Any = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
        self.mean = torch.zeros(channels, dtype=stats, device=x.device)
        self.var = torch.zeros_like(self.mean)  # unbiased
        self.invstd = torch.zeros_like(self.mean)
        self.eps = eps
        self.filled = 0
        self.grad: Any = None
        self.scratch: Any = None

    def read(self, channels: int, weight: torch.Tensor, bias: torch.Tensor, scratch: bool) -> torch.Tensor:
        """Compute relu(weight * x_hat + bias) for the first channels, where asked in memory that is used again."""
        x_hat = self.x_hat[:, :channels]
        dtype = x_hat.dtype
        out = self._scratch_like(x_hat) if scratch else torch.empty(
            x_hat.shape, dtype=dtype, device=x_hat.device, memory_format=torch.channels_last)
        torch.addcmul(_channels(bias, dtype), x_hat, _channels(weight, dtype), out=out)
        return out.relu_()

    def _scratch_like(self, x: torch.Tensor) -> torch.Tensor:
        if self.scratch is None:
            self.scratch = torch.empty(self.x_hat.numel(), dtype=x.dtype, device=x.device)
        b, c, h, w = x.shape
        return self.scratch[:x.numel()].view(b, h, w, c).permute(0, 3, 1, 2)

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
        torch.ops.aten.threshold_backward.grad_input(grad, out, 0, grad_input=grad)
        stats = self.mean.dtype
        grad_bias = grad.sum((0, 2, 3), dtype=stats)
        grad_weight = torch.mul(grad, x_hat, out=out).sum((0, 2, 3), dtype=stats)
        scale = _channels(weight, grad.dtype)
        if self.grad is None:  # that of the norm after the block, which reads all channels
            self.grad = torch.mul(grad, scale)
        else:
            self.grad[:, :channels].addcmul_(grad, scale)
        return grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _channels(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.detach().to(dtype)[:, None, None]


def _conv(x: torch.Tensor, weight: torch.Tensor, conv: Any) -> torch.Tensor:
    return F.conv2d(x, weight.to(x.dtype), None, conv.stride, conv.padding, conv.dilation, conv.groups)


def _conv_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        conv: Any,
        needs_weight: bool,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight.to(x.dtype), None, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups,
        [True, needs_weight, False])
    return grad_x, grad_weight.to(weight.dtype) if needs_weight else None


class _Append(Function):
    """Normalise new features (B, C, H, W) into the buffer; makes a token."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, x: torch.Tensor, features: _Features) -> torch.Tensor:
        start, end = features.filled, features.filled + x.shape[1]
        # With a momentum of 1, the running statistics are the batch's.
        x_hat, _, invstd = torch.native_batch_norm(
            x.to(features.mean.dtype), None, None, features.mean[start:end], features.var[start:end], True, 1.,
            features.eps)
        features.x_hat[:, start:end] = x_hat
        features.invstd[start:end] = invstd
        features.filled = end
        ctx.features, ctx.start, ctx.end, ctx.dtype = features, start, end, x.dtype
        return token.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_token: torch.Tensor) -> Any:
        features = ctx.features
        # Dense copies of the slices: the fused kernel needs them.
        x_hat, grad = (t[:, ctx.start:ctx.end].to(features.mean.dtype).contiguous(memory_format=torch.channels_last)
                       for t in (features.x_hat, features.grad))
        # x_hat has mean 0 and variance 1 already; its own scale goes in as the weight.
        invstd = features.invstd[ctx.start:ctx.end]
        grad_x, _, _ = torch.ops.aten.native_batch_norm_backward(
            grad, x_hat, invstd, None, None, torch.zeros_like(invstd), torch.ones_like(invstd), True, features.eps,
            [True, False, False])
        if ctx.start == 0:  # the last to need them
            features.x_hat = features.grad = features.scratch = None
        return torch.zeros_like(grad_token), grad_x.to(ctx.dtype), None


class _Layer(Function):
    """One layer's new features (B, growth_rate, H, W), from the buffer to the second convolution; takes a token."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, features: _Features, layer: Any, *params: torch.Tensor) -> torch.Tensor:
        weight1, bias1, conv1, weight2, bias2, conv2 = params
        channels = features.filled
        _update_running_stats(layer.norm1, features.mean[:channels], features.var[:channels])
        bottleneck = _conv(features.read(channels, weight1, bias1, scratch=True), conv1, layer.conv1)
        norm2 = layer.norm2
        norm2.num_batches_tracked.add_(1)
        momentum = 1 / float(norm2.num_batches_tracked) if norm2.momentum is None else norm2.momentum
        out, mean, invstd = torch.native_batch_norm(
            bottleneck, weight2, bias2, norm2.running_mean, norm2.running_var, True, momentum, norm2.eps)
        ctx.save_for_backward(*params, bottleneck, mean, invstd)
        ctx.features, ctx.layer, ctx.channels = features, layer, channels
        return _conv(out.relu_(), conv2, layer.conv2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight1, bias1, conv1, weight2, bias2, conv2, bottleneck, mean, invstd = ctx.saved_tensors
        features, layer, needs = ctx.features, ctx.layer, ctx.needs_input_grad
        scale = (weight2 * invstd).to(bottleneck.dtype)
        shift = (bias2 - mean * weight2 * invstd).to(bottleneck.dtype)
        out = torch.addcmul(shift[:, None, None], bottleneck, scale[:, None, None]).relu_()
        grad, grad_conv2 = _conv_backward(grad, out, conv2, layer.conv2, needs[8])
        torch.ops.aten.threshold_backward.grad_input(grad, out, 0, grad_input=grad)
        grad, grad_weight2, grad_bias2 = torch.ops.aten.native_batch_norm_backward(
            grad, bottleneck, weight2, None, None, mean, invstd, True, layer.norm2.eps, [True, needs[6], needs[7]])
        out = features.read(ctx.channels, weight1, bias1, scratch=True)
        grad, grad_conv1 = _conv_backward(grad, out, conv1, layer.conv1, needs[5])
        grad_weight1, grad_bias1 = features.add_grad(grad, weight1, bias1, out)
        return (grad.new_zeros(()), None, None, grad_weight1, grad_bias1, grad_conv1, grad_weight2, grad_bias2,
                grad_conv2)


class _Tail(Function):
    """The norm after the block, (B, C, H, W) or pooled; takes the last token and keeps the buffer."""

    @staticmethod
    def forward(
            ctx: Any,
            token: torch.Tensor,
            features: _Features,
            norm: Any,
            pool: bool,
            weight: torch.Tensor,
            bias: torch.Tensor,
    ) -> torch.Tensor:
        _update_running_stats(norm, features.mean, features.var)
        out = features.read(features.filled, weight, bias, scratch=pool)
        out = F.avg_pool2d(out, 2) if pool else out
        ctx.save_for_backward(features.x_hat, weight, bias)
        ctx.features, ctx.pool = features, pool
        features.x_hat = features.scratch = None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        features = ctx.features
        features.x_hat, weight, bias = ctx.saved_tensors
        features.grad = None
        out = features.read(features.filled, weight, bias, scratch=True)
        if ctx.pool:
            grad = torch.ops.aten.avg_pool2d_backward(
                grad.contiguous(memory_format=torch.channels_last), out, [2, 2], [2, 2], [0, 0], False, True, None)
        else:
            grad = grad.clone(memory_format=torch.channels_last)
        return grad.new_zeros(()), None, None, None, *features.add_grad(grad, weight, bias, out)


class _Close(Function):
    """Where no norm reads the buffer last: takes the last token and keeps the buffer; the features pass."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, x: torch.Tensor, features: _Features) -> torch.Tensor:
        ctx.save_for_backward(features.x_hat)
        ctx.features = features
        features.x_hat = features.scratch = None
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.features.x_hat, = ctx.saved_tensors
        ctx.features.grad = torch.zeros_like(ctx.features.x_hat)
        return grad.new_zeros(()), grad, None


def _run_eager(layers: List[Any], x: torch.Tensor, eps: float, tail: Any, pool: bool) -> torch.Tensor:
    channels = x.shape[1] + sum(layer.conv2.out_channels for layer in layers)
    features = _Features(x, channels, eps)
    outputs = [x]
    token = _Append.apply(x.new_zeros(()), x, features)
    for layer in layers:
        new_features = _Layer.apply(
            token, features, layer, layer.norm1.weight, layer.norm1.bias, layer.conv1.weight, layer.norm2.weight,
            layer.norm2.bias, layer.conv2.weight)
        new_features = _after_conv2(layer, new_features)
        token = _Append.apply(token, new_features, features)
        if tail is None:
            outputs.append(new_features)
    if tail is None:
        return _Close.apply(token, torch.cat(outputs, 1), features)
    return _Tail.apply(token, features, tail, pool, tail.weight, tail.bias)


# Fused.


def _is_foldable(norm: Any) -> bool:
    tensors = ('weight', 'bias', 'running_mean', 'running_var')
    return (
        all(isinstance(getattr(norm, name, None), torch.Tensor) for name in tensors)
        and isinstance(getattr(norm, 'act', None), nn.ReLU) and isinstance(getattr(norm, 'drop', None), nn.Identity))


def _scale_shift(norm: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (C,) of a norm with running statistics, in float64 and without a gradient."""
    scale = norm.weight.detach().double() * (norm.running_var.double() + norm.eps).rsqrt()
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale


@torch.no_grad()
def _fold_after(conv: Any, norm: Any) -> nn.Conv2d:
    """Give the convolution that computes norm(conv(x)), without the norm's ReLU."""
    scale, shift = _scale_shift(norm)
    fused = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        device=conv.weight.device, dtype=conv.weight.dtype)
    fused.weight.copy_(conv.weight.double() * scale[:, None, None, None])
    fused.bias.copy_(shift)  # type: ignore[union-attr]
    return fused.train(conv.training)


class _NormConv(nn.Module):
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
        self.conv1 = _NormConv(layer.norm1, _fold_after(layer.conv1, layer.norm2))
        self.conv2 = layer.conv2
        self.se = layer.se if isinstance(layer, SEDenseLayer) else nn.Identity()

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
