"""Whether the Hugging Face Hub can be reached, told within seconds: a download tries for most of a minute."""
from typing import Optional

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from .errors import HubError
from .options import first_line

__all__ = ['check_hub', 'find_weights', 'why_unreachable']


def _ask(repo_id: str, file: str) -> Optional[Exception]:
    """Ask for a file that is not in the cache, in one request; give what went wrong."""
    if isinstance(try_to_load_from_cache(repo_id, file), str):
        return None
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, file), timeout=10)
    except Exception as e:  # no network, no DNS, a proxy's page, no such repository
        return e
    return None


def find_weights(repo_id: str) -> bool:
    """Tell whether a repository's weights can be had, from the cache or the Hub, and print why if not.

    Args:
        repo_id: Repository with a `model.safetensors`, `timm/densenet121.ra_in1k` for example.
    """
    error = _ask(repo_id, 'model.safetensors')
    if error:
        print(f'The Hugging Face Hub could not be reached for {repo_id} ({type(error).__name__}: {error}).')
    return error is None


def why_unreachable(repo_id: str, file: str) -> str:
    """Say why a file is not in the cache and the Hub does not answer; empty where it can be had."""
    error = _ask(repo_id, file)
    # Where the Hub answers, the download says what is wrong.
    return '' if error is None or isinstance(error, HfHubHTTPError) else first_line(error)


def check_hub(repo_id: str, file: str) -> None:
    """Refuse to wait for a Hub that does not answer.

    Args:
        repo_id: Repository, OWNER/NAME, or OWNER/NAME@REVISION.
        file: A file of it that is needed.

    Raises:
        HubError: It is not in the cache, and the Hub could not be reached.
    """
    why = '' if constants.HF_HUB_OFFLINE else why_unreachable(repo_id.partition('@')[0], file)
    if why:
        raise HubError(
            f'Could not load {repo_id} ({why}). {constants.ENDPOINT} could not be reached and the cache does not have '
            f'it: check the connection and HF_ENDPOINT, and run again.')
