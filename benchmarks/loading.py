"""Which starves, the loader or the model: images a second that timm's loader delivers and that the model consumes.

JPEG files of MSLD's size (224x224), of a 12-megapixel camera (4000x3000), and the latter shrunk once to 512 pixels,
through timm's loader with its evaluation transform and with the augmentation of `timm-densese train`, for several
numbers of workers; se_densenet121 trains in linear memory and infers fused. Medians of alternating runs.

    python benchmarks/loading.py
    python benchmarks/loading.py --workers 0 2 4 8 16
"""
import argparse
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import build, device, interleave, save
from PIL import Image
from timm.data import create_dataset, create_loader
from tqdm import tqdm

from timm_densese.training import TrainConfig

BATCH_SIZE = 16
# Name -> width, height, files, images to load in a run.
SETS = {'224x224': (224, 224, 64, 512), '4000x3000': (4000, 3000, 16, 48), '4000x3000 shrunk': (682, 512, 64, 256)}


def write_images(folder: Path, width: int, height: int, files: int) -> float:
    """Write photograph-like JPEGs, coarse shapes with fine grain; their mean size in kB."""
    rng = np.random.default_rng(0)
    (folder / 'a').mkdir(parents=True)
    for i in range(files):
        coarse = Image.fromarray(rng.integers(60, 220, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        grain = rng.normal(0, 4, (height, width, 1)).astype(np.int16)
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(folder / 'a' / f'{i}.jpg', quality=85)
    return statistics.mean(file.stat().st_size for file in (folder / 'a').iterdir()) / 1e3


def loader_rate(folder: Path, images: int, training: bool, workers: int) -> float:
    """Images a second, without the start of the workers; batches that wait already are not counted."""
    dataset = create_dataset('', root=str(folder))
    dataset.reader.samples = (dataset.reader.samples * images)[:images]
    config = TrainConfig()
    augmentation = dict(
        scale=config.scale, ratio=config.ratio, color_jitter=config.color_jitter, auto_augment=config.aa,
        re_prob=config.reprob) if training else {}
    loader = create_loader(
        dataset, (3, 224, 224), BATCH_SIZE, is_training=training, num_workers=workers, use_prefetcher=False,
        persistent_workers=False, **augmentation)
    batches = iter(loader)
    ahead = 1 + 2 * workers  # of the loader's prefetch_factor
    for _ in range(min(ahead, len(loader) // 2)):
        next(batches)
    start = time.perf_counter()
    count = sum(len(batch[0]) for batch in batches)
    return count / (time.perf_counter() - start)


def model_rates() -> dict[str, float]:
    dtype = 'amp_bfloat16' if device().type == 'cuda' else 'float32'
    batch_size = 256 if device().type == 'cuda' else BATCH_SIZE
    runs = {kind: build(kind, f'se_densenet121 {how}', 'eager', dtype, batch_size, 224, Path())
            for kind, how in (('train', 'linear memory'), ('infer', 'fused'))}
    return {kind: batch_size / statistics.median(seconds) for kind, seconds in interleave(runs, 7).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--workers', type=int, nargs='+', default=sorted({0, 1, os.cpu_count() or 1}))
    parser.add_argument('--repeats', type=int, default=3)
    args = parser.parse_args()
    consumed = model_rates()
    print(f'se_densenet121 consumes {consumed["train"]:.1f} images/s in training, {consumed["infer"]:.1f} in inference')
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        kilobytes = {name: write_images(Path(folder) / name, *size[:3]) for name, size in SETS.items()}
        runs = [(name, training, workers) for name in SETS for training in (False, True) for workers in args.workers]
        rates: dict[tuple[str, bool, int], list[float]] = {run: [] for run in runs}
        for i in tqdm(range(args.repeats * len(runs)), unit='run'):
            name, training, workers = runs[i % len(runs)]
            rates[runs[i % len(runs)]].append(loader_rate(Path(folder) / name, SETS[name][3], training, workers))
    for name in SETS:
        for training in (False, True):
            rate = {workers: statistics.median(rates[name, training, workers]) for workers in args.workers}
            need = consumed['train' if training else 'infer']
            # By what one worker delivers while the others work, too.
            each = max(rate[n] / n for n in args.workers if n)
            recommended = math.ceil(need / each)
            rows.append({'images': name, 'kilobytes': kilobytes[name], 'training': training, 'images_per_second': rate,
                         'model': need, 'recommended_workers': recommended})
            print(f'{name} ({kilobytes[name]:.0f} kB), {"training" if training else "evaluation"}: '
                  + ', '.join(f'{n} workers {value:.1f}' for n, value in rate.items())
                  + f' images/s; the model {need:.1f}: {recommended} workers keep up, and '
                  f'{"the loader" if max(rate.values()) < need else "the model"} is the slower one here')
    save('loading', {'batch_size': BATCH_SIZE, 'model': consumed, 'rows': rows})


if __name__ == '__main__':
    main()
