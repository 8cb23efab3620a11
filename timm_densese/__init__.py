"""SE-DenseNet for timm. Importing this package registers the models with `timm.create_model`."""
from .errors import CheckpointMismatchError
from .models.attention import ATTN_LAYERS, GATE_LAYERS, add_attention
from .models.se_densenet import SE_PLACEMENTS, SEDenseNet

__version__ = '0.1.0'

__all__ = ['ATTN_LAYERS', 'GATE_LAYERS', 'SE_PLACEMENTS', 'CheckpointMismatchError', 'SEDenseNet', 'add_attention']
