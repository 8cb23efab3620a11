"""What the run of a checkpoint recorded: its options, its classes, its preprocessing."""
import json
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import yaml
from PIL import Image
from timm.data import create_transform, resolve_input_data_config

from .errors import CheckpointFileError

__all__ = ['read_preprocessing', 'read_recipe', 'recorded_args', 'recorded_images']

_INPUT = ('img_size', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
_KINDS = {'model_args': dict, 'model_kwargs': dict, 'class_names': list, 'data_dir': str, 'data': str,
          'train_split': str, 'val_split': str, 'trained_on': list}
_MAX_PIXELS = 2 ** 24  # numbers in one image


def read_recipe(file: Path, saved: Dict[str, Any]) -> Dict[str, Any]:
    """Give what the run recorded: in the checkpoint itself, else beside it.

    The args.yaml of another run may lie beside a checkpoint that was moved: where the two tell of different runs, the
    checkpoint is right.

    Args:
        file: The checkpoint.
        saved: What it holds.

    Raises:
        CheckpointFileError: The file beside it cannot be read, or values are of another kind than a run writes.
    """
    inside = dict(vars(saved['args'])) if hasattr(saved.get('args'), '__dict__') else {}
    args_file, config_file = file.parent / 'args.yaml', file.parent / 'config.json'
    try:
        if args_file.is_file():
            beside = yaml.safe_load(args_file.read_text(encoding='utf-8')) or {}
        elif config_file.is_file() and file.suffix == '.safetensors':
            config = json.loads(config_file.read_text(encoding='utf-8'))
            cfg = config.get('pretrained_cfg') or {}
            beside = {'architecture': config.get('architecture'), 'num_classes': config.get('num_classes'),
                      'model_args': {'num_classes': config.get('num_classes'), **(config.get('model_args') or {})},
                      'class_names': config.get('label_names'), **{k: cfg[k] for k in _INPUT if k in cfg}}
        else:
            beside = {}
        if not isinstance(beside, dict):
            raise ValueError(f'it holds a {type(beside).__name__}, no options')
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as e:
        raise CheckpointFileError(f'{args_file if args_file.is_file() else config_file} cannot be read: {e}') from e
    same_run = all(inside.get(k) == beside.get(k) for k in ('model', 'data_dir', 'data') if k in inside)
    recipe = {**beside, **inside} if same_run else inside
    for name, kind in _KINDS.items():
        if recipe.get(name) is not None and not isinstance(recipe[name], kind):
            raise CheckpointFileError(
                f'{file}: {name} is recorded as {recipe[name]!r:.60}, which is no {kind.__name__}.')
    if recipe.get('class_names'):
        names = recipe['class_names'] = list(map(str, recipe['class_names']))
        if len(set(names)) < len(names):
            raise CheckpointFileError(f'{file}: class_names is recorded with a name twice: {", ".join(names[:20])}.')
    return recipe


def recorded_args(recipe: Dict[str, Any]) -> Dict[str, Any]:
    """Give the arguments of the model: as this package records them whole, or from options of timm's train.py."""
    if isinstance(recipe.get('model_args'), dict):
        return dict(recipe['model_args'])
    options = {'global_pool': recipe.get('gp'), 'in_chans': recipe.get('in_chans'),
               'num_classes': recipe.get('num_classes')}
    return {**{k: v for k, v in options.items() if v}, **(recipe.get('model_kwargs') or {})}


def recorded_images(recipe: Dict[str, Any]) -> List[Tuple[Path, Optional[str]]]:
    """Give the folders of images that reached the weights, of this run and of those that it started from.

    Args:
        recipe: What the run recorded.

    Returns:
        Each folder, and the digest of its images (see `ImageFolder.digest`), None where it was not recorded.
    """
    recorded = [part for part in recipe.get('trained_on') or [] if isinstance(part, dict)]
    found = [(Path(str(part.get('folder'))), str(part['images']) if part.get('images') else None) for part in recorded]
    root = recipe.get('data_dir') or recipe.get('data')
    own = Path(root) / str(recipe.get('train_split') or 'train') if root else None
    if own and own not in [folder for folder, _ in found]:  # all that timm's train.py records
        found.append((own, None))
    return found


def read_preprocessing(file: Path, net: Any, recipe: Dict[str, Any]) -> Dict[str, Any]:
    """Give a model's preprocessing, as the run recorded it, tried out on a blank image.

    Args:
        file: The checkpoint.
        net: Its model.
        recipe: What the run recorded.

    Returns:
        input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode.

    Raises:
        CheckpointFileError: No image can be prepared so.
    """
    given = {k: recipe[k] for k in _INPUT if recipe.get(k)}
    try:
        found = resolve_input_data_config(net, given)
        size = found['input_size']
        if math.prod(size) > _MAX_PIXELS:
            raise ValueError(f'an image would be {size[0]} x {size[1]} x {size[2]} numbers')
        transform: Any = create_transform(**found)
        if size[0] in (1, 3):
            transform(Image.new('RGB' if size[0] == 3 else 'L', (8, 8)))
    except Exception as e:  # timm's and torchvision's, of values of any kind
        raise CheckpointFileError(
            f'{file}: the preprocessing is recorded as {given}, which prepares no image ({type(e).__name__}: {e}).'
        ) from e
    return found
