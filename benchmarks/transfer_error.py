"""What inserting SE does to a DenseNet's outputs: our transfer against an SE block with random weights.

    python benchmarks/transfer_error.py

writes benchmarks/results/transfer_error.json and .png. It takes densenet121.ra_in1k where the Hub answers, and
otherwise a densenet121 with random weights whose norms are fitted to its inputs; the record says which. Relative
error is |SE-DenseNet's logits - DenseNet's logits| / |DenseNet's logits| over 32 noise images, float32; agreement is
the share of images with the same top class.
"""
import json
import platform
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch

from timm_densese import SE_PLACEMENTS
from timm_densese.checkpoints import find_weights

RESULTS = Path(__file__).parent / 'results' / 'transfer_error'


def load_densenet() -> tuple[torch.nn.Module, str]:
    if find_weights('timm/densenet121.ra_in1k'):
        return timm.create_model('densenet121.ra_in1k', pretrained=True).eval(), 'densenet121.ra_in1k'
    densenet = timm.create_model('densenet121')
    for module in densenet.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, .5, 1.5)
            torch.nn.init.normal_(module.bias, 0, .2)
            module.momentum = None  # average of the batches
    densenet.train()
    with torch.inference_mode():
        for _ in range(4):
            densenet(torch.randn(8, 3, 224, 224))
    return densenet.eval(), 'random weights, norms fitted to noise'


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    densenet, weights = load_densenet()
    images = torch.randn(32, 3, 224, 224).split(8)
    expected = torch.cat([densenet(batch) for batch in images])
    rows = []
    for placement in SE_PLACEMENTS:
        transferred = timm.create_model('se_densenet121', se_placement=placement)
        transferred.load_state_dict(densenet.state_dict())
        random = timm.create_model('se_densenet121', se_placement=placement)
        for site in random.attn_sites:
            random.get_submodule(site).fc2.reset_parameters()
        attention = {k: v for k, v in random.state_dict().items() if '.se' in k}
        random.load_state_dict({**densenet.state_dict(), **attention})
        for insertion, model in (('transfer', transferred), ('random SE', random)):
            logits = torch.cat([model.eval()(batch) for batch in images])
            rows.append({
                'placement': placement,
                'insertion': insertion,
                'relative_error': ((logits - expected).norm() / expected.norm()).item(),
                'agreement': (logits.argmax(1) == expected.argmax(1)).float().mean().item(),
            })
            print('{placement:6} {insertion:10} relative error {relative_error:.1e}, agreement {agreement:.0%}'
                  .format(**rows[-1]))

    record = {'weights': weights, 'torch': torch.__version__, 'timm': timm.__version__,
              'python': platform.python_version(), 'rows': rows}
    RESULTS.with_suffix('.json').write_text(json.dumps(record, indent=1) + '\n')

    fig, ax = plt.subplots(figsize=(6, 3.2), layout='constrained')
    for offset, insertion, color in ((-.2, 'transfer', 'tab:blue'), (.2, 'random SE', 'tab:red')):
        errors = [max(r['relative_error'], 1e-9) for r in rows if r['insertion'] == insertion]
        bars = ax.bar([i + offset for i in range(len(errors))], errors, .4, label=insertion, color=color)
        ax.bar_label(bars, [f'{e:.0e}' if e > 1e-9 else '0' for e in errors], fontsize=8)
    ax.set(yscale='log', ylim=(1e-9, 1e3), ylabel='relative logit error', xticks=range(len(SE_PLACEMENTS)),
           xticklabels=[f"'{p}'" for p in SE_PLACEMENTS], title=f'densenet121 -> se_densenet121 ({weights})')
    ax.title.set_fontsize(9)
    ax.legend(loc='upper center', ncols=2)
    fig.savefig(RESULTS.with_suffix('.png'), dpi=120)


if __name__ == '__main__':
    main()
