"""Image folders and splits that keep a patient's images together."""
import re
from pathlib import Path
from typing import List, Sequence, Tuple, Union

import numpy as np

__all__ = ['generate_images', 'hold_out', 'patient_of']

# MSLD names a file <patient>_<shot>: M… for monkeypox patients, NM… for the others.
_MSLD_NAME = re.compile(r'^(N?M\d+)_\d+')


def patient_of(path: Union[str, Path]) -> str:
    """Give the patient that an image is of, or its own path where the name does not tell.

    Example:
        >>> patient_of('msld/Monkeypox/M09_02.jpg'), patient_of('other/a.png')
        ('M09', 'other/a.png')
    """
    match = _MSLD_NAME.match(Path(path).name)
    return match[1] if match else str(path)


def hold_out(labels: Sequence[int], groups: Sequence[str], fraction: float, seed: int) -> Tuple[List[int], List[int]]:
    """Split samples in two so that no group is on both sides and the classes keep their shares.

    Args:
        labels: Class of each sample.
        groups: What must stay together, one name a sample: a patient, say.
        fraction: Share of the samples to hold out, as near as the groups allow.
        seed: Seed of the split; the same seed gives the same split.

    Returns:
        Indices of the samples to train on, and of those held out.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    folds = StratifiedGroupKFold(n_splits=round(1 / fraction), shuffle=True, random_state=seed)
    train, held_out = next(folds.split(np.zeros(len(labels)), labels, groups))
    return train.tolist(), held_out.tolist()


def generate_images(root: Path, per_class: int = 60, size: int = 128, seed: int = 0) -> None:
    """Write a made-up set of two classes, `spots` and `stripes`, that a small run can learn.

    Args:
        root: Folder to write to; it gets one folder a class.
        per_class: Images of each class.
        size: Height and width in pixels.
        seed: Seed of the images.
    """
    from PIL import Image

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
