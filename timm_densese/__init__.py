"""SE-DenseNet for timm. Importing this package registers the models with `timm.create_model`."""
from .errors import CheckpointMismatchError, check_timm

check_timm()  # before anything of it is imported, which an older one lacks

from .models.attention import ATTN_LAYERS, GATE_LAYERS  # noqa: E402
from .models.se_densenet import SE_PLACEMENTS, SEDenseNet  # noqa: E402
from .models.with_attention import add_attention  # noqa: E402

__version__ = '0.2.0'

__all__ = ['ATTN_LAYERS', 'GATE_LAYERS', 'SE_PLACEMENTS', 'CheckpointMismatchError', 'SEDenseNet', 'add_attention']
