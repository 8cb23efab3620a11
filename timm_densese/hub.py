"""The Hugging Face Hub, beyond what timm does with it."""
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

__all__ = ['find_weights']


def find_weights(repo_id: str) -> bool:
    """Tell whether a repository's weights can be had, from the cache or the Hub, and print why if not.

    One request with a short timeout: a download without a network retries for 45 seconds before it gives up.

    Args:
        repo_id: Repository with a `model.safetensors`, `timm/densenet121.ra_in1k` for example.
    """
    file = (repo_id, 'model.safetensors')
    if isinstance(try_to_load_from_cache(*file), str):
        return True
    try:
        get_hf_file_metadata(hf_hub_url(*file), timeout=10)
    except Exception as e:  # no network, no DNS, a proxy's page, no such repository: whoever asks goes on without
        print(f'The Hugging Face Hub could not be reached for {repo_id} ({type(e).__name__}: {e}).')
        return False
    return True
