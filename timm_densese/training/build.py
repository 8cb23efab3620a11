"""What a training is made of: images, model, loss, optimizer and schedule, and where a resumed one stands."""
import random
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ContextManager, Dict, List, Optional, Set, Tuple

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import random_seed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ..data.images import ImageFolder, list_images, read_image
from ..errors import TrainingError
from ..files import printable
from .config import TrainConfig

__all__ = ['Run', 'build_run']


@dataclass
class Run:
    """A training that can start, or go on.

    Attributes:
        config: Its options.
        device: Where it runs.
        world: Number of processes.
        rank: Number of this one.
        classes: Names of the classes.
        data_config: Preprocessing: input_size (C, H, W), mean, std, interpolation, ...
        task: Model, averaged model and loss.
        optimizer: Optimizer.
        scheduler: Schedule of the learning rate, by updates.
        train_loader: Batches of images (B, C, H, W) and labels (B,), of this process.
        val_loader: The same of the images to validate on.
        start_epoch: First epoch to train, above 0 where a run is resumed.
    """
    config: TrainConfig
    device: torch.device
    world: int
    rank: int
    classes: List[str]
    data_config: Dict[str, Any]
    task: ClassificationTask
    optimizer: torch.optim.Optimizer
    scheduler: Any
    train_loader: DataLoader
    val_loader: DataLoader
    start_epoch: int

    @property
    def updates_per_epoch(self) -> int:
        return _updates_per_epoch(self.config, self.train_loader)

    def autocast(self) -> ContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.amp else nullcontext()


def build_run(config: TrainConfig, device: torch.device, world: int, rank: int) -> Run:
    """Read the folders, create the model and all that trains it; nothing is written.

    Args:
        config: Options.
        device: Where to train.
        world: Number of processes.
        rank: Number of this one.

    Raises:
        TrainingError: The folders do not hold what is needed, or weights cannot be loaded.
    """
    train_set, val_set = _open_split(config, config.train_split), _open_split(config, config.val_split)
    classes = train_set.classes
    if len(classes) < 2 or classes != val_set.classes:
        raise TrainingError(
            f'{config.train_split}/ and {config.val_split}/ in {config.data_dir} must hold the same two or more '
            f'classes; found {classes} and {val_set.classes}.')
    if len(train_set.samples) < 2 * world:
        raise TrainingError(
            f'{config.train_split}/ holds {len(train_set.samples)} images, too few for {world} processes.')

    random_seed(config.seed)
    model = _create_model(config, len(classes))
    data_config = resolve_data_config({'img_size': config.img_size} if config.img_size else {}, model=model)
    _place_model(config, model, device, world)

    # Task and optimizer, in the order of timm's train.py.
    task = ClassificationTask(model, _create_loss(config, train_set, len(classes)), device=device, verbose=False)
    optimizer = create_optimizer_v2(
        model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    start_epoch = _resume(config.resume, task, optimizer) if config.resume else 0
    if config.model_ema:
        task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
        if config.resume:
            load_task_ema_checkpoint(task, config.resume)
    if config.torchcompile:
        task.compile()
    if world > 1:
        # Buffers need no broadcast: the synchronised batch norms keep them equal.
        task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None, broadcast_buffers=False)

    train_loader, val_loader = _create_loaders(config, data_config, train_set, val_set, world, rank)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=config.sched, num_epochs=config.epochs, warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr, min_lr=config.min_lr, step_on_epochs=False,
        updates_per_epoch=_updates_per_epoch(config, train_loader))
    return Run(config, device, world, rank, classes, data_config, task, optimizer, scheduler, train_loader, val_loader,
               start_epoch)


def _updates_per_epoch(config: TrainConfig, loader: DataLoader) -> int:
    return -(-len(loader) // config.grad_accum_steps)


# Images.


class _Images(Dataset):
    """Images of a split, read as predictions read them; one that cannot be read gives its place to the next.

    With a seed, each is augmented from a seed of its own, so that the order and place of loading do not matter.
    """

    def __init__(self, samples: List[Tuple[Path, int]], transform: Any, seed: Optional[int] = None) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        self.told: Set[Path] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, int]:
        image, label = self._read(index)
        if self.seed is None:
            return self.transform(image), label
        seed = int(np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        with torch.random.fork_rng(devices=[]):  # with workers=0 this process draws the model's dropout
            torch.manual_seed(seed)
            return self.transform(image), label

    def _read(self, index: int) -> Tuple[Image.Image, int]:
        for i in range(len(self)):
            path, label = self.samples[(index + i) % len(self)]
            try:
                return read_image(path), label
            except Exception as e:  # PIL's decoders raise whatever they meet
                if path not in self.told:
                    self.told.add(path)
                    print(f'not readable, the next image takes its place: {printable(path)} ({type(e).__name__}: {e})',
                          file=sys.stderr)
        raise TrainingError(f'None of the {len(self)} images can be read.')


def _open_split(config: TrainConfig, split: str) -> ImageFolder:
    folder = Path(config.data_dir) / split
    if not folder.is_dir():
        raise TrainingError(
            f'{folder} is not there. Make train/, val/ and test/ from a folder of class folders with: '
            f'timm-densese data split SRC --output DIR')
    images = list_images(folder)
    if not images.samples:
        raise TrainingError(f'{folder} holds no images in class folders.')
    return images


def _create_loaders(
        config: TrainConfig,
        data_config: Dict[str, Any],
        train_set: ImageFolder,
        val_set: ImageFolder,
        world: int,
        rank: int,
) -> Tuple[DataLoader, DataLoader]:
    train_transform = create_transform(
        data_config['input_size'], is_training=True, no_aug=config.no_aug, scale=(config.scale[0], config.scale[1]),
        ratio=(config.ratio[0], config.ratio[1]),
        hflip=config.hflip, vflip=config.vflip, color_jitter=config.color_jitter, auto_augment=config.aa,
        interpolation='random' if not config.no_aug else data_config['interpolation'], mean=data_config['mean'],
        std=data_config['std'], re_prob=config.reprob, re_mode='pixel')
    batch_size = min(config.batch_size, len(train_set.samples) // world)
    train_images = _Images(train_set.samples, train_transform, config.seed)
    # The sampler deals the shuffled images out one by one: batch k of all processes together holds the same images,
    # however many processes there are.
    train_loader = DataLoader(
        train_images, batch_size, num_workers=config.workers, drop_last=True,
        sampler=DistributedSampler(train_images, world, rank, shuffle=True, seed=config.seed, drop_last=True))
    val_loader = DataLoader(
        _Images(val_set.samples, create_transform(**data_config)), config.validation_batch_size or config.batch_size,
        num_workers=config.workers,
        sampler=range(rank, len(val_set.samples), world))
    return train_loader, val_loader


# Model, loss and resumption.


def _create_model(config: TrainConfig, num_classes: int) -> Any:
    overlay = dict(file=config.pretrained_path, num_classes=-1) if config.pretrained_path else None
    try:
        return timm.create_model(
            config.model, pretrained=config.pretrained or bool(config.pretrained_path), pretrained_cfg_overlay=overlay,
            num_classes=num_classes, drop_rate=config.drop, checkpoint_path=config.initial_checkpoint,
            **config.model_kwargs)
    except OSError as e:  # huggingface_hub's errors are among these
        source = config.pretrained_path or config.initial_checkpoint or f'the pretrained weights of {config.model}'
        raise TrainingError(
            f'{source} could not be loaded: {type(e).__name__} {e}\nCheck the path or the connection. Weights '
            f'downloaded elsewhere go in with --pretrained-path FILE.') from e


def _place_model(config: TrainConfig, model: Any, device: torch.device, world: int) -> None:
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if world > 1:
        if device.type == 'cpu':
            _convert_cpu_sync_batchnorm(model)
        else:
            convert_sync_batchnorm(model)


def _create_loss(config: TrainConfig, train_set: ImageFolder, num_classes: int) -> nn.Module:
    weight = torch.ones(num_classes)
    if config.class_weights:
        labels = torch.tensor([label for _, label in train_set.samples])
        counts = labels.bincount(minlength=num_classes).float()
        weight = counts.sum() / (num_classes * counts)
    return _WeightedCrossEntropy(weight, config.smoothing)


def _resume(checkpoint: str, task: ClassificationTask, optimizer: torch.optim.Optimizer) -> int:
    """Load model and optimizer, keep this run's own options of the optimizer, and give the next epoch."""
    if not Path(checkpoint).is_file():
        raise TrainingError(f'--resume {checkpoint}: there is no such file.')
    options = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
    try:
        start_epoch = resume_task_checkpoint(task, checkpoint, optimizer=optimizer, log_info=False) or 0
    except Exception as e:  # an unpickler's, a missing key, other shapes
        raise TrainingError(
            f'--resume {checkpoint} is no checkpoint that this training can go on from ({type(e).__name__}: '
            f'{str(e).splitlines()[0] if str(e) else ""}). Give --model and --model-kwargs of its args.yaml, or '
            f'start anew with --initial-checkpoint.') from e
    for group, now in zip(optimizer.param_groups, options, strict=True):
        group.pop('initial_lr', None)  # the schedule's; a run that failed is resumed with another --lr
        group.update(now)
    return start_epoch


class _WeightedCrossEntropy(nn.Module):
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
