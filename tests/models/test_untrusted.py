"""Files that somebody else wrote are refused before memory is taken for them, and no code of theirs runs."""
import argparse
import json
import os
import pickle
import resource
import zipfile

import forked
import pytest
import timm
import torch
from conftest import SMALL

from timm_densese.errors import CheckpointFileError, HubError, ModelConfigError
from timm_densese.models.untrusted import check_checkpoint_file, read_checkpoint
from timm_densese.publish import publish


def write_config(folder, model_args=None, **config):
    folder.mkdir(parents=True)
    net = timm.create_model('se_densenet121', num_classes=3, **SMALL)
    timm.models.save_for_hf(net, folder, safe_serialization=True)
    saved = json.loads((folder / 'config.json').read_text())
    saved['model_args'] = {**saved['model_args'], **(model_args or {})}
    (folder / 'config.json').write_text(json.dumps({**saved, **config}))
    return net


ABSURD = [
    {'num_classes': 10 ** 9}, {'growth_rate': 10 ** 9}, {'block_config': [10 ** 9]}, {'block_config': [1] * 10 ** 4},
    {'bn_size': -1}, {'in_chans': 10 ** 9}, {'rd_channels': 10 ** 9}, {'growth_rate': 1e3}, {'growth_rate': True},
    {'growth_rate': 1000, 'block_config': [32] * 8}, {'block_config': [500] * 8}, {'global_pool': 'x' * 10 ** 6},
    {'trust_remote_code': True}, {'norm_layer': {'__class__': 'os.system'}}, {'checkpoint_path': 'x'},
    {'device': 'cpu'},
]


@pytest.mark.slow
@pytest.mark.parametrize('model_args', ABSURD, ids=lambda a: ','.join(a))
def test_config_that_is_not_ours(model_args, tmp_path, hub):
    folder = tmp_path / 'model'
    write_config(folder, model_args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hub.put('owner/absurd', {p.name: p.read_bytes() for p in folder.iterdir()})
    for name in (f'local-dir:{folder}', 'hf-hub:owner/absurd'):
        for pretrained in (True, False):
            with pytest.raises(ModelConfigError, match=r'refused, nothing was built') as e:
                timm.create_model(name, pretrained=pretrained)
            assert len(str(e.value)) < 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_classes_in_the_other_place(tmp_path):
    write_config(tmp_path / 'a', num_classes=10 ** 9)
    config = json.loads((tmp_path / 'a' / 'config.json').read_text())
    del config['model_args']
    (tmp_path / 'a' / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ModelConfigError, match='num_classes=1000000000'):
        timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True)


def test_own_configs_are_not_refused(tmp_path):
    net = write_config(tmp_path / 'a')
    loaded = timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in loaded.state_dict().items())
    timm.models.save_for_hf(net, tmp_path / 'pickled')  # timm's default, a pickle of the user's own
    loaded = timm.create_model(f'local-dir:{tmp_path / "pickled"}', pretrained=True)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in loaded.state_dict().items())


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def rezip(source, target, **replace):
    """Write a checkpoint again, with other contents or compressed."""
    compressed = replace.pop('compressed', False)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(
            target, 'w', zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            name = entry.filename.split('/')[-1]
            new.writestr(entry.filename, replace.get(name.replace('.', '_'), old.read(entry)))


def test_pickle_that_runs_code(tmp_path, hub):
    net = write_config(tmp_path / 'model')
    torch.save({**net.state_dict(), 'x': Bomb(tmp_path / 'ran')}, tmp_path / 'bomb.pth')
    with pytest.raises(CheckpointFileError, match=r'needs (posix|os)\.mkdir.*could run code'):
        publish(tmp_path / 'bomb.pth', 'owner/bomb', model='se_densenet121')
    (tmp_path / 'model' / 'model.safetensors').unlink()
    (tmp_path / 'bomb.pth').rename(tmp_path / 'model' / 'pytorch_model.bin')
    with pytest.raises(CheckpointFileError, match='could run code'):
        timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True)
    # From the Hub, no pickle is read at all.
    hub.put('owner/pickle', {p.name: p.read_bytes() for p in (tmp_path / 'model').iterdir()})
    with pytest.raises(HubError, match=r'pickles from the Hub are not loaded'):
        timm.create_model('hf-hub:owner/pickle', pretrained=True)
    assert not any('pytorch_model.bin' in r and 'owner/pickle' in r for r in hub.requests)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.slow
def test_zip_and_pickle_bombs(tmp_path, run_alone):
    """In a process that may take 1 GiB more than it has: each would take more."""
    torch.save({'classifier.weight': torch.zeros(256 << 18)}, tmp_path / 'zeros.pth')
    rezip(tmp_path / 'zeros.pth', tmp_path / 'zip.pth', compressed=True)
    assert (tmp_path / 'zip.pth').stat().st_size < 1 << 20 < 256 << 20

    torch.save({'w': torch.zeros(1).expand(10 ** 12)}, tmp_path / 'stride.pth')
    torch.save({'state_dict': {'w': torch.zeros(1).expand(10 ** 12)}}, tmp_path / 'nested.pth')
    torch.save({'a': torch.zeros(1)}, tmp_path / 'small.pth')
    code = b'\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.'  # bytearray(2**31 - 1)
    rezip(tmp_path / 'small.pth', tmp_path / 'bytearray.pth', data_pkl=code)
    rezip(tmp_path / 'small.pth', tmp_path / 'damaged.pth', data_pkl=b'\x80\x02}q\x00(X')
    (tmp_path / 'cut.pth').write_bytes((tmp_path / 'small.pth').read_bytes()[:-200])
    (tmp_path / 'empty.pth').write_bytes(b'')
    (tmp_path / 'old.pth').write_bytes(pickle.dumps({'a': 1}))
    (tmp_path / 'zeros.pth').unlink()

    said = {
        'zip.pth': 'may unpack to any size', 'stride.pth': 'claim more bytes', 'nested.pth': 'claim more bytes',
        'bytearray.pth': 'needs builtins.bytearray', 'damaged.pth': 'pickle is damaged',
        'cut.pth': 'not what torch.save writes', 'empty.pth': 'not what torch.save writes',
        'old.pth': 'older than torch 1.6', 'missing.pth': 'no such file'}
    result = run_alone(*(tmp_path / name for name in said), function=forked.read_checkpoints)
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(' ', 1) for line in result.stdout.splitlines())
    assert lines.keys() == said.keys()
    assert all(part in lines[name] for name, part in said.items()), lines


def test_overlapping_parts(tmp_path):
    torch.save({'a': torch.zeros(1000)}, tmp_path / 'a.pth')
    data = bytearray((tmp_path / 'a.pth').read_bytes())
    with zipfile.ZipFile(tmp_path / 'a.pth') as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith('data/0'))
    at = data.rfind(entry.filename.encode()) - 46  # its record in the central directory
    for field in (20, 24):
        data[at + field:at + field + 4] = (1 << 30).to_bytes(4, 'little')
    (tmp_path / 'b.pth').write_bytes(data)
    with pytest.raises(CheckpointFileError, match='parts claim'):
        check_checkpoint_file(tmp_path / 'b.pth')


def test_what_the_loops_write_is_read(tmp_path):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    torch.save({'state_dict': {'w': torch.zeros(3, dtype=torch.bfloat16)}, 'optimizer': optimizer.state_dict(),
                'args': argparse.Namespace(lr=.1, block_config=(1, 2)), 'epoch': 1, 'metric': 2.,
                'size': torch.Size([1]), 'p': torch.nn.Parameter(torch.zeros(2))}, tmp_path / 'a.pth')
    assert read_checkpoint(tmp_path / 'a.pth')['args'].block_config == (1, 2)


def test_tied_weights_are_read(tmp_path):
    tied = torch.zeros(300, 300)
    torch.save({'state_dict': {name: tied for name in 'abc'}}, tmp_path / 'a.pth')
    assert len(read_checkpoint(tmp_path / 'a.pth')['state_dict']) == 3


@pytest.mark.parametrize('name', ['../../outside', '/etc/passwd', 'owner/../../x', 'a/b/c'])
def test_path_tricks_in_names(name, tmp_path, hub):
    asked = len(hub.requests)
    with pytest.raises(Exception, match=r'[Rr]epo id must'):
        timm.create_model(f'hf-hub:{name}', pretrained=True, cache_dir=tmp_path / 'cache')
    assert len(hub.requests) == asked
    assert not (tmp_path / 'cache').exists()


def test_path_tricks_in_a_config(tmp_path, hub):
    write_config(tmp_path / 'a')
    config = json.loads((tmp_path / 'a' / 'config.json').read_text())
    config['pretrained_cfg'].update(hf_hub_filename='../../../secret', custom_load='hf', file='/etc/passwd', url='x')
    weights = (tmp_path / 'a' / 'model.safetensors').read_bytes()
    hub.put('owner/tricks', {'config.json': json.dumps(config).encode(), 'model.safetensors': weights})
    asked = len(hub.requests)
    timm.create_model('hf-hub:owner/tricks', pretrained=True, cache_dir=tmp_path / 'cache')
    assert {r.split('/')[-1] for r in hub.requests[asked:] if '/resolve/' in r} == {'config.json', 'model.safetensors'}
