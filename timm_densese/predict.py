"""Predictions for image files, as a table, JSON or CSV."""
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from .checkpoints import load_model
from .data.images import choose_device, compute_logits, find_images
from .errors import ImagesError
from .files import replace_file

__all__ = ['predict_files', 'read_temperature']


def read_temperature(calibration: Optional[Path]) -> float:
    """Read the temperature that `timm-densese evaluate` fitted; 1 without a file.

    Raises:
        ImagesError: The file holds none.
    """
    if calibration is None:
        return 1.
    try:
        temperature = float(json.loads(calibration.read_text())['temperature'])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ImagesError(
            f'{calibration} holds no temperature ({type(e).__name__}: {e}). Give the metrics.json of `timm-densese '
            f'evaluate MODEL DIR --report OUT`, where DIR has a val/.') from e
    if not 0 < temperature < float('inf'):
        raise ImagesError(f'{calibration} has the temperature {temperature}, which is not a positive number.')
    return temperature


def predict_files(
        model: str,
        images: Sequence[str],
        top_k: int = 5,
        calibration: Optional[Path] = None,
        as_json: bool = False,
        csv_file: Optional[Path] = None,
        device: str = '',
        batch_size: int = 32,
        workers: int = 2,
) -> int:
    """Predict image files and print the most probable classes of each.

    Args:
        model: What `timm_densese.checkpoints.load_model` takes.
        images: Files, folders and patterns.
        top_k: Classes to show.
        calibration: metrics.json of `timm-densese evaluate`, whose temperature the logits are divided by.
        as_json: Print JSON instead of a table.
        csv_file: File to write, a row for each image and class; replaced if it is there.
        device: Device, by default CUDA where there is one.
        batch_size: Images a batch.
        workers: Processes that read images.

    Returns:
        The number of images that could not be read. They are named on standard error.

    Raises:
        UserError: There are no images, or the model or the calibration cannot be read.
    """
    paths = find_images(images)
    temperature = read_temperature(calibration)
    loaded = load_model(model)
    where = choose_device(device)
    found = compute_logits(loaded.model, paths, loaded.data_config, where, batch_size, workers, desc='predict')
    labels = loaded.class_names
    rows: List[Dict[str, Any]] = []
    if found.indices:
        top = (found.values / temperature).softmax(1).topk(min(top_k, len(labels)), 1)
        rows = [
            {'file': str(paths[place]), 'predictions': [
                {'class': labels[i], 'probability': p} for i, p in zip(indices, probabilities, strict=True)]}
            for place, indices, probabilities in zip(
                found.indices, top.indices.tolist(), top.values.tolist(), strict=True)]
    errors = {str(paths[place]): error for place, error in found.errors.items()}

    if csv_file:
        _write_csv(csv_file, rows)
    if as_json:
        print(json.dumps({'model': model, 'temperature': temperature, 'calibrated': calibration is not None,
                          'predictions': rows, 'unreadable': errors}, indent=1))
    else:
        width = max((len(row['file']) for row in rows), default=0)
        for row in rows:
            print(f'{row["file"]:{width}}  '
                  + '  '.join(f'{p["class"]} {p["probability"]:.1%}' for p in row['predictions']))
        if calibration is None and rows:
            print('The probabilities are not calibrated: give --calibration with the metrics.json of an evaluation.',
                  file=sys.stderr)
    for file, error in errors.items():
        print(f'not readable: {file} ({error})', file=sys.stderr)
    if errors:
        print(f'{len(errors)} of {len(paths)} images could not be read.', file=sys.stderr)
    return len(errors)


def _write_csv(file: Path, rows: Sequence[Dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['file', 'rank', 'class', 'probability'])
    for row in rows:
        for rank, prediction in enumerate(row['predictions'], 1):
            writer.writerow([row['file'], rank, prediction['class'], prediction['probability']])
    replace_file(file, text.getvalue())
