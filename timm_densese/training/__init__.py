"""The embedded fine-tuning loop, built from timm's parts.

Option names are those of timm's train.py. What an epoch does depends on the seed and the epoch alone, not on workers,
processes or interruptions: each sample's augmentation has its own seed. So a resumed run gives an uninterrupted run's
result, bit for bit on a CPU, and several processes give one process's, up to float error.
"""
from .config import TrainConfig
from .loop import train, validate

__all__ = ['TrainConfig', 'train', 'validate']
