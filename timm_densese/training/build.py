"""What a training is made of, ready to start: images, model, optimizer, schedule."""
import random
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ContextManager, Dict, List, Optional, Set, Tuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint
from timm.utils import random_seed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ..data.images import ImageFolder, list_images, read_image, start_worker
from ..errors import CheckpointFileError, OptionError, TrainingError
from ..files import printable
from ..models.untrusted import read_checkpoint
from ..options import option_errors
from ..recipes import read_recipe, recorded_images
from .config import TrainConfig
from .model import WeightedCrossEntropy, create_model, create_optimizer, place_model, resume_run, try_out

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
        recorded: What its checkpoints and args.yaml say of it: the options, the classes, the preprocessing, and the
            model as it is made without the Hub.
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
    recorded: Dict[str, Any]
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
        OptionError: An option cannot be used with the others.
        TrainingError: The folders do not hold what is needed, or the Hub cannot be reached.
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

    images = train_set.digest()
    random_seed(config.seed)
    model, data_config, made_of = create_model(config, len(classes))
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise OptionError(f'--model {config.model} is made without values; leave device out of --model-kwargs.')
    model.to(device)
    batch_size = min(config.batch_size, len(train_set.samples) // world)
    try_out(config, model, data_config, len(classes), batch_size * world)
    place_model(config, model, device, world)

    # Task and optimizer, in the order of timm's train.py.
    task = ClassificationTask(model, _create_loss(config, train_set, len(classes)), device=device, verbose=False)
    optimizer = create_optimizer(config, model)
    began_with = {**made_of, 'eval_metric': config.eval_metric, 'input_size': list(data_config['input_size']),
                  'validated_on': val_set.digest()}
    start_epoch = resume_run(config, task, optimizer, classes, images, began_with) if config.resume else 0
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
    with option_errors(f'--sched {config.sched}'):
        scheduler, _ = create_scheduler_v2(
            optimizer, sched=config.sched, num_epochs=config.epochs, decay_epochs=config.decay_epochs,
            decay_milestones=config.decay_milestones, decay_rate=config.decay_rate,
            warmup_epochs=config.warmup_epochs, warmup_lr=config.warmup_lr, min_lr=config.min_lr, step_on_epochs=False,
            updates_per_epoch=_updates_per_epoch(config, train_loader))
    recorded = {
        **asdict(config), **began_with, 'num_classes': len(classes), 'class_names': classes,
        'trained_on': _trained_on(config, images),
        **{k: list(v) if isinstance(v, tuple) else v for k, v in data_config.items()}}
    return Run(config, device, world, rank, classes, data_config, recorded, task, optimizer, scheduler, train_loader,
               val_loader, start_epoch)


def _trained_on(config: TrainConfig, images: str) -> List[Dict[str, Optional[str]]]:
    """The images that reach the weights: this run's, and those of the runs that it starts from."""
    found: Dict[str, Tuple[Path, Optional[str]]] = {images: (Path(config.data_dir) / config.train_split, images)}
    for file in map(Path, filter(None, (config.resume, config.initial_checkpoint, config.pretrained_path))):
        with suppress(CheckpointFileError):  # weights of others, which record nothing
            saved = {} if file.suffix == '.safetensors' else read_checkpoint(file)
            for folder, digest in recorded_images(read_recipe(file, saved)):
                found.setdefault(digest or str(folder), (folder, digest))
    return [{'folder': str(folder), 'images': digest} for folder, digest in found.values()]


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
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # workers, which live on, see it change
        self.told: Set[Path] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, int]:
        image, label = self._read(index)
        if self.seed is None:
            return self.transform(image), label
        seed = int(np.random.SeedSequence((self.seed, int(self.epoch), index)).generate_state(1)[0])
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
    # Workers live on from epoch to epoch: where processes are not forked, each takes seconds to start. A generator of
    # their own: starting them draws a number, and the model's dropout is not to depend on how often that happens.
    workers: Dict[str, Any] = {'num_workers': config.workers, 'persistent_workers': config.workers > 0,
                               'generator': torch.Generator(), 'worker_init_fn': start_worker}
    # The sampler deals the shuffled images out one by one: batch k of all processes together holds the same images,
    # however many processes there are.
    train_loader = DataLoader(
        train_images, batch_size, drop_last=True, **workers,
        sampler=DistributedSampler(train_images, world, rank, shuffle=True, seed=config.seed, drop_last=True))
    val_loader = DataLoader(
        _Images(val_set.samples, create_transform(**data_config)), config.validation_batch_size or config.batch_size,
        **workers, sampler=range(rank, len(val_set.samples), world))
    return train_loader, val_loader


def _create_loss(config: TrainConfig, train_set: ImageFolder, num_classes: int) -> nn.Module:
    weight = torch.ones(num_classes)
    if config.class_weights:
        labels = torch.tensor([label for _, label in train_set.samples])
        counts = labels.bincount(minlength=num_classes).float()
        weight = counts.sum() / (num_classes * counts)
    return WeightedCrossEntropy(weight, config.smoothing)
