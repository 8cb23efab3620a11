"""Trained models, found and loaded from wherever they are."""
import difflib
import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Union

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import ImageNetInfo, resolve_input_data_config
from timm.models import clean_state_dict, get_pretrained_cfg, is_model

from .data.images import list_images
from .errors import (
    CheckpointError,
    CheckpointFileError,
    CheckpointMismatchError,
    ModelNotFoundError,
    OptionError,
    hub_errors,
)
from .hub import check_hub
from .models.se_densenet import default_cfgs
from .models.untrusted import check_model_args, check_net_args, read_checkpoint
from .options import ModelName, check, option_errors
from .recipes import read_preprocessing, read_recipe, recorded_args

__all__ = [
    'Checkpoint', 'Model', 'choose_device', 'load_model', 'short_name', 'split_source',
]

# Where loops put a state dict: timm's, torchvision's and others'; averaged weights first, which both loops validate.
_STATE_DICTS = ('state_dict_ema', 'model_ema', 'state_dict', 'model', 'model_state_dict')


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
        source: What it was loaded from.
    """
    model: Any
    label_names: List[str]
    data_config: Dict[str, Any]
    recipe: Dict[str, Any]
    trained: str
    source: str = ''

    @property
    def class_names(self) -> List[str]:
        """Names of the classes, their numbers where the names are not known."""
        return self.label_names or [str(i) for i in range(self.model.num_classes)]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def hash_weights(self) -> str:
        """Hash the tensors by name, type and value: the same for the same weights, from whatever file they came."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)};'.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


# A model: what `load_model` takes, what it returned, or a call of it that is made once the options are checked.
Model = Union[str, Checkpoint, Callable[[], Checkpoint]]


def load_model(
        of: Model,
        device: str = '',
        architecture: str = '',
        model_kwargs: Optional[Dict[str, Any]] = None,
        class_names: Optional[Sequence[str]] = None,
        data: Optional[Path] = None,
) -> Checkpoint:
    """Load a model to use it: a checkpoint, a repository of the Hub, a folder, or a registered model's own weights.

    A checkpoint is a file of timm's train.py, of `timm-densese train`, `model.safetensors`, or a bare state dict, also
    as `model_state_dict` or with Lightning's prefix. Averaged (EMA) weights are taken where there are some: they are
    what both loops validate. What a file does not say of its model comes from the args.yaml or config.json beside it.

    Args:
        of: Path of a checkpoint, `hf-hub:OWNER/NAME`, `local-dir:DIR`, or the name of a model with pretrained weights;
            what this returned is returned as it is, and a call of this is made.
        device: Device to move it to, by default CUDA where there is one.
        architecture: Name of a checkpoint's model, if its file does not say.
        model_kwargs: Arguments of a checkpoint's model, over those that the run recorded.
        class_names: Names of the classes in the order of the outputs, if it does not say.
        data: Folder that names the classes: class folders, or splits of class folders.

    Returns:
        The model in eval mode, on the device, and what is known of it; no recipe where it is not a checkpoint.

    Raises:
        ModelNotFoundError: It is none of these.
        OptionError: `architecture`, `model_kwargs` or `class_names` cannot be used.
        CheckpointError: It cannot be read, is refused, or does not fit its model or its classes.
        HubError: It cannot be had from the Hub.

    Example:
        >>> import tempfile, timm, timm_densese, torch
        >>> net = timm.create_model('resnet10t', num_classes=2)
        >>> with tempfile.NamedTemporaryFile(suffix='.pth') as file:
        ...     torch.save(net.state_dict(), file.name)
        ...     loaded = load_model(file.name, architecture='resnet10t', class_names=['cat', 'dog'])
        >>> loaded.class_names, loaded.data_config['input_size']
        (['cat', 'dog'], (3, 176, 176))
    """
    if isinstance(of, Checkpoint):
        return of
    if callable(of):
        return of()
    chosen = choose_device(device)
    if class_names and len(set(class_names)) < len(class_names):
        twice = next(name for name in class_names if list(class_names).count(name) > 1)
        raise OptionError(f'--class-names has {twice!r} more than once: give each class a name of its own.')
    if Path(of).is_file():
        loaded = _load_file(Path(of), architecture, model_kwargs or {})
    elif (architecture or model_kwargs) and _check_name(of):
        raise OptionError(f'--model and --model-kwargs say what a checkpoint file does not; {of} is none.')
    else:
        loaded = _load_pretrained(of)
    net = loaded.model
    if net.num_classes < 2:
        raise CheckpointError(
            f'{of} has {net.num_classes} output{"" if net.num_classes else "s"}, and a classifier has one for each '
            f'class: the probabilities of one output would be 100% for everything. Where it was trained with binary '
            f'cross entropy, give it two: weights (0, w) and biases (0, b) have the same probabilities.')
    bad = [name for name, t in net.state_dict().items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        more = f' and {len(bad) - 5} more' if len(bad) > 5 else ''
        raise CheckpointError(
            f'{of} holds weights that are not numbers (NaN or infinite): {", ".join(bad[:5])}{more}. Its training '
            f'diverged, or the file is damaged: take an earlier checkpoint.')
    names = _name_classes(of, loaded, class_names, data)
    net.to(chosen)
    return loaded._replace(label_names=names, source=of)


def split_source(name: str) -> List[str]:
    """Split `hf-hub:OWNER/NAME` and `local-dir:DIR` at the colon; another name has the source ''."""
    source, _, rest = name.partition(':')
    source = source.replace('hf_hub', 'hf-hub')  # timm takes both
    return [source, rest] if source in ('hf-hub', 'local-dir') else ['', name]


def short_name(of: str) -> str:
    """Name a model for a page that others read: of a path, the last two parts."""
    return '/'.join(Path(of).parts[-2:]) if Path(of).exists() else of


# Not a file: timm finds it.


def _load_pretrained(of: str) -> Checkpoint:
    source, name = _check_name(of)
    cfg: Any = None if source else get_pretrained_cfg(of)
    if cfg and not cfg.has_weights:
        raise ModelNotFoundError(f'{of} has no pretrained weights. Give a checkpoint of it.')
    if source == 'hf-hub':
        check_hub(name, 'config.json')
    elif cfg and cfg.hf_hub_id:
        check_hub(cfg.hf_hub_id, 'model.safetensors')
    with hub_errors(name, 'load'):
        try:
            net: Any = timm.create_model(of, pretrained=True).eval()
        except (RuntimeError, TypeError) as e:  # timm's and torch's, of arguments and shapes
            if isinstance(e, CheckpointError):
                raise
            raise CheckpointError(f'{of} cannot be built from its config.json ({type(e).__name__}: {e}).') from e
    labels = list(net.pretrained_cfg.get('label_names') or [])
    if not labels and not source and net.num_classes == 1000:
        labels = list(ImageNetInfo('imagenet-1k').label_descriptions())
    # ImageNet has two cranes, a bird and a machine.
    labels = [f'{name} ({i})' if labels.count(name) > 1 else str(name) for i, name in enumerate(labels)]
    return Checkpoint(net, labels, resolve_input_data_config(net), {}, '')


def _check_name(name: str) -> List[str]:
    """Refuse what is no file and no model, with the names that are near; give the source and the name in it."""
    source, rest = split_source(name)
    if source == 'local-dir' and not (Path(rest) / 'config.json').is_file():
        raise ModelNotFoundError(
            f'{rest or name} has no config.json: give a folder that `timm-densese publish --output` wrote.')
    if source or is_model(name):
        check('MODEL', ModelName(), name)
        return [source, rest]
    hint = ''
    if name and Path(name).is_dir():
        hint = f' It is a folder: give a checkpoint in it, or local-dir:{name}.'
    elif close := difflib.get_close_matches(name, timm.list_models(), 3):
        hint = f' Is it {" or ".join(close)}?'
    raise ModelNotFoundError(
        f'{name or "An empty name"} is no file and no model.{hint} Give a checkpoint, hf-hub:OWNER/NAME, '
        f'local-dir:DIR, or a name such as those of `timm-densese models`. A model of a module of your own needs '
        f'--device-modules.')


# A file.


def _load_file(file: Path, architecture: str, model_kwargs: Dict[str, Any]) -> Checkpoint:
    if architecture:
        check('--model', ModelName(), architecture)
    saved = _read_safetensors(file) if file.suffix == '.safetensors' else read_checkpoint(file)
    recipe = read_recipe(file, saved)
    arch, recorded = _find_architecture(file, architecture or recipe.get('architecture') or saved.get('arch') or
                                        recipe.get('model') or '')
    key = next((k for k in _STATE_DICTS if isinstance(saved.get(k), dict) and saved[k]), '')
    state_dict = clean_state_dict(saved[key] if key else saved)
    kwargs = {**recorded, **recorded_args(recipe), **model_kwargs}
    given = ' '.join(f'{name}={value}' for name, value in model_kwargs.items())
    with option_errors(f'--model-kwargs {given}') if given else nullcontext():
        net = _create(file, arch, kwargs, state_dict)

    data_config = read_preprocessing(file, net, recipe)
    trained = [f'These are the {"averaged" if "ema" in key else "raw"} weights']
    if isinstance(saved.get('epoch'), int):
        trained.append(f' after epoch {saved["epoch"]}')
    if isinstance(saved.get('metric'), float) and recipe.get('eval_metric'):
        trained.append(f', where validation {recipe["eval_metric"]}, which chose them, was {saved["metric"]:.4f}')
    return Checkpoint(net.eval(), recipe.get('class_names') or [], data_config, recipe, ''.join(trained) + '.')


def _read_safetensors(file: Path) -> Dict[str, Any]:
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError) as e:
        raise CheckpointFileError(f'{file} could not be read, it is damaged or no safetensors file: {e}') from e


def _find_architecture(file: Path, name: str) -> Any:
    """The registered name of a checkpoint's model, and the arguments that a config.json gives it.

    A run that started from the Hub or a folder has that for a name.
    """
    source, rest = split_source(str(name))
    args: Dict[str, Any] = {}
    if source:
        load = timm.models.load_model_config_from_hf if source == 'hf-hub' else (
            timm.models._hub.load_model_config_from_path)
        if source == 'hf-hub':
            check_hub(rest, 'config.json')
        try:
            with hub_errors(rest, 'load'):
                _, name, args = load(rest)
        except FileNotFoundError as e:
            raise CheckpointError(
                f'{file} was trained from {name}, which is not there to say what model that is ({e}). Give it with '
                f'--model and --model-kwargs.') from e
    if not isinstance(name, str) or not is_model(name):
        raise CheckpointError(
            f'Which model is {file}? It says {name or "nothing"!r}. Keep it beside its run\'s args.yaml, or give '
            f'--model se_densenet121 or another name of timm.list_models(). A model of a module of your own needs '
            f'--device-modules.')
    return name, args or {}


def _create(file: Path, arch: str, kwargs: Dict[str, Any], state_dict: Dict[str, torch.Tensor]) -> nn.Module:
    """Create the model and give it a checkpoint's tensors, all of them."""
    cfg: Any = get_pretrained_cfg(str(kwargs.get('base') or arch))
    classifier, stem = (_layers(cfg, key) for key in ('classifier', 'first_conv'))
    if classifier and stem:
        state_dict = _strip_prefix(file, arch, state_dict, [f'{classifier[0]}.weight', f'{stem[0]}.weight'])
    # What the tensors say is right, whatever was recorded.
    for key, layer, axis in (('num_classes', classifier, 0), ('in_chans', stem, 1)):
        weight = state_dict.get(f'{layer[0]}.weight') if layer else None
        if weight is not None and (axis == 0 or (weight.ndim == 4 and (weight.shape[1] != 3 or key in kwargs))):
            kwargs = {**kwargs, key: weight.shape[axis]}
    (check_model_args if arch in default_cfgs else check_net_args)(arch, kwargs)
    try:
        net = timm.create_model(arch, **kwargs)
    except CheckpointError:
        raise
    except Exception as e:  # timm's constructors raise whatever they meet
        raise CheckpointError(
            f'{file} says that it is {arch} with {kwargs}, which cannot be created ({type(e).__name__}: {e}). Give '
            f'--model-kwargs.') from e
    try:
        net.load_state_dict(state_dict)
    except CheckpointError:
        raise
    except RuntimeError as e:  # torch's list of keys, of any length
        own = net.state_dict()
        raise CheckpointMismatchError(
            f'{arch} with {kwargs}', [k for k in own if k not in state_dict], [k for k in state_dict if k not in own],
            [f'{k} {tuple(state_dict[k].shape)} for {tuple(v.shape)}' for k, v in own.items()
             if k in state_dict and state_dict[k].shape != v.shape]) from e
    return net


def _strip_prefix(
        file: Path,
        arch: str,
        state_dict: Dict[str, torch.Tensor],
        needed: List[str],
) -> Dict[str, torch.Tensor]:
    """The tensors of the model by its own names, where a wrapper such as Lightning's put a prefix before each."""
    if all(name in state_dict for name in needed):
        return state_dict
    prefixes = [name[:-len(needed[0])] for name in state_dict if name.endswith(f'.{needed[0]}')]
    prefixes = [prefix for prefix in prefixes if all(f'{prefix}{name}' in state_dict for name in needed)]
    if not prefixes:
        raise CheckpointError(
            f'{file} holds no {" or no ".join(needed)}: it is no checkpoint of a {arch} classifier. It holds '
            f'{", ".join(map(str, list(state_dict)[:5])) or "nothing"}.')
    if len(prefixes) > 1:
        raise CheckpointError(f'{file} holds several models: {", ".join(prefixes)}. Save the state dict of one.')
    return {k[len(prefixes[0]):]: v for k, v in state_dict.items() if k.startswith(prefixes[0])}


def _layers(cfg: Any, key: str) -> List[str]:
    """Names of a pretrained cfg's classifiers or first layers: there may be one, several or none."""
    names = getattr(cfg, key, None) or ()
    return [names] if isinstance(names, str) else list(names)


# Classes.


def _name_classes(
        of: str,
        loaded: Checkpoint,
        given: Optional[Sequence[str]],
        data: Optional[Path],
) -> List[str]:
    """Class names in the order of the outputs: what the run recorded, what is given, or the folders trained on."""
    outputs = loaded.model.num_classes
    recorded = loaded.label_names
    if recorded and len(recorded) != outputs:
        raise CheckpointError(f'The classes of {of} are {recorded}, but it has {outputs} outputs.')
    found: List[str] = []
    # Readers of timm's train.py other than that of folders, and class maps, have other orders.
    ordered = '/' not in str(loaded.recipe.get('dataset') or '') and not loaded.recipe.get('class_map')
    if data and not ordered and not recorded:
        raise CheckpointError(
            f'--data {data} does not tell the order of the classes, as {of} was trained with --dataset '
            f'{loaded.recipe.get("dataset")} and --class-map {loaded.recipe.get("class_map")}. Give --class-names in '
            f'the order of the outputs.')
    root = data or loaded.recipe.get('data_dir') or loaded.recipe.get('data')
    if root and Path(root).is_dir():
        split = Path(root) / str(loaded.recipe.get('train_split') or 'train')
        found = list_images(split if split.is_dir() else root).classes  # in timm's order
    if data and not found:
        raise CheckpointError(f'--data {data} names no classes: it is no folder of class folders with images.')
    if data and len(found) != outputs:
        raise CheckpointError(f'--data {data} has the classes {found}, but {of} has {outputs} outputs.')
    names = list(given) if given else found if data else recorded
    if given and len(names) != outputs:
        raise CheckpointError(f'--class-names are {len(names)}, but {of} has {outputs} outputs.')
    if recorded and names != recorded:
        option = '--class-names' if given else f'--data {data}'
        raise CheckpointError(f'{option} has the classes {names}, but {of} recorded {recorded}.')
    return names or (found if ordered and len(found) == outputs else [])
