"""What the benchmarks share: the models, what is timed, interleaved timing, peak memory, the machine, and results."""
import ctypes
import functools
import gc
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

import timm_densese  # noqa: F401
from timm_densese.files import replace_file

RESULTS = Path(__file__).parent / 'results'
# By the names of timm's --precision: the model's own type, or (amp) that of autocast.
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'amp_bfloat16': torch.bfloat16,
          'amp_float16': torch.float16}
COMPILED = ('compile', 'freezing', 'max-autotune')
Run = Callable[[], Any]
# What TINY_NETS=1 makes of the nets, for a dry run that asks whether all runs and not how fast. Nothing is compiled.
TINY: dict[str, dict[str, Any]] = {
    'densenet121': {'growth_rate': 4, 'block_config': (1, 1)}, 'seresnet50': {'layers': (1, 1, 1, 1)},
    'rdnet_tiny': {'num_init_features': 8, 'growth_rates': [8, 8], 'num_blocks_list': [1, 1],
                   'is_downsample_block': [None, True], 'transition_compression_ratio': .5,
                   'block_type': ['Block', 'Block']}}


def time_run(run: Callable[[], Any]) -> float:
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


def interleave(runs: dict[str, Any], repeats: int, warmup: int = 2,
               timer: Callable[[Any], float] = time_run) -> dict[str, list[float]]:
    """Time functions in turns, so that what disturbs the machine disturbs all; each round starts with another one.

    On a CPU, a turn of one that takes less than a second has a call before it that is not timed, for the caches, also
    oneDNN's of kernels, hold what the others used: who uses a model calls it again and again.

    Args:
        runs: What to time, by name.
        repeats: Rounds.
        warmup: Rounds before those, not timed.
        timer: Gives the seconds of one.

    Returns:
        Seconds of each round, by name; on CUDA, of the device, by events.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in tqdm(range(-warmup, repeats), desc=', '.join(names), unit='round', leave=False):
        for name in names[i % len(names):] + names[:i % len(names)]:
            elapsed = timer(runs[name])
            if elapsed < 1 and device().type == 'cpu':
                elapsed = timer(runs[name])
            if i >= 0:
                seconds[name].append(elapsed)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], base: str, name: str) -> tuple[float, float, float]:
    """How many times faster than `base` is `name`: quartiles of the rounds' ratios, which drift does not reach."""
    ratios = [b / n for b, n in zip(seconds[base], seconds[name], strict=True)]
    first, median, third = statistics.quantiles(ratios, n=4, method='inclusive')
    return first, median, third


def build_measured(*args: Any) -> tuple[Run, float | None]:
    """Build what is timed and run it twice; gives it and what `peak_memory` gives, without building it again there."""
    if not torch.cuda.is_available():
        peak = peak_memory(*args)
        run = build(*args)
        run()
        return run, peak
    before = _in_use()
    torch.cuda.reset_peak_memory_stats()
    run = build(*args)
    run()
    if args[2] in COMPILED:  # what the compiler tries takes memory too
        torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return run, (torch.cuda.max_memory_allocated() - before) / 1e6


def peak_memory(*args: Any, limit: float | None = None) -> float | None:
    """Measure what `build(*args)` and its runs need at most, over what was in use before, in MB.

    On CUDA by the allocator, of the building and two runs. On a CPU of resident memory in the second run, in a process
    of its own, which no other model has grown; on Linux only, None elsewhere.

    Raises:
        MemoryError: It needs more than `limit` GB, or than there is.
    """
    if torch.cuda.is_available():
        try:
            return build_measured(*args)[1]
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from None
    if sys.platform != 'linux':
        return None
    context = _processes()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_alone, args=(sender, args, torch.get_num_threads(), limit or _available()))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:  # an allocation that fails halfway through an operator ends the process
        answer = MemoryError(f'more than {limit or _available():.1f} GB')
    process.join()
    if isinstance(answer, Exception):
        raise answer
    return answer


@functools.lru_cache(maxsize=None)
def _processes() -> Any:
    """Processes that are forked from one that has imported everything."""
    os.environ['PYTHONPATH'] = os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')])
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['__main__', 'common', 'torch._inductor.config'])
    return context


def _peak_alone(sender: Any, args: tuple[Any, ...], threads: int, limit: float) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what fails here is the answer
    torch.set_num_threads(threads)
    gc.freeze()  # what was imported is in use for good: collecting it again takes longer than a small model
    kind, dtype, folder = args[0], args[3], args[6]
    try:
        with suppress(Exception):  # libraries and kernels, which are no model's memory
            build(kind, 'densenet121', 'eager', dtype, 1, 32, folder)()
        before = _in_use()
        # What is asked for is more than what is used. This only keeps the machine from swapping.
        resource.setrlimit(resource.RLIMIT_AS, (status('VmSize') + int(1.5 * limit * 1e9 + 5e8),) * 2)
        run = build(*args)
        run()
        _in_use()
        Path('/proc/self/clear_refs').write_text('5')  # starts the peak of resident memory anew
        run()  # beside the optimizer's state, which the first step made
        peak = (status('VmHWM') - before) / 1e6
        sender.send(peak if peak < 1e3 * limit else MemoryError(f'{peak:.0f} MB'))
    except Exception as error:
        sender.send(MemoryError(str(error)) if 'alloc' in str(error) else RuntimeError(
            first_line(error).removeprefix('RuntimeError: ')))


def first_line(error: Exception) -> str:
    return f'{type(error).__name__}: {(str(error).strip() or "no message").splitlines()[0]}'


def _available() -> float:
    """GB of memory that are free."""
    return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9


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


def base(model: str) -> str:
    """The DenseNet of a model's depth, 121 for the other nets."""
    found = re.search(r'densenet\w+', model)
    return found.group() if found else 'densenet121'


def create(model: str, training: bool) -> Any:
    torch.manual_seed(0)
    *source, name = re.sub(' (fused|checkpointing|linear memory)$', '', model).split()
    tiny = TINY.get(name[-11:], {}) if os.environ.get('TINY_NETS') else {}
    net: Any = torchvision.models.get_model(name) if source else timm.create_model(name, **tiny)
    net.train(training)
    if model.endswith(('checkpointing', 'linear memory')):
        net.set_grad_checkpointing()
    return timm.models.reparameterize_model(net) if model.endswith('fused') else net


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device().type, dtype, enabled=dtype != torch.float32)


def training_step(model: Any, x: torch.Tensor, dtype: torch.dtype = torch.float32, forward: Any = None,
                  optimizer: torch.optim.Optimizer | None = None) -> Run:
    """Make the training step that all benchmarks measure: loss, gradients, and an update where there is an optimizer.

    Args:
        model: A net of 1000 classes, in training.
        x: Images (B, 3, H, W), on the device.
        dtype: Type that autocast computes in; float32: without autocast.
        forward: Called instead of the model: compiled, or distributed.
        optimizer: Updates the parameters.
    """
    labels = torch.randint(0, 1000, (len(x),), device=x.device)

    def run() -> None:
        model.zero_grad()
        with autocast(dtype):
            loss = F.cross_entropy((model if forward is None else forward)(x), labels)
        loss.backward()
        if optimizer:
            optimizer.step()

    return run


def images(batch_size: int, size: int = 224) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(batch_size, 3, size, size, device=device()).contiguous(memory_format=torch.channels_last)


def build(kind: str, model: str, execution: str, dtype: str, batch_size: int, size: int, folder: Path) -> Run:
    """Make the function that is timed: a forward pass, or a step of training with SGD."""
    x = images(batch_size, size)
    if execution in ('onnxruntime', 'openvino'):
        file = folder / f'{model}.onnx'
        if not file.exists():
            export_onnx(create(model, False), size, file)
        if execution == 'onnxruntime':
            return onnxruntime_run(file, x)
        return openvino_run(file, x, {'float32': 'f32', 'bfloat16': 'bf16'}[dtype])

    amp, own = (DTYPES[dtype], torch.float32) if dtype.startswith('amp_') else (torch.float32, DTYPES[dtype])
    x, net = x.to(own), create(model, kind == 'train').to(device(), own, memory_format=torch.channels_last)
    forward = net
    if execution in COMPILED:
        backend = {'backend': 'aot_eager'} if os.environ.get('TINY_NETS') else {
            'mode': 'max-autotune' if execution == 'max-autotune' else 'default'}
        forward = torch.compile(net, **backend)
    if kind == 'train':
        run = training_step(net, x, amp, forward, torch.optim.SGD(net.parameters(), lr=1e-4, momentum=.9))
    else:
        def run() -> torch.Tensor:
            with torch.no_grad(), autocast(amp):
                return forward(x)

    return cudagraph(run) if execution == 'cudagraph' else run


def cudagraph(run: Run) -> Run:
    """Record a function's kernels once, to replay them without launching each."""
    graph, _ = record(run)

    def replay(kept: Run = run) -> None:  # whose tensors the graph reads
        graph.replay()

    return replay


def record(run: Run) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Record a function as a CUDA graph, after three calls; its output is what a replay fills anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


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
