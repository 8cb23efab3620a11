"""Scaling of training with DistributedDataParallel: more processes, by torchrun, with nccl on GPUs and gloo on CPUs.

Weak scaling keeps the batch of each process, strong scaling the batch of all together; efficiency is the throughput
over that of one process times their number. A step is measured with and without averaging gradients, and so is the
averaging alone. Runs of each number of processes alternate; medians. On CPUs each process has one thread.

    python benchmarks/scaling.py --processes 1 2
    python benchmarks/scaling.py --predict      # how far it carries on H100s; a model, nothing is run there
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from common import RESULTS, images, save, training_step
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import timm_densese  # noqa: F401

MODEL = 'se_densenet121'
# Bytes a second in one direction, of data sheets: NVLink of an H100 SXM, InfiniBand NDR for each GPU. Seconds a hop.
NVLINK, INFINIBAND, HOP = 450e9, 50e9, 10e-6


def worker(batch_sizes: list[int], steps: int, out: Path) -> None:
    """Measure in one of torchrun's processes; the first one writes the result."""
    cuda = torch.cuda.is_available()
    rank = int(os.environ['LOCAL_RANK'])
    device = torch.device('cuda', rank) if cuda else torch.device('cpu')
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group('nccl' if cuda else 'gloo')
    torch.manual_seed(0)
    model = timm.create_model(MODEL).train().to(device, memory_format=torch.channels_last)
    model.set_grad_checkpointing()
    net = DistributedDataParallel(model, device_ids=[rank] if cuda else None)
    gradients = torch.ones(sum(p.numel() for p in model.parameters()), device=device)
    rows = []
    for batch_size in batch_sizes:
        step = training_step(
            model, images(batch_size), torch.bfloat16 if cuda else torch.float32, forward=net)

        def alone(step: Callable[[], None] = step) -> None:
            with net.no_sync():
                step()

        seconds: dict[str, list[float]] = {'step': [], 'alone': [], 'average': []}
        for i in range(-2, steps):
            for name, run in (('step', step), ('alone', alone), ('average', lambda: dist.all_reduce(gradients))):
                elapsed = _time(run, cuda)
                if i >= 0:
                    seconds[name].append(elapsed)
        rows.append({'batch_size': batch_size, **{k: statistics.median(v) for k, v in seconds.items()}})
    if dist.get_rank() == 0:
        out.write_text(json.dumps(rows))
    dist.destroy_process_group()


def _time(run: Callable[[], Any], cuda: bool) -> float:
    dist.barrier()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def launch(processes: int, batch_sizes: list[int], steps: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'rows.json'
        subprocess.run(
            [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}', __file__,
             '--worker', str(out), '--batch-sizes', *map(str, batch_sizes), '--steps', str(steps)],
            check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, stderr=subprocess.DEVNULL)
        return json.loads(out.read_text())


def measure(processes: list[int], batch_size: int, steps: int, repeats: int) -> None:
    total = batch_size * max(processes)
    found: dict[int, list[list[dict[str, float]]]] = {n: [] for n in processes}
    with tqdm(total=repeats * len(processes), unit='launch') as progress:
        for i in range(repeats):
            for n in processes[::(-1) ** i]:
                progress.set_description(f'{n} processes')
                found[n].append(launch(n, [batch_size, total // n], steps))
                progress.update()
    rows = []
    for kind, scaling in enumerate(('weak', 'strong')):
        for n in processes:
            runs = [run[kind] for run in found[n]]
            row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            # Ratios of the runs of one round, so that drift does not count.
            efficiency = statistics.median(
                one[kind]['step'] / one[kind]['batch_size'] * run['batch_size'] / run['step']
                for one, run in zip(found[processes[0]], runs, strict=True))
            rows.append({'scaling': scaling, 'processes': n, **row,
                         'images_per_second': n * row['batch_size'] / row['step'], 'efficiency': efficiency})
            print(f'{scaling}, {n} processes, {row["batch_size"]:.0f} images each: '
                  f'{rows[-1]["images_per_second"]:.1f} images/s, efficiency {100 * efficiency:.1f}%; a step '
                  f'{1e3 * row["step"]:.0f} ms, without averaging {1e3 * row["alone"]:.0f} ms, averaging alone '
                  f'{1e3 * row["average"]:.1f} ms')
    save('scaling', {'model': MODEL, 'backend': 'nccl' if torch.cuda.is_available() else 'gloo', 'rows': rows})


def predict() -> None:
    """Model data parallelism on H100s: the floor of a step, and averaging hidden behind the backward pass.

    Averaging is a reduction within each node of 8, one between nodes of each GPU's eighth, and a spread within the
    node; each costs its bytes at the data sheet's rate and a hop for each doubling of the GPUs.
    """
    size = 4 * sum(p.numel() for p in timm.create_model(MODEL, device='meta').parameters())
    floor = json.loads((RESULTS / 'roofline_h100.json').read_text())
    image = floor['prediction']['training, plain']['floor_ms'] / floor['batch_size'] / 1e3
    rows = []
    print(f'{MODEL}: {size / 1e6:.1f} MB of gradients, {1e6 * image:.0f} us an image at least')
    for batch_size in (256, 32, 4):
        for gpus in (8, 64, 1024):
            nodes = gpus // 8
            average = (2 * 7 / 8 * size / NVLINK + 2 * (nodes - 1) / nodes * size / 8 / INFINIBAND
                       + 2 * math.log2(gpus) * HOP)
            step = batch_size * image
            whole = step + max(0., average - 2 / 3 * step)  # the backward pass is two thirds of a step
            rows.append({'gpus': gpus, 'batch_size': batch_size, 'average_ms': 1e3 * average, 'step_ms': 1e3 * step,
                         'efficiency': step / whole, 'images_per_second': gpus * batch_size / whole})
            print(f'MODEL, {gpus:4} H100s, {batch_size:3} images each: averaging {1e3 * average:.2f} ms, '
                  f'a step at least {1e3 * step:.1f} ms, efficiency {100 * step / whole:.0f}%, '
                  f'at most {gpus * batch_size / whole:,.0f} images/s')
    save('scaling_h100', {'gradient_bytes': size, 'nvlink': NVLINK, 'infiniband': INFINIBAND, 'hop': HOP, 'rows': rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--processes', type=int, nargs='+', default=[1, max(2, torch.cuda.device_count())])
    parser.add_argument('--batch-size', type=int, default=256 if torch.cuda.is_available() else 8,
                        help='images of each process in weak scaling')
    parser.add_argument('--steps', type=int, default=20 if torch.cuda.is_available() else 7)
    parser.add_argument('--repeats', type=int, default=3, help='launches of each number of processes')
    parser.add_argument('--predict', action='store_true')
    parser.add_argument('--worker', type=Path, help=argparse.SUPPRESS)
    parser.add_argument('--batch-sizes', type=int, nargs='+', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.batch_sizes, args.steps, args.worker)
    elif args.predict:
        predict()
    else:
        measure(args.processes, args.batch_size, args.steps, args.repeats)


if __name__ == '__main__':
    main()
