"""The embedded fine-tuning loop, built from timm's parts.

Option names are those of timm's train.py. What an epoch does depends on the seed and the epoch alone, not on workers,
processes or interruptions: each sample's augmentation has its own seed. So a resumed run gives an uninterrupted run's
result, bit for bit on a CPU, and several processes give one process's, up to float error.
"""
import argparse
import csv
import math
import os
import random
import shutil
import sys
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import yaml
from filelock import FileLock, Timeout  # comes with huggingface_hub, as tqdm does
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform, resolve_data_config
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, dispatch_clip_grad, init_distributed_device, random_seed, update_summary
from timm.utils.summary import trim_summary
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm import tqdm

from .data.images import read_image
from .errors import TrainingError

__all__ = ['TrainConfig', 'predict', 'train']


def _option(default: Any, help: str) -> Any:
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={'help': help})
    return field(default=default, metadata={'help': help})


@dataclass
class TrainConfig:
    """What to train and how. The defaults suit a few hundred images and pretrained weights.

    The names are those of timm's train.py, except for `patience` and `class_weights`, which it does not have.
    """
    data_dir: str = _option('', 'folder with train/CLASS/ and val/CLASS/')
    output: str = _option('', 'folder to write checkpoints, summary.csv and curves to')
    train_split: str = _option('train', 'folder of the images to train on, in the data folder')
    val_split: str = _option('val', 'folder of the images to validate on')
    model: str = _option('se_densenet121', 'name of any model of timm or of this package')
    model_kwargs: Dict[str, Any] = _option({}, 'arguments of the model, name=value ...')
    pretrained: bool = _option(False, 'start from pretrained weights')
    pretrained_path: str = _option('', 'file to take as the pretrained weights')
    initial_checkpoint: str = _option('', 'file to load into the model after it is created')
    resume: str = _option('', 'checkpoint to go on from, usually OUTPUT/last.pth.tar')
    img_size: Optional[int] = _option(None, "image height and width (default: the model's)")
    batch_size: int = _option(16, 'images a batch, in each process')
    validation_batch_size: Optional[int] = _option(None, 'images a batch when validating (default: batch size)')
    grad_accum_steps: int = _option(1, 'batches whose gradients make one update')
    grad_checkpointing: bool = _option(False, 'save memory in training')
    channels_last: bool = _option(True, 'keep feature maps in the channels_last layout')
    torchcompile: bool = _option(False, 'compile the model')
    device: str = _option('', 'device (default: cuda where there is one, else cpu)')
    amp: bool = _option(False, 'mixed precision with bfloat16')
    epochs: int = _option(30, 'passes over the images')
    opt: str = _option('adamw', "optimizer, by timm's name")
    lr: float = _option(1e-3, 'learning rate of the classifier')
    weight_decay: float = _option(0.05, 'weight decay, not applied to biases and norms')
    layer_decay: Optional[float] = _option(0.9, 'factor on the learning rate from each layer to the one before it')
    clip_grad: Optional[float] = _option(None, 'largest norm of the gradient')
    sched: str = _option('cosine', "learning rate schedule, by timm's name")
    warmup_epochs: int = _option(2, 'epochs over which the learning rate rises')
    warmup_lr: float = _option(1e-6, 'learning rate at the start of the warm-up')
    min_lr: float = _option(0., 'learning rate at the end')
    no_aug: bool = _option(False, 'do not augment')
    scale: List[float] = _option([0.35, 1.], 'least and largest area of a random crop')
    ratio: List[float] = _option([3 / 4, 4 / 3], 'least and largest aspect ratio of a random crop')
    hflip: float = _option(0.5, 'probability of a horizontal flip')
    vflip: float = _option(0., 'probability of a vertical flip')
    color_jitter: float = _option(0.3, 'strength of the colour jitter, where aa is not set')
    aa: Optional[str] = _option('rand-m6-mstd0.5-inc1', "automatic augmentation, by timm's name")
    reprob: float = _option(0.1, 'probability of erasing a random rectangle')
    smoothing: float = _option(0.1, 'label smoothing')
    class_weights: bool = _option(True, 'weigh each class by the inverse of its share')
    drop: float = _option(0., 'dropout before the classifier')
    model_ema: bool = _option(True, 'also keep, and evaluate, a moving average of the weights')
    model_ema_decay: float = _option(0.98, 'decay of the average')
    model_ema_warmup: bool = _option(True, 'reach the decay gradually')
    eval_metric: str = _option('loss', 'metric that chooses the best epoch: loss, top1 or balanced_top1')
    patience: int = _option(10, 'epochs without a better metric after which training stops, 0 for never')
    seed: int = _option(42, 'seed')
    workers: int = _option(2, 'processes that load images')


# Data.


class _Images(Dataset):
    """Images of a split, read as predictions read them; one that cannot be read gives its place to the next.

    With a seed, each is augmented from a seed of its own, so that the order and place of loading do not matter.
    """

    def __init__(self, dataset: ImageDataset, transform: Any, seed: Optional[int] = None) -> None:
        self.samples: List[Tuple[str, int]] = dataset.reader.samples
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        self.told: Set[str] = set()

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
                    print(f'not readable, the next image takes its place: {path} ({type(e).__name__}: {e})',
                          file=sys.stderr)
        raise TrainingError(f'None of the {len(self)} images can be read.')


def _open_split(config: TrainConfig, split: str) -> ImageDataset:
    folder = Path(config.data_dir) / split
    if not folder.is_dir():
        raise TrainingError(
            f'{folder} is not there. Make train/, val/ and test/ from a folder of class folders with: '
            f'timm-densese data split SRC --out DIR')
    try:
        return create_dataset('', root=str(config.data_dir), split=split)
    except RuntimeError as e:
        raise TrainingError(f'{folder} holds no images in class folders ({e}).') from e


def _create_loaders(
        config: TrainConfig,
        data_config: Dict[str, Any],
        train_set: ImageDataset,
        val_set: ImageDataset,
        world: int,
        rank: int,
) -> Tuple[DataLoader, DataLoader]:
    train_transform = create_transform(
        data_config['input_size'], is_training=True, no_aug=config.no_aug, scale=(config.scale[0], config.scale[1]),
        ratio=(config.ratio[0], config.ratio[1]),
        hflip=config.hflip, vflip=config.vflip, color_jitter=config.color_jitter, auto_augment=config.aa,
        interpolation='random' if not config.no_aug else data_config['interpolation'], mean=data_config['mean'],
        std=data_config['std'], re_prob=config.reprob, re_mode='pixel')
    batch_size = min(config.batch_size, len(train_set) // world)
    # The sampler deals the shuffled images out one by one: batch k of all processes together holds the same images,
    # however many processes there are.
    train_loader = DataLoader(
        _Images(train_set, train_transform, config.seed), batch_size, num_workers=config.workers, drop_last=True,
        sampler=DistributedSampler(train_set, world, rank, shuffle=True, seed=config.seed, drop_last=True))
    val_loader = DataLoader(
        _Images(val_set, create_transform(**data_config)), config.validation_batch_size or config.batch_size,
        num_workers=config.workers,
        sampler=range(rank, len(val_set), world))
    return train_loader, val_loader


# Loss and metrics.


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


@torch.inference_mode()
def predict(
        model: nn.Module,
        loader: DataLoader,
        device: torch.device,
        autocast: Any = nullcontext,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Run a model over a loader, and over its parts in all processes.

    Args:
        model: Model, put in eval mode.
        loader: Batches of images (B, C, H, W) and labels (B,).
        device: Where to run it.
        autocast: Gives the context to run it in.

    Returns:
        Logits (N, num_classes) in float32 and labels (N,), on the CPU. Several processes change their order.
    """
    model.eval()
    logits, labels = [], []
    for images, targets in loader:
        with autocast():
            logits.append(model(images.to(device)).float().cpu())
        labels.append(targets)
    part = (torch.cat(logits), torch.cat(labels)) if logits else None
    if not dist.is_initialized():
        assert part is not None, 'no images'
        return part
    parts: List[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    parts = [p for p in parts if p is not None]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _metrics(logits: torch.Tensor, labels: torch.Tensor) -> Dict[str, float]:
    right = (logits.argmax(1) == labels).double()
    recalls = [right[labels == label].mean() for label in labels.unique()]
    return {
        'loss': F.cross_entropy(logits.double(), labels).item(),
        'top1': 100 * right.mean().item(),
        'balanced_top1': 100 * torch.stack(recalls).mean().item(),
    }


# Several processes.


# torch's SyncBatchNorm, which does this, refuses CPUs.


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


# The loop.


def train(config: TrainConfig) -> Dict[str, Any]:
    """Fine-tune a model.

    Under torchrun, each process calls this; gradients and batch norm statistics are those of the global batch. The
    output folder gets `args.yaml`, `summary.csv`, `curves.png`, and in timm's format `last.pth.tar` and
    `model_best.pth.tar`. A file appears under its name when it is whole.

    Args:
        config: What to train and how.

    Returns:
        `classes`, the validation metrics `before` training and of the `best` epoch, and `best_epoch`.

    Raises:
        TrainingError: The folders do not hold what is needed, the output folder holds another training, or the loss
            is not finite.
    """
    if not config.output:
        raise TrainingError('Give --output: a folder for the checkpoints.')
    args = argparse.Namespace(device=config.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    device = init_distributed_device(args)
    try:
        with ExitStack() as stack:
            return _train(config, device, args.world_size, args.rank, stack)
    except Timeout as e:
        raise TrainingError(
            f'Another training is writing to {config.output}. Wait for it, or choose another --output.') from e
    finally:
        if args.distributed:
            dist.destroy_process_group()


def _train(config: TrainConfig, device: torch.device, world: int, rank: int, stack: ExitStack) -> Dict[str, Any]:
    primary = rank == 0
    output = Path(config.output)
    if (output / 'last.pth.tar').exists() and not config.resume:
        raise TrainingError(
            f'{output} holds a training already. Go on with --resume {output / "last.pth.tar"}, or choose another '
            f'--output.')
    if config.eval_metric not in ('loss', 'top1', 'balanced_top1'):
        raise TrainingError(f'--eval-metric {config.eval_metric!r} is not one of loss, top1, balanced_top1.')

    # Data.
    train_set, val_set = _open_split(config, config.train_split), _open_split(config, config.val_split)
    classes = list(train_set.reader.class_to_idx)
    if len(classes) < 2 or classes != list(val_set.reader.class_to_idx):
        raise TrainingError(
            f'{config.train_split}/ and {config.val_split}/ in {config.data_dir} must hold the same two or more '
            f'classes; found {classes} and {list(val_set.reader.class_to_idx)}.')
    if len(train_set) < 2 * world:
        raise TrainingError(f'{config.train_split}/ holds {len(train_set)} images, too few for {world} processes.')

    # Model.
    random_seed(config.seed)
    overlay = dict(file=config.pretrained_path, num_classes=-1) if config.pretrained_path else None
    try:
        model: Any = timm.create_model(
            config.model, pretrained=config.pretrained or bool(config.pretrained_path), pretrained_cfg_overlay=overlay,
            num_classes=len(classes), drop_rate=config.drop, checkpoint_path=config.initial_checkpoint,
            **config.model_kwargs)
    except OSError as e:  # huggingface_hub's errors are among these
        source = config.pretrained_path or config.initial_checkpoint or f'the pretrained weights of {config.model}'
        raise TrainingError(
            f'{source} could not be loaded: {type(e).__name__} {e}\nCheck the path or the connection. Weights '
            f'downloaded elsewhere go in with --pretrained-path FILE.') from e
    size = {'img_size': config.img_size} if config.img_size else {}
    data_config = resolve_data_config(size, model=model)
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if world > 1:
        if device.type == 'cpu':
            _convert_cpu_sync_batchnorm(model)
        else:
            model = convert_sync_batchnorm(model)

    # Task and optimizer, in the order of timm's train.py.
    labels = torch.tensor([label for _, label in train_set.reader.samples])
    counts = labels.bincount(minlength=len(classes)).float()
    weight = counts.sum() / (len(classes) * counts) if config.class_weights else torch.ones(len(classes))
    task = ClassificationTask(model, _WeightedCrossEntropy(weight, config.smoothing), device=device, verbose=False)
    optimizer = create_optimizer_v2(
        model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    start_epoch = 0
    if config.resume:
        options_now = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
        if not Path(config.resume).is_file():
            raise TrainingError(f'--resume {config.resume}: there is no such file.')
        try:
            start_epoch = resume_task_checkpoint(task, config.resume, optimizer=optimizer, log_info=False) or 0
        except Exception as e:  # an unpickler's, a missing key, other shapes
            raise TrainingError(
                f'--resume {config.resume} is no checkpoint that this training can go on from ({type(e).__name__}: '
                f'{str(e).splitlines()[0] if str(e) else ""}). Give --model and --model-kwargs of its args.yaml, or '
                f'start anew with --initial-checkpoint.') from e
        for group, now in zip(optimizer.param_groups, options_now, strict=True):
            group.pop('initial_lr', None)  # the schedule's; a run that failed is resumed with another --lr
            group.update(now)
    if config.model_ema:
        task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
        if config.resume:
            load_task_ema_checkpoint(task, config.resume)
    if config.torchcompile:
        task.compile()
    if world > 1:
        # Buffers need no broadcast: the synchronised batch norms keep them equal.
        task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None, broadcast_buffers=False)
    eval_model: Any = task.get_eval_model(ema=config.model_ema)

    train_loader, val_loader = _create_loaders(config, data_config, train_set, val_set, world, rank)
    updates_per_epoch = -(-len(train_loader) // config.grad_accum_steps)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=config.sched, num_epochs=config.epochs, warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr, min_lr=config.min_lr, step_on_epochs=False, updates_per_epoch=updates_per_epoch)

    def autocast() -> Any:
        return torch.autocast(device.type, torch.bfloat16) if config.amp else nullcontext()

    if primary:
        output.mkdir(parents=True, exist_ok=True)
        stack.enter_context(FileLock(output / '.lock', timeout=0))  # the system frees it when the process dies

    # Records. One process reads what is there and tells the others, so that all stop after the same epoch.
    found = [_best_so_far(config, output, start_epoch) if config.resume and primary else None]
    if world > 1:
        dist.broadcast_object_list(found)
    best = found[0]
    saver: Optional[CheckpointSaver] = None
    board: Any = None
    if primary:
        options = asdict(config)
        (output / 'args.yaml').write_text(yaml.safe_dump(
            {**options, 'num_classes': len(classes), 'class_names': classes,
             **{k: list(data_config[k]) for k in ('input_size', 'mean', 'std')}}, sort_keys=False))
        saver = CheckpointSaver(
            model, optimizer, argparse.Namespace(**options), checkpoint_dir=str(output),
            decreasing=config.eval_metric == 'loss', max_history=1, task=task)
        if best:
            # A kill may have come between last.pth.tar and model_best.pth.tar.
            saver.best_epoch, saver.best_metric = best['epoch'], best[config.eval_metric]
            if best['epoch'] == start_epoch - 1:
                with _writing(output, 'The best checkpoint'):
                    shutil.copyfile(config.resume, output / 'tmp.pth.tar')
                    os.replace(output / 'tmp.pth.tar', output / 'model_best.pth.tar')
        trim_summary(str(output / 'summary.csv'), start_epoch)
        try:
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(str(output), purge_step=start_epoch)
        except ImportError:
            pass

    before = None if config.resume else _metrics(*predict(eval_model, val_loader, device, autocast))
    for epoch in range(start_epoch, config.epochs):
        if best and config.patience and epoch - best['epoch'] > config.patience:
            if primary:
                print(f'No better {config.eval_metric} in {config.patience} epochs: stopped after epoch {epoch - 1}.')
            break
        train_loss = _train_epoch(
            config, epoch, task, train_loader, optimizer, scheduler, device, autocast, updates_per_epoch, primary)
        metrics = _metrics(*predict(eval_model, val_loader, device, autocast))
        if not math.isfinite(metrics['loss']):
            raise TrainingError(
                f'The validation loss is {metrics["loss"]} after epoch {epoch}, which is not saved. Lower --lr or set '
                f'--clip-grad.')
        sign = -1 if config.eval_metric == 'loss' else 1
        if best is None or sign * metrics[config.eval_metric] > sign * best[config.eval_metric]:
            best = {'epoch': epoch, **metrics}
        if primary:
            lr = max(group['lr'] for group in optimizer.param_groups)
            # The summary before the checkpoint: where a kill comes between them, resuming trims the extra row.
            assert saver is not None
            with _writing(output, f'Epoch {epoch}'):
                update_summary(epoch, {'loss': train_loss}, metrics, str(output / 'summary.csv'), lr=lr)
                saver.save_checkpoint(epoch, metrics[config.eval_metric])
            print(f'epoch {epoch}: train loss {train_loss:.4f}, val loss {metrics["loss"]:.4f}, '
                  f'top1 {metrics["top1"]:.1f}%, balanced {metrics["balanced_top1"]:.1f}%'
                  f'{" (best)" if best["epoch"] == epoch else ""}')
            if board:
                for name, value in {'train/loss': train_loss, 'lr': lr,
                                    **{f'val/{k}': v for k, v in metrics.items()}}.items():
                    board.add_scalar(name, value, epoch)
    if primary:
        if board:
            board.close()
        _draw_curves(output)
    if best is None:
        raise TrainingError(f'{config.resume} has been trained for {config.epochs} epochs already. Raise --epochs.')
    return {'classes': classes, 'before': before, 'best_epoch': best.pop('epoch'), 'best': best}


@contextmanager
def _writing(output: Path, what: str) -> Iterator[None]:
    """Say what to do where a file cannot be written; a half-written one does not stay."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch's writer says RuntimeError of a full disk
        with suppress(OSError):
            (output / 'tmp.pth.tar').unlink()
        raise TrainingError(
            f'{what} could not be written to {output}, where {shutil.disk_usage(output).free / 1e6:.0f} MB are free: '
            f'{str(e).splitlines()[0]}\nThe checkpoints of earlier epochs are whole. Make room and go on with '
            f'--resume {output / "last.pth.tar"}.') from e


def _train_epoch(
        config: TrainConfig,
        epoch: int,
        task: ClassificationTask,
        loader: DataLoader,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        device: torch.device,
        autocast: Any,
        updates_per_epoch: int,
        primary: bool,
) -> float:
    """Train for one epoch; the mean loss, over all processes."""
    random_seed(config.seed, epoch)
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    loader.dataset.epoch = epoch  # type: ignore[attr-defined]
    model: Any = task.get_trainable_module()
    model.train()
    optimizer.zero_grad()
    total = 0.
    update = epoch * updates_per_epoch
    with tqdm(total=len(loader), desc=f'epoch {epoch}', unit='batch', disable=not primary) as progress:
        for i, (images, labels) in enumerate(loader):
            first = i - i % config.grad_accum_steps
            accumulated = min(config.grad_accum_steps, len(loader) - first)
            last = i == first + accumulated - 1
            if i == first:
                scheduler.step_update(update)
            images, labels = images.to(device), labels.to(device)
            if config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with nullcontext() if last else task.no_sync():
                with autocast():
                    loss = task(images, labels)['loss']
                if not torch.isfinite(loss):
                    raise TrainingError(
                        f'The loss is {loss.item()} in batch {i} of epoch {epoch}. Lower --lr, set --clip-grad, or '
                        f'look at the images. Checkpoints of earlier epochs are as they were.')
                (loss / accumulated).backward()
            if last:
                if config.clip_grad is not None:
                    dispatch_clip_grad(model.parameters(), config.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
                update += 1
                task.update_ema(step=update)
            total += loss.item()
            lr = max(group['lr'] for group in optimizer.param_groups)
            progress.set_postfix(loss=f'{total / (i + 1):.4f}', lr=f'{lr:.1e}', refresh=False)
            progress.update()
    mean = torch.tensor(total / len(loader), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.item()


def _read_summary(output: Path) -> List[Dict[str, float]]:
    with open(output / 'summary.csv', newline='') as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _best_so_far(config: TrainConfig, output: Path, start_epoch: int) -> Optional[Dict[str, Any]]:
    """Read the best epoch back from the summary of the training that is resumed."""
    if not (output / 'summary.csv').exists():
        return None
    rows = [row for row in _read_summary(output) if row['epoch'] < start_epoch]
    if not rows:
        return None
    key = f'eval_{config.eval_metric}'
    row = min(rows, key=lambda r: r[key]) if config.eval_metric == 'loss' else max(rows, key=lambda r: r[key])
    return {'epoch': int(row['epoch']), **{k: row[f'eval_{k}'] for k in ('loss', 'top1', 'balanced_top1')}}


def _draw_curves(output: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print('curves.png is left out: matplotlib is missing (pip install timm-densese[report]).', file=sys.stderr)
        return
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    rows = _read_summary(output)
    epochs = [row['epoch'] for row in rows]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout='constrained')
    for key, label in (('train_loss', 'train'), ('eval_loss', 'validation')):
        left.plot(epochs, [row[key] for row in rows], label=label)
    for key, label in (('eval_top1', 'top-1'), ('eval_balanced_top1', 'balanced')):
        right.plot(epochs, [row[key] for row in rows], label=label)
    left.set(xlabel='epoch', ylabel='loss')
    right.set(xlabel='epoch', ylabel='validation accuracy (%)')
    left.legend()
    right.legend()
    partial = output / '.curves.png'
    fig.savefig(partial, dpi=100, format='png')
    os.replace(partial, output / 'curves.png')
    plt.close(fig)
