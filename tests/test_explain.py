"""Grad-CAM against the closed form, gates against what they multiply, and the files."""
import csv
import json
from urllib.parse import unquote

import numpy as np
import pytest
import timm
import torch
from conftest import SMALL, PageReader, put_on_hub, trained_densenet
from PIL import Image
from pytorch_grad_cam.utils.image import scale_cam_image

from timm_densese import ATTN_LAYERS, SE_PLACEMENTS
from timm_densese.checkpoints import load_model
from timm_densese.cli import main
from timm_densese.errors import ImagesError
from timm_densese.explain import explain, grad_cam, overlay, read_gates


def create(**kwargs):
    model = timm.create_model('se_densenet121', num_classes=5, **SMALL, **kwargs).eval()
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(.3 * torch.randn_like(param))
    return model


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_grad_cam_is_right(placement, fused):
    model = create(se_placement=placement)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(images)
    classes = [4, 0, 2]
    # After average pooling and one linear layer, Grad-CAM's weights are the class's weights: it is CAM.
    maps = torch.einsum('bchw,bc->bhw', features, model.classifier.weight[classes]).relu().detach().numpy()
    expected = scale_cam_image(scale_cam_image(maps, (64, 64)))  # a layer's map, and the mean of all layers'
    net = timm.models.reparameterize_model(model) if fused else model
    np.testing.assert_allclose(grad_cam(net, images, classes), expected, atol=2e-3)
    assert np.ptp(expected) > .5
    with torch.no_grad():
        best = model(images).argmax(1).tolist()
    np.testing.assert_allclose(grad_cam(net, images), grad_cam(model, images, best), atol=2e-3)


@pytest.mark.parametrize('name', ['densenet121', 'resnet10t', 'vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'])
def test_grad_cam_of_others(name):
    images = torch.randn(1, 3, 64, 64).expand(10, -1, -1, -1)
    size = {'img_size': 64} if name.startswith(('vit', 'swin')) else {}
    cam = grad_cam(timm.create_model(name, num_classes=10, **size).eval(), images, range(10))
    assert cam.shape == (10, 64, 64)
    assert 0 <= cam.min() < cam.max() <= 1
    assert np.ptp(cam, axis=0).max() > .5  # each class has its own


@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_every_gate_reads_one_at_its_start(placement):
    densenet = trained_densenet('densenet121', **SMALL)
    model = timm.create_model('se_densenet121', se_placement=placement, **SMALL).eval()
    model.load_state_dict(densenet.state_dict())
    gates = read_gates(model, torch.randn(2, 3, 64, 64))
    assert list(gates) == list(model.attn_sites)
    for name, values in gates.items():
        assert values.shape[0] == 2, name
        assert torch.equal(values, torch.ones_like(values)), name


@pytest.mark.parametrize('attn_layer', ATTN_LAYERS)
def test_gates_are_what_channels_are_multiplied_by(attn_layer):
    model = create(attn_layer=attn_layer)
    attn = model.get_submodule('features.se3')
    with torch.no_grad():
        for param in attn.parameters():
            param.normal_(0, .5)
    seen = {}
    attn.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    gates = read_gates(model, torch.randn(2, 3, 64, 64))['features.se3']
    x, y = seen['x'].double(), seen['y'].double()
    if attn_layer in ('se', 'ese', 'eca', 'ecam', 'ceca', 'gc'):  # those that have one gate for a whole channel
        torch.testing.assert_close(gates[:, :, None, None] * x, y, rtol=1e-4, atol=1e-5)
    assert gates.isfinite().all()
    assert gates.shape == (2, model.num_features)
    model.features.denseblock3.register_forward_hook(lambda module, args, output: output * 0)
    assert read_gates(model, torch.zeros(1, 3, 64, 64))['features.se3'].isfinite().all()  # black, to the gates too


def test_gates_of_another_net():
    model = timm.create_model('with_attention', base='resnet18').eval()
    gates = read_gates(model, torch.randn(2, 3, 64, 64))
    assert {site: tuple(values.shape) for site, values in gates.items()} == {
        'layer1.se': (2, 64), 'layer2.se': (2, 128), 'layer3.se': (2, 256), 'layer4.se': (2, 512)}


@pytest.mark.parametrize('size', [(1, 1), (2, 1), (200, 1), (1, 3000)])
def test_overlay_of_a_line(size):
    config = {'input_size': (3, 96, 96), 'crop_pct': .875, 'crop_mode': 'center'}
    drawn = overlay(Image.new('RGB', size), np.zeros((96, 96)), config)
    assert drawn.width == 2 * max(1, round(size[0] * min(1, 1024 / max(size))))


@pytest.mark.parametrize(('crop_mode', 'crop_pct'), [('center', 1.), ('center', .875), ('squash', .9), ('border', 1.)])
@pytest.mark.parametrize('size', [(400, 300), (300, 400), (64, 64), (3000, 1000)])
def test_overlay_lies_where_the_model_saw_it(size, crop_mode, crop_pct):
    """A bright disc in the photo is found in the model's input: the map of that input must lie on the disc."""
    config = {'input_size': (3, 96, 96), 'crop_pct': crop_pct, 'crop_mode': crop_mode, 'mean': (0,) * 3,
              'std': (1,) * 3, 'interpolation': 'bilinear'}
    y, x = np.mgrid[:size[1], :size[0]]
    disc = np.hypot(x - .55 * size[0], y - .4 * size[1]) < .1 * min(size)
    photo = Image.fromarray(np.where(disc[..., None], 255, 0).repeat(3, 2).astype(np.uint8))
    seen = timm.data.create_transform(**config)(photo)[0].numpy()
    drawn = np.asarray(overlay(photo, seen, config)).astype(int)
    height, width = drawn.shape[0], drawn.shape[1] // 2
    assert max(height, width) == min(1024, max(size))
    assert width / height == pytest.approx(size[0] / size[1], rel=.02)
    heat = drawn[:, width:, 0] - drawn[:, width:, 2] > 60  # red: where the map is high
    found_y, found_x = (axis.mean() for axis in np.nonzero(heat))
    assert (found_x / width, found_y / height) == pytest.approx((.55, .4), abs=.02)


def test_explain_writes_overlays_and_profiles(trained, tmp_path, capsys):
    broken = trained[0] / 'test' / 'broken.jpg'
    broken.write_bytes(b'no image')
    before = trained[1].parent / 'checkpoint-0.pth.tar'
    before = before if before.exists() else trained[1].with_name('last.pth.tar')
    try:
        assert main(['explain', str(trained[1]), str(trained[0] / 'test'), '--output', str(tmp_path / 'out'),
                     '--before', str(before)]) == 1  # one cannot be read
    finally:
        broken.unlink()
    said = capsys.readouterr()
    assert 'not readable' in said.err
    assert 'features.se3' in said.out
    overlays = sorted((tmp_path / 'out' / 'cam').iterdir())
    assert len(overlays) == 24
    assert Image.open(overlays[0]).size == (96, 48)  # the photo's own size, twice
    profile = json.loads((tmp_path / 'out' / 'excitation.json').read_text())
    assert list(profile['unreadable']) == [str(broken)]
    assert profile['images'] == {'spots': 12, 'stripes': 12}
    etas = [site['eta_squared'] for site in profile['sites'].values()]
    assert etas == sorted(etas, reverse=True)
    assert 0 < etas[0] <= 1
    with open(tmp_path / 'out' / 'excitation.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * sum(site['channels'] for site in profile['sites'].values())
    assert all(0 < float(row['mean_gate']) < 2 and 0 < float(row['mean_gate_before']) < 2 for row in rows)
    assert Image.open(tmp_path / 'out' / 'excitation.png').size[0] > 400
    page = PageReader((tmp_path / 'out' / 'explanation.html').read_text())
    assert page.text.startswith(
        'Images that could not be read, and are not here: 1. What run/model_best.pth.tar looked at in 24 images')
    assert 'spots: 12 of 12 images' in page.text
    assert sum(source.startswith('data:image/jpeg') for source in page.sources) == 24
    assert sum((tmp_path / 'out' / unquote(link)).is_file() for link in page.links) == 24
    assert 'At 1, the dotted line, it leaves the channel as it is' in page.text


@pytest.mark.slow
def test_saturated_dead_and_eta_squared(tmp_path, trained):
    loaded = load_model(str(trained[1]))
    with torch.no_grad():
        fc2 = loaded.model.get_submodule('features.se3').fc2
        fc2.weight.zero_()
        fc2.bias.copy_(torch.tensor([9.] * 3 + [-9.] * 2 + [0.] * (len(fc2.bias) - 5)))
    site = explain(loaded, [str(trained[0] / 'test')], tmp_path / 'out')['sites']['features.se3']
    assert (site['saturated'], site['dead'], site['eta_squared']) == (3, 2, 0)


def test_explain_refuses(trained, hub, tmp_path):
    put_on_hub(hub, 'timm/densenet121.ra_in1k', timm.create_model('densenet121'))
    images = str(trained[0] / 'test' / 'spots')
    with pytest.raises(ImagesError, match='attention in other places'):
        explain(str(trained[1]), [images], tmp_path / 'out', before='se_densenet121')
    args = torch.load(trained[1], weights_only=False)['args'].model_args
    other = {**args, 'growth_rate': args['growth_rate'] + 4}
    model = timm.create_model('se_densenet121', **other)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'other.pth')
    other = load_model(str(tmp_path / 'other.pth'), architecture='se_densenet121', model_kwargs=other)
    with pytest.raises(ImagesError, match='is another net than'):
        explain(str(trained[1]), [images], tmp_path / 'out', before=other)
    (tmp_path / 'broken.png').write_bytes(b'')
    with pytest.raises(ImagesError, match='can be read'):
        explain(str(trained[1]), [str(tmp_path / 'broken.png')], tmp_path / 'out')
    with pytest.raises(ImagesError, match='there are no images'):
        explain(str(trained[1]), [str(tmp_path / '*.gif')], tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
