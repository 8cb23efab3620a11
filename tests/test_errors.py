"""What a user is told where a download fails for the disk's sake."""
import pytest
import timm
from conftest import put_on_hub

from timm_densese.errors import HubError, hub_errors


def test_a_full_cache_is_named(hub, small_disk):
    put_on_hub(hub, 'timm/densenet121.ra_in1k', timm.create_model('densenet121'))
    with pytest.raises(HubError, match=r'The cache .* is full: make room'):
        timm.create_model('se_densenet121', pretrained=True, cache_dir=small_disk)


@pytest.mark.parametrize(('error', 'said'), [
    (PermissionError(13, 'Permission denied'), r'The cache .* cannot be written: .*HF_HOME'),
    (OSError(30, 'Read-only file system'), r'The cache .* cannot be written'),
    (ConnectionResetError(104, 'Connection reset by peer'), 'The connection broke'),
])
def test_what_the_system_says_is_passed_on(error, said):
    with pytest.raises(HubError, match=said), hub_errors('owner/name', 'load'):
        raise error
