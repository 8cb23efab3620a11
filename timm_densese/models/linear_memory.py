"""Training a dense block in linear memory.

With batch statistics, a batch norm is x_hat = (x - mean) / sqrt(var + eps), then an affine map of
each channel. Every layer of a dense block normalises the same earlier features with the same statistics, and only the
affine map is its own. So each feature map is normalised once, when it is new, into one buffer that the layers after it
read, and so does the norm that follows the block. Saved for backward are that buffer and each layer's bottleneck, which
grow linearly with the layers; what lies between is recomputed in backward, by pointwise passes and never by a
convolution.

Papers:
    * `Memory-Efficient Implementation of DenseNets` - https://arxiv.org/abs/1707.06990, which keeps concatenations
      out of memory by computing norms, and convolutions, twice.
"""
from contextlib import AbstractContextManager, nullcontext
from typing import Any, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch.autograd import Function

from .features import Features, create_features

__all__ = ['normalise', 'restore', 'run']


def run(layers: List[Any], x: torch.Tensor, eps: float, tail: Any, pool: bool) -> torch.Tensor:
    """Compute a block's features, or what a norm makes of them.

    Args:
        layers: Dense layers whose norms and convolutions are plain.
        x: The first features (B, C, H, W).
        eps: That of the norms that read the features.
        tail: The batch norm with ReLU that alone reads the block's output; None: the features are returned.
        pool: Average the tail's output over 2x2 pixels.
    """
    return (_run_compiled if torch.compiler.is_compiling() else _run_eager)(layers, x, eps, tail, pool)


def normalise(x: torch.Tensor, norm: Any, pool: bool = False) -> torch.Tensor:
    """Compute norm(x), ReLU included, and the average of 2x2 pixels if asked, saving one normalised copy."""
    return run([], x, norm.eps, norm, pool)


def restore(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Let who saves these features for backward save nothing: they are made anew from the normalised ones.

    Args:
        x: A block's features (B, C, H, W), as `run` gave them.

    Returns:
        A context for what reads them.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if type(x.grad_fn) is not _Close._backward_cls:  # type: ignore[attr-defined]
        return nullcontext()
    closed: Any = x.grad_fn
    if closed.version != x._version:  # somebody changed the features without autograd
        return nullcontext()
    storage, version = x.untyped_storage().data_ptr(), x._version
    layout, x_dtype = (x.shape, x.stride()), x.dtype  # not x, which these functions would keep

    def pack(t: torch.Tensor) -> Any:
        if t.untyped_storage().data_ptr() != storage or t._version != version or t.dtype != x_dtype:
            t = t.detach()  # an output that its own graph holds would never be freed
            return t, t._version
        return t.shape, t.stride(), t.storage_offset()

    def unpack(packed: Any) -> torch.Tensor:
        if torch._C._current_graph_task_id() >= 0:  # else somebody looks at a saved tensor
            _refuse_second_derivatives()
        if isinstance(packed[0], torch.Tensor):
            t, version = packed
            if t._version != version:  # as autograd says it
                raise RuntimeError(
                    'one of the variables needed for gradient computation has been modified by an inplace operation: '
                    f'a tensor of shape {tuple(t.shape)} is at version {t._version}; expected version {version} '
                    'instead. It is one that an attention or a transition after a dense block saved.')
            return t
        features = _start_backward(closed)
        std, mean = features.invstd.reciprocal(), features.mean
        x = torch.empty_strided(*layout, dtype=x_dtype, device=mean.device)
        torch.addcmul(mean[:, None, None], features.x_hat, std[:, None, None], out=x)
        return x.as_strided(*packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _start_backward(closed: Any) -> Features:
    """Give the features of `_Close` in a backward pass; the first to ask unpacks what it saved, as checkpoints want."""
    return closed.features.current or closed.features.start_backward(closed.saved_tensors[0])


def _read_features(ctx: Any) -> Features:
    features = ctx.features.current
    if features is None:
        raise RuntimeError(
            'A gradient reaches a layer of a dense block by another way than its output, as from a hook in it, which '
            'training in linear memory cannot compute. Call set_grad_checkpointing(False) before the forward pass.')
    return features


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            'Training in linear memory has no second derivatives (create_graph). '
            'Call set_grad_checkpointing(False) before the forward pass.')


def _refuse_batched(grad: torch.Tensor) -> None:
    if torch._C._functorch.is_batchedtensor(grad) or torch._C._functorch.is_legacy_batchedtensor(grad):
        raise RuntimeError(
            'Training in linear memory has no batched gradients (is_grads_batched, vectorize). '
            'Call set_grad_checkpointing(False) before the forward pass.')


def _update_running_stats(norm: Any, mean: torch.Tensor, var: torch.Tensor) -> None:
    """Update a norm's running statistics with a batch's mean and unbiased variance."""
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        factor = norm.momentum
        if factor is None:
            factor = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), factor)
        norm.running_var.lerp_(var.to(norm.running_var.dtype), factor)


def _update_all_running_stats(updates: List[Tuple[Any, torch.Tensor, torch.Tensor]]) -> None:
    """Update many norms at once, or one after another where they differ or one is there twice."""
    norms, means, variances = map(list, zip(*updates, strict=True))
    momenta = {norm.momentum for norm in norms}
    momentum = momenta.pop()
    if momenta or momentum is None or len(set(norms)) < len(norms):
        for update in updates:
            _update_running_stats(*update)
        return
    with torch.no_grad():
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
        for running, batch in ((
                [norm.running_mean for norm in norms], means), ([norm.running_var for norm in norms], variances)):
            torch._foreach_lerp_(running, [b.to(r.dtype) for r, b in zip(running, batch, strict=True)], momentum)


def _after_conv2(layer: Any, x: torch.Tensor) -> torch.Tensor:
    if hasattr(layer, 'se'):
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
    readers: List[Tuple[Any, int]] = []  # norms, and how many channels they read

    def read(norm: Any) -> torch.Tensor:
        x_hat = torch.cat(normalised, 1)
        readers.append((norm, x_hat.shape[1]))
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
    out = torch.cat(features, 1) if tail is None else read(tail)
    mean, var = torch.cat(means), torch.cat(variances)
    _update_all_running_stats([(norm, mean[:channels], var[:channels]) for norm, channels in readers])
    return F.avg_pool2d(out, 2) if pool else out


# Eager: functions that share the buffer of normalised features.

class _Append(Function):
    """Normalise new features (B, C, H, W) into the buffer; makes a token."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, x: torch.Tensor, features: Features) -> torch.Tensor:
        ctx.features, ctx.dtype, ctx.appended = features, x.dtype, features.append(x)
        return features.zero.detach()

    @staticmethod
    def backward(ctx: Any, grad_token: torch.Tensor) -> Any:
        return grad_token, _read_features(ctx).append_backward(ctx.appended).to(ctx.dtype), None


class _Layer(Function):
    """One layer's new features (B, growth_rate, H, W), from the buffer to the second convolution.

    Takes a token and makes one. If told to, it appends the new features itself, which saves the time of a function.
    """

    @staticmethod
    def forward(
            ctx: Any,
            token: torch.Tensor,
            features: Features,
            layer: Any,
            copies: Tuple[torch.Tensor, torch.Tensor, torch.Tensor],
            appends: bool,
            *params: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        weight1, _, _, weight2, _, _ = params
        channels = features.filled
        bias1, conv1, conv2 = copies
        features.updates.append((layer.norm1, features.mean[:channels], features.var[:channels]))
        bottleneck, stats, out = features.bottleneck(channels, (weight1, bias1, conv1), layer.norm2)
        out = F.conv2d(out, conv2, None, 1, 1)
        ctx.appended = features.append(out) if appends else None
        ctx.save_for_backward(weight1, bias1, conv1, weight2, conv2, bottleneck, *stats)
        ctx.features, ctx.layer, ctx.channels = features, layer, channels
        ctx.set_materialize_grads(False)
        return features.zero.detach(), out

    @staticmethod
    def backward(ctx: Any, grad_token: Optional[torch.Tensor], grad: Any) -> Any:
        if grad is None and ctx.appended is None:  # of an attention without a gradient
            return grad_token, *[None] * 10
        weight1, bias1, conv1, weight2, conv2, bottleneck, *stats = ctx.saved_tensors
        features, needs = _read_features(ctx), ctx.needs_input_grad
        if ctx.appended is not None:
            grad_appended = features.append_backward(ctx.appended)
            grad = grad_appended if grad is None else grad + grad_appended
        out = features.activate(bottleneck, stats)
        grad, grad_conv2, _ = torch.ops.aten.convolution_backward(
            grad, out, conv2, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, needs[10], False])
        grad, *grads2 = features.activate_backward(grad, bottleneck, stats, out, weight2, ctx.layer.norm2.eps)
        grads1 = features.bottleneck_backward(grad, ctx.channels, (weight1, bias1, conv1), needs[7])
        return features.zero, None, None, None, None, *grads1, *grads2, grad_conv2


class _Tail(Function):
    """The norm after the block, (B, C, H, W) or pooled; takes the last token and keeps the buffer."""

    @staticmethod
    def forward(
            ctx: Any,
            token: torch.Tensor,
            features: Features,
            norm: Any,
            pool: bool,
            weight: torch.Tensor,
            bias: torch.Tensor,
    ) -> torch.Tensor:
        features.updates.append((norm, features.mean, features.var))
        out = features.tail(weight, bias, pool)
        ctx.save_for_backward(features.x_hat, weight, bias.clone())  # as it may change, see _copies
        ctx.features, ctx.pool = features, pool
        features.release()
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        _refuse_second_derivatives()
        _refuse_batched(grad)
        x_hat, weight, bias = ctx.saved_tensors
        features = ctx.features.start_backward(x_hat)
        return features.zero, None, None, None, *features.tail_backward(grad, weight, bias, ctx.pool)


class _Close(Function):
    """Where no norm reads the buffer last: takes the last token and keeps the buffer; the features pass."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, x: torch.Tensor, features: Features) -> torch.Tensor:
        ctx.save_for_backward(features.x_hat)
        ctx.features = features
        features.release()
        ctx.mark_dirty(x)  # or it would be a view, which nobody could change in place
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        _refuse_second_derivatives()
        _refuse_batched(grad)
        features = _start_backward(ctx)
        features.grad = torch.zeros_like(features.x_hat)
        return features.zero, grad, None


def _copies(layers: List[Any], dtype: torch.dtype) -> Any:
    """Copy what each layer reads of its first norm's bias and its convolutions, all layers at once.

    Biases, as a plain batch norm does not need its bias in backward, so it may change until then. Weights where they
    are of another type.
    """
    biases = [layer.norm1.bias for layer in layers]
    biases = list(torch.cat(biases).split([len(bias) for bias in biases])) if layers else []
    weights = [conv.weight for layer in layers for conv in (layer.conv1, layer.conv2)]
    if any(weight.dtype != dtype for weight in weights):
        casts = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(casts, weights)
        weights = casts
    return list(zip(biases, weights[::2], weights[1::2], strict=True))


def _run_eager(layers: List[Any], x: torch.Tensor, eps: float, tail: Any, pool: bool) -> torch.Tensor:
    with torch.cuda.device_of(x):  # where kernels are launched; in backward, autograd sees to it
        features = create_features(layers, x, eps)
        out = _apply(features, layers, x, tail, pool)
        _update_all_running_stats(features.updates)
    features.updates = []
    return out


def _apply(features: Features, layers: List[Any], x: torch.Tensor, tail: Any, pool: bool) -> torch.Tensor:
    with torch.no_grad():
        copies = _copies(layers, features.x_hat.dtype)
    outputs = [x]
    token = _Append.apply(x.new_zeros(()), x, features)
    for layer, copied in zip(layers, copies, strict=True):
        appends = not hasattr(layer, 'se') and layer.drop_rate == 0
        token, new_features = _Layer.apply(
            token, features, layer, copied, appends, layer.norm1.weight, layer.norm1.bias, layer.conv1.weight,
            layer.norm2.weight, layer.norm2.bias, layer.conv2.weight)
        if not appends:
            new_features = _after_conv2(layer, new_features)
            token = _Append.apply(token, new_features, features)
        if tail is None:
            outputs.append(new_features)
    if tail is None:
        out = _Close.apply(token, torch.cat(outputs, 1), features)
        if out.grad_fn:
            out.grad_fn.version = out._version
        return out
    return _Tail.apply(token, features, tail, pool, tail.weight, tail.bias)
