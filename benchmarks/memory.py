"""Memory saved for backward: timm's DenseNets, their checkpointing, and SE-DenseNets in linear memory.

At 224x224 in float32, MB an image (torch 2.14.1): densenet121 130.4 plainly, 62.9 with timm's checkpointing,
se_densenet121 33.7; densenet201 203.0, 71.2 and 38.0. Exact on every machine, as nothing is timed.

    python benchmarks/memory.py
"""
import timm
import torch
from common import RESULTS, save
from matplotlib.figure import Figure

from timm_densese import SE_PLACEMENTS

VARIANTS = ('121', '161', '169', '201', '264d')
LAYERS = (4, 8, 16, 32, 48, 64)


def saved_megabytes(model: torch.nn.Module, size: int) -> float:
    """What two images save for backward more than one, by distinct storages; weights do not count."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found = []
    for batch in (1, 2):
        sizes: dict[int, int] = {}

        def pack(t: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t.detach()  # not t: an output that its own graph holds would never be freed

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(torch.randn(batch, 3, size, size, device=next(model.parameters()).device))
        found.append(sum(n for pointer, n in sizes.items() if pointer not in own))
        del out
    return (found[1] - found[0]) / 1e6


def create(name: str, checkpointing: bool, **kwargs) -> torch.nn.Module:
    model = timm.create_model(name, **kwargs).train()
    model.set_grad_checkpointing(checkpointing)
    return model


def main() -> None:
    rows = []
    for variant in VARIANTS:
        row = {'depth': variant,
               'plain': saved_megabytes(create(f'densenet{variant}', False), 224),
               'checkpointing': saved_megabytes(create(f'densenet{variant}', True), 224),
               'ours': saved_megabytes(create(f'se_densenet{variant}', True), 224)}
        rows.append(row)
        print(f'{variant:5} MB an image: plain {row["plain"]:6.1f}, checkpointing {row["checkpointing"]:6.1f}, '
              f'ours {row["ours"]:5.1f}: {row["plain"] / row["ours"]:.2f}x and '
              f'{row["checkpointing"] / row["ours"]:.2f}x less')

    placements = {}
    for placement in SE_PLACEMENTS:
        placements[placement] = saved_megabytes(create('se_densenet121', True, se_placement=placement), 224)
        print(f"se_densenet121 '{placement}': {placements[placement]:.1f} MB an image")

    growth: dict[str, list[float]] = {'plain': [], 'checkpointing': [], 'ours': []}
    for layers in LAYERS:
        kwargs = dict(growth_rate=32, block_config=(layers,))
        for name, model, checkpointing in (('plain', 'densenet121', False), ('checkpointing', 'densenet121', True),
                                           ('ours', 'se_densenet121', True)):
            growth[name].append(saved_megabytes(create(model, checkpointing, **kwargs), 224))
    print(f'one block of {LAYERS} layers: ' + ', '.join(
        f'{name} {[round(v, 1) for v in values]}' for name, values in growth.items()))
    save('memory', {'rows': rows, 'se_placement': placements, 'layers': LAYERS, 'one_block': growth})

    fig = Figure(figsize=(9, 3.4), layout='constrained')
    left, right = fig.subplots(1, 2)
    labels = {'plain': "timm's, plain", 'checkpointing': "timm's, checkpointing", 'ours': 'SE-DenseNet, linear memory'}
    for i, (name, label) in enumerate(labels.items()):
        left.bar([j + .27 * (i - 1) for j in range(len(rows))], [row[name] for row in rows], .25, label=label)
        right.plot(LAYERS, growth[name], 'o-', label=label)
    left.set(xticks=range(len(rows)), xticklabels=VARIANTS, xlabel='depth', ylabel='MB an image saved for backward',
             title='224x224, float32')
    right.set(xlabel='layers of one dense block', title='growth with the layers, 56x56', ylim=(0, None))
    left.legend(fontsize=8)
    fig.savefig(RESULTS / 'memory.png', dpi=110)


if __name__ == '__main__':
    main()
