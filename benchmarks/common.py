"""What the benchmarks share: interleaved timing, peak memory, exported models, the machine, and where results go."""
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

from timm_densese.files import replace_file

RESULTS = Path(__file__).parent / 'results'


def interleave(runs: dict[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Time functions in turns, so that what disturbs the machine disturbs all; each round starts with another one.

    Args:
        runs: What to time, by name.
        repeats: Rounds.
        warmup: Rounds before those, not timed.

    Returns:
        Seconds of each round, by name; on CUDA, of the device, by events.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in tqdm(range(-warmup, repeats), desc=', '.join(names), unit='round', leave=False):
        for name in names[i % len(names):] + names[:i % len(names)]:
            elapsed = _time(runs[name])
            if i >= 0:
                seconds[name].append(elapsed)
    return seconds


def _time(run: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    events[0].record()
    run()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], base: str, name: str) -> float:
    """How many times faster than `base` is `name`: the median of the rounds' ratios, which drift does not reach."""
    return statistics.median(b / n for b, n in zip(seconds[base], seconds[name], strict=True))


def peak_memory(build: Callable[[], Callable[[], Any]]) -> tuple[Callable[[], Any], float | None, float]:
    """Build something and run it twice: the first run warms up, the second is measured.

    Args:
        build: Makes the function to run.

    Returns:
        That function; the peak over what was in use before it was built, in MB, by the allocator on CUDA, of resident
        memory on Linux's CPUs and of the second run only there (None elsewhere); and the seconds of the second run.
    """
    before = _in_use()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # not later: a recorded graph takes its memory when it is built
    run = build()
    run()
    if not torch.cuda.is_available() and sys.platform == 'linux':
        _in_use()
        Path('/proc/self/clear_refs').write_text('5')  # starts the peak of resident memory anew
    seconds = _time(run)
    if torch.cuda.is_available():
        return run, (torch.cuda.max_memory_allocated() - before) / 1e6, seconds
    return run, (status('VmHWM') - before) / 1e6 if sys.platform == 'linux' else None, seconds


def _in_use() -> int:
    """Bytes in use once what is free has been given back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()
    if sys.platform != 'linux':
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    return status('VmRSS')


def status(field: str) -> int:
    """Bytes that Linux reports for this process."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f'{field}:'))


def export_onnx(model: torch.nn.Module, size: int, file: Path) -> None:
    """Export a model for square images, with a batch size that may vary."""
    torch.onnx.export(
        model, (torch.randn(2, 3, size, size),), file, dynamo=True, verbose=False, input_names=['x'],
        dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=4096)},), external_data=False)


def onnxruntime_run(file: Path, x: torch.Tensor) -> Callable[[], Any]:
    """Load an exported model in ONNX Runtime, on as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    inputs = {'x': x.contiguous().numpy()}
    return lambda: session.run(None, inputs)


def openvino_run(file: Path, x: torch.Tensor, precision: str = 'f32') -> Callable[[], Any]:
    """Load an exported model in OpenVINO, on as many threads as torch uses."""
    import openvino

    core = openvino.Core()
    network = core.compile_model(core.read_model(file), 'CPU', {
        'INFERENCE_NUM_THREADS': torch.get_num_threads(), 'INFERENCE_PRECISION_HINT': precision,
        'PERFORMANCE_HINT': 'LATENCY'})
    array = x.contiguous().numpy()
    return lambda: network(array)


def device() -> torch.device:
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def machine() -> dict[str, Any]:
    """Name the device and the versions that a result was measured with, and this repository's commit."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        driver = _output('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader').split('\n')[0]
    else:
        info = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
        model = next((line.split(':')[1].strip() for line in info.splitlines() if line.startswith('model name')),
                     platform.processor())
        name = f'{os.cpu_count()}-core {model}' + (', AVX-512 bf16' if 'avx512_bf16' in info else '')
        driver = None
    here = Path(__file__).parent
    commit = _output('git', '-C', str(here), 'rev-parse', '--short', 'HEAD')
    if _output('git', '-C', str(here), 'status', '--porcelain', '--', str(here.parent / 'timm_densese'), '*.py'):
        commit += ', changed'
    return {'device': name, 'driver': driver, 'torch': torch.__version__, 'timm': timm.__version__,
            'python': platform.python_version(), 'threads': torch.get_num_threads(), 'commit': commit}


def _output(*command: str) -> str:
    """What a command prints; nothing where it fails or is missing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ''


def save(name: str, record: dict[str, Any]) -> None:
    """Write a result to results/NAME.json, with the machine."""
    replace_file(RESULTS / f'{name}.json', json.dumps({**machine(), **record}, indent=1) + '\n')
