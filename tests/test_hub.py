"""Loading from a Hub whose connections break, without a network, and by two processes at once."""
import forked
import huggingface_hub
import pytest
import timm
from conftest import finish, put_on_hub, same_logits, save_run, start_alone
from hub_server import Fault

from timm_densese.errors import HubError
from timm_densese.publish import publish

# Older clients give up on a connection that breaks in a body, with our error, and keep the part for the next run.
resumes = pytest.mark.skipif(
    int(huggingface_hub.__version__.split('.')[0]) < 2, reason='huggingface_hub 2 is missing, whose client resumes')


@resumes
def test_download_that_breaks_is_resumed(owner, tmp_path, no_waiting, cold_cache):
    checkpoint, net = save_run(tmp_path / 'run')
    publish(checkpoint, 'owner/resumed')
    owner.faults = [Fault('^GET /cdn/owner/resumed', drop_after=20_000), Fault('^GET /cdn/owner/resumed', delay=.5)]
    assert same_logits(timm.create_model('hf-hub:owner/resumed', pretrained=True, cache_dir=cold_cache), net)


@resumes
def test_download_that_keeps_breaking_leaves_nothing(owner, tmp_path, no_waiting, cold_cache):
    checkpoint, net = save_run(tmp_path / 'run')
    publish(checkpoint, 'owner/dropped')
    owner.faults = [Fault('^GET /cdn/owner/dropped', drop_after=0, times=6)]
    with pytest.raises(HubError, match=r'Could not load owner/dropped.*run again'):
        timm.create_model('hf-hub:owner/dropped', pretrained=True, cache_dir=cold_cache)
    left = [p for p in cold_cache.rglob('*') if 'safetensors' in p.name or 'incomplete' in p.name]
    assert left == []
    assert same_logits(timm.create_model('hf-hub:owner/dropped', pretrained=True, cache_dir=cold_cache), net)


def test_damaged_files_are_named(owner, tmp_path, no_waiting, cold_cache):
    checkpoint, net = save_run(tmp_path / 'run')
    publish(checkpoint, 'owner/sound')
    weights = owner.read('owner/sound', 'model.safetensors')
    config = owner.read('owner/sound', 'config.json')

    # Shorter than the Hub says: not taken into the cache.
    owner.faults = [Fault('^GET /cdn/owner/sound', tamper=weights[:-100])]
    with pytest.raises(HubError, match=r'owner/sound.*size'):
        timm.create_model('hf-hub:owner/sound', pretrained=True, cache_dir=cold_cache)
    assert same_logits(timm.create_model('hf-hub:owner/sound', pretrained=True, cache_dir=cold_cache), net)

    for name, data in (('header', b'\xff' * 8 + weights[8:]), ('cut', weights[:-100]), ('empty', b'')):
        owner.put(f'owner/{name}', {'config.json': config, 'model.safetensors': data})
        with pytest.raises(HubError, match=r'model.safetensors is damaged.*tell its owner'):
            timm.create_model(f'hf-hub:owner/{name}', pretrained=True, cache_dir=cold_cache)


@pytest.fixture
def load_alone(tmp_path_factory, hub):
    """Start loading models in a process of its own; a call of what is returned gives its exit status and output."""
    def start(home, *models, **env):
        folder = tmp_path_factory.mktemp('said')
        stdout, stderr = folder / 'stdout', folder / 'stderr'
        process = start_alone(forked.load_models, *models, stdout=stdout, stderr=stderr, HF_HOME=str(home),
                              HF_ENDPOINT=hub.endpoint, **env)
        return lambda: finish(process, stdout, stderr)

    return start


@pytest.mark.slow
def test_offline_with_a_warm_and_a_cold_cache(owner, tmp_path, load_alone):
    checkpoint, _ = save_run(tmp_path / 'run')
    publish(checkpoint, 'owner/offline')
    put_on_hub(owner, 'timm/densenet121.ra_in1k', timm.create_model('densenet121'))
    asked = len(owner.requests)
    for offline, home, said in (('0', 'warm', 'loaded'), ('1', 'warm', 'loaded'), ('1', 'cold', 'failed:')):
        done = load_alone(tmp_path / home, 'hf-hub:owner/offline', 'se_densenet121', HF_HUB_OFFLINE=offline)()
        assert (done.returncode, done.stdout.count(said)) == (0, 2), done.stdout + done.stderr
    assert 'HF_HUB_OFFLINE is set and the cache does not have it: run once with HF_HUB_OFFLINE=0' in done.stdout
    assert sum('GET /cdn/timm/densenet121.ra_in1k/' in request for request in owner.requests[asked:]) == 1


@pytest.mark.slow
def test_stalled_download_is_resumed(owner, tmp_path, load_alone):
    checkpoint, _ = save_run(tmp_path / 'run')
    publish(checkpoint, 'owner/stalled')
    owner.faults = [Fault('^GET /cdn/owner/stalled', drop_after=20_000, delay=5)]
    done = load_alone(tmp_path / 'home', 'hf-hub:owner/stalled', HF_HUB_DOWNLOAD_TIMEOUT='1')()
    assert (done.returncode, done.stdout) == (0, 'loaded\n'), done.stderr
    assert 'Trying to resume download' in done.stderr


@pytest.mark.slow
def test_two_processes_downloading_at_once(owner, tmp_path, load_alone):
    checkpoint, _ = save_run(tmp_path / 'run', timm.create_model('se_densenet121', num_classes=3),
                             args={'model_kwargs': {}})
    publish(checkpoint, 'owner/shared')
    owner.faults = [Fault('^GET /cdn/owner/shared', delay=2)]  # long enough for the second to arrive
    for finished in [load_alone(tmp_path / 'home', 'hf-hub:owner/shared') for _ in range(2)]:
        done = finished()
        assert (done.returncode, done.stdout) == (0, 'loaded\n'), done.stderr
    assert sum(r.startswith('GET /cdn/owner/shared') for r in owner.requests) == 1
