"""What the benchmarks share: interleaved timing, the machine's name, and where results go."""
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

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


def device() -> torch.device:
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def machine() -> dict[str, str]:
    """Name the device and the versions that a result was measured with."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        info = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
        model = next((line.split(':')[1].strip() for line in info.splitlines() if line.startswith('model name')),
                     platform.processor())
        name = f'{os.cpu_count()}-core {model}' + (', AVX-512 bf16' if 'avx512_bf16' in info else '')
    return {'device': name, 'torch': torch.__version__, 'timm': timm.__version__, 'python': platform.python_version()}


def save(name: str, record: dict[str, Any]) -> None:
    """Write a result to results/NAME.json, with the machine; the file appears whole."""
    RESULTS.mkdir(exist_ok=True)
    partial = RESULTS / f'.{name}.json'
    partial.write_text(json.dumps({**machine(), **record}, indent=1) + '\n')
    os.replace(partial, RESULTS / f'{name}.json')
