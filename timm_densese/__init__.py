"""SE-DenseNet for timm. Importing this package registers the models with `timm.create_model`."""
from .errors import CheckpointMismatchError
from .models.attention import ATTN_LAYERS, GATE_LAYERS
from .models.se_densenet import SE_PLACEMENTS, SEDenseNet
from .models.with_attention import add_attention

__version__ = '0.2.0'

__all__ = ['ATTN_LAYERS', 'GATE_LAYERS', 'SE_PLACEMENTS', 'CheckpointMismatchError', 'SEDenseNet', 'add_attention']
