"""Whether the Hugging Face Hub can be reached, told within seconds: a download tries for most of a minute."""
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from .errors import HubError
from .options import first_line

__all__ = ['check_hub', 'why_unreachable']


def why_unreachable(repo_id: str, file: str) -> str:
    """Say why a file is not in the cache and the Hub does not answer; empty where it can be had."""
    if isinstance(try_to_load_from_cache(repo_id, file), str):
        return ''
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, file), timeout=10)
    except HfHubHTTPError:
        pass  # the Hub answers: the download says what is wrong
    except Exception as e:  # no network, no DNS, a proxy's page
        return first_line(e)
    return ''


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
