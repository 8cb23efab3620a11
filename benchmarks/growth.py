"""How time and memory grow with image size, depth and batch: a training step and inference, ours and timm's.

SE-DenseNets in linear memory (training) and fused (inference) against timm's DenseNets, plain and checkpointing, in
float32 and channels_last, in turns; medians of time, peaks of memory. See benchmarks/README.md.

    python benchmarks/growth.py
    python benchmarks/growth.py --kinds infer     # measures these anew and keeps the others
"""
import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, build, interleave, medians, peak_memory, save
from matplotlib.figure import Figure
from tqdm import tqdm

SIZES = (96, 128, 160, 224, 320, 512)
DEPTHS = ('121', '161', '169', '201', '264d')
BATCHES = (1, 2, 4, 8, 16, 32)
MODELS = {
    'train': {'densenet{}': "timm's, plain", 'densenet{} checkpointing': "timm's, checkpointing",
              'se_densenet{} linear memory': 'SE-DenseNet, linear memory'},
    'infer': {'densenet{}': "timm's", 'se_densenet{} fused': 'SE-DenseNet, fused'},
}


def measure(kind: str, depth: str, batch_size: int, size: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds and MB of each model; of what is in use before a model is built, nothing counts."""
    runs, memory = {}, {}
    for model in MODELS[kind]:
        args = (kind, model.format(depth), 'eager', 'float32', batch_size, size, Path())
        memory[model], runs[model] = peak_memory(*args), build(*args)
    median = medians(interleave(runs, rounds, warmup=1))
    return {label: {'ms': 1e3 * median[model], 'mb': memory[model]} for model, label in MODELS[kind].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--kinds', nargs='+', choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    points = ([('image size', size, '121', 4, size) for size in SIZES]
              + [('depth', depth, depth, 4, 224) for depth in DEPTHS]
              + [('batch size', batch_size, '121', batch_size, 224) for batch_size in BATCHES])
    known = json.loads((RESULTS / 'growth.json').read_text())['rows'] if (RESULTS / 'growth.json').exists() else []
    rows = [row for row in known if row['kind'] not in args.kinds]
    for kind in args.kinds:
        for what, value, depth, batch_size, size in tqdm(points, desc=kind, unit='point'):
            found = measure(kind, depth, batch_size, size, args.rounds)
            rows.append({'kind': kind, 'against': what, 'value': value, 'depth': depth, 'batch_size': batch_size,
                         'img_size': size, 'models': found})
            shown = '; '.join(f'{label} {v["ms"]:.0f} ms' + (f' {v["mb"]:.0f} MB' if v['mb'] else '')
                              for label, v in found.items())
            tqdm.write(f'{kind}, {what} {value}: {shown}')
    save('growth', {'rows': rows})
    draw(rows)


def draw(rows: list[dict[str, Any]]) -> None:
    fig = Figure(figsize=(11, 11), layout='constrained')
    axes = fig.subplots(4, 3)
    for i, (kind, quantity) in enumerate((k, q) for k in MODELS for q in ('ms', 'mb')):
        for ax, against in zip(axes[i], ('image size', 'depth', 'batch size'), strict=True):
            line = [row for row in rows if (row['kind'], row['against']) == (kind, against)]
            for label in MODELS[kind].values():
                ax.plot([row['value'] for row in line], [row['models'][label][quantity] for row in line], 'o-', ms=3,
                        label=label)
            what = 'training step' if kind == 'train' else 'inference'
            fixed = {'image size': 'depth 121, batch 4', 'depth': '224x224, batch 4',
                     'batch size': 'depth 121, 224x224'}[against]
            ax.set(xlabel=f'{against} ({fixed})', yscale='log',
                   ylabel=f'{what}, {"ms" if quantity == "ms" else "peak MB"}')
            if against != 'depth':
                ax.set_xscale('log', base=2)
                ax.set_xticks([row['value'] for row in line], [str(row['value']) for row in line])
        axes[i][0].legend(fontsize=7)
    fig.savefig(RESULTS / 'growth.png', dpi=100)


if __name__ == '__main__':
    main()
