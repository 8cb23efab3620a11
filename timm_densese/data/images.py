"""Image files of every kind that people have, and a model's logits for them."""
import glob
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageOps
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # comes with huggingface_hub

from ..errors import ImagesError

__all__ = ['EXTENSIONS', 'Logits', 'choose_device', 'compute_logits', 'find_images', 'load_batches', 'read_image']

EXTENSIONS = frozenset(Image.registered_extensions())


def read_image(file: Union[str, Path]) -> Image.Image:
    """Read an image as a person sees it: upright, its first frame, in RGB with 8 bits a channel.

    Args:
        file: Path of the image.

    Returns:
        The image. 16 bits a pixel are scaled to 8, which PIL's own conversion cuts off instead.

    Raises:
        ValueError: Its pixels are floats, which have no known range.
        OSError: It cannot be decoded, and so are other errors of PIL's: SyntaxError, DecompressionBombError.
    """
    with Image.open(file) as image:
        image.load()
        if image.mode == 'F':
            raise ValueError('its pixels are floating-point numbers of unknown range; convert it to 8 or 16 bits')
        upright: Image.Image = ImageOps.exif_transpose(image)
        if upright.mode.startswith('I'):
            upright = Image.fromarray((np.asarray(upright) // 257).clip(0, 255).astype(np.uint8))
        return upright.convert('RGB')


def find_images(sources: Sequence[str]) -> List[Path]:
    """List the images that files, folders and glob patterns name, each once, in order.

    Args:
        sources: Files (of whatever name), folders (searched for names of images, at every depth) and patterns.

    Raises:
        ImagesError: A source names nothing.
    """
    found: Dict[Path, None] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files = [f for f in sorted(path.rglob('*')) if f.suffix.lower() in EXTENSIONS and f.is_file()]
        else:
            files = [path] if path.exists() else [Path(f) for f in sorted(glob.glob(source, recursive=True))]
            files = [f for f in files if f.is_file()]
        if not files:
            raise ImagesError(f'{source}: there are no images. Give image files, folders of them, or patterns such as '
                              f"'photos/**/*.jpg'.")
        found.update(dict.fromkeys(files))
    return list(found)


def choose_device(device: str) -> torch.device:
    """Give a device by its name; by none, CUDA where there is one, else the CPU."""
    return torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))


class _Files(Dataset):
    """Images by index; one that cannot be read is its error."""

    def __init__(self, paths: Sequence[Path], transform: Any) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tuple[int, Optional[torch.Tensor], str]:
        try:
            return index, self.transform(read_image(self.paths[index])), ''
        except Exception as e:  # PIL's decoders raise whatever they meet
            return index, None, f'{type(e).__name__}: {e}'


class Logits(NamedTuple):
    """What a model says of image files.

    Attributes:
        values: Logits (N, num_classes) in float32, of the images that could be read.
        indices: Their places in the list of files, (N,).
        errors: Why the others could not be read, by their places.
    """
    values: torch.Tensor
    indices: List[int]
    errors: Dict[int, str]


def load_batches(
        paths: Sequence[Path],
        data_config: Dict[str, Any],
        batch_size: int = 32,
        workers: int = 0,
        desc: str = '',
) -> Iterator[Tuple[List[int], torch.Tensor, Dict[int, str]]]:
    """Read images in batches, with progress.

    Args:
        paths: Files.
        data_config: Preprocessing, as of `timm.data.resolve_data_config`.
        batch_size: Images a batch.
        workers: Processes that read them.
        desc: What to call the progress.

    Returns:
        For each batch: places in `paths` of the images that could be read, these images (B, C, H, W), and the errors
        of the others by place.
    """
    loader: Any = DataLoader(
        _Files(paths, create_transform(**data_config)), batch_size, collate_fn=list,
        num_workers=workers if len(paths) > batch_size else 0)
    with tqdm(total=len(paths), desc=desc, unit='image') as progress:
        for batch in loader:
            good = [(index, image) for index, image, _ in batch if image is not None]
            errors = {index: error for index, image, error in batch if image is None}
            images = torch.stack([image for _, image in good]) if good else torch.empty(0)
            yield [index for index, _ in good], images, errors
            progress.update(len(batch))


def compute_logits(
        model: nn.Module,
        paths: Sequence[Path],
        data_config: Dict[str, Any],
        device: torch.device,
        batch_size: int = 32,
        workers: int = 0,
        desc: str = '',
) -> Logits:
    """Run a model on image files; those that cannot be read stop nothing.

    Args:
        model: Model in eval mode, moved to `device`.
        paths: Files.
        data_config: Preprocessing.
        device: Where to run it.
        batch_size: Images a batch.
        workers: Processes that read the images.
        desc: What to call the progress.

    Returns:
        The logits and what went wrong.
    """
    model.to(device)
    values: List[torch.Tensor] = []
    indices: List[int] = []
    errors: Dict[int, str] = {}
    for places, images, failed in load_batches(paths, data_config, batch_size, workers, desc):
        errors.update(failed)
        if places:
            with torch.inference_mode():
                values.append(model(images.to(device)).float().cpu())
            indices += places
    return Logits(torch.cat(values) if values else torch.empty(0, 0), indices, errors)
