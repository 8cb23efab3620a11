"""The options of a training, declared once for Python, YAML and the command line."""
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

__all__ = ['TrainConfig']


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
