"""Figures and tables about the models."""
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from .se_densenet import SE_PLACEMENTS, default_cfgs

__all__ = ['models_table']


def models_table() -> str:
    """Compute the table of registered models, in Markdown: parameters and multiply-adds for each placement.

    Counted on the meta device at the default input size, so nothing is run. The counter sees convolutions and
    matrix products, as is usual, and neither norms nor the gates' scaling.
    """
    header = ['model', 'start from', 'input', 'DenseNet', *(f"`'{p}'`" for p in SE_PLACEMENTS)]
    lines = ['| ' + ' | '.join(header) + ' |', '|' + '---|' * len(header)]
    for name, cfg in sorted(default_cfgs.items()):
        tags = [f'`{tag}`' for tag, tag_cfg in cfg.cfgs.items() if tag_cfg.has_weights]
        size = cfg.default.input_size
        cells = [f'`{name}`', ', '.join(tags) or 'no weights exist', f'{size[1]}x{size[2]}']
        for placement in (None, *SE_PLACEMENTS):
            if placement is None:
                model = timm.create_model(name[len('se_'):], device='meta').eval()
            else:
                model = timm.create_model(name, device='meta', se_placement=placement).eval()
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, *size, device='meta'))
            sites = len(getattr(model, 'attn_sites', ()))
            where = f', {sites} SE' if sites else ''
            params = sum(p.numel() for p in model.parameters())
            cells.append(f'{params / 1e6:.2f} M, {counter.get_total_flops() / 2e9:.3f} G{where}')
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)
