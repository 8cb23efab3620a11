"""What a score is worth where augmented copies of an image lie on both sides of the split, as in published ones.

Each image of MSLD gets three copies, as Keras' ImageDataGenerator makes them. The same 912 images are dealt out twice:
at random, and by `timm-densese data split`, which finds the copies and keeps patients together. The same densenet121 is
trained on both under one recipe, and tested on each one's own test images.

    python benchmarks/leak.py --weights FILE        # a densenet121 to start from, as configs/msld.yaml takes it

It writes results/leak.json.
"""
import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import save
from copies import COPIES, augment
from PIL import Image

from timm_densese.data.images import read_image
from timm_densese.data.splits import split_images
from timm_densese.evaluate import evaluate
from timm_densese.training import TrainConfig, train

ROOT = Path(__file__).parent.parent


def write_copies(source: Path, folder: Path) -> list[Path]:
    """Write each image and its copies, below its class."""
    rng = np.random.default_rng(0)
    paths = []
    for path in sorted(source.glob('*/*.jpg')):
        original = np.array(read_image(path))
        for k in range(COPIES + 1):
            copy = folder / path.parent.name / f'{path.stem}_aug{k}.png'
            copy.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(augment(original, rng) if k else original).save(copy)
            paths.append(copy)
    return paths


def deal_at_random(paths: list[Path], folder: Path, val: float, test: float) -> None:
    rng = np.random.default_rng(0)
    for path, place in zip(paths, rng.random(len(paths)), strict=True):
        split = 'test' if place < test else 'val' if place < test + val else 'train'
        (folder / split / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / split / path.parent.name)


def score(data: Path, output: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Train and test on a split; accuracy and balanced accuracy with their intervals, and what was warned of."""
    train(TrainConfig(**{**recipe, 'data_dir': str(data), 'output': str(output / 'run')}))
    found = evaluate(str(output / 'run' / 'model_best.pth.tar'), data, output / 'report', workers=0)
    return {**{name: found['metrics'][name] for name in ('accuracy', 'balanced_accuracy', 'auroc')},
            'images': found['dataset']['images'], 'warnings': found['warnings']}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', type=Path, default=Path('../shared/data/msld'), help='MSLD, a folder a class')
    parser.add_argument('--weights', default='', help='file of weights to start from (default: ImageNet, from the Hub)')
    parser.add_argument('--img-size', type=int, default=64, help='height and width in pixels')
    parser.add_argument('--epochs', type=int, default=30)
    args = parser.parse_args()
    recipe = {**yaml.safe_load((ROOT / 'configs' / 'msld.yaml').read_text()), 'model': 'densenet121', 'workers': 0,
              'img_size': args.img_size, 'epochs': args.epochs, 'patience': 0, 'pretrained_path': args.weights}
    with tempfile.TemporaryDirectory() as work:
        paths = write_copies(args.data, Path(work, 'images'))
        deal_at_random(paths, Path(work, 'random'), val=.1, test=.2)
        split_images(Path(work, 'images'), Path(work, 'whole'), val=.1, test=.2, group_regex=r'^([A-Z]+\d+)_')
        rows = {name: score(Path(work, name), Path(work, f'{name}-run'), recipe) for name in ('random', 'whole')}
    for name, row in rows.items():
        print(name, {key: row[key] for key in ('accuracy', 'balanced_accuracy', 'auroc')}, row['images'])
    save('leak', {'rows': rows, 'recipe': {**recipe, 'pretrained_path': Path(args.weights).name}})


if __name__ == '__main__':
    main()
