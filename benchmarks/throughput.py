"""Throughput, latency and memory of the SE-DenseNets and of what one would pick instead, in one command.

Inference and training steps of the family, fused (inference) and in linear memory (training) and not, against timm's
DenseNets of the same depth, torchvision's, rdnet_tiny and seresnet50: eager, compiled and, on CPUs, in ONNX Runtime and
OpenVINO. The models of a row's group run in turns; medians. See benchmarks/README.md for what was measured where.

    python benchmarks/throughput.py             # depth 121; on a GPU where there is one
    python benchmarks/throughput.py --variants 121 161 169 201 264d blur121d --executions eager
    python benchmarks/throughput.py --quick     # 3 minutes on two cores

With --quote, the table between the marks <!-- throughput --> of README.md and docs/performance.md is written anew.

Results go to results/throughput-DEVICE/: each row is appended to rows.jsonl as it is measured, so that Ctrl-C loses
nothing and the next run goes on in the same folder, a newer row replacing an older one in the tables, which have the
columns of timm's results/benchmark-*.csv, in the figures and in README.md, which shows it all.
"""
import argparse
import functools
import importlib.metadata
import json
import os
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torchvision
from common import (
    DTYPES,
    RESULTS,
    base,
    build_measured,
    create,
    device,
    first_line,
    interleave,
    machine,
    peak_memory,
    ratio,
    time_run,
)
from tables import DOCS, draw, quote, read, write_summary, write_tables
from torch._inductor import config as inductor_config
from tqdm import tqdm

from timm_densese.models.stats import model_stats

VARIANTS = ('121', '161', '169', '201', '264d', 'blur121d')
PEERS = ('rdnet_tiny', 'seresnet50')
EXECUTIONS = {
    'cpu': {'infer': ('eager', 'compile', 'freezing', 'onnxruntime', 'openvino'), 'train': ('eager', 'compile')},
    'cuda': {'infer': ('eager', 'cudagraph', 'compile', 'max-autotune'), 'train': ('eager', 'cudagraph', 'compile')},
}


def models(kind: str, variant: str) -> list[str]:
    """What is compared at a depth; the nets of other families stand beside depth 121."""
    name = f'densenet{variant}'
    found = [name, f'se_{name}'] + ([f'se_{name} fused'] if kind == 'infer' else
                                    [f'{name} checkpointing', f'se_{name} linear memory'])
    found += [f'torchvision {name}'] if hasattr(torchvision.models, name) else []
    return found + (list(PEERS) if variant == '121' else [])


@functools.cache
def stats(model: str, size: int) -> dict[str, float]:
    """Parameters, multiply-adds and activations, in timm's units."""
    with torch.device('meta'):
        found = model_stats(create(model, False), size)
    return {'param_count': round(found['params'], 2), 'gmacs': round(found['macs'] / 1e3, 2),
            'macts': round(found['activations'], 2)}


def largest_batch(kind: str, model: str, dtype: str, size: int, guess: int, limit: float | None,
                  part: int = 16) -> int:
    """Bisect the largest batch size that fits into memory, to a part of it; 0 where one image does not."""
    fits, fails = 0, None
    with tqdm(desc=f'largest batch of {model}', unit='try', leave=False) as progress:
        while fails is None or fails - fits > max(1, fits // part):
            batch_size = (fits + fails) // 2 if fails else 2 * fits or guess
            progress.set_postfix(batch_size=batch_size)
            try:
                peak_memory(kind, model, 'eager', dtype, batch_size, size, Path(), limit=limit)
                fits = batch_size
            except MemoryError:
                fails = batch_size
            except RuntimeError as error:
                if not re.search('32.?bit', str(error)):
                    raise
                fails = batch_size  # more elements than some operator counts
            progress.update()
    return fits


def applies(kind: str, execution: str, dtype: str) -> bool:
    """Tell whether somebody would run it: weights are trained in float32, and exported in it."""
    if execution == 'onnxruntime':
        return dtype == 'float32'
    if execution == 'openvino':
        return not dtype.startswith('amp_')
    return kind == 'infer' or dtype != 'bfloat16'


class Bench:
    """Measures groups of models and appends a record for each to rows.jsonl.

    Args:
        out: Folder.
        size: Height and width of the images in pixels.
        seconds: About how long each model runs for a row.
        fewest: Rounds that a row has at least; for inference of one image, 100 where it is more than 3.
        build: Gives what is timed, and MB, as `build_measured` does.
        timer: Gives the seconds of what `build` gave.
    """

    def __init__(self, out: Path, size: int, seconds: float, fewest: int,
                 build: Callable[..., tuple[Any, float | None]] = build_measured,
                 timer: Callable[[Any], float] = time_run) -> None:
        self.out, self.size, self.seconds, self.fewest = out, size, seconds, fewest
        self.build, self.timer = build, timer
        command = shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]])
        self.machine = {**machine(), 'torchvision': torchvision.__version__, 'command': command}

    def group(self, kind: str, execution: str, dtype: str, sizes: dict[str, int], folder: Path,
              batch: str | None = None) -> list[str]:
        """Time models in turns, each at its batch size; those that do not fit beside the others have a turn later.

        Returns:
            The models that ran.
        """
        torch._dynamo.reset()  # or a frozen model would run the code of one that was compiled without freezing
        memory: dict[str, float | None] = {}
        left = list(sizes)
        ran: list[str] = []
        while left:
            later: list[str] = []
            runs: dict[str, Any] = {}
            slowest = 0.
            for model in left:
                args = (kind, model, execution, dtype, sizes[model], self.size, folder)
                try:
                    with inductor_config.patch(freezing=execution == 'freezing'):
                        run, memory[model] = self.build(*args)
                    slowest = max(slowest, self.timer(run))
                    runs[model] = run
                except Exception as error:  # a failing peer is a row, not the end
                    if isinstance(error, torch.OutOfMemoryError) and runs:
                        later.append(model)
                    else:
                        self.write(kind, execution, dtype, model, sizes[model], batch, error=first_line(error))
            if runs:
                latency = kind == 'infer' and max(sizes.values()) == 1 and self.fewest > 3
                fewest = 100 if latency else self.fewest
                seconds = interleave(runs, min(max(fewest, int(self.seconds / slowest)), 500), timer=self.timer)
                for model, values in seconds.items():
                    self.write(kind, execution, dtype, model, sizes[model], batch, values, memory[model],
                               ratio(seconds, base(model), model) if base(model) in seconds else None)
                ran += runs
            left = later
        return ran

    def write(self, kind: str, execution: str, dtype: str, model: str, batch_size: int, batch: str | None,
              seconds: list[float] | None = None, memory: float | None = None,
              relative: tuple[float, float, float] | None = None, error: str | None = None) -> None:
        """Append a record; `batch` is what was asked for, a size or 'largest'."""
        counts: dict[str, float] = {}
        with suppress(Exception):  # of a model that failed
            counts = stats(model, self.size)
        row = {'kind': kind, 'execution': execution, 'dtype': dtype, 'img_size': self.size,
               'batch': batch or batch_size, 'model': model, 'batch_size': batch_size,
               **counts, **self.machine}
        if execution in ('onnxruntime', 'openvino'):
            with suppress(importlib.metadata.PackageNotFoundError):  # the error to record is the import's
                row[execution] = importlib.metadata.version(execution)
        if seconds is None:
            shown = error
            row['error'] = error
        else:
            p25, p50, p75 = statistics.quantiles(seconds, n=4, method='inclusive')
            row.update(samples_per_sec=batch_size / p50, step_time_ms=1e3 * p50, step_time_ms_p25=1e3 * p25,
                       step_time_ms_p75=1e3 * p75, rounds=len(seconds), peak_memory_mb=memory,
                       faster_than_densenet=relative and dict(zip(('p25', 'p50', 'p75'), relative, strict=True)))
            shown = f'{batch_size / p50:9.1f} images/s ({1e3 * p25:.1f} to {1e3 * p75:.1f} ms a step)'
            shown += f', {memory:.0f} MB' if memory else ''
            if relative and model != base(model):
                shown += f', {relative[1]:.2f}x {base(model)} ({relative[0]:.2f} to {relative[2]:.2f})'
            if kind == 'infer' and batch_size == 1 and len(seconds) >= 100:
                cuts = statistics.quantiles(seconds, n=100, method='inclusive')
                row['latency_ms'] = {f'p{p}': 1e3 * cuts[p - 1] for p in (50, 90, 95, 99)}
                shown += f', p99 {row["latency_ms"]["p99"]:.1f} ms'
        with open(self.out / 'rows.jsonl', 'a') as file:
            file.write(json.dumps(row) + '\n')
        tqdm.write(f'{kind}, {execution}, {dtype}, batch {batch_size}, {model}: {shown}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = EXECUTIONS[device().type]
    parser.add_argument('--kinds', nargs='+', choices=known, default=list(known))
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=['121'])
    parser.add_argument('--executions', nargs='+', choices=known['infer'], default=known['infer'])
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES,
                        default=list(DTYPES) if device().type == 'cuda' else ['float32', 'bfloat16', 'amp_bfloat16'],
                        help="as timm's --precision; amp: autocast")
    parser.add_argument('--batch-sizes', type=int, nargs='+',
                        default=[1, 8, 32, 64, 128, 256] if device().type == 'cuda' else [1, 4, 8, 16],
                        help='and, in eager mode, the largest that fits')
    parser.add_argument('--largest', action=argparse.BooleanOptionalAction,
                        default=device().type == 'cuda' or sys.platform == 'linux',
                        help='find and measure the largest batch that fits')
    parser.add_argument('--img-size', type=int, default=224, help='height and width in pixels')
    parser.add_argument('--memory-limit', type=float,
                        help='GB in which the largest batch is to fit; default: what is free')
    parser.add_argument('--seconds', type=float, default=10, help='about how long each model runs for a row')
    parser.add_argument('--out', type=Path, help='folder to go on in; default: results/throughput-DEVICE')
    parser.add_argument('--quote', action='store_true', help='write the table into README.md and docs/performance.md')
    parser.add_argument('--quick', action='store_true', help='a small part, to see that it works here')
    args = parser.parse_args()
    if args.quick:
        args.executions, args.dtypes, args.batch_sizes = ('eager', known['infer'][-2]), ['float32'], [1, 4]
        args.img_size, args.memory_limit, args.seconds = 64, args.memory_limit or .15, .1
    if device().type == 'cpu':
        torch.set_num_threads(min(os.cpu_count() or 1, torch.get_num_threads()))
    elif args.memory_limit:
        free = torch.cuda.get_device_properties(0).total_memory / 1e9
        torch.cuda.set_per_process_memory_fraction(min(1., args.memory_limit / free))
    torch._dynamo.config.recompile_limit = 64  # models of a class share their code
    name = re.sub(r'\W+', '-', machine()['device']).strip('-').lower() + ('-quick' if args.quick else '')
    out = args.out or RESULTS / f'throughput-{name}'
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(out, args.img_size, args.seconds, 3 if args.quick else 5)
    groups = [(kind, execution, dtype, variant) for kind in args.kinds for execution in args.executions
              for dtype in args.dtypes for variant in args.variants
              if execution in known[kind] and applies(kind, execution, dtype)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            for kind, execution, dtype, variant in tqdm(groups, unit='group', disable=None):
                left = [model for model in models(kind, variant)
                        if not args.quick or ('densenet' in model and 'torch' not in model)]
                for batch_size in args.batch_sizes:
                    left = bench.group(kind, execution, dtype, dict.fromkeys(left, batch_size), Path(folder))
                searched = left[:1] if args.quick else left
                for model in searched if execution == 'eager' and args.largest else []:
                    size = largest_batch(kind, model, dtype, args.img_size, args.batch_sizes[-1], args.memory_limit)
                    if size:
                        bench.group(kind, execution, dtype, {model: size}, Path(folder), 'largest')
                    else:
                        bench.write(kind, execution, dtype, model, 1, 'largest', error='one image does not fit')
    except KeyboardInterrupt:
        sys.exit(f'Stopped. What was measured is in {out}; the next run goes on there.')
    finally:
        rows = read(out)
        if rows:
            write_tables(rows, out)
            draw(rows, out)
            write_summary(rows, out)
            for file in DOCS if args.quote else ():
                quote(rows, file)
            print(f'{len(rows)} rows in {out}')


if __name__ == '__main__':
    main()
