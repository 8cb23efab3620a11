"""The options of a training, declared once for Python, YAML and the command line."""
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, List, Optional

import yaml
from timm.optim import list_optimizers

from ..errors import OptionError
from ..options import (
    Augmentation,
    Choice,
    Device,
    Flag,
    ListOf,
    Mapping,
    ModelName,
    ModuleName,
    Number,
    Text,
    check,
    close_matches,
)

__all__ = ['TrainConfig', 'read_config']

OPTIMIZERS = [f'{prefix}{name}' for name in list_optimizers() for prefix in ('', 'lookahead_')]
# Not timm's plateau, whose state a resumed run would not have.
SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant')
_SHARE = Number(float, least=0, most=1)


def _option(kind: Any, default: Any, help: str) -> Any:
    metadata = {'kind': kind, 'help': help}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """What to train and how. The defaults suit a few hundred images and pretrained weights.

    The names are those of timm's train.py, except for `patience`, `class_weights` and `dry_run`, which it
    does not have.

    Raises:
        OptionError: A value cannot be used; the message names the option, the value, and what is allowed.
    """
    device_modules: List[str] = _option(ListOf(ModuleName()), [], 'modules to import, with models of your own')
    data_dir: str = _option(Text(), '', 'folder with train/CLASS/ and val/CLASS/')
    output: str = _option(Text(), '', 'folder to write checkpoints, summary.csv and curves to')
    train_split: str = _option(Text(), 'train', 'folder of the images to train on, in the data folder')
    val_split: str = _option(Text(), 'val', 'folder of the images to validate on')
    model: str = _option(ModelName(), 'se_densenet121', 'name of any model of timm or of this package')
    model_kwargs: Dict[str, Any] = _option(Mapping(), {}, 'arguments of the model, name=value ...')
    pretrained: bool = _option(Flag(), False, 'start from pretrained weights')
    pretrained_path: str = _option(Text(), '', 'file to take as the pretrained weights')
    initial_checkpoint: str = _option(Text(), '', 'file to load into the model after it is created')
    resume: str = _option(Text(), '', 'checkpoint to go on from: OUTPUT/last.pth.tar')
    dry_run: bool = _option(Flag(), False, 'stop after one batch and write nothing')
    img_size: Optional[int] = _option(Number(int, least=1), None, "image height and width (default: the model's)")
    batch_size: int = _option(Number(int, least=1), 16, 'images a batch, in each process')
    validation_batch_size: Optional[int] = _option(
        Number(int, least=1), None, 'images a batch when validating (default: batch size)')
    grad_accum_steps: int = _option(Number(int, least=1), 1, 'batches whose gradients make one update')
    grad_checkpointing: bool = _option(Flag(), False, 'save memory in training')
    channels_last: bool = _option(Flag(), True, 'keep feature maps in the channels_last layout')
    torchcompile: bool = _option(Flag(), False, 'compile the model')
    device: str = _option(Device(), '', 'device (default: cuda where there is one, else cpu)')
    amp: bool = _option(Flag(), False, 'mixed precision with bfloat16')
    epochs: int = _option(Number(int, least=1), 30, 'passes over the images')
    opt: str = _option(Choice('optimizer', OPTIMIZERS), 'adamw', "optimizer, by timm's name")
    lr: float = _option(Number(float, least=0), 1e-3, 'learning rate of the classifier')
    weight_decay: float = _option(Number(float, least=0), 0.05, 'weight decay, not applied to biases and norms')
    layer_decay: Optional[float] = _option(
        Number(float, above=0, most=1), 0.9, 'factor on the learning rate from each layer to the one before it')
    clip_grad: Optional[float] = _option(Number(float, above=0), None, 'largest norm of the gradient')
    sched: str = _option(Choice('schedule', SCHEDULES), 'cosine', f'learning rate schedule: {", ".join(SCHEDULES)}')
    decay_epochs: Optional[float] = _option(
        Number(float, above=0), None, 'epochs from one step to the next (step), of the decay (wsd, rsqrt)')
    decay_milestones: List[int] = _option(
        ListOf(Number(int, least=1), rising=True), [], 'epochs of the steps (multistep)')
    decay_rate: float = _option(Number(float, above=0), 0.1, 'factor of a step (step, multistep), power (poly)')
    warmup_epochs: int = _option(Number(int, least=0), 2, 'epochs over which the learning rate rises')
    warmup_lr: float = _option(Number(float, least=0), 1e-6, 'learning rate at the start of the warm-up')
    min_lr: float = _option(Number(float, least=0), 0., 'learning rate at the end')
    no_aug: bool = _option(Flag(), False, 'do not augment')
    scale: List[float] = _option(
        ListOf(Number(float, above=0, most=1), 2, rising=True), [0.35, 1.], 'least and largest area of a random crop')
    ratio: List[float] = _option(
        ListOf(Number(float, above=0), 2, rising=True), [3 / 4, 4 / 3], 'least and largest aspect ratio of it')
    hflip: float = _option(_SHARE, 0.5, 'probability of a horizontal flip')
    vflip: float = _option(_SHARE, 0., 'probability of a vertical flip')
    color_jitter: float = _option(Number(float, least=0), 0.3, 'strength of the colour jitter, where aa is not set')
    aa: Optional[str] = _option(Augmentation(), 'rand-m6-mstd0.5-inc1', "automatic augmentation, by timm's name")
    reprob: float = _option(_SHARE, 0.1, 'probability of erasing a random rectangle')
    smoothing: float = _option(Number(float, least=0, below=1), 0.1, 'label smoothing')
    class_weights: bool = _option(Flag(), True, 'weigh each class by the inverse of its share')
    drop: float = _option(Number(float, least=0, below=1), 0., 'dropout before the classifier')
    model_ema: bool = _option(Flag(), True, 'also keep, and evaluate, a moving average of the weights')
    model_ema_decay: float = _option(_SHARE, 0.98, 'decay of the average')
    model_ema_warmup: bool = _option(Flag(), True, 'reach the decay gradually')
    eval_metric: str = _option(
        Choice('metric', ('loss', 'top1', 'balanced_top1')), 'loss',
        'metric that chooses the best epoch: loss, top1 or balanced_top1')
    patience: int = _option(
        Number(int, least=0), 10, 'epochs without a better metric after which training stops, 0 for never')
    seed: int = _option(Number(int, least=0, below=2 ** 32), 42, 'seed')
    workers: int = _option(Number(int, least=0), 2, 'processes that load images')

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(TrainConfig)
        for option in fields(self):
            value = getattr(self, option.name)
            if value is None and type(None) in typing.get_args(hints[option.name]):
                continue
            setattr(self, option.name, check(f'--{option.name.replace("_", "-")}', option.metadata['kind'], value))
        for sched, option_name in (('step', 'decay_epochs'), ('multistep', 'decay_milestones')):
            if self.sched == sched and not getattr(self, option_name):
                raise OptionError(f'--sched {sched} needs --{option_name.replace("_", "-")}.')


def read_config(file: Path) -> Dict[str, Any]:
    """Read a YAML file of options; their values are checked where all options are.

    Args:
        file: File with lines such as `lr: 0.001`.

    Raises:
        OptionError: It cannot be read, or names an option that there is none of.
    """
    given = f'-c {file}'
    try:
        values = yaml.safe_load(file.read_text(encoding='utf-8'))
    except FileNotFoundError as e:
        raise OptionError(f'{given}: there is no such file.') from e
    except (OSError, UnicodeDecodeError) as e:
        raise OptionError(f'{given} cannot be read ({e}).') from e
    except yaml.YAMLError as e:
        raise OptionError(f'{given} is no YAML ({" ".join(str(e).split())}).') from e
    if not isinstance(values, dict):
        found = 'nothing' if values is None else repr(values)[:60]
        raise OptionError(f'{given} holds {found}, and no lines such as "lr: 0.001".')
    names = [option.name for option in fields(TrainConfig)]
    for name in values:
        if name not in names:
            raise OptionError(f'{given}: train has no option {name!r}{close_matches(name, names)}')
    return values
