"""Where the time goes: floating-point operations and bytes moved by kind of layer, and the floor that they give.

Counts every operator that really runs, for timm's densenet121 and for SE-DenseNet-121 in our executions. The floor of
an operator is the larger of its operations at the machine's matmul ceiling and its bytes (inputs and outputs, once
each) at the machine's copy ceiling, both measured in the same run; floors add up. Caches can beat the floor of
operators that only move bytes. The measured time is an interleaved median; its split by kind is the profiler's.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --predict     # floors on an H100 from the counts; a prediction, nothing is run there
"""
import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from common import RESULTS, create, device, images, interleave, medians, save, training_step
from matplotlib.figure import Figure
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from timm_densese.models import pointwise

KINDS = ('conv 3x3 and stem', 'conv 1x1', 'linear', 'norm', 'activation', 'concatenation', 'pool',
         'copies and pointwise')
EXECUTIONS = {False: ('plain', 'ours'), True: ('plain', 'checkpointing', 'ours')}  # by whether it is training
# An operator's name, without its overload, holds one of these; the first that matches counts.
_NAMES = {
    'conv': '', '_mm': 'linear', 'addmm': 'linear', 'aten::mm': 'linear', 'batch_norm': 'norm',
    'threshold': 'activation', 'relu': 'activation', 'clamp': 'activation', 'sigmoid': 'activation',
    'cat': 'concatenation', 'pool': 'pool'}
H100 = {'flops': 989e12, 'bytes': 3.35e12}  # dense bfloat16 and HBM3, by NVIDIA's data sheet


def kind_of(name: str, kernel: int) -> str:
    kind = next((kind for part, kind in _NAMES.items() if part in name), 'copies and pointwise')
    return kind or ('conv 1x1' if kernel == 1 else 'conv 3x3 and stem')


def tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [t for v in values for t in tensors(v)] if isinstance(values, (list, tuple)) else []


class Counter(TorchDispatchMode):
    """Lists the operators that run: kind, operations, bytes. Each has a floor of its own, so they are not added up."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[str, float, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        written = {argument.name for argument in func._schema.arguments if argument.is_out}
        inputs = tensors([*args, *(v for k, v in (kwargs or {}).items() if k not in written)])
        outputs = tensors(out)
        moved = [] if func.is_view else [*inputs, *outputs]
        if name.split('::')[1] in ('empty', 'empty_like', 'new_empty', 'detach', 'alias', 'zeros', 'as_strided'):
            return out
        flops = 0.
        kernel = 0
        if 'conv' in name:
            weight = args[2] if 'backward' in name else args[1]
            kernel = weight.shape[-1]
            flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        elif func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        if moved:
            size = sum(t.numel() * t.element_size() for t in moved)
            self.operators.append((kind_of(name, kernel), flops, size))
        return out


def floors(operators: list[tuple[str, float, float]], ceilings: dict[str, float]) -> dict[str, dict[str, float]]:
    table = {kind: {'gflop': 0., 'gbyte': 0., 'floor_ms': 0.} for kind in KINDS}
    for kind, flops, size in operators:
        row = table[kind]
        row['gflop'] += flops / 1e9
        row['gbyte'] += size / 1e9
        row['floor_ms'] += 1e3 * max(flops / ceilings['flops'], size / ceilings['bytes'])
    return table


def measure_ceilings(dtype: torch.dtype, quick: bool = False) -> dict[str, float]:
    """The fastest of some matrix products and 1x1 convolutions, and a copy far larger than the caches."""
    cuda = device().type == 'cuda'
    n = 128 if quick else 8192 if cuda else 2048
    a = torch.randn(n, n, device=device(), dtype=dtype)
    image = torch.randn(8, 512, 32 if cuda else 28, 32 if cuda else 28, device=device(), dtype=dtype).contiguous(
        memory_format=torch.channels_last)
    weight = torch.randn(512, 512, 1, 1, device=device(), dtype=dtype)
    source = torch.randn(1 << (20 if quick else 28 if cuda else 26), device=device())
    target = torch.empty_like(source)
    seconds = medians(interleave({
        'matmul': lambda: a @ a, 'conv': lambda: F.conv2d(image, weight), 'copy': lambda: target.copy_(source)}, 15))
    convolved = 2 * image.numel() * 512
    return {'flops': max(2 * n ** 3 / seconds['matmul'], convolved / seconds['conv']),
            'bytes': 2 * source.numel() * 4 / seconds['copy']}


def create_run(name: str, training: bool, batch_size: int, dtype: torch.dtype, size: int = 224) -> Callable[[], Any]:
    model = {'plain': 'densenet121', 'checkpointing': 'densenet121 checkpointing',
             'ours': 'se_densenet121 linear memory' if training else 'se_densenet121 fused'}[name]
    net = create(model, training).to(device(), memory_format=torch.channels_last)
    x = images(batch_size, size)
    if training:
        return training_step(net, x, dtype)
    net, x = net.to(dtype), x.to(dtype)
    return torch.no_grad()(lambda: net(x))


@contextmanager
def counted_kernels(operators: list[tuple[str, float, float]]) -> Iterator[None]:
    """Count our kernels too, which are no operators: their tensors, once each, and what they give."""
    kernels = pointwise.find_kernels(torch.empty(1, device=device()), torch.bfloat16)
    depth = 0

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            out = function(*args, **kwargs)
            depth -= 1
            if not depth:  # else it is a part of another
                read = tensors(list(args))
                flops = 0.
                if name == 'affine_conv_backward':  # reads and writes as much of the last as it reads of x
                    flops = 4. * args[1].numel() * len(args[4])
                    read[-1:] = [args[1]] * 2
                elif 'conv' in name:
                    flops = 2. * args[0].numel() * len(args[3])
                written = [t for t in tensors([out]) if all(t is not other for other in read)]
                size = sum(t.numel() * t.element_size() for t in [*read, *written])
                operators.append(('conv 1x1' if 'conv' in name else 'norm', flops, size))
            return out

        return run

    with ExitStack() as stack:
        # Kernels run although the counter does not see them, as they are counted here.
        stack.enter_context(patch.object(pointwise, '_are_operators_watched', lambda: False))
        for name in vars(kernels).get('__all__', ()) if kernels else ():
            if callable(getattr(kernels, name)):
                stack.enter_context(patch.object(kernels, name, counted(name, getattr(kernels, name))))
        yield


def count(run: Callable[[], Any]) -> list[tuple[str, float, float]]:
    with Counter() as counter, counted_kernels(counter.operators):
        run()
    return counter.operators


def profile_by_kind(run: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each kind, by the profiler, of its operators' own time."""
    cuda = device().type == 'cuda'
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities, record_shapes=True) as trace:
        run()
    found: dict[str, float] = defaultdict(float)
    for event in trace.key_averages(group_by_input_shape=True):
        if event.device_type != DeviceType.CPU:  # a kernel, whose operator is counted, or ours, which has none
            if event.key.startswith('_') and event.key.endswith('_kernel'):
                found['conv 1x1' if 'conv' in event.key else 'norm'] += event.self_device_time_total / 1e3
            continue
        if '::' not in event.key or event.key.startswith('autograd::'):
            continue
        shapes = [s for s in event.input_shapes if len(s) == 4]
        kernel = min((s[-1] for s in shapes), default=0) if 'conv' in event.key else 0
        if 'conv' in event.key and len(shapes) > 1:
            kernel = shapes[2 if 'backward' in event.key else 1][-1]
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        found[kind_of(event.key, kernel)] += time / 1e3
    return {kind: found[kind] for kind in KINDS}


def predict(batch_size: int) -> dict[str, Any]:
    """Scale the counts of two batches in bfloat16 to a larger one, and give the floor on an H100."""
    fewest = 21  # of fewer images, a CPU runs some 1x1 convolutions as matrix products
    prediction = {}
    for training in (False, True):
        for model in EXECUTIONS[training]:
            one, two = (count(create_run(model, training, n, torch.bfloat16)) for n in (fewest, fewest + 1))
            more = batch_size - fewest
            scaled = [(kind, f1 + (f2 - f1) * more, b1 + (b2 - b1) * more)
                      for (kind, f1, b1), (_, f2, b2) in zip(one, two, strict=True)]
            table = floors(scaled, H100)
            total = sum(row['floor_ms'] for row in table.values())
            name = f'{"training" if training else "inference"}, {model}'
            prediction[name] = {'floor_ms': total, 'images_per_second': 1e3 * batch_size / total,
                                'gflop': sum(r['gflop'] for r in table.values()),
                                'gbyte': sum(r['gbyte'] for r in table.values()), 'kinds': table}
            print(f'PREDICTION, H100, bfloat16, batch {batch_size}, {name}: {prediction[name]["gflop"]:.0f} GFLOP, '
                  f'{prediction[name]["gbyte"]:.1f} GB: at least {total:.1f} ms, at most '
                  f'{prediction[name]["images_per_second"]:.0f} images/s')
    return prediction


def measure(batch_size: int, dtype: torch.dtype, size: int = 224,
            quick: bool = False) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measure the ceilings and each execution against its floor; quickly, where only the steps count."""
    ceilings = measure_ceilings(dtype, quick)
    print(f'ceilings: {ceilings["flops"] / 1e9:.0f} GFLOP/s, {ceilings["bytes"] / 1e9:.1f} GB/s')
    rows = []
    for training in (False, True):
        runs = {name: create_run(name, training, batch_size, dtype, size) for name in EXECUTIONS[training]}
        median = medians(interleave(runs, 11))
        for name, run in runs.items():
            table = floors(count(run), ceilings)
            for kind, value in profile_by_kind(run).items():
                table[kind]['profiled_ms'] = value
            floor = sum(row['floor_ms'] for row in table.values())
            rows.append({'training': training, 'name': name, 'measured_ms': 1e3 * median[name], 'floor_ms': floor,
                         'kinds': table})
            print(f'\n{"training step" if training else "inference"}, {name}, batch {batch_size}: '
                  f'{1e3 * median[name]:.0f} ms, floor {floor:.0f} ms: {1e3 * median[name] / floor:.2f}x the floor')
            print(f'{"":22} {"GFLOP":>8} {"GB":>7} {"floor ms":>9} {"profiled ms":>12}')
            for kind, row in table.items():
                print(f'{kind:22} {row["gflop"]:8.2f} {row["gbyte"]:7.2f} {row["floor_ms"]:9.1f} '
                      f'{row["profiled_ms"]:12.1f}')
    return ceilings, rows


def draw(rows: list[dict[str, Any]], batch_size: int, dtype: torch.dtype, file: Path) -> None:
    fig = Figure(figsize=(11, 4), layout='constrained')
    axes = fig.subplots(1, 2, width_ratios=(4, 6))
    for ax, training in zip(axes, (False, True), strict=True):
        bars = [(f'{row["name"].replace("checkpointing", "checkp.")}\n{what}', [row['kinds'][k][key] for k in KINDS])
                for row in rows if row['training'] == training
                for what, key in (('floor', 'floor_ms'), ('profiled', 'profiled_ms'))]
        bottom = [0.] * len(bars)
        for i, kind in enumerate(KINDS):
            heights = [values[i] for _, values in bars]
            ax.bar(range(len(bars)), heights, bottom=bottom, label=kind, color=f'C{i}')
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        ax.set(xticks=range(len(bars)), xticklabels=[name for name, _ in bars], ylabel='ms',
               title=f'{"training step" if training else "inference"}, batch {batch_size}, {str(dtype)[6:]}')
    axes[1].legend(fontsize=8, loc='upper left', bbox_to_anchor=(1, 1))
    fig.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--predict', action='store_true')
    args = parser.parse_args()
    if args.predict:
        save('roofline_h100', {'ceilings': H100, 'batch_size': 256, 'prediction': predict(256)})
        return
    torch.set_num_threads(min(2, torch.get_num_threads()))
    ceilings, rows = measure(args.batch_size, torch.float32)
    save('roofline', {'batch_size': args.batch_size, 'ceilings': ceilings, 'rows': rows})
    draw(rows, args.batch_size, torch.float32, RESULTS / 'roofline.png')


if __name__ == '__main__':
    main()
