"""The linear-memory and the fused execution of dense blocks, against timm's own."""
import copy
import io
import os
import socket
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn as nn
from conftest import MODELS, SMALL, relative_error
from memory import saved_megabytes  # benchmarks/memory.py
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models import densenet, reparameterize_model
from timm.utils import ModelEmaV3

from timm_densese import SE_PLACEMENTS
from timm_densese.models.dense_block import DenseBlock

CHANNELS_LAST = torch.channels_last


def create(name='se_densenet121', dtype=torch.float64, **kwargs):
    """A small model in training whose affine maps and gates are not at their start."""
    kwargs = {**SMALL, 'num_classes': 5, **kwargs} if name == 'se_densenet121' else kwargs
    model = timm.create_model(name, dtype=dtype, **kwargs).train().to(memory_format=CHANNELS_LAST)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.randn_like(param) * .3)
            else:
                param.add_(torch.randn_like(param) * .02)
    return model


def images(n=4, dtype=torch.float64, size=72):
    return torch.randn(n, 3, size, size, dtype=dtype).to(memory_format=CHANNELS_LAST)


def step(model, x, context=None):
    """Output, gradients of every parameter and of the input, and buffers after a step."""
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    if context:
        with context:
            out = model(x)
    else:
        out = model(x)
    (out.float() if context else out).square().sum().backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
    return out.detach(), {**grads, 'the input': x.grad}, dict(model.named_buffers())


def pair(model):
    """The same model, plain and in linear memory."""
    linear = copy.deepcopy(model)
    linear.set_grad_checkpointing()
    assert blocks_are_memory_efficient(linear)
    return model, linear


def blocks(model):
    return [m for m in model.modules() if isinstance(m, DenseBlock)]


def blocks_are_memory_efficient(model):
    dtype = next(model.parameters()).dtype
    verdicts = set()
    for block in blocks(model):
        verdicts.add(block.is_memory_efficient(torch.randn(2, block.denselayer1.conv1.in_channels, 8, 8, dtype=dtype)))
    assert len(verdicts) == 1
    return verdicts.pop()


def assert_same_step(ours, theirs, tolerance=1e-9):
    (out, grads, buffers), (expected, expected_grads, expected_buffers) = ours, theirs
    assert relative_error(out, expected) < tolerance
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert relative_error(grads[name], grad) < tolerance, name
    for name, buffer in expected_buffers.items():
        if name.endswith('num_batches_tracked'):
            assert torch.equal(buffers[name], buffer), name
        else:
            assert relative_error(buffers[name], buffer) < tolerance, name


# Linear memory.


@pytest.mark.parametrize('kwargs', [
    {}, {'se_placement': 'stage'}, {'se_placement': 'layer'}, {'se_placement': 'layer', 'attn_layer': 'cbam'},
    {'proj_drop_rate': .3}, {'se_placement': 'layer', 'proj_drop_rate': .3}, {'stem_type': 'deep'}, {'bn_size': 2},
    {'aa_layer': timm.layers.BlurPool2d, 'aa_stem_only': False}],
    ids=lambda kwargs: '-'.join(map(str, kwargs.values())) or 'default')
def test_gradients_are_the_plain_ones(kwargs):
    plain, linear = pair(create(**kwargs))
    x = images()
    assert_same_step(step(linear, x), step(plain, x))


def test_ways_to_switch_it_on():
    model = create(memory_efficient=True)
    assert blocks_are_memory_efficient(model)
    model.set_grad_checkpointing(False)
    assert not blocks_are_memory_efficient(model)


@pytest.mark.parametrize('size', [64, 75])
def test_odd_sizes_and_the_other_layout(size):
    plain, linear = pair(create())
    x = images(size=size).contiguous()
    assert_same_step(step(linear, x), step(plain, x))


def test_momentum_of_a_cumulative_average():
    model = create()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    plain, linear = pair(model)
    for _ in range(2):
        x = images()
        ours, theirs = step(linear, x), step(plain, x)
        assert_same_step(ours, theirs)
        plain.zero_grad()
        linear.zero_grad()


@pytest.mark.parametrize('tail', [None, 'norm', 'pool'])
def test_gradcheck(tail):
    block = DenseBlock(densenet.DenseBlock(
        2, 3, bn_size=2, growth_rate=2, grad_checkpointing=True, dtype=torch.float64)).train()
    norm = timm.layers.BatchNormAct2d(7, dtype=torch.float64)
    with torch.no_grad():
        for param in [*block.parameters(), *norm.parameters()]:
            param.add_(torch.randn_like(param) * .3)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert block.is_memory_efficient(x)
    params = [*block.parameters(), *(norm.parameters() if tail else ())]

    def run(x, *params):
        return block.forward_memory_efficient(x, norm if tail else None, pool=tail == 'pool')

    assert torch.autograd.gradcheck(run, (x, *params))


def test_double_backward_says_that_it_does_not():
    _, linear = pair(create())
    x = images(2).requires_grad_()
    grad, = torch.autograd.grad(linear(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='differentiate twice'):
        grad.sum().backward()


def test_float32_is_as_close_to_float64_as_timms():
    reference = create('se_densenet121', block_config=(6, 12, 24, 16), growth_rate=32)
    single = copy.deepcopy(reference).float()
    x = images(6, size=96)
    _, exact, _ = step(reference, x)
    plain, linear = pair(single)
    _, theirs, _ = step(plain, x.float())
    _, ours, _ = step(linear, x.float())
    errors = torch.tensor([(relative_error(ours[n].double(), exact[n]), relative_error(theirs[n].double(), exact[n]))
                           for n in exact])
    mean, worst = errors.mean(0), errors.max(0).values
    assert mean[0] < 1.5 * mean[1]
    assert worst[0] < 2 * worst[1]


@pytest.mark.parametrize(('name', 'limit'), [('se_densenet121', 40), ('se_densenet201', 46)])
def test_memory_saved_for_backward(name, limit):
    model = timm.create_model(name).train()
    model.set_grad_checkpointing()
    saved = saved_megabytes(model, 224)
    assert saved < limit
    checkpointed = timm.create_model(name[len('se_'):]).train()
    checkpointed.set_grad_checkpointing()
    assert saved < .6 * saved_megabytes(checkpointed, 224)


def test_memory_grows_linearly_with_the_layers():
    saved = []
    for layers in (8, 16, 24, 32):
        model = timm.create_model('se_densenet121', growth_rate=32, block_config=(layers, 2)).train()
        model.set_grad_checkpointing()
        saved.append(saved_megabytes(model, 64))
    growth = torch.tensor(saved).diff()
    assert torch.allclose(growth, growth[0], rtol=.05)


# Ways of training.


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    plain, linear = pair(create(dtype=torch.float32))
    x = images(8, dtype=torch.float32)
    exact = step(copy.deepcopy(plain), x)[1]
    out, ours, _ = step(linear, x, torch.autocast('cpu', dtype))
    expected, theirs, _ = step(plain, x, torch.autocast('cpu', dtype))
    assert out.dtype == expected.dtype
    errors = torch.tensor([(relative_error(ours[n], exact[n]), relative_error(theirs[n], exact[n])) for n in exact])
    assert ours['classifier.weight'].dtype == torch.float32
    assert errors.isfinite().all()
    assert errors.mean(0)[0] < 1.3 * errors.mean(0)[1]  # no further from float32 than the plain path


def test_accumulation_and_double_use():
    plain, linear = pair(create())
    a, b = images(), images()
    for model in (plain, linear):
        (model(a) * model(b)).sum().backward()  # twice in one graph
        model(a).square().sum().backward()  # and added to
    for ours, theirs in zip(linear.parameters(), plain.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-9


def test_backward_twice_through_a_kept_graph():
    _, linear = pair(create())
    loss = linear(images()).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in linear.parameters()]
    loss.backward()
    assert all(relative_error(p.grad, 2 * g) < 1e-12 for p, g in zip(linear.parameters(), once, strict=True))


def test_some_parameters_are_frozen():
    plain, linear = pair(create())
    for model in (plain, linear):
        for name, param in model.named_parameters():
            param.requires_grad_('denseblock2' in name or ('norm' in name and 'denseblock3' in name))
    x = images()
    assert_same_step(step(linear, x), step(plain, x))
    for model in (plain, linear):
        model.zero_grad()
        model(x).sum().backward()  # no gradient reaches the first block


def test_average_of_weights():
    _, linear = pair(create())
    ema = ModelEmaV3(linear, decay=.5)
    linear(images()).sum().backward()
    ema.update(linear)
    with torch.no_grad():
        assert torch.isfinite(ema.module.eval()(images())).all()


def test_saved_tensors_can_be_moved():
    plain, linear = pair(create())
    x = images()
    with torch.autograd.graph.save_on_cpu():
        ours = step(linear, x)
    assert_same_step(ours, step(plain, x))


DDP = """
import os, sys, torch, timm, timm_densese
import torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group('gloo')
torch.manual_seed(0)
model = timm.create_model('se_densenet121', growth_rate=8, block_config=(2, 3, 2), num_classes=5, dtype=torch.float64)
grads = []
for linear in (False, True):
    net = torch.nn.parallel.DistributedDataParallel(model.train())
    model.set_grad_checkpointing(linear)
    net.zero_grad()
    torch.manual_seed(dist.get_rank())
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    net(x).square().sum().backward()
    grads.append([p.grad.clone() for p in model.parameters()])
worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(grads[1], grads[0]) if b.norm() > 0)
other = [g.clone() for g in grads[1]]
for g in other:
    dist.broadcast(g, 0)
same = all(torch.equal(a, b) for a, b in zip(other, grads[1]))
print('RANK', dist.get_rank(), worst < 1e-9, same)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {**os.environ, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'WORLD_SIZE': '2'}
    processes = [subprocess.Popen([sys.executable, '-c', DDP], env={**env, 'RANK': str(rank)}, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for rank, process in enumerate(processes):
        out, err = process.communicate(timeout=120)
        assert f'RANK {rank} True True' in out, err


@pytest.mark.slow
@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_compiled_in_one_graph(placement):
    plain, linear = pair(create(se_placement=placement))
    x = images()
    out = torch.compile(linear, fullgraph=True, backend='aot_eager')(x)
    out.square().sum().backward()
    expected, grads, buffers = step(plain, x)
    del grads['the input']
    ours = {name: param.grad for name, param in linear.named_parameters()}
    assert_same_step((out.detach(), ours, dict(linear.named_buffers())), (expected, grads, buffers))


# Stepping aside.


def aside(**kwargs):
    model = create(**kwargs)
    model.set_grad_checkpointing()
    return model


def with_a_hook(model):
    model.features.denseblock1.denselayer1.conv1.register_forward_hook(lambda *_: None)
    model.features.denseblock2.denselayer1.norm1.register_forward_hook(lambda *_: None)
    model.features.denseblock3.denselayer1.register_full_backward_hook(lambda *_: None)
    return model


def with_frozen_norms(model):
    return freeze_batch_norm_2d(model)


def with_norms_in_eval(model):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    return model


@pytest.mark.parametrize('make', [
    lambda: convert_sync_batchnorm(aside()),
    lambda: with_frozen_norms(aside()),
    lambda: with_norms_in_eval(aside()),
    lambda: with_a_hook(aside()),
    lambda: aside(norm_layer='layernorm2d'),
    lambda: aside(act_layer='silu'),
], ids=['sync', 'frozen', 'eval', 'hook', 'layernorm', 'silu'])
def test_steps_aside_exactly(make):
    """What is not a plain batch norm with ReLU runs as in timm, to the last bit."""
    torch.manual_seed(0)
    model = make()
    assert not blocks_are_memory_efficient(model)
    plain = copy.deepcopy(model)
    for block in blocks(plain):
        block.__class__ = densenet.DenseBlock
    plain.features.__class__ = nn.Sequential
    x = images()
    if any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        return  # it runs on GPUs only
    (out, grads, _), (expected, expected_grads, _) = step(model, x), step(plain, x)
    assert torch.equal(out, expected)
    assert all(torch.equal(grads[n], g) for n, g in expected_grads.items())


@pytest.mark.parametrize('name', ['denseblock1', 'transition1', 'transition1.norm', 'transition1.conv', 'norm5'])
def test_hooks_between_the_blocks_fire(name):
    plain, linear = pair(create())
    seen = {}
    for kind, model in (('plain', plain), ('linear', linear)):
        model.features.get_submodule(name).register_forward_hook(
            lambda module, args, out, kind=kind: seen.update({kind: (args[0].detach(), out.detach())}))
    x = images()
    assert_same_step(step(linear, x), step(plain, x))
    assert all(relative_error(a, b) < 1e-9 for a, b in zip(seen['linear'], seen['plain'], strict=True))


def test_norms_of_another_eps_step_aside():
    model = aside()
    for block in blocks(model):
        block.denselayer2.norm1.eps = 1e-3
    assert not blocks_are_memory_efficient(model)


def test_single_pixels_raise_as_timms_do():
    model = aside(block_config=(2, 2, 2, 2, 2))
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        model(images(1, size=32))


def test_scripting_tracing_and_no_gradient():
    model = aside(dtype=torch.float32)
    x = images(2, dtype=torch.float32)
    with torch.no_grad():
        assert not blocks_are_memory_efficient(model)
        traced = torch.jit.trace(model.eval(), x)
        assert relative_error(traced(x), model(x)) < 1e-6
    plain = create(dtype=torch.float32).eval()
    with torch.no_grad():
        assert relative_error(torch.jit.script(plain)(x), plain(x)) < 1e-6


def test_cut_model_for_features():
    plain = create(block_config=(2, 3, 2, 2), features_only=True, out_indices=(0, 1, 2))
    linear = copy.deepcopy(plain)
    for m in linear.modules():
        if isinstance(m, densenet.DenseLayer):
            m.grad_checkpointing = True
    x = images()
    outs = []
    for model in (plain, linear):
        features = model(x)
        sum(f.square().sum() for f in features).backward()
        outs.append(features)
    assert all(relative_error(a, b) < 1e-9 for a, b in zip(*outs, strict=True))
    for ours, theirs in zip(linear.parameters(), plain.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-9


def test_intermediates_in_linear_memory():
    plain, linear = pair(create())
    x = images()
    for ours, theirs in zip(linear.forward_intermediates(x, intermediates_only=True),
                            plain.forward_intermediates(x, intermediates_only=True), strict=True):
        assert relative_error(ours, theirs) < 1e-9


# Fused.


def trained(name='se_densenet121', **kwargs):
    """A model in eval mode whose statistics are no start, with signs and zeros among the scales."""
    model = create(name, dtype=torch.float32, **kwargs).eval()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, .2)
                m.running_var.uniform_(.3, 2)
                m.weight.normal_()
                m.weight[::7] = 0
                m.weight[1::7] *= 1e-9
    return model


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
    model = trained(growth_rate=32, block_config=(6, 12))
    x = images(2, dtype=torch.float32)
    exact = model(x)
    fused = reparameterize_model(model)
    with torch.autocast('cpu', torch.bfloat16):
        assert relative_error(fused(x).float(), exact) < 2 * relative_error(model(x).float(), exact)
    x = x.bfloat16()
    assert relative_error(fused.bfloat16()(x).float(), exact) < 2 * relative_error(model.bfloat16()(x).float(), exact)


@torch.no_grad()
def test_fused_follows_its_weights():
    """Packed weights are no copy to forget: a change, a cast, a load reach the outputs."""
    fused, other = reparameterize_model(trained()), reparameterize_model(trained())
    x = images(2, dtype=torch.float32)
    before = fused(x)
    fused.features.denseblock1.layers[0].conv2.weight.mul_(2)
    assert relative_error(fused(x), before) > 1e-3
    fused.load_state_dict(other.state_dict())
    assert torch.equal(fused(x), other(x))
    assert relative_error(fused.double()(x.double()), other(x).double()) < 1e-5
    with torch.inference_mode():
        assert torch.equal(fused.float()(x), other(x))


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


def test_norms_that_cannot_be_folded_stay():
    model = create(norm_layer='layernorm2d', dtype=torch.float32).eval()
    fused = reparameterize_model(model)
    assert len(blocks(fused)) == 3
    with torch.no_grad():
        x = images(2, dtype=torch.float32)
        assert relative_error(fused(x), model(x)) < 1e-6


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    torch.manual_seed(0)
    fused = reparameterize_model(trained(se_placement='stage'))
    file = tmp_path_factory.mktemp('onnx') / 'model.onnx'
    batch = torch.export.Dim('batch', min=1, max=64)
    torch.onnx.export(fused, (images(2, dtype=torch.float32),), file, dynamo=True, verbose=False, input_names=['x'],
                      dynamic_shapes=({0: batch},), external_data=False)
    x = images(3, dtype=torch.float32)
    with torch.no_grad():
        return file, x, fused(x)


def test_onnx(exported):
    onnx = pytest.importorskip('onnx', reason='onnx is missing: pip install .[test]')
    runtime = pytest.importorskip('onnxruntime', reason='onnxruntime is missing: pip install .[test]')
    file, x, expected = exported
    out, = runtime.InferenceSession(file, providers=['CPUExecutionProvider']).run(None, {'x': x.contiguous().numpy()})
    assert relative_error(torch.from_numpy(out), expected) < 1e-5
    kinds = {node.op_type for node in onnx.load(file).graph.node}
    assert 'BatchNormalization' in kinds  # the form that runtimes fuse
    assert not any('Scatter' in kind for kind in kinds)


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
