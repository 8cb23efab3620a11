"""Publishing and loading with the real client, against a Hub on this machine."""
import argparse
import json
import shutil

import pytest
import safetensors.torch
import timm
import torch
from conftest import CLASSES, IMAGE, MSLD, SMALL, needs_msld, same_logits, save_run
from hub_server import Fault
from PIL import Image

import timm_densese
from timm_densese.cli import main
from timm_densese.data.splits import split_images
from timm_densese.errors import CheckpointError, CheckpointMismatchError, HubError, PublishError
from timm_densese.publish import publish

# Publish and load.


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.'])
def test_published_model_gives_the_same_logits(prefix, owner, tmp_path, capsys):
    checkpoint, net = save_run(tmp_path / 'run', prefix=prefix)
    repo = f'owner/push{len(prefix)}'
    url = publish(checkpoint, repo)
    assert sorted(owner.repos[repo].files('main')) == ['README.md', 'config.json', 'model.safetensors']

    out = capsys.readouterr().out
    assert all(file in out for file in ('README.md', 'config.json', 'model.safetensors'))
    assert f'{len(owner.read(repo, "model.safetensors")):,} bytes' in out
    assert url == f'{owner.endpoint}/{repo}/commit/{owner.repos[repo].refs["main"]}'
    assert url in out
    namespace: dict = {}
    exec('\n'.join(line.strip() for line in out.split('Load it with\n')[1].splitlines()), namespace)

    loaded = timm.create_model(f'hf-hub:{repo}', pretrained=True)
    assert same_logits(loaded, net)
    assert loaded.pretrained_cfg['label_names'] == CLASSES
    config = timm.data.resolve_model_data_config(loaded)
    assert config['input_size'] == (3, 64, 64)
    assert [*config['mean'], *config['std']] == [.1, .2, .3, .4, .5, .6]


def test_loading_with_other_heads(owner, tmp_path):
    checkpoint, net = save_run(tmp_path / 'run')
    publish(checkpoint, 'owner/heads')
    other = timm.create_model('hf-hub:owner/heads', pretrained=True, num_classes=5)
    pooled = timm.create_model('hf-hub:owner/heads', pretrained=True, num_classes=0)
    features = timm.create_model('hf-hub:owner/heads', pretrained=True, features_only=True, out_indices=(0, 1, 2, 3))
    with torch.inference_mode():
        assert other.eval()(IMAGE).shape == (2, 5)
        assert torch.equal(other.forward_features(IMAGE), net.forward_features(IMAGE))
        assert torch.equal(pooled.eval()(IMAGE), net.forward_head(net.forward_features(IMAGE), pre_logits=True))
        for ours, theirs in zip(
                features.eval()(IMAGE), net.forward_intermediates(IMAGE, intermediates_only=True), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize('placement', timm_densese.SE_PLACEMENTS)
def test_model_arguments_travel(placement, owner, tmp_path):
    kwargs = dict(SMALL, se_placement=placement, rd_ratio=.25, gate_layer='hard_sigmoid')
    net = timm.create_model('se_densenet121', num_classes=3, in_chans=1, **kwargs)
    checkpoint, net = save_run(
        tmp_path / 'run', net, args={'model_kwargs': kwargs, 'input_size': [1, 64, 64], 'mean': [.1], 'std': [.4]})
    publish(checkpoint, f'owner/{placement}')
    loaded = timm.create_model(f'hf-hub:owner/{placement}', pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(IMAGE[:, :1]), net(IMAGE[:, :1]))


def test_arguments_given_by_hand_replace_the_record(owner, tmp_path, capsys):
    net = timm.create_model('se_densenet121', num_classes=3, se_placement='stage', **SMALL)
    torch.save(net.state_dict(), tmp_path / 'bare.pth')
    with pytest.raises(CheckpointError, match='--model se_densenet121'):
        publish(tmp_path / 'bare.pth', 'owner/bare')
    for label in CLASSES:
        (tmp_path / 'data' / 'train' / label).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'data' / 'train' / label / 'a.png')
    assert main([
        'publish', str(tmp_path / 'bare.pth'), 'owner/bare', '--model', 'se_densenet121', '--model-kwargs',
        'growth_rate=8', 'block_config=(2,3,2)', 'se_placement=stage', '--data', str(tmp_path / 'data')]) == 0
    loaded = timm.create_model('hf-hub:owner/bare', pretrained=True)
    assert same_logits(loaded, net)
    assert loaded.pretrained_cfg['label_names'] == CLASSES


def test_arguments_inside_the_checkpoint(owner, tmp_path):
    args = argparse.Namespace(model='se_densenet121', model_kwargs=dict(SMALL), gp=None, img_size=64, data_dir=None)
    checkpoint, net = save_run(tmp_path / 'run', saved={'args': args})
    (tmp_path / 'run' / 'args.yaml').unlink()
    publish(checkpoint, 'owner/inside')
    loaded = timm.create_model('hf-hub:owner/inside', pretrained=True)
    assert same_logits(loaded, net)
    assert 'label_names' not in json.loads(owner.read('owner/inside', 'config.json'))


def test_folder_instead_of_the_hub(tmp_path, capsys, hub):
    checkpoint, net = save_run(tmp_path / 'run')
    asked = len(hub.requests)
    assert main(['publish', str(checkpoint), 'owner/name', '--output', str(tmp_path / 'out')]) == 0
    assert len(hub.requests) == asked
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert same_logits(timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True), net)

    (tmp_path / 'out' / 'notes.txt').write_text('mine')
    capsys.readouterr()
    assert main(['publish', str(checkpoint), 'owner/name', '--output', str(tmp_path / 'out')]) == 1
    assert 'not empty' in capsys.readouterr().err
    assert (tmp_path / 'out' / 'notes.txt').read_text() == 'mine'
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []


@pytest.mark.slow
def test_transformers_wrapper(owner, tmp_path):
    transformers = pytest.importorskip('transformers', reason='transformers is missing: pip install transformers')
    checkpoint, net = save_run(tmp_path / 'run')
    publish(checkpoint, 'owner/wrapped')
    model = transformers.AutoModelForImageClassification.from_pretrained('owner/wrapped').eval()
    assert type(model).__name__ == 'TimmWrapperForImageClassification'
    assert list(model.config.id2label.values()) == CLASSES
    with torch.inference_mode():
        assert torch.equal(model(IMAGE).logits, net(IMAGE))
    processor = transformers.AutoImageProcessor.from_pretrained('owner/wrapped')
    assert processor(Image.new('RGB', (80, 80)))['pixel_values'].shape == (1, 3, 64, 64)


# Repositories that are there already.


def test_own_readme_is_kept_unless_confirmed(owner, tmp_path, capsys):
    checkpoint, _ = save_run(tmp_path / 'run')
    owner.put('owner/readme', {'README.md': b'written by hand'})
    assert main(['publish', str(checkpoint), 'owner/readme']) == 0  # no terminal to ask on
    assert 'stays as it is' in capsys.readouterr().out
    assert owner.read('owner/readme', 'README.md') == b'written by hand'
    assert same_logits(timm.create_model('hf-hub:owner/readme', pretrained=True), save_run(tmp_path / 'x')[1]) is False

    asked = []
    publish(checkpoint, 'owner/readme', confirm=lambda question: asked.append(question) or True)
    assert 'owner/readme has a README.md' in asked[0]
    assert b'# Model card for readme' in owner.read('owner/readme', 'README.md')
    commits = len(owner.repos['owner/readme'].commits)
    publish(checkpoint, 'owner/readme', confirm=lambda question: pytest.fail('the same card'))
    assert len(owner.repos['owner/readme'].commits) == commits


def test_overwriting_serves_the_new_weights(owner, tmp_path):
    first, _ = save_run(tmp_path / 'a')
    second, net = save_run(tmp_path / 'b')
    publish(first, 'owner/twice')
    timm.create_model('hf-hub:owner/twice', pretrained=True)
    publish(second, 'owner/twice')
    assert same_logits(timm.create_model('hf-hub:owner/twice', pretrained=True), net)


@pytest.mark.slow
def test_revisions_and_pull_requests(owner, tmp_path, monkeypatch):
    (first, a), (second, b), (third, c) = (save_run(tmp_path / name) for name in 'abc')
    publish(first, 'owner/branches')
    publish(second, 'owner/branches', revision='v2')
    assert same_logits(timm.create_model('hf-hub:owner/branches', pretrained=True), a)
    assert same_logits(timm.create_model('hf-hub:owner/branches@v2', pretrained=True), b)
    with pytest.raises(HubError, match='no such revision'):
        timm.create_model('se_densenet121', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id='owner/branches@v3'))

    monkeypatch.setenv('HF_TOKEN', 'hf_stranger')  # who may not write there
    with pytest.raises(HubError, match=r'token was refused.*HF_TOKEN'):
        publish(third, 'owner/branches')
    url = publish(third, 'owner/branches', create_pr=True)
    assert url == f'{owner.endpoint}/owner/branches/discussions/1'
    assert same_logits(timm.create_model('hf-hub:owner/branches', pretrained=True), a)
    assert owner.read('owner/branches', 'model.safetensors', 'refs/pr/1') == safetensors.torch.save(c.state_dict())
    with pytest.raises(PublishError, match='not both'):
        publish(third, 'owner/branches', create_pr=True, revision='v2')


# Refused.


@pytest.mark.slow
def test_private_missing_and_gated(owner, tmp_path, monkeypatch, cold_cache):
    checkpoint, net = save_run(tmp_path / 'run')
    publish(checkpoint, 'owner/private', private=True)
    assert owner.repos['owner/private'].private
    assert same_logits(timm.create_model('hf-hub:owner/private', pretrained=True), net)
    owner.put('timm/gated', {'model.safetensors': b''}, gated=True)

    monkeypatch.delenv('HF_TOKEN')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cold'))
    # timm reads config.json first, and then it is huggingface_hub's own message.
    with pytest.raises(Exception, match=r'401[\s\S]*make sure you are authenticated'):
        timm.create_model('hf-hub:owner/private', pretrained=True, cache_dir=tmp_path / 'cold')
    for repo, said in (('owner/private', 'it is private'), ('timm/missing', 'no such repository'),
                       ('timm/gated', r'gated: ask for access on http://127.*/timm/gated')):
        with pytest.raises(HubError, match=f'{repo}[\\s\\S]*{said}[\\s\\S]*HF_TOKEN'):
            timm.create_model('se_densenet121', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=repo),
                              cache_dir=tmp_path / 'cold')
    with pytest.raises(HubError, match=r'(token was refused|no such repository).*HF_TOKEN'):
        publish(checkpoint, 'owner/private')
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    with pytest.raises(HubError, match=r'token was refused.*HF_TOKEN'):
        timm.create_model('se_densenet121', pretrained=True, cache_dir=tmp_path / 'cold',
                          pretrained_cfg_overlay=dict(hf_hub_id='owner/private'))
    assert [p for p in (tmp_path / 'cold').rglob('*') if p.is_file() and p.suffix != '.TAG'] == []


def test_private_does_not_hide_what_is_public(owner, tmp_path):
    checkpoint, _ = save_run(tmp_path / 'run')
    owner.put('owner/public', {'a.txt': b'a'})
    with pytest.raises(PublishError, match='exists and is public'):
        publish(checkpoint, 'owner/public', private=True)
    assert owner.repos['owner/public'].files('main').keys() == {'a.txt'}


@pytest.mark.parametrize('repo', ['name', '../../etc/passwd', 'owner/../x', 'owner/a b', 'owner/x.git', '/abs/path'])
def test_names_that_are_no_repository(repo, tmp_path, hub):
    checkpoint, _ = save_run(tmp_path / 'run')
    asked = len(hub.requests)
    with pytest.raises(PublishError, match='no name of a repository'):
        publish(checkpoint, repo)
    assert len(hub.requests) == asked


def test_classes_that_do_not_fit(owner, tmp_path):
    checkpoint, _ = save_run(tmp_path / 'run', args={'class_names': ['a', 'b']})
    with pytest.raises(CheckpointError, match='3 outputs'):
        publish(checkpoint, 'owner/labels')
    checkpoint, _ = save_run(tmp_path / 'run')
    for name in ('x', 'y', 'z'):
        (tmp_path / 'data' / 'train' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'data' / 'train' / name / 'a.png')
    with pytest.raises(CheckpointError, match='recorded'):
        publish(checkpoint, 'owner/labels', data=tmp_path / 'data')
    with pytest.raises(CheckpointMismatchError, match='se_placement'):
        publish(checkpoint, 'owner/labels', model_kwargs={'se_placement': 'layer'})
    assert 'owner/labels' not in owner.repos


def test_files_that_rebuild_another_model_are_not_sent(owner, tmp_path, monkeypatch):
    checkpoint, _ = save_run(tmp_path / 'run')
    real = timm.models.save_for_hf

    def damaged(model, folder, **kwargs):  # a disk that writes other bytes than it was given
        real(model, folder, **kwargs)
        state = {k: v + 1e-3 if v.is_floating_point() else v for k, v in model.state_dict().items()}
        safetensors.torch.save_file(state, f'{folder}/model.safetensors')

    monkeypatch.setattr('timm_densese.publish.save_for_hf', damaged)
    with pytest.raises(PublishError, match='other logits'):
        publish(checkpoint, 'owner/damaged')
    assert 'owner/damaged' not in owner.repos


# Connections.


def test_upload_that_breaks_is_retried(owner, tmp_path, no_waiting):
    checkpoint, net = save_run(tmp_path / 'run')
    owner.faults = [Fault('^PUT /lfs/', drop_after=1000), Fault('^PUT /lfs/', status=503)]
    publish(checkpoint, 'owner/retried')
    assert same_logits(timm.create_model('hf-hub:owner/retried', pretrained=True), net)


def test_upload_that_keeps_breaking_is_a_clear_error(owner, tmp_path, no_waiting):
    checkpoint, net = save_run(tmp_path / 'run')
    owner.faults = [Fault('^PUT /lfs/owner/broken', drop_after=1000, times=6)]
    with pytest.raises(HubError, match=r'Could not publish owner/broken.*run again') as e:
        publish(checkpoint, 'owner/broken')
    assert isinstance(e.value.__cause__, Exception)
    assert owner.repos['owner/broken'].files('main') == {}  # nothing half-sent is visible
    publish(checkpoint, 'owner/broken')
    assert same_logits(timm.create_model('hf-hub:owner/broken', pretrained=True), net)


@pytest.mark.slow
def test_upload_in_parts(owner, tmp_path):
    torch.manual_seed(1)  # weights that no other test uploads: what is on the server already is not sent again
    net = timm.create_model('se_densenet121', num_classes=3)
    checkpoint, net = save_run(tmp_path / 'run', net, args={'model_kwargs': {}})
    publish(checkpoint, 'owner/parts')
    assert sum(r.startswith('PUT /lfs/owner/parts') for r in owner.requests) == 4
    assert owner.read('owner/parts', 'model.safetensors') == safetensors.torch.save(net.state_dict())


# Secrets.


@pytest.mark.slow
def test_token_appears_nowhere(tmp_path, hub, run_alone):
    """Publish in a process of its own, well and badly; look at all that it printed, sent and wrote."""
    token = 'hf_abcdefghijklmnopqrstuvwxyz'
    hub.tokens[token] = 'owner'
    checkpoint, _ = save_run(tmp_path / 'run')
    said = ''
    for repo, faults in (('owner/quiet', []), ('someone/quiet', []),
                         ('owner/quiet2', [Fault('^POST /api/models/owner/quiet2/commit', status=500)])):
        hub.faults = faults
        result = run_alone('publish', checkpoint, repo, HF_TOKEN=token, HF_HOME=str(tmp_path), HF_HUB_VERBOSITY='info')
        said += result.stdout + result.stderr
        assert (result.returncode == 0) == (repo == 'owner/quiet'), result.stderr
        assert 'Traceback' not in result.stderr
    written = b''.join(p.read_bytes() for p in [*tmp_path.rglob('*'), *hub.root.iterdir()] if p.is_file())
    assert 'Could not publish someone/quiet' in said
    assert token not in said
    assert token.encode() not in written
    assert b'secret-place' not in b''.join(
        hub.read('owner/quiet', p) for p in ('README.md', 'config.json', 'model.safetensors'))


@pytest.mark.slow
@needs_msld
def test_msld_is_recognised_by_its_images(tmp_path, owner):
    for file in (file for folder in MSLD.iterdir() if folder.is_dir() for file in sorted(folder.iterdir())[:20]):
        (tmp_path / 'some' / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / 'some' / file.parent.name)
    split_images(tmp_path / 'some', tmp_path / 'split')
    net = timm.create_model('se_densenet121', num_classes=2, **SMALL)
    checkpoint, _ = save_run(tmp_path / 'run', net, args={'class_names': None, 'data_dir': str(tmp_path / 'split')})
    publish(checkpoint, 'owner/msld')
    card = owner.read('owner/msld', 'README.md').decode()
    assert 'license: other' in card
    assert 'Monkeypox, Others' in card
    assert 'never for diagnosis' in card
