"""The embedded fine-tuning loop, built from timm's parts."""
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import ClassificationTask
from timm.utils import AverageMeter, accuracy
from torch.utils.data import DataLoader
from tqdm import tqdm  # comes with huggingface_hub

__all__ = ['evaluate', 'fine_tune']


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader) -> float:
    """Measure the share of a loader's images that the model classifies right, in percent."""
    model.eval()
    top1 = AverageMeter()
    for images, labels in loader:
        top1.update(accuracy(model(images), labels)[0].item(), len(labels))
    return top1.avg


def fine_tune(
        model: nn.Module,
        train_loader: DataLoader,
        val_loader: DataLoader,
        epochs: int,
        lr: float,
) -> torch.optim.Optimizer:
    """Fine-tune a model with AdamW, layer-wise learning rates and a cosine schedule, showing progress.

    Args:
        model: Model, changed in place.
        train_loader: Batches of images (B, C, H, W) and labels (B,) to train on.
        val_loader: Batches to measure the accuracy on after each epoch.
        epochs: Passes over `train_loader`.
        lr: Learning rate of the classifier; it falls by 0.9 a layer group towards the stem.

    Returns:
        The optimizer, whose state goes into a checkpoint.
    """
    task = ClassificationTask(model, criterion_kwargs=dict(smoothing=0.1), verbose=False)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=lr, weight_decay=0.05, layer_decay=0.9)
    updates = epochs * len(train_loader)
    scheduler = CosineLRScheduler(optimizer, t_initial=updates, warmup_t=updates // 10, t_in_epochs=False)
    scheduler.step_update(0)
    step = 0
    for epoch in range(epochs):
        model.train()
        losses = AverageMeter()
        with tqdm(total=len(train_loader), desc=f'epoch {epoch + 1}/{epochs}', unit='batch') as progress:
            for images, labels in train_loader:
                loss = task(images, labels)['loss']
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                scheduler.step_update(step)
                losses.update(loss.item(), len(labels))
                progress.set_postfix(loss=f'{losses.avg:.3f}', refresh=False)
                progress.update()
            top1 = evaluate(model, val_loader)
            progress.set_postfix(loss=f'{losses.avg:.3f}', held_out=f'{top1:.1f}%')
    return optimizer
