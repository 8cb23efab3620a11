"""Trained models, found and loaded from wherever they are."""
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import timm
import torch
import yaml
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from timm.data import ImageNetInfo, resolve_data_config
from timm.models import clean_state_dict, get_pretrained_cfg, is_model

from .data.images import list_images
from .errors import ModelNotFoundError, PublishError, hub_errors
from .models.untrusted import check_model_args, read_checkpoint

__all__ = ['Checkpoint', 'choose_device', 'find_weights', 'load_checkpoint', 'load_model', 'short_name']


def find_weights(repo_id: str) -> bool:
    """Tell whether a repository's weights can be had, from the cache or the Hub, and print why if not.

    One request with a short timeout: a download without a network retries for 45 seconds before it gives up.

    Args:
        repo_id: Repository with a `model.safetensors`, `timm/densenet121.ra_in1k` for example.
    """
    file = (repo_id, 'model.safetensors')
    if isinstance(try_to_load_from_cache(*file), str):
        return True
    try:
        get_hf_file_metadata(hf_hub_url(*file), timeout=10)
    except Exception as e:  # no network, no DNS, a proxy's page, no such repository: whoever asks goes on without
        print(f'The Hugging Face Hub could not be reached for {repo_id} ({type(e).__name__}: {e}).')
        return False
    return True


def choose_device(device: str) -> torch.device:
    """Give a device by its name; by none, CUDA where there is one, else the CPU."""
    return torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))


class Checkpoint(NamedTuple):
    """A trained model and what its run recorded.

    Attributes:
        model: The model in eval mode.
        label_names: Names of the classes, empty if they are not known.
        data_config: Preprocessing: input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode.
        recipe: The run's options by name, empty if they are not known.
        trained: A sentence on which weights these are.
    """
    model: Any
    label_names: List[str]
    data_config: Dict[str, Any]
    recipe: Dict[str, Any]
    trained: str

    @property
    def class_names(self) -> List[str]:
        """Names of the classes, their numbers where the names are not known."""
        return self.label_names or [str(i) for i in range(self.model.num_classes)]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def load_checkpoint(
        checkpoint: Path,
        model: str = '',
        model_kwargs: Optional[Dict[str, Any]] = None,
        data: Optional[Path] = None,
) -> Checkpoint:
    """Rebuild the model of a checkpoint of timm's train.py or of `timm-densese train`.

    Averaged (EMA) weights are taken where there are some: they are what both loops validate. The classes, the input
    and the model's arguments come from the run's args.yaml beside the checkpoint, or the arguments in the checkpoint.

    Args:
        checkpoint: File that the loop wrote, or a bare state dict.
        model: Name of the model, the checkpoint's if empty.
        model_kwargs: Arguments of the model, over those that the run recorded.
        data: Folder that names the classes: class folders, or splits of class folders.

    Returns:
        The model and what is known of it.

    Raises:
        CheckpointFileError: The file cannot be read or is refused.
        CheckpointMismatchError: Its tensors are not the model's.
        ModelConfigError: The run's arguments are not the model's.
        PublishError: The model's name or classes are missing or do not fit.
    """
    checkpoint = Path(checkpoint)
    saved = read_checkpoint(checkpoint)
    args_file = checkpoint.parent / 'args.yaml'
    recipe: Dict[str, Any] = {}
    if args_file.is_file():
        recipe = yaml.safe_load(args_file.read_text()) or {}
    elif 'args' in saved:
        recipe = dict(vars(saved['args']))

    name = model or saved.get('arch') or recipe.get('model') or ''
    if not isinstance(name, str) or not is_model(name):
        raise PublishError(f'Which model is {checkpoint}? It says {name or "nothing"!r}. Keep it beside its run\'s '
                           f'args.yaml, or publish it with --model se_densenet121 or another of `timm-densese models`.')
    keys = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
    key = next((k for k in keys if isinstance(saved.get(k), dict)), '')
    state_dict = clean_state_dict(saved[key] if key else saved)
    cfg: Any = get_pretrained_cfg(name)
    classifier, first_conv = (f'{layer}.weight' for layer in (cfg.classifier, cfg.first_conv))
    weight, stem = state_dict.get(classifier), state_dict.get(first_conv)
    if weight is None or stem is None:
        raise PublishError(
            f'{checkpoint} holds no {classifier} or no {first_conv}: it is no checkpoint of a {name} classifier. It '
            f'holds {", ".join(list(state_dict)[:5]) or "nothing"}.')
    kwargs = {
        **({'global_pool': recipe['gp']} if recipe.get('gp') else {}), **(recipe.get('model_kwargs') or {}),
        **(model_kwargs or {}), 'num_classes': weight.shape[0]}
    if stem.shape[1] != 3:
        kwargs['in_chans'] = stem.shape[1]
    check_model_args(name, kwargs)
    net: Any = timm.create_model(name, **kwargs)
    net.load_state_dict(state_dict)

    input_options = {k: v for k, v in recipe.items()
                     if k in ('img_size', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode') and v}
    data_config = resolve_data_config({**input_options, 'in_chans': net.in_chans}, model=net)
    labels = _label_names(recipe, data, net.num_classes)
    trained = [f'These are the {"averaged" if "ema" in key else "raw"} weights']
    if isinstance(saved.get('epoch'), int):
        trained.append(f' after epoch {saved["epoch"]}')
    if isinstance(saved.get('metric'), float) and recipe.get('eval_metric'):
        trained.append(f', where validation {recipe["eval_metric"]}, which chose them, was {saved["metric"]:.4f}')
    return Checkpoint(net.eval(), labels, data_config, recipe, ''.join(trained) + '.')


def load_model(of: str, device: str = '') -> Checkpoint:
    """Load a model to use it: a checkpoint, a repository of the Hub, a folder, or a registered model's own weights.

    Args:
        of: Path of a checkpoint, `hf-hub:OWNER/NAME`, `local-dir:DIR`, or the name of a model with pretrained weights.
        device: Device to move it to, by default CUDA where there is one.

    Returns:
        The model in eval mode, on the device, and what is known of it; no recipe where it is not a checkpoint.

    Raises:
        ModelNotFoundError: It is none of these.
        UserError: It cannot be read or had, as for `load_checkpoint`.
    """
    chosen = choose_device(device)
    loaded = load_checkpoint(Path(of)) if Path(of).is_file() else _load_pretrained(of)
    loaded.model.to(chosen)
    return loaded


def _load_pretrained(of: str) -> Checkpoint:
    scheme, _, name = of.rpartition(':')
    if scheme == 'local-dir' and not (Path(name) / 'config.json').is_file():
        raise ModelNotFoundError(
            f'{name} has no config.json: give a folder that `timm-densese publish --output` wrote.')
    if not scheme and not is_model(of):
        hint = f' It is a folder: give a checkpoint in it, or local-dir:{of}.' if Path(of).is_dir() else ''
        raise ModelNotFoundError(
            f'{of} is no file and no model.{hint} Give a checkpoint, hf-hub:OWNER/NAME, local-dir:DIR, or a name such '
            f'as those of `timm-densese models`.')
    if not scheme and not get_pretrained_cfg(of).has_weights:  # type: ignore[union-attr]
        raise ModelNotFoundError(f'{of} has no pretrained weights. Give a checkpoint of it.')
    with hub_errors(name, 'load'):
        net: Any = timm.create_model(of, pretrained=True).eval()
    labels = list(net.pretrained_cfg.get('label_names') or [])
    if not labels and net.num_classes == 1000:
        labels = list(ImageNetInfo('imagenet-1k').label_descriptions())
    return Checkpoint(net, labels, resolve_data_config({}, model=net), {}, '')


def short_name(of: str) -> str:
    """Name a model for a page that others read: of a path, the last two parts."""
    return '/'.join(Path(of).parts[-2:]) if Path(of).exists() else of


def _label_names(recipe: Dict[str, Any], data: Optional[Path], num_classes: int) -> List[str]:
    """Class names in the order of the logits, from the run's record or the data's folders."""
    recorded = list(recipe.get('class_names') or [])
    root = data or recipe.get('data_dir') or recipe.get('data')
    found: List[str] = []
    if root and Path(root).is_dir():
        split = recipe.get('train_split') or 'train'
        folder = Path(root) / split if (Path(root) / split).is_dir() else Path(root)
        found = list_images(folder).classes
        if data and not found:
            raise PublishError(f'--data {data} names no classes: it holds no images in class folders.')
    elif data:
        raise PublishError(f'--data {data} is not a folder.')
    if data and recorded and found != recorded:
        raise PublishError(f'--data {data} has the classes {found}, the run recorded {recorded}.')
    labels = recorded or found
    if labels and len(labels) != num_classes:
        if data or recorded:
            raise PublishError(f'The classes are {labels}, but the checkpoint has {num_classes} outputs.')
        return []
    return labels
