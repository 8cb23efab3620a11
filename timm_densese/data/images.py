"""Which files are images of which class, in which order, and how one is read."""
import glob
import hashlib
import os
import re
import sys
from contextlib import suppress
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple, Type, Union

import numpy as np
from PIL import Image, ImageOps

from ..errors import ImagesError

__all__ = [
    'ImageFolder', 'find_images', 'is_hidden', 'list_images', 'looks_like_image', 'natural_key', 'read_image',
    'start_worker',
]

with suppress(ImportError):  # photos of iPhones, where somebody installed what reads them
    import pillow_heif
    pillow_heif.register_heif_opener()

# PostScript is a program, which PIL has Ghostscript run; the others are no pictures, and PIL knows only their heads.
_SUFFIXES = Image.registered_extensions()
_FORMATS = sorted({*Image.OPEN} - {'EPS', 'BUFR', 'GRIB', 'HDF5', 'MPEG'})
_READ = frozenset(suffix for suffix, name in _SUFFIXES.items() if name in _FORMATS)
# Names of images that are not read, and what to do about them. PIL would open some raw photographs: their thumbnails.
_NOT_READ = {suffix: advice for suffixes, advice in (
    ('.heic .heif .hif', 'HEIC is read where pillow-heif is installed: pip install pillow-heif'),
    ('.3fr .arw .cr2 .cr3 .crw .dng .erf .kdc .mef .mrw .nef .nrw .orf .pef .raf .rw2 .rwl .sr2 .srf .srw .x3f',
     'a raw photograph: develop it to JPEG or PNG'),
    ('.dcm .dicom', 'DICOM: export it to PNG, with the window that it is looked at with'),
    ('.svs .ndpi .mrxs .scn .vms', 'a whole slide: cut it into tiles, as JPEG or PNG'),
    ('.avif .eps .jxl .jxr .ps .svg .webp', 'not read by this PIL: convert it to PNG'),
) for suffix in suffixes.split() if suffix not in _READ}
_HIDDEN = frozenset({'__macosx', '__pycache__', '@eadir', '#recycle', '$recycle.bin', 'lost+found',
                     'system volume information'})
# What is read takes at most about 1 GB on the way. The shorter side is scaled to the model's input, and would make a
# thin strip of few pixels as large as its longer side is.
_MAX_PIXELS, _MAX_ASPECT = 8192 * 8192, 200


def natural_key(name: str) -> List[Union[int, str]]:
    """Key that sorts names as timm does, and people: without case, numbers by value.

    Example:
        >>> sorted(['b10', 'B9', 'a'], key=natural_key)
        ['a', 'B9', 'b10']
    """
    # timm's own takes digits such as a superscript two for numbers, and fails.
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r'(\d+)', name.lower()))]


def looks_like_image(file: Union[str, PurePath]) -> bool:
    """Tell by its name whether a file is an image; also one that cannot be read, which is to be listed as such."""
    suffix = PurePath(file).suffix.lower()
    return suffix in _READ or suffix in _NOT_READ


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is one that systems and tools make for themselves: .git, __MACOSX."""
    return name.startswith('.') or name.lower() in _HIDDEN


class ImageFolder(NamedTuple):
    """The images of a folder of class folders.

    Attributes:
        root: The folder.
        classes: Names of the class folders that hold images, in timm's order: natural, without case.
        samples: The images, each with its class's place in `classes`, in the natural order of their paths.
        loose: Images that lie in the folder itself, and are of no class.
    """
    root: Path
    classes: List[str]
    samples: List[Tuple[Path, int]]
    loose: List[Path]

    def digest(self) -> str:
        """Hash the images' paths below the folder and their sizes: another digest tells of other images or classes."""
        lines = [f'{path.relative_to(self.root).as_posix()} {path.stat().st_size if path.exists() else 0}'
                 for path, _ in self.samples]
        return hashlib.sha256('\n'.join(lines).encode('utf-8', 'surrogateescape')).hexdigest()


def list_images(root: Union[str, Path]) -> ImageFolder:
    """List the images of a folder of class folders: the one reading of a folder, whoever reads it.

    A class is a folder directly below the root; images at every depth in it are its. An image is a file with the name
    of one (see `looks_like_image`). What is hidden is left out. Links are followed, to files and to folders, but in
    no circle. Where all images are .jpg, .jpeg and .png files directly in the class folders, and nothing is hidden,
    timm's own reader gives the same classes and images in the same order.

    Args:
        root: Folder.

    Returns:
        The classes and images; both are empty where there are none.

    Raises:
        ImagesError: It is no folder, or a folder in it cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise ImagesError(f'{root} is not a folder.')
    files, folders = _scan(root)
    found = [(name, path) for name in folders for path in _walk(root / name, root)]
    classes = sorted({name for name, _ in found}, key=lambda name: (natural_key(name), name))
    index = {name: i for i, name in enumerate(classes)}
    samples = sorted(((path, index[name]) for name, path in found), key=lambda sample: _path_key(sample[0]))
    return ImageFolder(root, classes, samples, sorted((root / name for name in files), key=_path_key))


def find_images(sources: Sequence[str]) -> List[Path]:
    """List the images that files, folders and glob patterns name, each once, in order.

    Args:
        sources: Files (of whatever name), folders (searched for names of images, at every depth) and patterns.

    Raises:
        ImagesError: A source names nothing, or a folder cannot be read.
    """
    found: Dict[Path, None] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files = sorted(_walk(path, path), key=_path_key)
        else:
            files = [path] if path.exists() else [Path(f) for f in sorted(glob.glob(source, recursive=True))]
            files = [f for f in files if f.is_file()]
        if not files:
            raise ImagesError(f'{source}: there are no images. Give image files, folders of them, or patterns such as '
                              f"'photos/**/*.jpg'.")
        found.update(dict.fromkeys(files))
    return list(found)


def _path_key(path: Path) -> Tuple[List[Union[int, str]], str]:
    return natural_key(str(path)), str(path)


def _scan(folder: Path) -> Tuple[List[str], List[str]]:
    """Names of the images and of the folders in a folder. A link to nothing, named as an image, is listed as one."""
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif looks_like_image(entry.name) and (entry.is_file() or entry.is_symlink()):
                    files.append(entry.name)
    except OSError as e:
        raise ImagesError(f'{folder} cannot be read ({e.strerror}).') from e
    return files, folders


def _walk(folder: Path, root: Path) -> Iterator[Path]:
    """Images at every depth of a folder, each real folder once; links back to the root or above lead nowhere."""
    above = root.resolve()
    seen: Set[Path] = {*above.parents, *([above] if folder != root else [])}
    todo = [folder]
    while todo:
        here = todo.pop()
        if here.resolve() in seen:
            continue
        seen.add(here.resolve())
        files, folders = _scan(here)
        yield from (here / name for name in files)
        todo += (here / name for name in folders)


def read_image(file: Union[str, Path]) -> Image.Image:
    """Read an image as a person sees it on a page: upright, its first frame, in RGB with 8 bits a channel.

    What is transparent is white. Of more than 8 bits a channel the upper 8 are taken, of as many as the file uses: the
    smallest of 8, 10, 12, 14 and 16 that hold its largest value (or the one that a TIFF names).

    Args:
        file: Path of the image.

    Returns:
        The image.

    Raises:
        ValueError: Its format is not read, its numbers have no known range, or it is too large: over 67 million
            pixels, or one side over 200 times the other. Nothing is decoded then.
        OSError: It cannot be decoded, and so are other errors of PIL's: SyntaxError, DecompressionBombError.
    """
    advice = _NOT_READ.get(Path(file).suffix.lower())
    if advice:
        raise ValueError(advice)
    with Image.open(file, formats=_FORMATS) as image:
        width, height = image.size
        if width * height > _MAX_PIXELS or max(width, height) > _MAX_ASPECT * min(width, height):
            raise ValueError(f'{width} x {height} pixels: at most {_MAX_PIXELS / 1e6:.0f} million are read, and at '
                             f'most {_MAX_ASPECT} times as many one way as the other')
        rawmode = str(image.tile[0].args) if image.tile else ''
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == 'F':
            raise ValueError('its pixels are floating-point numbers of unknown range; convert it to 8 or 16 bits')
        if image.mode.startswith('I'):
            return _upper_bits(image).convert('RGB')
        if ';16' in rawmode and image.mode in ('RGB', 'RGBA', 'LA'):
            _check_range(image)
        if image.has_transparency_data:
            pixels = image if image.mode == 'RGBA' else image.convert('RGBA')
            page = Image.new('RGB', pixels.size, 'white')
            page.paste(pixels, mask=pixels)
            return page
        return image.convert('RGB')


def start_worker(_: int) -> None:
    """Start a loader's process (the `worker_init_fn` of a DataLoader).

    It hands its tensors over by a thread, which prints a traceback where Ctrl-C stops the main process in the middle of
    taking one. What goes wrong in reading images does not come this way.
    """
    def report(kind: Type[BaseException], error: BaseException, traceback: Optional[TracebackType]) -> None:
        if not issubclass(kind, (ConnectionError, EOFError)):
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = report


def _upper_bits(image: Image.Image) -> Image.Image:
    """Take the upper 8 of the bits that a grey image uses."""
    pixels = np.asarray(image)
    largest = int(pixels.max())
    tags: Any = getattr(image, 'tag_v2', {})
    if tags.get(258, (16,))[0] < 16:  # BitsPerSample
        largest = max(largest, (1 << tags[258][0]) - 1)
    if 281 in tags and (named := int(np.max(tags[281]))) < 0xffff:  # MaxSampleValue; 65535 says nothing
        largest = max(largest, named)
    if pixels.min() < 0 or largest > 0xffff:
        raise ValueError(f'its pixels are numbers from {pixels.min()} to {pixels.max()}, of unknown range; convert it '
                         f'to 8 or 16 bits')
    bits = next(b for b in (8, 10, 12, 14, 16) if largest < 1 << b)
    grey = (pixels >> (bits - 8)).astype(np.uint8)
    if isinstance(transparent := image.info.get('transparency'), int):
        grey[pixels == transparent] = 255
    return Image.fromarray(grey)


def _check_range(image: Image.Image) -> None:
    """Refuse colours of 16 bits that use fewer: PIL keeps the upper 8, and they would be black."""
    colours = image.getchannel('L') if image.mode == 'LA' else image.convert('RGB')
    extrema: Any = colours.getextrema()
    largest = extrema[1] if image.mode == 'LA' else max(high for _, high in extrema)
    if 0 < largest < 1 << 6:
        raise ValueError('its colours have 16 bits of which it uses 14 or fewer, which PIL cuts off; convert it to 8 '
                         'bits')
