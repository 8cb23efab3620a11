"""Speed of inference: the fused SE-DenseNet-121 against timm's plain densenet121, and what SE costs.

At 224x224 in channels_last on two threads, all in one process, interleaved; medians. See benchmarks/README.md for what
was measured where.

    python benchmarks/inference.py
    python benchmarks/inference.py --runtimes      # ONNX Runtime and OpenVINO
    python benchmarks/inference.py --compile       # torch.compile, with and without freezing
"""
import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from common import device, export_onnx, interleave, medians, onnxruntime_run, openvino_run, ratio, save
from torch._inductor import config as inductor_config

from timm_densese.models import dense_block

MODELS = (('plain', 'densenet121', False), ('se', 'se_densenet121', False), ('fused', 'se_densenet121', True))
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}


def create(name: str, fused: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    if fused:
        model = timm.models.reparameterize_model(model)
    return model.to(device(), dtype, memory_format=torch.channels_last)


def _plain(name: str) -> str:
    """The densenet121 that a run is compared with."""
    return name.replace(', product form', '').replace('fused', 'plain').replace('se', 'plain')


def images(batch_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(batch_size, 3, 224, 224, device=device()).to(dtype, memory_format=torch.channels_last)


def repeats(batch_size: int) -> int:
    return 100 if batch_size == 1 else 40


def eager(dtype: str, batch_size: int) -> dict[str, Callable[[], Any]]:
    x = images(batch_size, DTYPES[dtype])
    models = {name: create(model, fused, DTYPES[dtype]) for name, model, fused in MODELS}
    return {name: lambda model=model: model(x) for name, model in models.items()}


def compiled(dtype: str, batch_size: int, freezing: bool) -> dict[str, Callable[[], Any]]:
    x = images(batch_size, DTYPES[dtype])
    torch._dynamo.reset()  # or a frozen model would run the code of one that was compiled without freezing
    runs: dict[str, Callable[[], Any]] = {}
    with inductor_config.patch(freezing=freezing):
        for name, model, fused in (MODELS[0], MODELS[2]):
            net = torch.compile(create(model, fused, DTYPES[dtype]))
            net(x)  # compiles
            runs[name] = lambda net=net: net(x)
    return runs


@contextmanager
def product_form() -> Iterator[None]:
    """The other form of a norm before a convolution: a product and a sum instead of a batch norm."""
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        scale, shift = (t[:, None, None].to(x.dtype) for t in dense_block._scale_shift(self.norm))
        x = F.relu(x * scale + shift)
        return self.conv(F.avg_pool2d(x, 2) if self.pool else x)

    with mock.patch.object(dense_block._NormConv, 'forward', forward):
        yield


def runtimes(batch_size: int, folder: Path) -> dict[str, Callable[[], Any]]:
    x = images(batch_size)
    runs: dict[str, Callable[[], Any]] = {}
    for name, model, fused in (*MODELS, ('fused, product form', 'se_densenet121', True)):
        file = folder / f'{name}.onnx'
        if not file.exists():
            with product_form() if 'product' in name else nullcontext():
                export_onnx(create(model, fused), 224, file)
        runs[f'onnxruntime {name}'] = onnxruntime_run(file, x)
        runs[f'openvino {name}'] = openvino_run(file, x)
    return runs


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch-sizes', type=int, nargs='+', default=[1, 16])
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES, default=list(DTYPES))
    parser.add_argument('--runtimes', action='store_true')
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--out', help='name of the result, to write it')
    args = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rows = []

    def measure(what: str, dtype: str, batch_size: int, runs: dict[str, Callable[[], Any]]) -> None:
        seconds = interleave(runs, repeats(batch_size), warmup=3)
        median = medians(seconds)
        faster = {name: ratio(seconds, _plain(name), name)
                  for name in runs if 'plain' not in name}
        rows.append({'what': what, 'dtype': dtype, 'batch_size': batch_size, 'median': median,
                     'faster_than_plain': faster})
        shown = ', '.join(f'{name} {1e3 * value:.1f} ms' for name, value in median.items())
        print(f'{what}, {dtype}, batch {batch_size:2}: {shown}')
        for name, value in faster.items():
            print(f'    {name}: {value:.3f}x plain', flush=True)

    if args.runtimes:
        with tempfile.TemporaryDirectory() as folder:
            for batch_size in args.batch_sizes:
                measure('exported', 'float32', batch_size, runtimes(batch_size, Path(folder)))
    else:
        for dtype in args.dtypes:
            for batch_size in args.batch_sizes:
                if not args.compile:
                    measure('eager', dtype, batch_size, eager(dtype, batch_size))
                    continue
                for freezing in (False, True):
                    what = 'compiled, freezing' if freezing else 'compiled'
                    measure(what, dtype, batch_size, compiled(dtype, batch_size, freezing))
    if args.out:
        save(args.out, {'rows': rows})


if __name__ == '__main__':
    main()
