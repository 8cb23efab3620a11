"""Fused dense blocks against timm's own, before and after what can happen to them."""
import copy
import io
import re

import pytest
import timm
import torch
import torch.nn as nn
from conftest import MODELS, relative_error
from nets import Double, Plus, blocks, images, trained
from timm.models import densenet, reparameterize_model
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from timm_densese import SE_PLACEMENTS
from timm_densese.models.dense_block import DenseBlock


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
@torch.inference_mode()
def test_fused_is_the_same_function(name):
    for placement in SE_PLACEMENTS if name == 'se_densenet121' else ('final',):
        model = trained(name, se_placement=placement, **({'block_config': (6, 12, 24, 16), 'growth_rate': 32}
                                                         if name == 'se_densenet121' else {}))
        fused = reparameterize_model(model)
        assert not any(isinstance(m, DenseBlock) for m in fused.modules())
        x = images(2, dtype=torch.float32, size=96)
        assert relative_error(fused(x), model(x)) < 1e-5
        for ours, theirs in zip(fused.forward_intermediates(x, intermediates_only=True),
                                model.forward_intermediates(x, intermediates_only=True), strict=True):
            assert relative_error(ours, theirs) < 1e-5


@torch.no_grad()
def test_fused_in_bfloat16():
    model = trained(growth_rate=32, block_config=(6, 12), num_classes=100)
    x = images(2, dtype=torch.float32)
    exact = model(x)
    fused = reparameterize_model(model)
    with torch.autocast('cpu', torch.bfloat16):
        assert relative_error(fused(x).float(), exact) < 2 * relative_error(model(x).float(), exact)
    x = x.bfloat16()
    assert relative_error(fused.bfloat16()(x).float(), exact) < 2 * relative_error(model.bfloat16()(x).float(), exact)


def conv1(net):
    return net.features.denseblock2.layers[0].conv1.conv


def layer(net):
    return net.features.denseblock2.layers[0]


def transition(net):
    return net.features.transition1


def scale_all(tensors):
    for t in tensors:
        t.mul_(1.1)


def replace_parameters(net):
    for m in net.modules():
        for name, param in list(m.named_parameters(recurse=False)):
            setattr(m, name, nn.Parameter(param * 1.1))


def instead(conv, kind=nn.Conv2d, **kwargs):
    """A convolution with another's weights, of another kind."""
    kwargs = {'kernel_size': conv.kernel_size, 'padding': conv.padding, 'bias': conv.bias is not None, **kwargs}
    other = kind(conv.in_channels, conv.out_channels, **kwargs)
    if other.weight.shape == conv.weight.shape:
        other.weight.data.copy_(conv.weight)
    return other.eval()


def override(module, name='forward'):
    method = getattr(module, name)
    setattr(module, name, lambda *args: method(*args) + 1)


def add_watched(layer):
    layer.se = nn.Identity()
    layer.se.register_forward_hook(lambda module, args, out: out * 2)


CHANGES = {
    'in place': lambda net: scale_all(net.parameters()),
    'data': lambda net: scale_all(p.data for p in net.parameters()),
    'vector': lambda net: vector_to_parameters(parameters_to_vector(net.parameters()) * 1.1, net.parameters()),
    'new parameters': replace_parameters,
    'other weights': lambda net: net.load_state_dict(reparameterize_model(trained()).state_dict()),
    'prune': lambda net: [prune.l1_unstructured(m, 'weight', .5) for m in list(net.modules())
                          if isinstance(m, nn.Conv2d)],
    'parametrization': lambda net: register_parametrization(conv1(net), 'weight', Double()),
    'wrapped': lambda net: setattr(layer(net), 'conv2', nn.Sequential(layer(net).conv2, nn.Tanh())),
    'subclass': lambda net: setattr(layer(net).conv1, 'conv', instead(conv1(net), Plus)),
    'reflect': lambda net: setattr(layer(net), 'conv2', instead(layer(net).conv2, padding_mode='reflect')),
    'forward': lambda net: override(conv1(net)),
    '_conv_forward': lambda net: override(layer(net).conv2, '_conv_forward'),
    '_conv_forward in a transition': lambda net: override(transition(net).conv, '_conv_forward'),
    'hook': lambda net: conv1(net).register_forward_hook(lambda module, args, out: out * 2),
    'pre-hook': lambda net: layer(net).conv1.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    'attention': lambda net: setattr(layer(net), 'se', nn.Tanh()),
    'subclass in a transition': lambda net: setattr(transition(net), 'conv', instead(transition(net).conv, Plus)),
    'bias in a transition': lambda net: give_bias(transition(net).conv),
    'forward in a transition': lambda net: override(transition(net).conv),
    'hook in a transition': lambda net: transition(net).conv.register_forward_hook(lambda module, args, out: out * 2),
    'hook on an attention': lambda net: add_watched(layer(net)),
}


@pytest.mark.parametrize('change', CHANGES)
@torch.no_grad()
def test_what_changes_a_fused_model_reaches_its_outputs(change):
    """As with a gradient, where the layers are called and concatenated, and as in a copy that never ran before."""
    fused = reparameterize_model(trained()).to(memory_format=torch.contiguous_format)  # as prune needs it
    x = images(2, dtype=torch.float32)
    before = fused(x)
    CHANGES[change](fused)
    with torch.enable_grad():
        expected = fused(x).detach()
    assert relative_error(fused(x), expected) < 1e-5
    assert relative_error(expected, before) > 1e-3


@torch.no_grad()
def test_fused_without_images():
    model = trained()
    x = images(2, dtype=torch.float32)[:0]
    assert reparameterize_model(model)(x).shape == model(x).shape == (0, 5)


@torch.no_grad()
def test_functional_calls_leave_nothing():
    fused = reparameterize_model(trained())
    x = images(2, dtype=torch.float32)
    before = fused(x)
    others = {name: param * 1.1 for name, param in fused.named_parameters()}
    with torch.enable_grad():
        expected = functional_call(fused, others, (x,)).detach()
    assert relative_error(functional_call(fused, others, (x,)), expected) < 1e-5
    assert torch.equal(fused(x), before)


def test_weights_of_inference_mode_change():
    with torch.inference_mode():
        fused = reparameterize_model(trained())
        x = images(2, dtype=torch.float32)
        fused(x)
        scale_all(fused.parameters())
        assert torch.equal(fused(x), copy.deepcopy(fused)(x))


@pytest.mark.parametrize('placement', SE_PLACEMENTS)
@torch.no_grad()
def test_fused_loads_its_own_state(placement):
    fused = reparameterize_model(trained(se_placement=placement))
    other = reparameterize_model(trained(se_placement=placement))
    x = images(2, dtype=torch.float32)
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(x), fused(x))
    assert relative_error(fused.double()(x.double()), other(x).double()) < 1e-5


@pytest.mark.parametrize('everywhere', [False, True])
def test_all_hooks_fire(everywhere):
    fused = reparameterize_model(trained(se_placement='layer'))
    convs = {m for m in fused.modules() if isinstance(m, nn.Conv2d)}
    fired = set()
    if everywhere:
        handles = [nn.modules.module.register_module_forward_hook(lambda m, *_: fired.add(m))]
    else:
        handles = [m.register_forward_hook(lambda m, *_: fired.add(m)) for m in convs]
    try:
        with torch.no_grad():
            fused(images(2, dtype=torch.float32))
    finally:
        for handle in handles:
            handle.remove()
    assert fired >= convs


@torch.no_grad()
def test_hooks_keep_what_they_read():
    """The ReLUs behind what a hook reads are not in place."""
    fused, kept = reparameterize_model(trained()), {}
    for name, m in fused.named_modules():
        if isinstance(m, nn.Conv2d) and '.se' not in name:  # timm's SE has a ReLU in place
            m.register_forward_hook(lambda m, args, out, name=name: kept.update({name: (out, out.clone())}))
    for x in images(2, dtype=torch.float32), images(2, dtype=torch.bfloat16):
        fused.to(x.dtype)(x)
        assert all(torch.equal(out, then) for out, then in kept.values())


def test_an_attention_that_is_a_function_is_called():
    fused, x = reparameterize_model(trained()), images(2, dtype=torch.float32)
    layer(fused).se = torch.tanh
    with torch.no_grad():
        out = fused(x)
    assert relative_error(out, fused(x)) < 1e-5


def test_all_of_a_fused_model_is_in_its_mode():
    assert not any(m.training for m in reparameterize_model(trained(se_placement='stage')).modules())


def test_floating_point_operations_are_counted():
    fused = reparameterize_model(trained(growth_rate=32, block_config=(6, 12)))
    counts = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), FlopCounterMode(display=False) as counter:
            fused(images(1, dtype=torch.float32))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_nothing_is_concatenated():
    for placement in SE_PLACEMENTS:
        fused = reparameterize_model(trained(se_placement=placement))
        with Operators() as operators:
            fused(images(2, dtype=torch.float32))
        assert not any('cat' in name or 'mkldnn' in name for name in operators.names)


@torch.no_grad()
def test_transforms():
    fused = reparameterize_model(trained()).double()
    x, tangent = images(2), images(2)
    with torch.enable_grad():
        expected, direction = torch.func.jvp(fused, (x,), (tangent,))
    step = 1e-5
    assert relative_error((fused(x + step * tangent) - fused(x - step * tangent)) / (2 * step), direction) < 1e-4
    out, ours = torch.func.jvp(fused, (x,), (tangent,))
    assert relative_error(out, expected) < 1e-9
    assert relative_error(ours, direction) < 1e-9
    with forward_ad.dual_level():
        ours = forward_ad.unpack_dual(fused(forward_ad.make_dual(x, tangent))).tangent
        assert relative_error(ours, direction) < 1e-9
    assert relative_error(torch.vmap(lambda image: fused(image[None])[0])(x), expected) < 1e-9

    others = [reparameterize_model(trained()).double() for _ in range(2)]
    params, buffers = torch.func.stack_module_state(others)
    outs = torch.vmap(lambda *state: functional_call(fused, state, (x,)))(params, buffers)
    assert all(relative_error(out, other(x)) < 1e-9 for out, other in zip(outs, others, strict=True))

    assert relative_error(torch.fx.symbolic_trace(fused.features)(x), fused.features(x)) < 1e-9


@pytest.mark.slow
@torch.no_grad()
def test_fused_is_copied_saved_and_scripted():
    fused = reparameterize_model(trained())
    x = images(2, dtype=torch.float32)
    expected = fused(x)
    assert torch.equal(copy.deepcopy(fused)(x), expected)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    assert relative_error(torch.jit.script(fused)(x), expected) < 1e-5
    assert relative_error(torch.jit.trace(fused, x)(x), expected) < 1e-5
    assert relative_error(torch.compile(fused, fullgraph=True, backend='aot_eager')(x), expected) < 1e-5


def test_fused_has_gradients():
    model = trained()
    fused = reparameterize_model(model)
    grads = []
    for net in (model, fused):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 72, 72, requires_grad=True)
        net(x).square().sum().backward()
        grads.append(x.grad)
    assert relative_error(*grads) < 1e-4


def dense(model):
    return model.features.denseblock1.denselayer1


def give_bias(conv):
    conv.bias = nn.Parameter(torch.ones(conv.out_channels))


def wrap(model):
    dense(model).conv2 = nn.Sequential(dense(model).conv2, nn.BatchNorm2d(8).eval())


class OtherLayer(densenet.DenseLayer):
    def forward(self, x):
        return super().forward(x) + 1


OTHERS = {
    'bias': lambda m: give_bias(dense(m).conv1),
    'bias of the second': lambda m: give_bias(dense(m).conv2),
    'subclass': lambda m: setattr(dense(m), 'conv1', instead(dense(m).conv1, Plus)),
    'subclass of the second': lambda m: setattr(dense(m), 'conv2', instead(dense(m).conv2, Plus)),
    'reflect': lambda m: setattr(dense(m), 'conv2', instead(dense(m).conv2, padding_mode='reflect')),
    'padding by name': lambda m: setattr(dense(m), 'conv2', instead(dense(m).conv2, padding='same')),
    'groups': lambda m: setattr(dense(m), 'conv2', instead(dense(m).conv2, groups=2)),
    'dilation': lambda m: setattr(dense(m), 'conv2', instead(dense(m).conv2, padding=2, dilation=2)),
    'wrapped': wrap,
    'hook on a layer': lambda m: dense(m).register_forward_hook(lambda module, args, out: out * 2),
    'hook on a norm': lambda m: dense(m).norm2.register_forward_hook(lambda module, args, out: out * 2),
    'hook on a ReLU': lambda m: dense(m).norm1.act.register_forward_hook(lambda module, args, out: out * 2),
    'pre-hook on the block': lambda m: m.features.denseblock1.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    'hook on the features': lambda m: m.features.register_forward_hook(lambda module, args, out: out * 2),
    'hook on a transition': lambda m: m.features.transition1.register_forward_hook(lambda module, args, out: out * 2),
    'hook on the stem': lambda m: m.features.conv0.register_forward_hook(lambda module, args, out: out * 2),
    'bias of the stem': lambda m: give_bias(m.features.conv0),
    'subclass in the stem': lambda m: setattr(m.features, 'conv0', instead(m.features.conv0, Plus, stride=2)),
    'bias of a transition': lambda m: give_bias(m.features.transition1.conv),
    'pool of a transition': lambda m: setattr(m.features.transition1, 'pool', nn.MaxPool2d(2)),
    'forward': lambda m: override(dense(m).conv1),
    'part of a method': lambda m: setattr(dense(m), 'bottleneck_fn', lambda xs: dense(m).conv1(torch.cat(xs, 1))),
    'prune': lambda m: prune.l1_unstructured(dense(m).conv1, 'weight', .5),
    'parametrization': lambda m: register_parametrization(dense(m).conv1, 'weight', Double()),
    'statistics of the batch': lambda m: [
        setattr(dense(m).norm1, name, None) for name in ('running_mean', 'running_var')],
    'activation': lambda m: setattr(dense(m).norm1, 'act', nn.SiLU()),
    'dropped norm': lambda m: setattr(dense(m).norm2, 'drop', nn.Hardtanh()),
    'another module': lambda m: dense(m).add_module('extra', nn.Identity()),
    'layer of a subclass': lambda m: setattr(dense(m), '__class__', OtherLayer),
    'layernorm': lambda m: setattr(dense(m), 'norm1', timm.layers.LayerNorm2d(16).eval()),
    'types': lambda m: dense(m).norm1.double(),
    'a child that is not called': lambda m: dense(m).add_module('se', nn.Tanh()),
    'norm in training': lambda m: dense(m).norm2.train(),
    'norm of the stem in training': lambda m: m.features.norm0.train(),
    'transition in training': lambda m: m.features.transition1.train(),
}


@pytest.mark.parametrize('other', OTHERS)
@torch.no_grad()
def test_what_is_not_timms_stays(other):
    """Folded or not, the model computes the same; the block whose layer is another is not folded."""
    torch.manual_seed(0)
    model = trained()
    OTHERS[other](model)
    x = images(2, dtype=torch.float32)
    fused = reparameterize_model(model)
    try:
        expected = model(x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:40])):
            fused(x)
    else:
        assert relative_error(fused(x), expected) < 1e-5


def test_hooks_of_all_modules_stop_folding():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert len(blocks(reparameterize_model(trained()))) == 3
    finally:
        handle.remove()


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    torch.manual_seed(0)
    fused = reparameterize_model(trained(se_placement='stage', block_config=(1, 2)))
    file = tmp_path_factory.mktemp('onnx') / 'model.onnx'
    batch = torch.export.Dim('batch', min=1, max=64)
    torch.onnx.export(fused, (images(2, dtype=torch.float32),), file, dynamo=True, verbose=False, input_names=['x'],
                      dynamic_shapes=({0: batch},), external_data=False)
    x = images(3, dtype=torch.float32)
    with torch.no_grad():
        return file, x, fused(x)


@pytest.mark.slow
def test_onnx(exported):
    onnx = pytest.importorskip('onnx', reason='onnx is missing: pip install .[test]')
    runtime = pytest.importorskip('onnxruntime', reason='onnxruntime is missing: pip install .[test]')
    file, x, expected = exported
    out, = runtime.InferenceSession(file, providers=['CPUExecutionProvider']).run(None, {'x': x.contiguous().numpy()})
    assert relative_error(torch.from_numpy(out), expected) < 1e-5
    kinds = {node.op_type for node in onnx.load(file).graph.node}
    assert 'BatchNormalization' in kinds  # the form that runtimes fuse
    assert not any('Scatter' in kind for kind in kinds)


@pytest.mark.slow
def test_openvino(exported):
    openvino = pytest.importorskip('openvino', reason='openvino is missing: pip install .[test]')
    file, x, expected = exported
    core = openvino.Core()
    model = core.compile_model(core.read_model(file), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    assert relative_error(torch.from_numpy(model(x.contiguous().numpy())[0]), expected) < 1e-5


@torch.no_grad()
def test_torch_export():
    fused = reparameterize_model(trained())
    x = images(2, dtype=torch.float32)
    program = torch.export.export(fused, (x,))
    assert relative_error(program.module()(x), fused(x)) < 1e-5
