"""The whole path on one machine in minutes: weights, transfer, fine-tuning, checkpoint, prediction."""
import shutil
from pathlib import Path
from typing import Any, Optional

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config

from .data.splits import split_images
from .errors import OptionError
from .files import check_writable
from .hub import find_weights
from .predict import predict
from .training import TrainConfig, train

__all__ = ['generate_images', 'run_demo']

MODEL, DENSENET = 'se_densenet121', 'densenet121'
IMG_SIZE, EPOCHS = 128, 5


def run_demo(data: Optional[Path], output: Path) -> None:
    """Fine-tune se_densenet121 for a few epochs at a small size, and use what comes out.

    Args:
        data: Folder with a folder of images for each class, or None for a small generated set.
        output: Folder that gets the images split, the weights and the checkpoints: new, empty, or an earlier demo's,
            whose files are replaced.

    Raises:
        OptionError: `output` holds something else, or `data`, or lies in it.
        SplitError: `data` does not hold two classes of images.
    """
    _claim(output, data)
    torch.manual_seed(0)

    # Images, split so that no patient is on both sides.
    if data is None:
        data = output / 'generated'
        generate_images(data)
        print(f'No images were given, so these are GENERATED: spots and stripes, in {data}.')
    split_images(data, output / 'images', val=.2, test=0)

    # A DenseNet's weights, transferred.
    pretrained = find_weights(f'timm/{DENSENET}.ra_in1k')
    densenet: Any = timm.create_model(DENSENET, pretrained=pretrained).eval()
    weights = output / f'{DENSENET}.pth'
    torch.save(densenet.state_dict(), weights)
    model: Any = timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=dict(file=str(weights))).eval()
    config = resolve_data_config({'img_size': IMG_SIZE}, model=model)
    with torch.inference_mode():
        image = torch.randn(1, *config['input_size'])
        expected, logits = densenet(image), model(image)
    error = ((logits - expected).norm() / expected.norm()).item()
    print(f'{DENSENET} has {"ImageNet" if pretrained else "RANDOM"} weights; transferred to {MODEL}, they give the '
          f'same logits up to {error:.0e}.')

    # Fine-tuning.
    result = train(TrainConfig(
        data_dir=str(output / 'images'), output=str(output / 'training'), model=MODEL, pretrained_path=str(weights),
        img_size=IMG_SIZE, epochs=EPOCHS, warmup_epochs=1, patience=0, workers=0, eval_metric='top1'))
    print(f'Accuracy on the held-out images: {result["before"]["top1"]:.1f}% before, {result["best"]["top1"]:.1f}% '
          f'after the best of {EPOCHS} epochs{"" if pretrained else " from random weights"}.')

    # The checkpoint, used.
    checkpoint = output / 'training' / 'model_best.pth.tar'
    print(f'Checkpoint: {checkpoint}')
    row, = predict(str(checkpoint), [str(min((output / 'images' / 'val').glob('*/*')))], top_k=1)
    best = row['predictions'][0]
    print(f'Reloaded, it says of {row["file"]}: {best["class"]} ({best["probability"]:.0%}).')


def _claim(output: Path, data: Optional[Path]) -> None:
    """Take a folder for the demo, and empty it where it is an earlier demo's."""
    check_writable(output, '--output')
    if data is not None:
        images, here = data.resolve(), output.resolve()
        if images == here or images in here.parents or here in images.parents:
            raise OptionError(f'--output {output}: give a folder outside of --data {data}.')
    mark = output / '.timm-densese-demo'
    if output.exists() and not mark.is_file() and (not output.is_dir() or any(output.iterdir())):
        raise OptionError(f'--output {output} holds files that no demo wrote. Choose a new folder.')
    output.mkdir(parents=True, exist_ok=True)
    mark.touch()
    for name in ('generated', 'images', 'training'):
        if (output / name).is_dir():
            shutil.rmtree(output / name)


def generate_images(root: Path, per_class: int = 60, size: int = 128, seed: int = 0) -> None:
    """Write a made-up set of two classes, `spots` and `stripes`, that a small run can learn.

    Args:
        root: Folder to write to; it gets one folder a class.
        per_class: Images of each class.
        size: Height and width in pixels.
        seed: Seed of the images.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    for label in ('spots', 'stripes'):
        (root / label).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            frequency, (phase_x, phase_y) = rng.uniform(4, 9), rng.uniform(0, 2 * np.pi, 2)
            wave_x, wave_y = np.sin(2 * np.pi * frequency * x + phase_x), np.sin(2 * np.pi * frequency * y + phase_y)
            pattern = wave_x * wave_y if label == 'spots' else wave_x
            rgb = 128 + 60 * pattern[..., None] * rng.uniform(.3, 1, 3) + rng.normal(0, 30, (size, size, 3))
            Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).save(root / label / f'{i:03}.png')
