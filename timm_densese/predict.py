"""A model over image files: rows, which the command line prints as a table, JSON or CSV."""
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Grayscale
from tqdm import tqdm  # comes with huggingface_hub

from .checkpoints import Checkpoint, Model, load_model
from .data.images import find_images, read_image, start_worker
from .errors import CheckpointError, OptionError
from .files import check_new_file, replace_file
from .thresholds import Calibration, name_call, read_calibration

__all__ = [
    'Logits', 'check_logits', 'compute_logits', 'create_image_transform', 'load_batches', 'predict', 'predict_files']

_UNCALIBRATED = Calibration()


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


def create_image_transform(data_config: Dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """Create what turns an image, as `read_image` gives it, into a model's input (C, H, W), of 1 or 3 channels.

    Raises:
        CheckpointError: The model takes another number of channels, which pictures do not have.
    """
    channels = data_config['input_size'][0]
    if channels not in (1, 3):
        raise CheckpointError(f'This model takes {channels} channels, and images are read in 3, or in 1 as grey.')
    transform: Any = create_transform(**data_config)
    return transform if channels == 3 else Compose([Grayscale(), transform])


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
        _Files(paths, create_image_transform(data_config)), batch_size, collate_fn=list,
        num_workers=workers if len(paths) > batch_size else 0, worker_init_fn=start_worker)
    with tqdm(total=len(paths), desc=desc, unit='image') as progress:
        for batch in loader:
            good = [(index, image) for index, image, _ in batch if image is not None]
            errors = {index: error for index, image, error in batch if image is None}
            images = torch.stack([image for _, image in good]) if good else torch.empty(0)
            yield [index for index, _ in good], images, errors
            progress.update(len(batch))


def check_logits(logits: torch.Tensor, loaded: Checkpoint, paths: Sequence[Path]) -> torch.Tensor:
    """Give the logits (N, num_classes) of N files back, or raise a CheckpointError where they are no numbers."""
    if not logits.isfinite().all():
        worst = paths[int((~logits.isfinite()).any(1).nonzero()[0])]
        raise CheckpointError(f'{loaded.source or "The model"} gives no numbers for {worst} (NaN or infinite): it is '
                              f'damaged, or its training diverged.')
    return logits


def compute_logits(
        loaded: Checkpoint,
        paths: Sequence[Path],
        batch_size: int = 32,
        workers: int = 0,
        desc: str = '',
) -> Logits:
    """Run a model on image files; those that cannot be read stop nothing.

    Args:
        loaded: The model, run on the device where it is.
        paths: Files.
        batch_size: Images a batch.
        workers: Processes that read the images.
        desc: What to call the progress.

    Returns:
        The logits and what went wrong.

    Raises:
        CheckpointError: It gives what is no number.
    """
    values: List[torch.Tensor] = []
    indices: List[int] = []
    errors: Dict[int, str] = {}
    for places, images, failed in load_batches(paths, loaded.data_config, batch_size, workers, desc):
        errors.update(failed)
        if places:
            with torch.inference_mode():
                logits = loaded.model(images.to(loaded.device)).float().cpu()
            values.append(check_logits(logits, loaded, [paths[place] for place in places]))
            indices += places
    return Logits(torch.cat(values) if values else torch.empty(0, 0), indices, errors)


def predict(
        model: Model,
        images: Sequence[str],
        top_k: int = 5,
        calibration: Calibration = _UNCALIBRATED,
        device: str = '',
        batch_size: int = 32,
        workers: int = 0,
) -> List[Dict[str, Any]]:
    """Predict the most probable classes of image files.

    Args:
        model: What `timm_densese.checkpoints.load_model` takes, or what it returned.
        images: Files, folders and patterns.
        top_k: Classes of each image.
        calibration: What `timm_densese.thresholds.read_calibration` gives: a temperature, thresholds.
        device: Device, by default CUDA where there is one; a model that is loaded already stays where it is.
        batch_size: Images a batch.
        workers: Processes that read images.

    Returns:
        A row for each file, in order: `file`, and `predictions`, a list of `class` and `probability` from the most
        probable on, and with thresholds `called`: the positive class, the other, or 'not sure'; or `file` and `error`,
        the reason why it cannot be read.

    Raises:
        UserError: There are no images, or the model cannot be loaded.

    Example:
        >>> import tempfile, timm
        >>> from PIL import Image
        >>> from timm_densese.checkpoints import Checkpoint
        >>> folder = tempfile.TemporaryDirectory()
        >>> Image.new('RGB', (40, 30)).save(f'{folder.name}/a.png')
        >>> net = timm.create_model('resnet10t', num_classes=2).eval()
        >>> cat_or_dog = Checkpoint(net, ['cat', 'dog'], timm.data.resolve_model_data_config(net), {}, '')
        >>> [row] = predict(cat_or_dog, [folder.name], top_k=1)
        >>> row['predictions'][0]['class'] in ('cat', 'dog')
        True
    """
    paths = find_images(images)
    loaded = load_model(model, device)
    logits = compute_logits(loaded, paths, batch_size=batch_size, workers=workers, desc='predict')
    rows: List[Dict[str, Any]] = [{'file': str(path)} for path in paths]
    for place, error in logits.errors.items():
        rows[place]['error'] = error
    if logits.indices:
        names = loaded.class_names
        # In float64, as thresholds are chosen.
        probabilities = (logits.values.double() / calibration.temperature).softmax(1)
        top = probabilities.topk(min(top_k, len(names)), 1)
        for place, indices, values in zip(logits.indices, top.indices.tolist(), top.values.tolist(), strict=True):
            rows[place]['predictions'] = [
                {'class': names[i], 'probability': p} for i, p in zip(indices, values, strict=True)]
        if thresholds := calibration.thresholds:
            column = probabilities[:, names.index(thresholds.positive)]
            for place, probability in zip(logits.indices, column.tolist(), strict=True):
                rows[place]['called'] = name_call(probability, thresholds, names)
    return rows


def predict_files(
        model: Model,
        images: Sequence[str],
        top_k: int = 5,
        calibration: Optional[Path] = None,
        as_json: bool = False,
        output: Optional[Path] = None,
        device: str = '',
        batch_size: int = 32,
        workers: int = 2,
) -> int:
    """Print what `predict` returns.

    Args:
        model: As for `predict`, as are `images`, `top_k`, `device`, `batch_size` and `workers`.
        images: Files, folders and patterns.
        top_k: Classes of each image.
        calibration: metrics.json of `timm-densese evaluate` or `timm-densese study`: a temperature, thresholds.
        as_json: Print JSON instead of a table.
        output: CSV file to write, a row for each image and class; replaced if it is there.
        device: Device.
        batch_size: Images a batch.
        workers: Processes that read images.

    Returns:
        How many images could not be read.

    Raises:
        UserError: There are no images, or the model or the calibration cannot be read.
    """
    if output and output.suffix.lower() != '.csv':
        raise OptionError(f'--output {output} is written as CSV: name it .csv. JSON is printed: --json > FILE.')
    if output:
        check_new_file(output, '--output')
    find_images(images)  # they are missed before the model is loaded
    loaded = load_model(model, device)
    use = read_calibration(calibration, loaded.hash_weights(), loaded.class_names)
    rows = predict(loaded, images, top_k=top_k, calibration=use, batch_size=batch_size, workers=workers)
    good = [row for row in rows if 'error' not in row]
    errors = {row['file']: row['error'] for row in rows if 'error' in row}
    if output:
        _write_csv(output, good)
    if as_json:
        print(json.dumps({'model': loaded.source, 'temperature': use.temperature, 'calibrated': use.is_fitted,
                          'threshold': use.thresholds and use.thresholds._asdict(),
                          'predictions': good, 'unreadable': errors}, indent=1))
    else:
        width = max((len(row['file']) for row in good), default=0)
        longest = max((len(row.get('called', '')) for row in good), default=0)
        for row in good:
            called = f'{row["called"]:{longest}}  ' if 'called' in row else ''
            print(f'{row["file"]:{width}}  {called}'
                  + '  '.join(f'{p["class"]} {p["probability"]:.1%}' for p in row['predictions']))
        if not loaded.label_names:
            print('The classes are numbers, the places of the outputs: their names are not known. Give --class-names.',
                  file=sys.stderr)
        if not use.is_fitted and good:
            print('The probabilities are not calibrated: ' + (
                f'{calibration} holds no temperature.' if calibration else
                'give --calibration with the metrics.json of an evaluation.'), file=sys.stderr)
    for file, error in errors.items():
        print(f'not readable: {file} ({error})', file=sys.stderr)
    if errors:
        print(f'{len(errors)} of {len(rows)} images could not be read.', file=sys.stderr)
    return len(errors)


def _write_csv(file: Path, rows: Sequence[Dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    with_calls = any('called' in row for row in rows)
    writer.writerow(['file', 'rank', 'class', 'probability', *(['called'] if with_calls else [])])
    for row in rows:
        for rank, prediction in enumerate(row['predictions'], 1):
            writer.writerow([row['file'], rank, prediction['class'], prediction['probability'],
                             *([row['called']] if with_calls else [])])
    replace_file(file, text.getvalue())
