"""What timm promises of a model holds for these."""
import io

import pytest
import timm
import torch
from conftest import MODELS, SMALL, relative_error
from timm.models._manipulate import group_parameters
from timm.models.densenet import default_cfgs as densenet_cfgs
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay

from timm_densese import ATTN_LAYERS, SE_PLACEMENTS, SEDenseNet

placements = pytest.mark.parametrize('placement', SE_PLACEMENTS)


def create(**kwargs) -> SEDenseNet:
    model = timm.create_model('se_densenet121', **{**SMALL, **kwargs})
    for module in model.modules():  # gates that do something
        if type(module).__name__ == 'SEModule':
            module.fc2.reset_parameters()
    return model


IMAGE = torch.linspace(-2, 2, 2 * 3 * 64 * 64).sin().reshape(2, 3, 64, 64)


# Registration and structure.


def test_registered_with_the_tags_of_their_densenets():
    assert timm.list_models('se_densenet*', module='se_densenet') == sorted(MODELS)
    assert timm.list_models('with_attention') == ['with_attention']
    for name in MODELS:
        theirs = densenet_cfgs[name[len('se_'):]]
        assert {t.split('.', 1)[1] for t in timm.list_models(f'{name}.*', include_tags=True)} == set(theirs.tags)
        for tag, cfg in theirs.cfgs.items():
            ours = timm.get_pretrained_cfg(f'{name}.{tag}')
            if cfg.has_weights:
                assert ours.hf_hub_id == f'timm/{name[len("se_"):]}.{tag}'
            for field in ('input_size', 'test_input_size', 'test_crop_pct', 'crop_pct', 'interpolation', 'mean', 'std',
                          'num_classes', 'pool_size', 'first_conv', 'classifier'):
                assert getattr(ours, field) == getattr(cfg, field), (name, tag, field)


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_structure(name):
    densenet = timm.create_model(name[len('se_'):], device='meta')
    blocks = [m for n, m in densenet.features.named_children() if n.startswith('denseblock')]
    for placement, sites in (('final', 1), ('stage', 2 * len(blocks) - 1), ('layer', sum(map(len, blocks)))):
        model = timm.create_model(name, device='meta', se_placement=placement)
        added = set(model.state_dict()) - set(densenet.state_dict())
        assert set(densenet.state_dict()) < set(model.state_dict())
        assert len(model.attn_sites) == sites
        assert added == {f'{site}.{fc}.{p}' for site in model.attn_sites for fc in ('fc1', 'fc2')
                         for p in ('weight', 'bias')}
    default = timm.create_model(name, device='meta')
    assert list(default.attn_sites) == ['features.se4']
    names = [n for n, _ in default.features.named_children()]
    assert names[-3:] == ['denseblock4', 'se4', 'norm5']
    assert default.features.se4.fc1.weight.shape == (16, default.num_features, 1, 1)
    assert type(default.features.se4.act) is torch.nn.ReLU


def test_backbone_is_initialised_as_the_densenet_of_that_seed():
    torch.manual_seed(3)
    densenet = timm.create_model('densenet121', **SMALL)
    torch.manual_seed(3)
    model = timm.create_model('se_densenet121', **SMALL)
    state_dict = model.state_dict()
    assert all(torch.equal(state_dict[k], v) for k, v in densenet.state_dict().items())


@pytest.mark.parametrize(('wrong', 'right'), [
    (dict(se_placement='everywhere'), r"'final', 'stage', 'layer'"),
    (dict(attn_layer='sse'), r"'se', 'ese', 'eca'"),
    (dict(attn_layer='nl'), r"'se', 'ese', 'eca'"),
    (dict(gate_layer='sigmod'), r"'sigmoid', 'hard_sigmoid'"),
    (dict(rd_channels=0), 'positive whole number'),
    (dict(rd_channels=2.5), 'positive whole number'),
    (dict(rd_ratio=-1.), r'in \(0, 1\]'),
    (dict(rd_channels=8, rd_ratio=.5), 'not both'),
    (dict(attn_layer='ceca', rd_channels=8), 'no hidden units'),
])
def test_wrong_values_are_refused_with_the_right_ones(wrong, right):
    with pytest.raises(ValueError, match=right):
        timm.create_model('se_densenet121', device='meta', **wrong)


def test_excitation_size():
    def hidden(**kwargs):
        return timm.create_model('se_densenet121', device='meta', **kwargs).features.se4.fc1.out_channels
    assert (hidden(), hidden(rd_channels=24), hidden(rd_ratio=1 / 8)) == (16, 24, 128)
    assert type(create(gate_layer='hard_sigmoid').features.se3.gate.gate).__name__ == 'Hardsigmoid'


@pytest.mark.slow
@placements
@pytest.mark.parametrize('attn_layer', ATTN_LAYERS)
def test_each_attention_trains_and_scripts(placement, attn_layer):
    model = create(se_placement=placement, attn_layer=attn_layer, block_config=(1, 2))
    model(IMAGE).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.inference_mode():
        assert torch.allclose(torch.jit.script(model)(IMAGE), model(IMAGE), atol=1e-5)


# The model as timm's users handle it.


@placements
def test_heads(placement):
    model = create(se_placement=placement, num_classes=7).eval()
    with torch.inference_mode():
        assert model(IMAGE).shape == (2, 7)
        features = model.forward_features(IMAGE)
        assert features.shape == (2, model.num_features, 4, 4)
        assert torch.equal(model.forward_head(features), model(IMAGE))
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        model.reset_classifier(3, 'avgmax')
        assert model(IMAGE).shape == (2, 3)
        assert model.get_classifier() is model.classifier
        model.reset_classifier(0, '')
        assert torch.equal(model(IMAGE), features)
    assert create(se_placement=placement, num_classes=0).eval()(IMAGE).shape == (2, model.num_features)


@pytest.mark.parametrize('in_chans', [1, 3, 4])
@pytest.mark.parametrize('global_pool', ['avg', 'max', 'avgmax', 'catavgmax', ''])
def test_channels_and_pools(in_chans, global_pool):
    num_classes = 5 if global_pool else 0
    model = create(in_chans=in_chans, global_pool=global_pool, num_classes=num_classes)
    out = model(torch.randn(2, in_chans, 64, 64))
    assert out.shape == ((2, 5) if global_pool else (2, model.num_features, 4, 4))


@placements
def test_drop_rates(placement):
    model = create(se_placement=placement, drop_rate=.5, proj_drop_rate=.5)
    model.train()
    assert not torch.equal(model(IMAGE), model(IMAGE))
    model.eval()
    assert torch.equal(model(IMAGE), model(IMAGE))
    assert model.head_drop.p == .5
    assert {layer.drop_rate for block in (model.features.denseblock1, model.features.denseblock3)
            for layer in block.values()} == {.5}


@placements
@pytest.mark.parametrize('drop_rate', [0, .3])
def test_dense_layer_drops_after_its_attention(placement, drop_rate):
    model = create(se_placement='layer', proj_drop_rate=drop_rate).train()
    layer = model.features.denseblock1.denselayer1
    x = torch.randn(2, 16, 8, 8)
    kept = layer(x) != 0
    zero_share = 1 - kept.float().mean().item()
    assert abs(zero_share - drop_rate) < .05


@placements
def test_feature_extraction(placement):
    model = create(se_placement=placement).eval()
    with torch.inference_mode():
        final, intermediates = model.forward_intermediates(IMAGE)
        assert torch.equal(final, model.forward_features(IMAGE))
        info = timm.models.FeatureInfo(model.feature_info, (0, 1, 2, 3))
        assert [t.shape[1] for t in intermediates] == info.channels()
        assert [IMAGE.shape[-1] // t.shape[-1] for t in intermediates] == info.reduction()
        assert torch.equal(
            model.forward_intermediates(IMAGE, indices=[1], stop_early=True, intermediates_only=True)[0],
            intermediates[1])
        for feature_cls in ('list', 'dict', 'hook', 'getter'):
            backbone = create(
                se_placement=placement, features_only=True, feature_cls=feature_cls, out_indices=(0, 2, 3)).eval()
            backbone.load_state_dict(
                {k: v for k, v in zip(backbone.state_dict(), model.state_dict().values(), strict=False)})
            out = backbone(IMAGE)
            out = list(out.values()) if isinstance(out, dict) else out
            for ours, expected in zip(out, [intermediates[i] for i in (0, 2, 3)], strict=True):
                assert relative_error(ours, expected) < 1e-6, feature_cls

        densenet = timm.create_model('densenet121', **SMALL)
        for net in (model, densenet):
            net.prune_intermediate_layers([1])
        assert torch.equal(model(IMAGE), intermediates[1])
        model.load_state_dict(model.state_dict())
        assert torch.equal(model(IMAGE), intermediates[1])
        model.load_state_dict(densenet.state_dict())
        assert relative_error(model(IMAGE), densenet.eval()(IMAGE)) < 1e-5


@placements
def test_layer_decay_puts_each_attention_with_its_block(placement):
    model = create(se_placement=placement)
    for coarse in (False, True):
        group_of = group_parameters(model, model.group_matcher(coarse), reverse=True)
        assert group_of['features.conv0.weight'] == 0
        for site in model.attn_sites:
            if placement == 'layer' or '.transition' in site:
                follows = site.replace('.se', '.conv2.weight' if placement == 'layer' else '.conv.weight')
            else:
                block = model.get_submodule(site.replace('.se', '.denseblock'))
                follows = f'{site.replace(".se", ".denseblock")}.denselayer{len(block)}.conv2.weight'
            assert group_of[f'{site}.fc1.weight'] == group_of[f'{site}.fc2.bias'] == group_of[follows], (site, coarse)
    groups = param_groups_layer_decay(model, weight_decay=.05, layer_decay=.5)
    assert sum(len(g['params']) for g in groups) == len(list(model.parameters()))


@placements
def test_weight_decay_spares_biases_and_norms(placement):
    model = create(se_placement=placement)
    names = {id(p): n for n, p in model.named_parameters()}
    spared, decayed = param_groups_weight_decay(model, weight_decay=.05)
    spared, decayed = ({names[id(p)] for p in group['params']} for group in (spared, decayed))
    for site in model.attn_sites:
        assert {f'{site}.fc1.weight', f'{site}.fc2.weight'} <= decayed
        assert {f'{site}.fc1.bias', f'{site}.fc2.bias'} <= spared
    assert 'features.norm5.weight' in spared
    create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=.05, layer_decay=.7)


@placements
def test_gradient_checkpointing_gives_the_same_gradients(placement):
    model = create(se_placement=placement, dtype=torch.float64)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(IMAGE.double()).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(relative_error(b, a) < 1e-9 or a.norm() < 1e-12 for a, b in zip(*grads, strict=True))


# Execution modes.


@pytest.mark.slow
@placements
def test_torchscript(placement, tmp_path):
    model = create(se_placement=placement).eval()
    with torch.inference_mode():
        torch.jit.script(model).save(tmp_path / 'model.pt')
        assert torch.allclose(torch.jit.load(tmp_path / 'model.pt')(IMAGE), model(IMAGE), atol=1e-5)
        assert torch.allclose(torch.jit.trace(model, IMAGE)(IMAGE), model(IMAGE), atol=1e-5)


@placements
def test_fx(placement):
    model = create(se_placement=placement).eval()
    with torch.inference_mode():
        assert torch.equal(torch.fx.symbolic_trace(model)(IMAGE), model(IMAGE))


@pytest.mark.slow
@placements
def test_export_with_a_dynamic_batch(placement):
    model = create(se_placement=placement, block_config=(1, 2)).eval()
    program = torch.export.export(model, (IMAGE,), dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=64)},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    with torch.inference_mode():
        for image in (IMAGE, IMAGE.repeat(2, 1, 1, 1)):
            assert torch.allclose(loaded(image), model(image), atol=1e-5)


@pytest.mark.slow
@placements
def test_onnx(placement, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is missing: pip install .[test]')
    pytest.importorskip('onnxscript', reason='onnxscript is missing: pip install .[test]')
    model = create(se_placement=placement, block_config=(1, 2)).eval()
    path = str(tmp_path / 'model.onnx')
    torch.onnx.export(model, (IMAGE,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    with torch.inference_mode():
        out, = session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})
        assert relative_error(torch.from_numpy(out), model(IMAGE)) < 1e-5


@pytest.mark.slow
@placements
@torch.no_grad()
def test_compiles_without_a_graph_break(placement):
    model = create(se_placement=placement, block_config=(1, 1))
    for train in (True, False):
        model.train(train)
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
        assert relative_error(compiled(IMAGE), model(IMAGE)) < 1e-5
        torch._dynamo.reset()


@pytest.mark.slow
def test_inductor():
    model = create(block_config=(1,)).eval()
    with torch.inference_mode():
        assert relative_error(torch.compile(model, fullgraph=True)(IMAGE), model(IMAGE)) < 1e-4


@placements
def test_channels_last_and_autocast(placement):
    model = create(se_placement=placement).eval()
    with torch.inference_mode():
        expected = model(IMAGE)
        last = model.to(memory_format=torch.channels_last)
        image = IMAGE.to(memory_format=torch.channels_last)
        assert relative_error(last(image), expected) < 1e-5
        assert last.forward_features(image).is_contiguous(memory_format=torch.channels_last)
        with torch.autocast('cpu', torch.bfloat16):
            out = last(image)
        assert out.dtype == torch.bfloat16
        assert relative_error(out.float(), expected) < .1
    model.train()
    with torch.autocast('cpu', torch.bfloat16):
        model(image).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@placements
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_device_and_dtype_at_creation(placement, dtype):
    model = timm.create_model('se_densenet121', se_placement=placement, dtype=dtype, **SMALL)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(IMAGE.to(dtype)).dtype == dtype
    on_meta = timm.create_model('se_densenet121', se_placement=placement, device='meta')
    assert {p.device.type for p in on_meta.parameters()} == {'meta'}
