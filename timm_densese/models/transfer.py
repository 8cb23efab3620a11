"""DenseNet checkpoint -> SE-DenseNet state dict that computes the same function. Nothing here changes its arguments.

A gate that starts at the constant c (a sigmoid: 0.5) multiplies a feature map by c. Its neighbour absorbs 1 / c:

- a convolution that produces the map: weight / c, exact in floating point for c = 1/2 and 1/4;
- a batch norm that alone consumes it: it now sees c * x, whose mean is c * m and whose variance is c^2 * v. Its scale
  makes up for eps, which does not shrink with the variance: gamma * sqrt(c^2 * v + eps) / (c * sqrt(v + eps)).
"""
import logging
from typing import TYPE_CHECKING, Any, Dict, Mapping, Tuple

import torch
import torch.nn as nn
from timm.models.densenet import _filter_torchvision_pretrained

from ..errors import CheckpointMismatchError
from .attention import gate_constant, gate_inputs

if TYPE_CHECKING:
    from .se_densenet import SEDenseNet

__all__ = ['checkpoint_filter_fn', 'transfer_densenet']

_logger = logging.getLogger(__name__)


def _check_keys(
        state_dict: Mapping[str, Any],
        model: 'SEDenseNet',
        expected: Mapping[str, torch.Tensor],
        adapted: bool,
) -> None:
    """Raise where the checkpoint's tensors are not those expected.

    Not looked at: num_batches_tracked, which checkpoints older than torch 0.4.1 lack, and before timm has adapted them
    the classifier and the first convolution's input channels.

    Args:
        state_dict: The checkpoint.
        model: The model it is for, for the message.
        expected: The tensors that it should hold.
        adapted: timm has adapted the classifier and the first convolution.

    Raises:
        CheckpointMismatchError: Some are missing, left over, or of another shape.
    """
    def checked(name: str) -> bool:
        return (adapted or not name.startswith('classifier.')) and not name.endswith('.num_batches_tracked')

    def shape(name: str, tensor: torch.Tensor) -> Tuple[int, ...]:
        first = name == 'features.conv0.weight' and not adapted
        return tensor.shape[:1] + tensor.shape[2:] if first else tensor.shape

    missing = [k for k in expected if checked(k) and k not in state_dict]
    unexpected = [k for k in state_dict if checked(k) and k not in expected]
    misshapen = [
        f'{k} ({tuple(state_dict[k].shape)}, not {tuple(v.shape)})' for k, v in expected.items()
        if checked(k) and k in state_dict and shape(k, state_dict[k]) != shape(k, v)]
    if missing or unexpected or misshapen:
        arch = getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__
        raise CheckpointMismatchError(
            f'{arch} with se_placement={model.se_placement!r}', missing, unexpected, misshapen)


def transfer_densenet(state_dict: Mapping[str, torch.Tensor], model: 'SEDenseNet') -> Dict[str, torch.Tensor]:
    """Turn a plain DenseNet's state dict into one of an SE-DenseNet with the same outputs.

    Args:
        state_dict: Tensors of the DenseNet by timm's names; num_classes and in_chans may differ from the model's.
        model: The SE-DenseNet. Its attention gives the tensors that a DenseNet does not have.

    Returns:
        A new dict, which shares the tensors that did not have to change.
    """
    out = dict(state_dict)
    own = model.state_dict()
    constant = gate_constant(model.attn_layer, model.gate_layer)
    for attn_name, neighbour_name in model.attn_sites.items():
        zeroed = tuple(f'{attn_name}.{name}.' for name in gate_inputs(model.attn_layer))
        for key in own:
            if key.startswith(attn_name + '.'):
                at_start = constant is not None and key.startswith(zeroed) and key.endswith(('weight', 'bias'))
                out[key] = torch.zeros_like(own[key]) if at_start else own[key].clone()

        neighbour: Any = model.get_submodule(neighbour_name)
        # Told by its tensors, so that synchronised and frozen batch norms count too.
        is_batch_norm = all(f'{neighbour_name}.{key}' in own for key in ('weight', 'running_mean', 'running_var'))
        if constant is not None and isinstance(neighbour, nn.Conv2d):
            key = f'{neighbour_name}.weight'
            out[key] = out[key] / constant
        elif constant is not None and is_batch_norm:
            out.update(_absorb_into_norm(out, neighbour_name, constant, neighbour.eps))
        else:
            _logger.warning(
                f'{attn_name} (attn_layer={model.attn_layer!r}, gate_layer={model.gate_layer!r}) enters a trained '
                f'network beside a {type(neighbour).__name__}, and the two do not cancel: the model does not compute '
                f'what the checkpoint did. Sigmoid gates beside batch norms do.')
    return out


def _absorb_into_norm(
        state_dict: Mapping[str, torch.Tensor],
        name: str,
        constant: float,
        eps: float,
) -> Dict[str, torch.Tensor]:
    """Make a batch norm compute from constant * x what it computed from x."""
    weight, mean, var = (state_dict[f'{name}.{key}'] for key in ('weight', 'running_mean', 'running_var'))
    v = var.double()
    scale = ((constant ** 2 * v + eps) / (v + eps)).sqrt() / constant
    return {
        f'{name}.weight': (weight.double() * scale).to(weight.dtype),
        f'{name}.running_mean': mean * constant,
        f'{name}.running_var': (v * constant ** 2).to(var.dtype),
    }


def checkpoint_filter_fn(
        state_dict: Mapping[str, Any],
        model: 'SEDenseNet',
        adapted: bool = False,
) -> Dict[str, Any]:
    """Fit a checkpoint to an SE-DenseNet: a DenseNet's is transferred, an SE-DenseNet's is left as it is.

    Args:
        state_dict: Tensors by timm's or torchvision's names, of a DenseNet or of this model.
        model: The SE-DenseNet that they are for.
        adapted: timm has adapted the classifier and the first convolution already, so that these must fit, too.

    Returns:
        A new dict by the model's names.

    Raises:
        CheckpointMismatchError: The backbone's tensors, or the attention's, are not the model's.
    """
    state_dict = _filter_torchvision_pretrained(dict(state_dict))
    own = model.state_dict()
    attn_keys = tuple(f'{name}.' for name in model.attn_sites)
    if any(key.startswith(attn_keys) for key in state_dict):
        _check_keys(state_dict, model, own, adapted)
        return state_dict
    backbone = {k: v for k, v in own.items() if not k.startswith(attn_keys)}
    _check_keys(state_dict, model, backbone, adapted)
    return transfer_densenet(state_dict, model)
