"""The model of a training, as it starts: created, tried out, placed; its loss, and where a resumed run stands."""
import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, List, Tuple

import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import constants
from timm.data import resolve_data_config
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from timm.models import get_model_args, load_checkpoint
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from ..errors import OptionError, TrainingError, hub_errors
from ..hub import why_unreachable
from ..options import first_line, option_errors
from ..recipes import recorded_images
from .config import TrainConfig

__all__ = ['WeightedCrossEntropy', 'create_model', 'create_optimizer', 'place_model', 'resume_run', 'try_out']


def create_model(config: TrainConfig, num_classes: int) -> Tuple[Any, Dict[str, Any], Dict[str, Any]]:
    """Create the model, with the weights that it starts from.

    Args:
        config: Options.
        num_classes: Number of classes.

    Returns:
        The model, its preprocessing, and what makes it again where a name such as `hf-hub:...` does not: `architecture`
        and `model_args`.

    Raises:
        OptionError: timm does not build it, or cannot read a file of weights.
        TrainingError: The Hub cannot be reached.
    """
    for option in ('pretrained_path', 'initial_checkpoint'):
        file = getattr(config, option)
        if file and not Path(file).is_file():
            raise OptionError(f'--{option.replace("_", "-")} {file}: there is no such file.')
    overlay = dict(file=config.pretrained_path, num_classes=-1) if config.pretrained_path else None
    given = _given(config) + (f' --pretrained-path {config.pretrained_path}' if config.pretrained_path else '')
    repo_id = _repo_id(config)
    if repo_id:
        _check_hub(config, repo_id)
    advice = 'To train from random weights: --no-pretrained.' if config.pretrained else ''
    with option_errors(given, advice), hub_errors(repo_id, 'load') if repo_id else nullcontext():
        model: Any = timm.create_model(
            config.model, pretrained=config.pretrained or bool(config.pretrained_path), pretrained_cfg_overlay=overlay,
            num_classes=num_classes, drop_rate=config.drop, **config.model_kwargs)
    if config.initial_checkpoint:
        with option_errors(f'--initial-checkpoint {config.initial_checkpoint}'):
            load_checkpoint(model, config.initial_checkpoint)

    made_of = {'architecture': model.pretrained_cfg['architecture'], 'model_args': _plain(get_model_args(model))}
    if config.img_size and hasattr(model, 'set_input_size'):  # as transformers have it
        with option_errors(f'--img-size {config.img_size}'):
            model.set_input_size(img_size=config.img_size)
        made_of['model_args']['img_size'] = config.img_size
    size = config.img_size or config.model_kwargs.get('img_size')
    return model, resolve_data_config({'img_size': size} if size else {}, model=model), made_of


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML has."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _given(config: TrainConfig) -> str:
    arguments = ' '.join(f'{name}={value}' for name, value in config.model_kwargs.items())
    return f'--model {config.model}' + (f' --model-kwargs {arguments}' if arguments else '')


def _repo_id(config: TrainConfig) -> str:
    """The repository that the start needs, empty where it needs none."""
    scheme, _, name = config.model.rpartition(':')
    if scheme in ('hf-hub', 'hf_hub'):
        return name.partition('@')[0]
    if scheme or not config.pretrained or config.pretrained_path:
        return ''
    cfg: Any = timm.models.get_pretrained_cfg(config.model_kwargs.get('base') or config.model)  # of with_attention
    return cfg.hf_hub_id or '' if cfg else ''


def _check_hub(config: TrainConfig, repo_id: str) -> None:
    why = why_unreachable(repo_id, 'config.json' if ':' in config.model else 'model.safetensors')
    if why:
        raise TrainingError(
            f'--pretrained: {repo_id} is not in the cache, and {constants.ENDPOINT} could not be reached '
            f'({why}). Train from random weights with --no-pretrained, or give weights downloaded elsewhere '
            f'with --pretrained-path FILE.')


def create_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Create the optimizer, with a learning rate for each layer."""
    return create_optimizer_v2(
        model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, layer_decay=config.layer_decay)


def try_out(config: TrainConfig, model: nn.Module, data_config: Dict[str, Any], num_classes: int, batch: int) -> None:
    """Train and evaluate a copy of the model on blank images: what would fail later is refused before the start.

    Args:
        config: Options.
        model: Model, which stays as it is.
        data_config: Its preprocessing.
        num_classes: Number of classes.
        batch: Images in a batch of all processes.

    Raises:
        OptionError: It cannot be trained so, or its outputs are not one logit for each class.
    """
    _, height, width = data_config['input_size']
    channels = config.model_kwargs.get('in_chans', data_config['input_size'][0])
    if channels != 3:
        raise OptionError(f'--model {config.model} takes {channels} channels, and images are read in RGB, with 3.')
    made_for = _given(config) + (f' --img-size {height}' if config.img_size else f', at {height}x{width} pixels')
    net = copy.deepcopy(model).train()
    images = torch.zeros(2, 3, height, width, device=next(net.parameters()).device)
    with option_errors(made_for):
        logits = net(images)
        if not isinstance(logits, torch.Tensor) or logits.shape != (2, num_classes):
            shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ValueError(f'its outputs for 2 images are {shape}, not (2, {num_classes}): a logit for each class')
    if batch == 1:
        with option_errors('--batch-size 1', 'Give 2 or more.'):
            net(images[:1])
    with option_errors(f'--opt {config.opt}'):
        optimizer = create_optimizer(config, net)
        F.cross_entropy(logits.float(), torch.zeros(2, dtype=torch.long, device=images.device)).backward()
        optimizer.step()
    with option_errors(made_for), torch.inference_mode():
        net.eval()(images[:1])


def place_model(config: TrainConfig, model: Any, device: torch.device, world: int) -> None:
    """Prepare the model for how it is trained: memory, layout, norms over several processes."""
    if config.grad_checkpointing:
        with option_errors(f'--grad-checkpointing, with --model {config.model}'):
            model.set_grad_checkpointing()
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if world > 1:
        if device.type == 'cpu':
            _convert_cpu_sync_batchnorm(model)
        else:
            convert_sync_batchnorm(model)


def resume_run(
        config: TrainConfig,
        task: ClassificationTask,
        optimizer: torch.optim.Optimizer,
        classes: List[str],
        images: str,
        began_with: Dict[str, Any],
) -> int:
    """Load model and optimizer of a run, keeping this run's options of the optimizer.

    Args:
        config: Options.
        task: Gets the weights.
        optimizer: Gets the state.
        classes: Names of the classes now.
        images: Digest of the images now.
        began_with: What the run records now of what is not to change in it.

    Returns:
        The next epoch.

    Raises:
        OptionError: The file is none that a run in this folder can go on from, or the run began with other images or
            another model.
    """
    given = f'--resume {config.resume}'
    anew = f'To start a new run from its weights, give --initial-checkpoint {config.resume} and a new --output.'
    if not Path(config.resume).is_file():
        raise OptionError(f'{given}: there is no such file.')
    folder = Path(config.resume).parent
    if folder.resolve() != Path(config.output).resolve():
        raise OptionError(f'{given} goes on with the run in {folder}, so give --output {folder}. {anew}')
    options = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
    try:
        saved = load_checkpoint_metadata(config.resume)
        if 'optimizer' not in saved or 'epoch' not in saved:
            raise OptionError(f'{given} holds no state of the optimizer, so that no run can go on from it. {anew}')
        began = getattr(saved.get('args'), '__dict__', {})
        _check_same_images(config, began, classes, images, anew)
        start_epoch = resume_task_checkpoint(task, config.resume, optimizer=optimizer, log_info=False) or 0
        for key, now in began_with.items():
            before = _plain(began.get(key, now))
            if before != now:
                raise OptionError(
                    f'{given}: the run began with the {key.replace("_", " ")} {before}, and now it is {now}. Epochs '
                    f'of both would be compared as if they were of one run. {anew}')
    except OptionError:
        raise
    except Exception as e:  # an unpickler's, a missing key, other shapes
        raise OptionError(
            f'{given} is no checkpoint that this training can go on from ({type(e).__name__}: {first_line(e)}). Give '
            f'--model and --model-kwargs of its args.yaml. {anew}') from e
    for group, now in zip(optimizer.param_groups, options, strict=True):
        group.pop('initial_lr', None)  # the schedule's; a run that failed is resumed with another --lr
        group.update(now)
    return start_epoch


def _check_same_images(config: TrainConfig, began: Dict[str, Any], classes: List[str], images: str, anew: str) -> None:
    folder = Path(config.data_dir) / config.train_split
    names = began.get('class_names')
    if names and names != classes:
        raise OptionError(
            f'--resume {config.resume}: the run began with the classes {", ".join(names)}, and {folder} holds '
            f'{", ".join(classes)}. The model\'s outputs would change places. {anew}')
    if any(digest and digest != images for _, digest in recorded_images(began)[:1]):
        raise OptionError(
            f'--resume {config.resume}: the run began with other images than those in {folder} now. They were '
            f'added, removed, moved or changed since, so that its scores would be of two sets. {anew}')


class WeightedCrossEntropy(nn.Module):
    """Cross entropy with label smoothing, averaged over the batch with a weight for each class.

    torch's own weights divide by their sum over the batch, which differs between the processes of one global batch.
    """

    def __init__(self, class_weight: torch.Tensor, smoothing: float) -> None:
        super().__init__()
        self.register_buffer('class_weight', class_weight)
        self.smoothing = smoothing

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(logits.float(), labels, reduction='none', label_smoothing=self.smoothing)
        return (loss * self.get_buffer('class_weight')[labels]).mean()


# Several processes.
def _sync_batch_norm(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """Batch norm in training mode, over the batches of all processes."""
    from torch.distributed.nn.functional import all_reduce  # the one with a gradient

    count = x.numel() // x.shape[1] * dist.get_world_size()
    mean = all_reduce(x.sum((0, 2, 3))) / count
    centred = x - mean[:, None, None]
    var = all_reduce(centred.square().sum((0, 2, 3))) / count
    with torch.no_grad():
        norm.get_buffer('num_batches_tracked').add_(1)
        norm.get_buffer('running_mean').lerp_(mean, norm.momentum or 0.)
        norm.get_buffer('running_var').lerp_(var * count / (count - 1), norm.momentum or 0.)
    return centred * (norm.weight * (var + norm.eps).rsqrt())[:, None, None] + norm.bias[:, None, None]


class _CpuSyncBatchNorm2d(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _sync_batch_norm(self, x) if self.training else super().forward(x)


class _CpuSyncBatchNormAct2d(BatchNormAct2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(_sync_batch_norm(self, x))) if self.training else super().forward(x)


def _convert_cpu_sync_batchnorm(module: nn.Module) -> None:
    sync = {nn.BatchNorm2d: _CpuSyncBatchNorm2d, BatchNormAct2d: _CpuSyncBatchNormAct2d}
    for child in module.modules():
        child.__class__ = sync.get(type(child), type(child))  # the same tensors and names, another forward
