"""What a training leaves in its folder: options, checkpoints, summary.csv, TensorBoard, curves."""
import argparse
import csv
import io
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import yaml
from filelock import FileLock, Timeout  # comes with huggingface_hub
from timm.utils import CheckpointSaver, update_summary
from timm.utils.summary import trim_summary

from ..errors import TrainingError
from ..files import replace_file
from ..options import option_errors
from .build import Run

__all__ = ['LOCK', 'WRITTEN', 'Records', 'describe_start']

LOCK = '.lock'
WRITTEN = ('args.yaml', 'summary.csv', 'curves.png', 'model_best.pth.tar')  # beside last.pth.tar


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done.

    TensorBoard writes by a queue. An interrupt within one of the queue's calls can lose what they wait for, and closing
    it then hangs for two minutes.
    """
    if threading.current_thread() is not threading.main_thread():  # the only one that Ctrl-C interrupts
        yield
        return
    pressed = []
    handler = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def describe_start(run: Run) -> str:
    """Say what will be trained: images by class and split, device, weights, size."""
    config = run.config
    columns: List[Any] = [run.train_loader.dataset, run.val_loader.dataset]
    counts = [Counter(label for _, label in images.samples) for images in columns]
    rows = [['class', config.train_split, config.val_split]]
    rows += [[name, *(str(count[i]) for count in counts)] for i, name in enumerate(run.classes)]
    width = max(len(row[0]) for row in rows)
    lines = [f'{row[0]:{width}}' + ''.join(f'  {cell:>{len(rows[0][i])}}' for i, cell in enumerate(row[1:], 1))
             for row in rows]
    if config.resume:
        weights = f'{config.resume}, from epoch {run.start_epoch} on'
    elif config.initial_checkpoint or config.pretrained_path:
        weights = f'the weights of {config.initial_checkpoint or config.pretrained_path}'
    else:
        weights = 'its pretrained weights' if config.pretrained else 'RANDOM weights'
    model: Any = run.task.get_trainable_module()
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(n for n, wanted in parameters if wanted)
    height, width = run.data_config['input_size'][1:]
    lines.append(
        f'{config.model}, starting from {weights}: {trained / 1e6:.2f} of {sum(n for n, _ in parameters) / 1e6:.2f} M '
        f'parameters are trained, on {run.device}, at {height}x{width} pixels, for up to {config.epochs} epochs of '
        f'{len(run.train_loader)} batches.')
    return '\n'.join(lines)


class Records:
    """The folder of a training. One process writes it, and holds it until it closes it.

    Args:
        run: Training that starts or goes on.

    Attributes:
        best: Epoch and metrics of the best epoch so far, None where there is none.

    Raises:
        TrainingError: Another training is writing there, or the disk is full.
    """

    def __init__(self, run: Run) -> None:
        config = run.config
        self.output = Path(config.output)
        with option_errors(f'--output {config.output}'):
            self.output.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.output / LOCK, timeout=0)  # the system frees it when the process dies
        try:
            self._lock.acquire()
        except Timeout as e:
            raise TrainingError(
                f'Another training is writing to {config.output}. Wait for it, or choose another --output.') from e
        self._metric = config.eval_metric
        self._data = config.data_dir
        self.best = self._best_before(run.start_epoch) if config.resume else None

        with self._writing('args.yaml'):
            replace_file(self.output / 'args.yaml', yaml.safe_dump(run.recorded, sort_keys=False, allow_unicode=True))
        self._saver = CheckpointSaver(
            run.task.get_eval_model(ema=False), run.optimizer, argparse.Namespace(**run.recorded),
            checkpoint_dir=config.output, decreasing=self._metric == 'loss', max_history=1, task=run.task)
        if self.best:
            # A kill may have come between last.pth.tar and model_best.pth.tar.
            self._saver.best_epoch, self._saver.best_metric = self.best['epoch'], self.best[self._metric]
            if self.best['epoch'] == run.start_epoch - 1:
                with self._writing('The best checkpoint'):
                    shutil.copyfile(config.resume, self.output / 'tmp.pth.tar')
                    os.replace(self.output / 'tmp.pth.tar', self.output / 'model_best.pth.tar')
        trim_summary(str(self.output / 'summary.csv'), run.start_epoch)
        self._board: Any = None
        with suppress(ImportError), _ctrl_c_waits():
            from torch.utils.tensorboard import SummaryWriter
            self._board = SummaryWriter(config.output, purge_step=run.start_epoch)

    @_ctrl_c_waits()
    def save_epoch(self, epoch: int, train_loss: float, lr: float, metrics: Dict[str, float]) -> None:
        """Write an epoch: the summary before the checkpoint, so that where a kill comes between them, resuming trims
        the extra row."""
        with self._writing(f'Epoch {epoch}'):
            update_summary(epoch, {'loss': train_loss}, metrics, str(self.output / 'summary.csv'), lr=lr)
            self._saver.save_checkpoint(epoch, metrics[self._metric])
        if self._board:
            for name, value in {'train/loss': train_loss, 'lr': lr,
                                **{f'val/{k}': v for k, v in metrics.items()}}.items():
                self._board.add_scalar(name, value, epoch)

    def describe_end(self, best: Dict[str, Any]) -> str:
        """Say what came out of the training and what to do with it."""
        checkpoint = self.output / 'model_best.pth.tar'
        return (
            f'Best epoch: {best["epoch"]}, val loss {best["loss"]:.4f}, top1 {best["top1"]:.1f}%, balanced '
            f'{best["balanced_top1"]:.1f}%.\nCheckpoint: {checkpoint}\nNext: timm-densese evaluate {checkpoint} '
            f'{self._data} --output {self.output / "report"}')

    @_ctrl_c_waits()
    def close(self) -> None:
        """Leave the folder to others."""
        if self._board:
            self._board.close()
        self._lock.release()

    def _read_summary(self) -> List[Dict[str, float]]:
        with open(self.output / 'summary.csv', newline='') as file:
            return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]

    def _best_before(self, start_epoch: int) -> Optional[Dict[str, Any]]:
        """Read the best epoch back from the summary of the training that is resumed."""
        if not (self.output / 'summary.csv').exists():
            return None
        rows = [row for row in self._read_summary() if row['epoch'] < start_epoch]
        if not rows:
            return None
        row = (min if self._metric == 'loss' else max)(rows, key=lambda r: r[f'eval_{self._metric}'])
        return {'epoch': int(row['epoch']), **{k: row[f'eval_{k}'] for k in ('loss', 'top1', 'balanced_top1')}}

    def draw_curves(self) -> None:
        """Draw curves.png: losses and accuracies by epoch."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print('curves.png is left out: matplotlib is missing (pip install timm-densese[report]).', file=sys.stderr)
            return
        rows = self._read_summary()
        epochs = [int(row['epoch']) for row in rows]
        figure = Figure(figsize=(9, 3.2), layout='constrained')
        left, right = figure.subplots(1, 2)
        for key, label in (('train_loss', 'train'), ('eval_loss', 'validation')):
            left.plot(epochs, [row[key] for row in rows], '.-', label=label)
        for key, label in (('eval_top1', 'top-1'), ('eval_balanced_top1', 'balanced')):
            right.plot(epochs, [row[key] for row in rows], '.-', label=label)
        left.set(xlabel='epoch', ylabel='loss')
        right.set(xlabel='epoch', ylabel='validation accuracy (%)')
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend()
        picture = io.BytesIO()
        figure.savefig(picture, dpi=100, format='png')
        replace_file(self.output / 'curves.png', picture.getvalue())

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Say what to do where a file cannot be written; a half-written one does not stay."""
        try:
            yield
        except (OSError, RuntimeError) as e:  # torch's writer says RuntimeError of a full disk
            with suppress(OSError):
                (self.output / 'tmp.pth.tar').unlink()
            raise TrainingError(
                f'{what} could not be written to {self.output}, where '
                f'{shutil.disk_usage(self.output).free / 1e6:.0f} MB are free: '
                f'{str(e).splitlines()[0]}\nThe checkpoints of earlier epochs are whole. Make room and go on with '
                f'--resume {self.output / "last.pth.tar"}.') from e
