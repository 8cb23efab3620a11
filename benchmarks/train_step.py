"""Speed of a training step: SE-DenseNet-121 in linear memory against timm's densenet121, plain and checkpointing.

Forward and backward at 224x224 in channels_last, all in one process, interleaved; medians. See benchmarks/README.md for
what was measured where.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --compile --batch-sizes 8
"""
import argparse
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from common import device, interleave, medians, ratio, save

import timm_densese  # noqa: F401


def create_step(name: str, checkpointing: bool, batch_size: int, compile: bool, amp: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    model = timm.create_model(name).train().to(device(), memory_format=torch.channels_last)
    model.set_grad_checkpointing(checkpointing)
    net = torch.compile(model) if compile else model
    images = torch.randn(batch_size, 3, 224, 224, device=device()).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch_size,), device=device())

    def step() -> None:
        model.zero_grad()
        with torch.autocast(device().type, torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(net(images).float(), labels)
        loss.backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch-sizes', type=int, nargs='+', default=[8, 16])
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--compile', action='store_true', help='compile the three models')
    parser.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--out', help='name of the result, to write it')
    args = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rows = []
    for batch_size in args.batch_sizes:
        seconds = interleave({
            'plain': create_step('densenet121', False, batch_size, args.compile, args.amp),
            'checkpointing': create_step('densenet121', True, batch_size, args.compile, args.amp),
            'ours': create_step('se_densenet121', True, batch_size, args.compile, args.amp)}, args.repeats)
        median = medians(seconds)
        faster = {base: ratio(seconds, base, 'ours') for base in ('plain', 'checkpointing')}
        rows.append({'batch_size': batch_size, 'compile': args.compile, 'amp': args.amp, 'median': median,
                     'ours_faster_than': faster})
        print(f'batch {batch_size:3}{", compiled" if args.compile else ""}{", bfloat16" if args.amp else ""}: '
              + ', '.join(f'{name} {1e3 * value:.0f} ms' for name, value in median.items())
              + f': {faster["plain"]:.2f}x plain, {faster["checkpointing"]:.2f}x checkpointing', flush=True)
    if args.out:
        save(args.out, {'rows': rows})


if __name__ == '__main__':
    main()
