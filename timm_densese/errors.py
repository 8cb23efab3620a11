"""What a user can put right: a class for each cause, and a message that says what was found and what to do."""
import errno
import importlib.util
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

__all__ = [
    'CheckpointError',
    'CheckpointFileError',
    'CheckpointMismatchError',
    'DownloadError',
    'HubError',
    'ImagesError',
    'MetricsError',
    'ModelConfigError',
    'ModelNotFoundError',
    'OptionError',
    'PublishError',
    'ScriptError',
    'SplitError',
    'TimmVersionError',
    'TrainingError',
    'TrainingFinishedError',
    'UserError',
    'check_timm',
    'hub_errors',
]

_NAMES_SHOWN = 12


class UserError(Exception):
    """Base of the errors below; the command line prints its message and no traceback."""


class CheckpointError(UserError, ValueError):
    """A trained model cannot be loaded as it is; each cause that has a class of its own is one of these."""


class CheckpointMismatchError(CheckpointError, RuntimeError):
    """A checkpoint holds other tensors than the model: some are missing, left over, or of another shape.

    Attributes:
        missing: Names that the model has and the checkpoint lacks.
        unexpected: Names that the checkpoint has and the model lacks.
        misshapen: Names that both have, with the two shapes.
    """

    def __init__(
            self,
            model: str,
            missing: List[str],
            unexpected: List[str],
            misshapen: List[str],
    ) -> None:
        self.missing, self.unexpected, self.misshapen = missing, unexpected, misshapen
        lines = [f'This checkpoint does not fit {model}:']
        for what, names in (('missing', missing), ('unexpected', unexpected), ('of another shape', misshapen)):
            if names:
                more = f' and {len(names) - _NAMES_SHOWN} more' if len(names) > _NAMES_SHOWN else ''
                lines.append(f'  {len(names)} {what}: {", ".join(names[:_NAMES_SHOWN])}{more}')
        lines.append(
            'Take the checkpoint of the same network without attention, or create the model with the arguments that '
            'the checkpoint was trained with (se_placement, attn_layer, rd_channels, growth_rate, ...).')
        super().__init__('\n'.join(lines))


class CheckpointFileError(CheckpointError):
    """A checkpoint file cannot be read, or asks for what is not read; nothing of it was loaded."""


class ModelConfigError(CheckpointError):
    """A config.json asks for a model that is not built."""


class ModelNotFoundError(CheckpointError):
    """What was named is no checkpoint, repository, folder or registered model."""


class OptionError(UserError, ValueError):
    """An option's value cannot be used; nothing was started."""


class ImagesError(UserError, ValueError):
    """Images, their classes or their splits do not allow what was asked; nothing was written."""


class MetricsError(UserError, ValueError):
    """A metrics.json cannot be used as was asked."""


class PublishError(UserError, ValueError):
    """A model cannot be published as was asked; nothing was sent or written."""


class HubError(UserError, OSError):
    """The Hugging Face Hub refused, or could not be reached; the cause is huggingface_hub's own error."""


class DownloadError(UserError, OSError):
    """Files could not be downloaded; those that were stay, and the next run goes on from there."""


class ScriptError(UserError, RuntimeError):
    """A script of timm's cannot be run."""


class SplitError(UserError, ValueError):
    """A folder of images cannot be split as was asked; nothing was written."""


class TimmVersionError(UserError, ImportError):
    """The timm that Python finds is too old."""


class TrainingError(UserError, RuntimeError):
    """Training cannot start or go on; the checkpoints written so far stay."""


class TrainingFinishedError(TrainingError):
    """A training that is to go on has done all its epochs."""


_TIMM_NEEDED = (1, 0, 31)  # as pyproject.toml has it


def check_timm() -> None:
    """Refuse a timm that is too old, without importing it.

    Python may find another than the one that pip installed: a script started inside a checkout finds the checkout's.

    Raises:
        TimmVersionError: It is too old; the message says which was found where.
    """
    spec = importlib.util.find_spec('timm')
    if spec is None or spec.origin is None:
        return  # its import says what is missing
    folder = Path(spec.origin).parent
    version = folder / 'version.py'
    found = re.search(r"__version__ = ['\"]([^'\"]+)", version.read_text()) if version.is_file() else None
    numbers = tuple(map(int, re.findall(r'\d+', found[1])[:3])) if found else ()
    if found and numbers < _TIMM_NEEDED:
        raise TimmVersionError(
            f'timm_densese needs timm {".".join(map(str, _TIMM_NEEDED))} or newer, and Python finds timm {found[1]} in '
            f'{folder}. If that is a checkout, start Python in another folder, or check out a newer version there; '
            f"else run: pip install --upgrade timm")


# requests.HTTPError (an OSError) or httpx.HTTPError: huggingface_hub's versions differ.
_TRANSPORT_ERROR: Any = HfHubHTTPError.__mro__[1]
_LOG_IN = 'log in with `hf auth login`, or set HF_TOKEN, to an account that may'


@contextmanager
def hub_errors(repo_id: str, doing: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a HubError whose message says what to do next.

    Args:
        repo_id: Repository, OWNER/NAME.
        doing: What is being tried: 'load', 'publish'.
    """
    try:
        yield
    except UserError:
        raise
    except GatedRepoError as e:
        advice = (f'It is gated: ask for access on {constants.ENDPOINT}/{repo_id}, then {_LOG_IN} read it.')
        raise _hub_error(e, repo_id, doing, advice) from e
    except RepositoryNotFoundError as e:
        advice = f'There is no such repository, or it is private. Check the name, or {_LOG_IN} {doing} it.'
        raise _hub_error(e, repo_id, doing, advice) from e
    except RevisionNotFoundError as e:
        advice = f'It has no such revision: look at {constants.ENDPOINT}/{repo_id}/tree/main for those that it has.'
        raise _hub_error(e, repo_id, doing, advice) from e
    except LocalEntryNotFoundError as e:
        advice = (
            'HF_HUB_OFFLINE is set and the cache does not have it: run once with HF_HUB_OFFLINE=0, or copy the cache '
            '(HF_HOME) from a machine that has it.' if constants.HF_HUB_OFFLINE else
            f'{constants.ENDPOINT} could not be reached and the cache does not have it: check the connection and '
            f'HF_ENDPOINT, and run again.')
        raise _hub_error(e, repo_id, doing, advice) from e
    except EntryNotFoundError as e:
        advice = (
            'It lacks a file that this needs. Weights must be there as model.safetensors: pickles from the Hub are '
            'not loaded. `timm-densese publish` writes what is needed.')
        raise _hub_error(e, repo_id, doing, advice) from e
    except SafetensorError as e:
        file = try_to_load_from_cache(repo_id.split('@')[0], 'model.safetensors')
        remedy = f'Delete {file} and run again' if isinstance(file, str) else 'Download it again'
        advice = f'Its model.safetensors is damaged. {remedy}; if it fails again, tell its owner.'
        raise _hub_error(e, repo_id, doing, advice) from e
    except HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else 0
        advice = (f'The token was refused: {_LOG_IN} {doing} it.' if status in (401, 403) else
                  'The Hub is at fault or busy: run again later.' if status >= 500 or status == 429 else
                  'The Hub does not take this request.')
        raise _hub_error(e, repo_id, doing, advice) from e
    except (_TRANSPORT_ERROR, OSError) as e:
        if isinstance(e, FileNotFoundError):
            raise
        advice = _cache_advice(e) or (
            'The connection broke and several attempts failed. Nothing half-sent or half-read is used: run again.')
        raise _hub_error(e, repo_id, doing, advice) from e


def _cache_advice(error: Exception) -> str:
    """What to do where a file could not be written, empty where that is not what went wrong."""
    code = getattr(error, 'errno', None)
    if code not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
        return ''
    wrong = 'is full' if code in (errno.ENOSPC, errno.EDQUOT) else 'cannot be written'
    return (f'The cache {constants.HF_HUB_CACHE} {wrong}: make room or give the right to write there, or set HF_HOME '
            f'to another folder.')


def _hub_error(error: Exception, repo_id: str, doing: str, advice: str) -> HubError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    found = lines[0].split(' (Request ID')[0] if lines else ''
    return HubError(f'Could not {doing} {repo_id} ({type(error).__name__}: {found}). {advice}')
