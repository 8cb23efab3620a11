"""Throughput, latency and memory of the SE-DenseNets and of what one would pick instead, in one command.

Inference and training steps of the family, fused (inference) and in linear memory (training) and not, against timm's
DenseNets of the same depth, torchvision's, rdnet_tiny and seresnet50: eager, compiled and, on CPUs, in ONNX Runtime and
OpenVINO. The models of a row's group run in turns; medians. See benchmarks/README.md for what was measured where.

    python benchmarks/throughput.py             # depth 121; on a GPU where there is one
    python benchmarks/throughput.py --variants 121 161 169 201 264d blur121d --executions eager
    python benchmarks/throughput.py --quick     # 3 minutes on two cores

Results go to results/throughput-DEVICE/: each row is appended to rows.jsonl as it is measured, so that Ctrl-C loses
nothing and the next run goes on in the same folder, a newer row replacing an older one in the tables, which have the
columns of timm's results/benchmark-*.csv, in the figures and in README.md, which shows it all.
"""
import argparse
import csv
import importlib.metadata
import io
import json
import multiprocessing
import os
import re
import resource
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib
import timm
import torch
import torch.nn.functional as F
import torchvision
from common import (
    RESULTS,
    device,
    export_onnx,
    interleave,
    machine,
    onnxruntime_run,
    openvino_run,
    peak_memory,
    ratio,
    status,
)
from torch._inductor import config as inductor_config
from tqdm import tqdm

from timm_densese.files import replace_file
from timm_densese.models.stats import model_stats

matplotlib.use('Agg')
import matplotlib.pyplot as plt

VARIANTS = ('121', '161', '169', '201', '264d', 'blur121d')
PEERS = ('rdnet_tiny', 'seresnet50')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
EXECUTIONS = {
    'cpu': {'infer': ('eager', 'compile', 'freezing', 'onnxruntime', 'openvino'), 'train': ('eager', 'compile')},
    'cuda': {'infer': ('eager', 'cudagraph', 'compile', 'max-autotune'), 'train': ('eager', 'cudagraph', 'compile')},
}
COMPILED = ('compile', 'freezing', 'max-autotune')
KEY = ('kind', 'execution', 'dtype', 'img_size', 'batch', 'model')
Run = Callable[[], Any]


def models(kind: str, variant: str) -> list[str]:
    """What is compared at a depth; the nets of other families stand beside depth 121."""
    name = f'densenet{variant}'
    found = [name, f'se_{name}'] + ([f'se_{name} fused'] if kind == 'infer' else
                                    [f'{name} checkpointing', f'se_{name} linear memory'])
    found += [f'torchvision {name}'] if hasattr(torchvision.models, name) else []
    return found + (list(PEERS) if variant == '121' else [])


def base(model: str) -> str:
    """The DenseNet of a model's depth, 121 for the other nets."""
    found = re.search(r'densenet\w+', model)
    return found.group() if found else 'densenet121'


def create(model: str, training: bool) -> Any:
    torch.manual_seed(0)
    *source, name = re.sub(' (fused|checkpointing|linear memory)$', '', model).split()
    net: Any = torchvision.models.get_model(name) if source else timm.create_model(name)
    net.train(training)
    if model.endswith(('checkpointing', 'linear memory')):
        net.set_grad_checkpointing()
    return timm.models.reparameterize_model(net) if model.endswith('fused') else net


def stats(model: str, size: int) -> dict[str, float]:
    """Parameters, multiply-adds and activations, in timm's units."""
    with torch.device('meta'):
        found = model_stats(create(model, False), size)
    return {'param_count': round(found['params'], 2), 'gmacs': round(found['macs'] / 1e3, 2),
            'macts': round(found['activations'], 2)}


def build(kind: str, model: str, execution: str, dtype: str, batch_size: int, size: int, folder: Path) -> Run:
    """Make the function that is timed: a forward pass, or a step of training with SGD."""
    torch.manual_seed(0)
    x = torch.randn(batch_size, 3, size, size, device=device()).contiguous(memory_format=torch.channels_last)
    if execution in ('onnxruntime', 'openvino'):
        file = folder / f'{model}.onnx'
        if not file.exists():
            export_onnx(create(model, False), size, file)
        if execution == 'onnxruntime':
            return onnxruntime_run(file, x)
        return openvino_run(file, x, {'float32': 'f32', 'bfloat16': 'bf16'}[dtype])

    net = create(model, kind == 'train').to(device(), memory_format=torch.channels_last)
    forward = net if execution not in COMPILED else torch.compile(
        net, mode='max-autotune' if execution == 'max-autotune' else 'default')
    autocast = torch.autocast(device().type, DTYPES[dtype], enabled=dtype != 'float32')

    def infer() -> torch.Tensor:
        with torch.no_grad(), autocast:
            return forward(x)

    if kind == 'infer':
        return cudagraph(infer) if execution == 'cudagraph' else infer
    labels = torch.randint(0, 1000, (batch_size,), device=device())
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=.9)

    def train() -> None:
        optimizer.zero_grad()
        with autocast:
            loss = F.cross_entropy(forward(x), labels)
        loss.backward()
        optimizer.step()

    return cudagraph(train) if execution == 'cudagraph' else train


def cudagraph(run: Run) -> Run:
    """Record a function's kernels once, to replay them without launching each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def largest_batch(kind: str, model: str, dtype: str, size: int, guess: int, limit: float | None) -> int:
    """Bisect the largest batch size that fits into memory, to a sixteenth; 0 where one image does not."""
    fits, fails = 0, None
    with tqdm(desc=f'largest batch of {model}', unit='try', leave=False) as progress:
        while fails is None or fails - fits > max(1, fits // 16):
            batch_size = (fits + fails) // 2 if fails else 2 * fits or guess
            progress.set_postfix(batch_size=batch_size)
            if _fits(kind, model, dtype, batch_size, size, limit):
                fits = batch_size
            else:
                fails = batch_size
            progress.update()
    return fits


def _fits(kind: str, model: str, dtype: str, batch_size: int, size: int, limit: float | None) -> bool:
    args = (kind, model, 'eager', dtype, batch_size, size, Path())
    if device().type == 'cuda':
        try:
            peak_memory(lambda: build(*args))
        except torch.OutOfMemoryError:
            return False
        return True
    # A process of its own, as an allocation that fails halfway through a CPU operator may end it.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__, 'timm_densese'])
    process = context.Process(target=_try, args=(args, torch.get_num_threads(), limit or _available_gigabytes()))
    process.start()
    process.join()
    return process.exitcode == 0


def _try(args: tuple[Any, ...], threads: int, limit: float) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what fails here is the answer
    torch.set_num_threads(threads)
    before = status('VmRSS')
    # What is asked for is more than what is used. This only keeps the machine from swapping.
    resource.setrlimit(resource.RLIMIT_AS, (status('VmSize') + int(1.5 * limit * 1e9 + 5e8),) * 2)
    run = build(*args)
    run()
    if args[0] == 'train':
        run()  # beside the optimizer's state, which the first step made
    sys.exit(status('VmHWM') - before > limit * 1e9)


def _available_gigabytes() -> float:
    return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9


class Bench:
    """Measures groups of models and appends a record for each to rows.jsonl.

    Args:
        out: Folder.
        size: Height and width of the images in pixels.
        seconds: About how long each model runs for a row.
        fewest: Rounds that a row has at least; for inference of one image, 100 where it is more than 3.
    """

    def __init__(self, out: Path, size: int, seconds: float, fewest: int) -> None:
        self.out, self.size, self.seconds, self.fewest = out, size, seconds, fewest
        command = shlex.join(['python', 'benchmarks/throughput.py', *sys.argv[1:]])
        self.machine = {**machine(), 'torchvision': torchvision.__version__, 'command': command}
        self.stats: dict[str, dict[str, float]] = {}

    def group(self, kind: str, execution: str, dtype: str, sizes: dict[str, int], folder: Path,
              batch: str | None = None) -> list[str]:
        """Time models in turns, each at its batch size; those that do not fit beside the others have a turn later.

        Returns:
            The models that ran.
        """
        torch._dynamo.reset()  # or a frozen model would run the code of one that was compiled without freezing
        left: list[str] = list(sizes)
        ran: list[str] = []
        with suppress(Exception):  # the first model would else count the libraries and kernels that its run loads
            if execution in COMPILED:
                torch.compile(lambda x: x + 1)(torch.ones(1, device=device()))
            else:
                peak_memory(lambda: build(kind, left[0], execution, dtype, sizes[left[0]], self.size, folder))
        while left:
            later: list[str] = []
            runs: dict[str, Run] = {}
            memory: dict[str, float | None] = {}
            slowest = 0.
            for model in left:
                args = (kind, model, execution, dtype, sizes[model], self.size, folder)
                try:
                    with inductor_config.patch(freezing=execution == 'freezing'):
                        runs[model], memory[model], seconds = peak_memory(lambda args=args: build(*args))
                    slowest = max(slowest, seconds)
                except Exception as error:  # a failing peer is a row, not the end
                    if isinstance(error, torch.OutOfMemoryError) and runs:
                        later.append(model)
                    else:
                        self.write(kind, execution, dtype, model, sizes[model], batch, error=_first_line(error))
            if runs:
                latency = kind == 'infer' and max(sizes.values()) == 1 and self.fewest > 3
                fewest = 100 if latency else self.fewest
                seconds = interleave(runs, min(max(fewest, int(self.seconds / slowest)), 500))
                for model, values in seconds.items():
                    self.write(kind, execution, dtype, model, sizes[model], batch, values, memory[model],
                               ratio(seconds, base(model), model) if base(model) in seconds else None)
                ran += runs
            left = later
        return ran

    def write(self, kind: str, execution: str, dtype: str, model: str, batch_size: int, batch: str | None,
              seconds: list[float] | None = None, memory: float | None = None, relative: float | None = None,
              error: str | None = None) -> None:
        """Append a record; `batch` is what was asked for, a size or 'largest'."""
        if model not in self.stats:
            with suppress(Exception):  # of a model that failed
                self.stats[model] = stats(model, self.size)
        row = {'kind': kind, 'execution': execution, 'dtype': dtype, 'img_size': self.size,
               'batch': batch or batch_size, 'model': model, 'batch_size': batch_size,
               **self.stats.get(model, {}), **self.machine}
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
                       faster_than_densenet=relative)
            shown = f'{batch_size / p50:9.1f} images/s ({1e3 * p25:.1f} to {1e3 * p75:.1f} ms a step)'
            shown += f', {memory:.0f} MB' if memory else ''
            shown += f', {relative:.2f}x {base(model)}' if relative and model != base(model) else ''
            if kind == 'infer' and batch_size == 1 and len(seconds) >= 100:
                cuts = statistics.quantiles(seconds, n=100, method='inclusive')
                row['latency_ms'] = {f'p{p}': 1e3 * cuts[p - 1] for p in (50, 90, 95, 99)}
                shown += f', p99 {row["latency_ms"]["p99"]:.1f} ms'
        with open(self.out / 'rows.jsonl', 'a') as file:
            file.write(json.dumps(row) + '\n')
        tqdm.write(f'{kind}, {execution}, {dtype}, batch {batch_size}, {model}: {shown}')


def _first_line(error: Exception) -> str:
    return f'{type(error).__name__}: {(str(error).strip() or "no message").splitlines()[0]}'


def read(out: Path) -> list[dict[str, Any]]:
    """The newest row of each kind, execution, type, size, batch and model."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in (out / 'rows.jsonl').read_text().splitlines():
        row = json.loads(line)
        rows[tuple(row[key] for key in KEY)] = row
    return list(rows.values())


def write_tables(rows: list[dict[str, Any]], out: Path) -> None:
    """Write a CSV for each kind, type and execution, named and with the columns as timm's are."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if 'error' not in row:
            groups.setdefault((row['kind'], row['dtype'], row['execution']), []).append(row)
    for (kind, dtype, execution), group in groups.items():
        columns = ['img_size', 'samples_per_sec', 'step_time', 'batch_size']
        fields = ['model', *(f'{kind}_{column}' for column in columns), 'param_count']
        if kind == 'infer':
            fields += ['infer_gmacs', 'infer_macts']
        text = io.StringIO()
        table = csv.DictWriter(text, fields, extrasaction='ignore', lineterminator='\n')
        table.writeheader()
        for row in sorted(group, key=lambda row: -row['samples_per_sec']):
            table.writerow({'model': row['model'], f'{kind}_img_size': row['img_size'],
                            f'{kind}_samples_per_sec': round(row['samples_per_sec'], 2),
                            f'{kind}_step_time': round(row['step_time_ms'], 3),
                            f'{kind}_batch_size': row['batch_size'], 'param_count': row['param_count'],
                            'infer_gmacs': row['gmacs'], 'infer_macts': row['macts']})
        version = group[0]['torch'].split('+')[0].replace('.', '')
        replace_file(out / f'benchmark-{kind}-{dtype}-nhwc-pt{version}-{execution}.csv', text.getvalue())


def write_summary(rows: list[dict[str, Any]], out: Path) -> None:
    """Write README.md: a table for each kind, execution, type and size, with what failed."""
    first = rows[0]
    text = [f'# {first["device"]}', f'torch {first["torch"]}, timm {first["timm"]}'
            + (f', driver {first["driver"]}' if first['driver'] else '') + f', {first["threads"]} threads. Images a '
            'second, medians; in brackets, against the densenet of the same depth in the same rounds (more is faster). '
            'Latency of one image; peak memory beyond what the process used before, weights included. On a CPU that is '
            'resident memory, which grows in a process that has run other models: whether the largest batch fits is '
            'judged in a process of its own. Spread, rounds and commit are in rows.jsonl.']
    for kind, execution, dtype, size in dict.fromkeys(
            (row['kind'], row['execution'], row['dtype'], row['img_size']) for row in rows):
        group = [row for row in rows if (row['kind'], row['execution'], row['dtype'], row['img_size'])
                 == (kind, execution, dtype, size)]
        batches = sorted({row['batch'] for row in group}, key=lambda batch: (batch == 'largest', batch))
        has_latency = any('latency_ms' in row for row in group)
        header = ['model', *(f'batch {batch}' if batch != 'largest' else 'largest batch' for batch in batches)]
        header += ['latency, ms (p99)'] if has_latency else []
        lines = ['| ' + ' | '.join(header) + ' |', '|' + '---|' * len(header)]
        for model in dict.fromkeys(row['model'] for row in group):
            own = {row['batch']: row for row in group if row['model'] == model}
            cells = [model, *(_cell(own.get(batch)) for batch in batches)]
            if has_latency:
                latency = own.get(1, {}).get('latency_ms')
                cells.append(f'{latency["p50"]:.1f} ({latency["p99"]:.1f})' if latency else '')
            lines.append('| ' + ' | '.join(cells) + ' |')
        what = 'Inference' if kind == 'infer' else 'Training step'
        text += [f'## {what}, {execution}, {dtype}, {size}x{size}', '\n'.join(lines),
                 '\n'.join(f'`{command}`  ' for command in dict.fromkeys(row['command'] for row in group)).rstrip()]
    text += [f'![{file.stem}]({file.name})' for file in sorted(out.glob('*.png'))]
    replace_file(out / 'README.md', '\n\n'.join(text) + '\n')


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ''
    if 'error' in row:
        return row['error'].replace('|', '/')
    relative = None if row['batch'] == 'largest' else row['faster_than_densenet']  # each at a batch size of its own
    memory = f', {row["peak_memory_mb"]:.0f} MB' if row['peak_memory_mb'] else ''
    size = f'{row["batch_size"]}: ' if row['batch'] == 'largest' else ''
    return f'{size}{row["samples_per_sec"]:.1f}' + (f' ({relative:.2f}x)' if relative else '') + memory


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw throughput against batch size and against memory, a panel for each depth, and what SE costs."""
    good = [row for row in rows if 'error' not in row]
    for kind in ('infer', 'train'):
        lines: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
        for row in good:
            if row['kind'] == kind:
                depth, label = base(row['model'])[8:], row['model'].replace(base(row['model']), 'densenet')
                lines.setdefault((depth, row['execution'], row['dtype']), {}).setdefault(label, []).append(row)
        panels = sorted(lines)
        labels = list(dict.fromkeys(label for panel in lines.values() for label in panel))
        for x, title in (('batch_size', 'batch size'), ('peak_memory_mb', 'peak memory, MB')):
            if not panels or not any(row[x] for row in good):
                continue
            columns = min(4, len(panels))
            fig, axes = plt.subplots(-(-len(panels) // columns), columns, squeeze=False, layout='constrained',
                                     figsize=(3.2 * columns + 2.4, 2.8 * -(-len(panels) // columns)))
            for ax, panel in zip(axes.flat, panels, strict=False):
                for i, label in enumerate(labels):
                    line = sorted((row[x], row['samples_per_sec']) for row in lines[panel].get(label, []) if row[x])
                    ax.plot(*zip(*line, strict=True) if line else ((), ()), 'o-', ms=3, color=plt.cm.tab10(i))
                ax.set(title=', '.join(panel), xlabel=title, ylabel='images/s', ylim=(0, 1.1 * ax.dataLim.y1))
                ax.set_xscale('log', base=2)
                ax.xaxis.set_major_formatter('{x:g}')
            for ax in axes.flat[len(panels):]:
                ax.set_axis_off()
            fig.legend(axes.flat[0].lines, labels, loc='outside right upper', fontsize=7)
            _save_figure(fig, out / f'{kind}-{"batch" if x == "batch_size" else "memory"}.png')
    costs = [(f'{row["kind"]}, {row["execution"]}, {row["dtype"]}, batch {row["batch"]}, {base(row["model"])[8:]}',
              100 / row['faster_than_densenet'] - 100) for row in good
             if row['model'].startswith('se_') and ' ' not in row['model'] and row['faster_than_densenet']
             and row['batch'] != 'largest']
    if costs:
        fig, ax = plt.subplots(figsize=(7, 1 + .17 * len(costs)), layout='constrained')
        ax.barh(range(len(costs)), [value for _, value in costs])
        ax.set(yticks=range(len(costs)), xlabel="%, more time than timm's densenet of the same depth",
               title='cost of SE')
        ax.set_yticklabels([label for label, _ in costs], fontsize=7)
        ax.margins(y=.01)
        ax.invert_yaxis()
        _save_figure(fig, out / 'se-cost.png')


def _save_figure(fig: Any, file: Path) -> None:
    content = io.BytesIO()
    fig.savefig(content, dpi=110)
    plt.close(fig)
    replace_file(file, content.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = EXECUTIONS[device().type]
    parser.add_argument('--kinds', nargs='+', choices=known, default=list(known))
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=['121'])
    parser.add_argument('--executions', nargs='+', choices=known['infer'], default=known['infer'])
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES,
                        default=list(DTYPES) if device().type == 'cuda' else ['float32', 'bfloat16'])
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
    parser.add_argument('--quick', action='store_true', help='a small part, to see that it works here')
    args = parser.parse_args()
    if args.quick:
        args.executions, args.dtypes, args.batch_sizes = ('eager', known['infer'][-2]), ['float32'], [1, 4]
        args.img_size, args.memory_limit, args.seconds = 64, .15, .3
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
              for dtype in args.dtypes for variant in args.variants if execution in known[kind]
              and (execution, dtype) != ('onnxruntime', 'bfloat16')]  # exported in float32, as it is served
    try:
        with tempfile.TemporaryDirectory() as folder:
            for kind, execution, dtype, variant in tqdm(groups, unit='group', disable=None):
                left = [model for model in models(kind, variant)
                        if not args.quick or ('densenet' in model and 'torch' not in model)]
                for batch_size in args.batch_sizes:
                    left = bench.group(kind, execution, dtype, dict.fromkeys(left, batch_size), Path(folder))
                for model in left if execution == 'eager' and args.largest else []:
                    size = largest_batch(kind, model, dtype, args.img_size, args.batch_sizes[-1], args.memory_limit)
                    if size:
                        bench.group(kind, execution, dtype, {model: size}, Path(folder), 'largest')
                    else:
                        bench.write(kind, execution, dtype, model, 1, 'largest', error='one image does not fit')
    except KeyboardInterrupt:
        sys.exit(f'Stopped. What was measured is in {out}; the next run goes on there.')
    finally:
        if (out / 'rows.jsonl').exists():
            rows = read(out)
            write_tables(rows, out)
            draw(rows, out)
            write_summary(rows, out)
            print(f'{len(rows)} rows in {out}')


if __name__ == '__main__':
    main()
