"""What a user can put right: a class for each cause, and a message that says what was found and what to do."""
from typing import List

__all__ = ['CheckpointMismatchError', 'DownloadError', 'ScriptError', 'SplitError', 'TrainingError', 'UserError']

_NAMES_SHOWN = 12


class UserError(Exception):
    """Base of the errors below; the command line prints its message and no traceback."""


class CheckpointMismatchError(UserError, RuntimeError):
    """A checkpoint holds other tensors than the model: some are missing, left over, or of another shape.

    Attributes:
        missing: Names that the model has and the checkpoint lacks.
        unexpected: Names that the checkpoint has and the model lacks.
        misshapen: Names that both have, with the two shapes.
    """

    def __init__(
            self,
            arch: str,
            se_placement: str,
            missing: List[str],
            unexpected: List[str],
            misshapen: List[str],
    ) -> None:
        self.missing, self.unexpected, self.misshapen = missing, unexpected, misshapen
        lines = [f'This checkpoint does not fit {arch} with se_placement={se_placement!r}:']
        for what, names in (('missing', missing), ('unexpected', unexpected), ('of another shape', misshapen)):
            if names:
                more = f' and {len(names) - _NAMES_SHOWN} more' if len(names) > _NAMES_SHOWN else ''
                lines.append(f'  {len(names)} {what}: {", ".join(names[:_NAMES_SHOWN])}{more}')
        lines.append(
            'Take the DenseNet of the same depth, or create the model with the arguments that the checkpoint was '
            'trained with (se_placement, attn_layer, rd_channels, growth_rate, ...).')
        super().__init__('\n'.join(lines))


class DownloadError(UserError, OSError):
    """Files could not be downloaded; those that were stay, and the next run goes on from there."""


class ScriptError(UserError, RuntimeError):
    """A script of timm's cannot be run."""


class SplitError(UserError, ValueError):
    """A folder of images cannot be split as was asked; nothing was written."""


class TrainingError(UserError, RuntimeError):
    """Training cannot start or go on; the checkpoints written so far stay."""
