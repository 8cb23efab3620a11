"""SE-DenseNet for timm. Importing this package registers the models with `timm.create_model`."""
import os
import sys
from types import TracebackType
from typing import Optional, Type


def _say_stopped(kind: Type[BaseException], error: BaseException, trace: Optional[TracebackType]) -> None:
    cause: Optional[BaseException] = error
    while cause and not isinstance(cause, KeyboardInterrupt):  # some imports make another error of it
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        sys.__excepthook__(kind, error, trace)
        return
    print('\ntimm-densese: stopped. Nothing was begun: run the same command again.', file=sys.stderr, flush=True)
    os._exit(130)


# A command's imports take seconds, in which no function of ours could catch a Ctrl-C. Its name is '-m' while Python
# looks for the package that it is to run.
if os.path.basename((getattr(sys, 'argv', None) or [''])[0]) in ('-m', 'timm-densese'):
    sys.excepthook = _say_stopped

from .errors import CheckpointMismatchError, check_timm  # noqa: E402

check_timm()  # before anything of it is imported, which an older one lacks

from .models.attention import ATTN_LAYERS, GATE_LAYERS  # noqa: E402
from .models.se_densenet import SE_PLACEMENTS, SEDenseNet  # noqa: E402
from .models.with_attention import add_attention  # noqa: E402

__version__ = '0.2.0'

__all__ = ['ATTN_LAYERS', 'GATE_LAYERS', 'SE_PLACEMENTS', 'CheckpointMismatchError', 'SEDenseNet', 'add_attention']
