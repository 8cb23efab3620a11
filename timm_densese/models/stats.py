"""Figures and tables about the models."""
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .se_densenet import SE_PLACEMENTS, default_cfgs

__all__ = ['model_stats', 'models_table', 'placement_stats']


class _Counter(TorchDispatchMode):
    """Counts floating-point operations and outputs of products, and the elements that batch norms normalise.

    As torch's FlopCounterMode, which takes every other operator apart: on the meta device that is most of its time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.activations = self.normalised = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if 'batch_norm' in name and args[0].is_meta:  # whose shapes torch finds in Python, by computing all of it
            self.normalised += args[0].numel()
            return torch.empty_like(args[0]), *(args[0].new_empty(0) for _ in func._schema.returns[1:])
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=output)
        if name in ('convolution', 'addmm', 'mm', 'bmm'):
            self.activations += output.numel()
        return output


def model_stats(model: Any, size: Optional[int] = None) -> Dict[str, float]:
    """Count a model's parameters, multiply-adds and activations for one image, in millions.

    Counted as timm's tables do, which is as fvcore does: convolutions, matrix products, and two for each element of a
    batch norm; not activation functions, poolings and the gates' scaling. Activations are the outputs of convolutions
    and matrix products.

    Args:
        model: Model on the meta device, so that nothing is run.
        size: Height and width of the image in pixels; None for those of the model's pretrained cfg.

    Returns:
        `params`, `macs`, `activations`.
    """
    shape = (size, size) if size else model.pretrained_cfg['input_size'][1:]
    with _Counter() as counter:
        model.eval()(torch.empty(1, getattr(model, 'in_chans', 3), *shape, device='meta'))
    return {
        'params': sum(p.numel() for p in model.parameters()) / 1e6,
        'macs': (counter.flops / 2 + 2 * counter.normalised) / 1e6,
        'activations': counter.activations / 1e6,
    }


def placement_stats(name: str) -> List[Tuple[Optional[str], Dict[str, float], int]]:
    """Count a registered model's DenseNet (placement None) and its placements: placement, `model_stats`, attentions."""
    rows: List[Tuple[Optional[str], Dict[str, float], int]] = [
        (None, model_stats(timm.create_model(name[len('se_'):], device='meta')), 0)]
    for placement in SE_PLACEMENTS:
        model: Any = timm.create_model(name, device='meta', se_placement=placement)
        rows.append((placement, model_stats(model), len(model.attn_sites)))
    return rows


def models_table() -> str:
    """Compute the table of registered models, in Markdown: parameters and multiply-adds for each placement."""
    header = ['model', 'start from', 'input', 'DenseNet', *(f"`'{p}'`" for p in SE_PLACEMENTS)]
    lines = ['| ' + ' | '.join(header) + ' |', '|' + '---|' * len(header)]
    for name, cfg in sorted(default_cfgs.items()):
        tags = [f'`{tag}`' for tag, tag_cfg in cfg.cfgs.items() if tag_cfg.has_weights]
        size = cfg.default.input_size
        cells = [f'`{name}`', ', '.join(tags) or 'no weights exist', f'{size[1]}x{size[2]}']
        for _, stats, sites in placement_stats(name):
            gates = f', {sites} SE' if sites else ''
            cells.append(f'{stats["params"]:.2f} M, {stats["macs"] / 1e3:.3f} G{gates}')
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)
