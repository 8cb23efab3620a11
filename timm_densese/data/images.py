"""Image files of every kind that people have: which there are, and how one is read."""
import glob
from pathlib import Path
from typing import Dict, List, Sequence, Union

import numpy as np
from PIL import Image, ImageOps

from ..errors import ImagesError

__all__ = ['EXTENSIONS', 'find_images', 'read_image']

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
