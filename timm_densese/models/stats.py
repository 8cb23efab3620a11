"""Figures and tables about the models."""
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from .se_densenet import SE_PLACEMENTS, default_cfgs

__all__ = ['model_stats', 'models_table', 'placement_stats']


def model_stats(model: Any, size: Optional[int] = None) -> Dict[str, float]:
    """Count a model's parameters, multiply-adds and activations for one image, in millions.

    Counted as timm's model cards do: convolutions and matrix products, neither norms nor the gates' scaling;
    activations are the outputs of convolutions and linear layers.

    Args:
        model: Model on the meta device, so that nothing is run.
        size: Height and width of the image in pixels; None for those of the model's pretrained cfg.

    Returns:
        `params`, `macs`, `activations`.
    """
    outputs = []
    handles = [m.register_forward_hook(lambda module, args, output: outputs.append(output.numel()))
               for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    shape = (size, size) if size else model.pretrained_cfg['input_size'][1:]
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, getattr(model, 'in_chans', 3), *shape, device='meta'))
    for handle in handles:
        handle.remove()
    return {
        'params': sum(p.numel() for p in model.parameters()) / 1e6,
        'macs': counter.get_total_flops() / 2e6,
        'activations': sum(outputs) / 1e6,
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
            where = f', {sites} SE' if sites else ''
            cells.append(f'{stats["params"]:.2f} M, {stats["macs"] / 1e3:.3f} G{where}')
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)
