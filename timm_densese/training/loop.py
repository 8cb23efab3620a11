"""The loop: epochs, validation, the best one."""
import argparse
import math
import sys
from contextlib import ExitStack, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import dispatch_clip_grad, init_distributed_device, random_seed
from torch.utils.data import DataLoader
from tqdm import tqdm  # comes with huggingface_hub

from ..errors import OptionError, TrainingError, TrainingFinishedError
from ..files import check_writable
from .build import Run, build_run
from .config import TrainConfig
from .records import LOCK, WRITTEN, Records, describe_start

__all__ = ['train', 'validate']


def train(config: TrainConfig) -> Dict[str, Any]:
    """Fine-tune a model.

    Under torchrun, each process calls this; gradients and batch norm statistics are those of the global batch. The
    output folder gets `args.yaml`, `summary.csv`, `curves.png`, and in timm's format `last.pth.tar` and
    `model_best.pth.tar`. A file appears under its name when it is whole.

    Args:
        config: What to train and how.

    Returns:
        `classes`, the validation metrics `before` training and of the `best` epoch, and `best_epoch`. A dry run has
        `classes` alone.

    Raises:
        OptionError: An option cannot be used, alone or with the others.
        TrainingError: The folders do not hold what is needed, the output folder holds another training, or the loss
            is not finite.
    """
    if not config.data_dir:
        raise OptionError('Give the folder of the images: timm-densese train DIR --output OUTPUT.')
    if not config.output:
        raise OptionError('Give --output: a folder for the checkpoints.')
    args = argparse.Namespace(device=config.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    device = init_distributed_device(args)
    try:
        return _train(config, device, args.world_size, args.rank)
    except KeyboardInterrupt:
        last = Path(config.output) / 'last.pth.tar'
        raise KeyboardInterrupt(
            f'Go on with --resume {last}' if last.exists() else 'No epoch was done: start it again.') from None
    finally:
        if args.distributed:
            dist.destroy_process_group()


def _train(config: TrainConfig, device: torch.device, world: int, rank: int) -> Dict[str, Any]:
    last = Path(config.output) / 'last.pth.tar'
    if last.exists() and not config.resume:
        raise TrainingError(
            f'{config.output} holds a training already. Go on with --resume {last}, or choose another --output.')
    check_writable(Path(config.output), '--output')
    # A training that was stopped before its first checkpoint has left its lock, and no curves.
    foreign = [name for name in WRITTEN if (Path(config.output) / name).exists()]
    lines = (Path(config.output) / 'summary.csv').read_bytes().splitlines() if 'summary.csv' in foreign else []
    if (Path(config.output) / LOCK).exists() and 'curves.png' not in foreign and len(lines) <= 2:
        foreign = [name for name in foreign if name.endswith('.tar')]
    if foreign and not config.resume:
        raise TrainingError(f'{config.output} holds {", ".join(foreign)}, which would be written over. Choose another '
                            f'--output.')
    run = build_run(config, device, world, rank)
    if rank == 0:
        print(describe_start(run))
    if config.dry_run:
        loss = _train_epoch(run, run.start_epoch, batches=1)
        if rank == 0:
            print(f'Dry run: one batch was trained on, with the loss {loss:.4f}. Nothing was written.')
        return {'classes': run.classes}
    with ExitStack() as stack:
        records: Optional[Records] = None
        if rank == 0:
            records = Records(run)
            stack.callback(records.close)
        # One process has read what is there and tells the others, so that all stop after the same epoch.
        found = [records.best if records else None]
        if world > 1:
            dist.broadcast_object_list(found)
        return _run_epochs(run, records, found[0])


def _run_epochs(run: Run, records: Optional[Records], best: Optional[Dict[str, Any]]) -> Dict[str, Any]:
    config = run.config
    model: Any = run.task.get_eval_model(ema=config.model_ema)

    def measure() -> Dict[str, float]:
        return _metrics(*validate(model, run.val_loader, run.device, run.autocast))

    before = None if config.resume else measure()
    for epoch in range(run.start_epoch, config.epochs):
        if best and config.patience and epoch - best['epoch'] > config.patience:
            if records:
                print(f'No better {config.eval_metric} in {config.patience} epochs: stopped after epoch {epoch - 1}.')
            break
        train_loss = _train_epoch(run, epoch)
        metrics = measure()
        if not math.isfinite(metrics['loss']):
            raise TrainingError(
                f'The validation loss is {metrics["loss"]} after epoch {epoch}, which is not saved. Lower --lr or set '
                f'--clip-grad.')
        sign = -1 if config.eval_metric == 'loss' else 1
        if best is None or sign * metrics[config.eval_metric] > sign * best[config.eval_metric]:
            best = {'epoch': epoch, **metrics}
        if records:
            records.save_epoch(epoch, train_loss, _largest_lr(run), metrics)
            print(f'epoch {epoch}: train loss {train_loss:.4f}, val loss {metrics["loss"]:.4f}, '
                  f'top1 {metrics["top1"]:.1f}%, balanced {metrics["balanced_top1"]:.1f}%'
                  f'{" (best)" if best["epoch"] == epoch else ""}')
    if records and best:
        records.draw_curves()
    if run.start_epoch >= config.epochs or best is None:
        raise TrainingFinishedError(
            f'--resume {config.resume} is finished: {run.start_epoch} epochs are done, and --epochs is '
            f'{config.epochs}. To train it further, raise --epochs.')
    if records:
        print(records.describe_end(best))
    return {'classes': run.classes, 'before': before, 'best_epoch': best.pop('epoch'), 'best': best}


def _largest_lr(run: Run) -> float:
    return max(group['lr'] for group in run.optimizer.param_groups)


def _train_epoch(run: Run, epoch: int, batches: int = sys.maxsize) -> float:
    """Train for one epoch, or some batches of it; the mean loss, over all processes."""
    config, task, loader = run.config, run.task, run.train_loader
    random_seed(config.seed, epoch)
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    loader.dataset.epoch.fill_(epoch)  # type: ignore[attr-defined]
    model: Any = task.get_trainable_module()
    model.train()
    run.optimizer.zero_grad()
    total = 0.
    update = epoch * run.updates_per_epoch
    batches = min(batches, len(loader))
    with tqdm(total=batches, desc=f'epoch {epoch}', unit='batch', disable=run.rank > 0) as progress:
        for i, (images, labels) in enumerate(islice(loader, batches)):
            first = i - i % config.grad_accum_steps
            accumulated = min(config.grad_accum_steps, batches - first)
            last = i == first + accumulated - 1
            if i == first:
                run.scheduler.step_update(update)
            images, labels = images.to(run.device), labels.to(run.device)
            if config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with nullcontext() if last else task.no_sync():
                with run.autocast():
                    loss = task(images, labels)['loss']
                if not torch.isfinite(loss):
                    raise TrainingError(
                        f'The loss is {loss.item()} in batch {i} of epoch {epoch}. Lower --lr, set --clip-grad, or '
                        f'look at the images. Checkpoints of earlier epochs are as they were.')
                (loss / accumulated).backward()
            if last:
                if config.clip_grad is not None:
                    dispatch_clip_grad(model.parameters(), config.clip_grad)
                run.optimizer.step()
                run.optimizer.zero_grad()
                update += 1
                task.update_ema(step=update)
            total += loss.item()
            progress.set_postfix(loss=f'{total / (i + 1):.4f}', lr=f'{_largest_lr(run):.1e}', refresh=False)
            progress.update()
    mean = torch.tensor(total / batches, dtype=torch.float64, device=run.device)
    if run.world > 1:
        dist.all_reduce(mean)
        mean /= run.world
    return mean.item()


# Validation.


@torch.inference_mode()
def validate(
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
