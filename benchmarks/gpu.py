"""All that concerns a GPU, in one command of under 9 minutes, on a bare machine without a network.

Tests on the device, bytes saved for backward, throughput of inference and training (ours, timm's, rdnet_tiny,
seresnet50; eager, compile, max-autotune; bfloat16 autocast; batch 1, 64 and the largest), what SE costs, and time
against the floor that the card's measured ceilings give. See docs/gpu.md for what was measured where.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --dry-run     # the same steps with tiny nets, on a CPU

Results go to results/gpu-DEVICE/. Each step writes gpu.json when it ends, and each row of throughput when it is
measured, so that an interruption keeps what was measured. A step that fails is recorded, and the next one runs; one
that would begin after --minutes is left out, and recorded too. Nets are compiled beside each other and the tests, each
in a process of its own, which times it; what is not compiled in time is not measured.
"""
import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import roofline
import torch
from common import RESULTS, create, device, first_line, machine, peak_memory
from memory import saved_megabytes
from tables import draw, read, write_summary, write_tables
from throughput import Bench, largest_batch
from worker import Worker

from timm_densese.files import replace_file

ROOT = Path(__file__).parents[1]
NAMES = {'infer': 'inference', 'train': 'training'}
OURS: dict[str, tuple[str, ...]] = {
    'train': ('densenet121', 'se_densenet121 linear memory'), 'infer': ('densenet121', 'se_densenet121 fused')}
PEERS = ('rdnet_tiny', 'seresnet50')
MODELS = {'train': (*OURS['train'], 'densenet121 checkpointing', 'se_densenet121', *PEERS),
          'infer': (*OURS['infer'], 'se_densenet121', *PEERS)}
WAIT = 4.7  # minutes from the start, for the compilers
Job = tuple[str, str, str, int]


class Steps:
    """Runs steps one after another, each until its end, and keeps what they gave in gpu.json.

    Args:
        out: Folder.
        minutes: After these, no step begins.
    """

    def __init__(self, out: Path, minutes: float) -> None:
        self.out, self.begin = out, time.monotonic()
        self.end = self.begin + 60 * minutes
        self.record: dict[str, Any] = {**machine(), 'steps': {}}

    def run(self, name: str, step: Callable[[], Any]) -> None:
        """Run a step, unless it is too late; what it raises is its record."""
        print(f'--- {name}', flush=True)
        start = time.monotonic()
        record: dict[str, Any] = {}
        if start > self.end:
            record['left_out'] = 'no time was left'
        else:
            try:
                record['result'] = step()
            except Exception as error:
                record['error'] = first_line(error)
        record['seconds'] = round(time.monotonic() - start, 1)
        self.record['steps'][name] = record
        replace_file(self.out / 'gpu.json', json.dumps(self.record, indent=1) + '\n')
        print(f'    {record["seconds"]} s', record.get('error', record.get('left_out', '')), flush=True)


def run_tests(*options: str) -> str:
    """Run the tests that are for a device, several at a time where pytest-xdist is installed; gives the last line."""
    if importlib.util.find_spec('xdist') and (os.cpu_count() or 1) > 8:
        options = '--numprocesses', '8', *options
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests/models/test_device.py',
         'tests/models/test_kernels.py', *options], cwd=ROOT,
        env={**os.environ, 'DEVICE': device().type}, capture_output=True, text=True, timeout=180)
    last = result.stdout.strip().splitlines()[-1]
    if result.returncode:
        failed = re.findall(r'^FAILED .*', result.stdout, re.MULTILINE)
        raise RuntimeError(f'{last} {"; ".join(failed)} {result.stderr[-300:]}')
    return last


def measure_bytes(size: int, batch_size: int) -> dict[str, dict[str, float | None]]:
    """MB that an image saves for backward in bfloat16 autocast, and MB at the peak of a training step."""
    found = {}
    for model in ('densenet121', 'densenet121 checkpointing', 'se_densenet121 linear memory'):
        net = create(model, True).to(device(), memory_format=torch.channels_last)
        with torch.autocast(device().type, torch.bfloat16):
            saved = saved_megabytes(net, size)
        peak = peak_memory('train', model, 'eager', 'amp_bfloat16', batch_size, size, Path())
        found[model] = {'saved': saved, 'peak': peak}
        print(f'    {model}: {saved:.1f} MB an image, {peak or 0:.0f} MB at batch {batch_size}')
    return found


class Compiled:
    """Models that workers compile beside each other, and time when they are told to.

    Args:
        size: Height and width of the images in pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.workers: dict[tuple[Any, ...], Worker] = {}

    def start(self, jobs: list[Job], threads: int) -> None:
        """Start to compile, each with so many threads; a job goes before those that come later in the list."""
        for nice, (kind, model, execution, batch_size) in enumerate(jobs):
            args = kind, model, execution, 'amp_bfloat16', batch_size, self.size
            self.workers[args] = Worker(*args, threads=threads, nice=nice)

    def wait(self, end: float) -> str:
        """Wait until all are compiled or a time on the monotonic clock has come, and end what is left then."""
        for worker in self.workers.values():
            worker.wait(end)
        failed = [f'{" ".join(map(str, args))}: {worker.error}' for args, worker in self.workers.items()
                  if worker.error]
        if failed:
            raise RuntimeError('; '.join(failed))
        return f'{len(self.workers)} compiled'

    def build(self, *args: Any) -> tuple[Worker, float | None]:
        """Give what `build_measured` gives, of what was started."""
        worker = self.workers[args[:-1]]
        if worker.error:
            raise RuntimeError(worker.error)
        return worker, worker.memory

    def end(self) -> None:
        for worker in self.workers.values():
            worker.process.kill()
        self.workers = {}


def measure_largest(bench: Bench, kind: str, models: tuple[str, ...], guess: int, limit: float | None,
                    part: int) -> None:
    for model in models:
        size = largest_batch(kind, model, 'amp_bfloat16', bench.size, guess, limit, part)
        if not size:
            raise RuntimeError(f'one image of {model} does not fit')
        with tempfile.TemporaryDirectory() as folder:
            bench.group(kind, 'eager', 'amp_bfloat16', {model: size}, Path(folder), 'largest')


def first_guess() -> dict[str, int]:
    """Batches that are about the largest which fit, by the card's memory."""
    images = torch.cuda.get_device_properties(0).total_memory >> 26
    return {'infer': 4 * images, 'train': images}


def cost_of_se(out: Path) -> dict[str, float]:
    """How much longer se_densenet121 takes than densenet121, in %."""
    return {f'{row["kind"]}, {row["execution"]}, batch {row["batch"]}': 100 / row['faster_than_densenet']['p50'] - 100
            for row in read(out) if row['model'] == 'se_densenet121' and row.get('faster_than_densenet')}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--dry-run', action='store_true', help='tiny images and batches, on whatever device there is')
    parser.add_argument('--minutes', type=float, default=8, help='after these, no step begins')
    parser.add_argument('--out', type=Path, help='folder; default: results/gpu-DEVICE')
    args = parser.parse_args()
    if not args.dry_run and device().type != 'cuda':
        sys.exit('No GPU was found. torch.cuda.is_available() says so; --dry-run walks the steps on a CPU.')
    dry = args.dry_run
    name = re.sub(r'\W+', '-', machine()['device']).strip('-').lower()
    out = args.out or RESULTS / f'gpu-{name}{"-dry-run" if dry else ""}'
    out.mkdir(parents=True, exist_ok=True)
    size, batches = (32, (1, 2)) if dry else (224, (1, 64))
    limit, guess, part = (.02, {'infer': 64, 'train': 64}, 2) if dry else (None, first_guess(), 4)
    if dry:
        os.environ['TINY_NETS'] = '1'
    seconds, fewest = (.02, 3) if dry else (1.5, 10)
    steps, compiled = Steps(out, args.minutes), Compiled(size)
    benches = dict.fromkeys(('compile', 'max-autotune'), Bench(out, size, seconds, fewest, compiled.build, Worker.time))
    bench = Bench(out, size, seconds, fewest)

    def sizes(kind: str, execution: str) -> tuple[int, ...]:
        """Who compiles trains larger ones, and autotuning takes minutes."""
        if dry:
            return batches if (kind, execution) == ('infer', 'eager') else batches[-1:]
        one = execution == 'eager' or (kind, execution) == ('infer', 'compile')
        return batches if one else batches[-1:]

    def throughput(kind: str, execution: str, models: tuple[str, ...]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for batch_size in sizes(kind, execution):
                benches.get(execution, bench).group(
                    kind, execution, 'amp_bfloat16', dict.fromkeys(models, batch_size), Path(folder))
        failed = [f'{row["model"]}, batch {row["batch"]}: {row["error"]}' for row in read(out)
                  if row['kind'] == kind and row['execution'] == execution and 'error' in row]
        if failed:
            raise RuntimeError('; '.join(failed))

    def tables() -> int:
        rows = read(out)
        write_tables(rows, out)
        write_summary(rows, out)
        draw(rows, out)
        return len(rows)

    def roof() -> dict[str, Any]:
        batch_size = 2 if dry else 256  # as the prediction
        ceilings, rows = roofline.measure(batch_size, torch.bfloat16, size, quick=dry)
        roofline.draw(rows, batch_size, torch.bfloat16, out / 'roofline.png')
        return {'batch_size': batch_size, 'ceilings': ceilings, 'rows': rows}

    def jobs(execution: str, models: dict[str, tuple[str, ...]]) -> list[Job]:
        return [(kind, model, execution, batch_size) for kind in models for model in models[kind]
                for batch_size in reversed(sizes(kind, execution))]

    def autotune(job: Job) -> str:
        compiled.start([job], threads=os.cpu_count() or 1)
        return compiled.wait(steps.end)

    ours = slice(1, 2) if dry else slice(None)  # of what takes long, the dry run has one model of ours alone
    few = {kind: models[ours] for kind, models in OURS.items()}
    peers = dict.fromkeys(few, () if dry else PEERS)
    try:
        compiled.start([*jobs('compile', few), *jobs('compile', peers)], threads=4)
        steps.run('tests', lambda: run_tests(*(['-k', 'fused'] if dry else [])))  # which nobody times, beside it
        steps.run('bytes', lambda: measure_bytes(size, batches[-1]))
        steps.run('compiling', lambda: compiled.wait(steps.begin + 60 * WAIT))
        for kind in few:
            steps.run(f'{NAMES[kind]}, compile', lambda kind=kind: throughput(kind, 'compile', few[kind] + peers[kind]))
        compiled.end()
        for kind, models in MODELS.items():
            steps.run(f'{NAMES[kind]}, eager', lambda kind=kind, models=models: throughput(kind, 'eager', models))
        for kind, models in MODELS.items() if device().type == 'cuda' else ():
            steps.run(f'{NAMES[kind]}, CUDA graph',
                      lambda kind=kind, models=models: throughput(kind, 'cudagraph', models[:3]))
        steps.run('cost of SE', lambda: cost_of_se(out))
        steps.run('roofline', roof)
        for kind in few:
            steps.run(f'largest batch, {NAMES[kind]}', lambda kind=kind: measure_largest(
                Bench(out, size, seconds, 3), kind, few[kind] if dry else MODELS[kind][:3], guess[kind], limit, part))
        for job in jobs('max-autotune', {'infer': few['infer']}):  # one after another, as they time kernels
            steps.run(f'compiling, max-autotune, {job[1]}', lambda job=job: autotune(job))
        steps.run('inference, max-autotune', lambda: throughput('infer', 'max-autotune', few['infer']))
    except KeyboardInterrupt:
        sys.exit(f'Stopped. What was measured is in {out}.')
    finally:
        compiled.end()
        if read(out):
            steps.end = float('inf')
            steps.run('tables', tables)
    failed = [name for name, record in steps.record['steps'].items() if 'error' in record]
    if failed:
        sys.exit(f'Failed: {", ".join(failed)}. Why is in {out / "gpu.json"}.')
    late = [name for name, record in steps.record['steps'].items() if 'left_out' in record]
    print(f'See {out}. No time was left for: {", ".join(late)}.' if late else f'All steps ended; see {out}.')


if __name__ == '__main__':
    main()
