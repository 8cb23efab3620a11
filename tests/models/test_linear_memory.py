"""Linear memory against timm's own training."""
import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress

import forked
import pytest
import timm
import torch
import torch.nn as nn
from conftest import relative_error, two_processes
from memory import saved_megabytes  # benchmarks/memory.py
from nets import aside, assert_same_step, blocks, blocks_are_memory_efficient, create, images, pair, step
from timm.models import densenet
from timm.utils import ModelEmaV3
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from timm_densese import SE_PLACEMENTS
from timm_densese.models.dense_block import DenseBlock


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
        assert all(relative_error(ours[2][name], buffer.double()) < 1e-12 for name, buffer in theirs[2].items())
        plain.zero_grad()
        linear.zero_grad()


@pytest.mark.slow
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
    """Also where no gradient that comes in needs one, which torch's own refusal would not see."""
    _, linear = pair(create(se_placement='stage'))
    x = images(2).requires_grad_()
    message = r'no second derivatives .*set_grad_checkpointing\(False\)'
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(linear(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=message):  # does not reach the block
        torch.autograd.grad(linear.features(x).sum(), linear.features.se3.fc2.weight, create_graph=True)
    linear.requires_grad_(False)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(linear(x)[:, 0].sum(), x, create_graph=True)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'limit'), [('se_densenet121', 34), ('se_densenet201', 38.5)])
def test_memory_saved_for_backward(name, limit):
    model = timm.create_model(name).train()
    model.set_grad_checkpointing()
    saved = saved_megabytes(model, 224)
    assert saved < limit
    checkpointed = timm.create_model(name[len('se_'):]).train()
    checkpointed.set_grad_checkpointing()
    assert saved < .6 * saved_megabytes(checkpointed, 224)


def test_memory_with_attention_between_the_stages():
    model = timm.create_model('se_densenet121', se_placement='stage', memory_efficient=True).train()
    assert saved_megabytes(model, 224) < 40


def buffers_held(loss):
    """What the nodes of a graph hold beside what they saved."""
    held, seen, nodes = [], set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [n for n, _ in node.next_functions]
            features = getattr(node, 'features', None)
            assert not features or not features.passes
            held += [t for t in vars(features or object).values()
                     if isinstance(t, torch.Tensor) and t.numel() > features.stats.numel()]
    return held


@pytest.mark.parametrize('frozen', [
    (), ('conv0', 'norm0'), ('conv0', 'norm0', 'denseblock1'), ('conv0', 'norm0', 'denseblock1.denselayer1')])
@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_buffers_go_after_backward(frozen, placement):
    model = aside(se_placement=placement)
    for name, param in model.named_parameters():
        param.requires_grad_(not name.startswith(tuple(f'features.{f}' for f in frozen)) or not frozen)
    loss = model(images()).square().sum()
    loss.backward()
    assert not buffers_held(loss)
    loss = model(images()).square().sum()
    torch.autograd.grad(loss, model.classifier.weight, retain_graph=True)
    torch.autograd.grad(loss, model.features.denseblock2.denselayer2.conv1.weight)
    assert not buffers_held(loss)


def test_a_bias_may_change_before_backward():
    plain, linear = pair(create())
    x = images()
    for model in (plain, linear):
        loss = model(x).square().sum()
        with torch.no_grad():
            for m in model.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.bias.sub_(5)
        loss.backward()
    for ours, theirs in zip(linear.parameters(), plain.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_meta_device(placement):
    with torch.device('meta'):
        model = timm.create_model('se_densenet121', se_placement=placement, memory_efficient=True).train()
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(param.grad.is_meta for param in model.parameters())


def test_forward_mode_steps_aside_with_a_message():
    plain, linear = pair(create())
    x, tangent = images(2), images(2)
    directions = []
    for model in (plain, linear):
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = 0.
        message = pytest.warns(UserWarning, match='forward-mode') if model is linear else nullcontext()
        with forward_ad.dual_level(), message:
            try:
                directions.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent)
            except NotImplementedError:
                pytest.skip("this version of torch's checkpoints, which run then, have no forward-mode derivatives")
    assert relative_error(directions[1], directions[0]) < 1e-9


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


def test_backward_passes_within_each_other_and_in_threads():
    plain, linear = pair(create(se_placement='stage'))
    x = images().requires_grad_()
    expected, = torch.autograd.grad(plain(x).square().sum(), x)
    loss = linear(x).square().sum()

    def differentiate(_=None):
        return torch.autograd.grad(loss, x, retain_graph=True)[0]

    found = []
    weight = linear.features.denseblock1.denselayer2.conv1.weight
    handle = weight.register_hook(lambda grad: found.append(differentiate()) if not found else None)
    loss.backward(retain_graph=True)
    handle.remove()
    with ThreadPoolExecutor(3) as executor:
        found += executor.map(differentiate, range(9))
    assert all(relative_error(grad, expected) < 1e-9 for grad in [x.grad, *found])


@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_a_forward_pass_without_backward_leaves_nothing(placement):
    def count():
        gc.collect()
        return sum(isinstance(t, torch.Tensor) for t in gc.get_objects())

    model, x = aside(se_placement=placement), images()
    model(x)
    before = count()
    for _ in range(3):
        torch.autograd.grad(model(x).sum(), model.classifier.weight)
    assert count() == before


@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_within_a_checkpoint(placement):
    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=False)

    x = images()
    (out, grads, _), (expected, expected_grads, _) = (
        step(Checkpointed(model), x) for model in pair(create(se_placement=placement)))
    assert_same_step((out, grads, {}), (expected, expected_grads, {}))


def test_batched_gradients_say_what_to_do():
    x = images().requires_grad_()
    out = aside()(x)
    with pytest.raises(RuntimeError, match=r'no batched gradients .* set_grad_checkpointing\(False\)'):
        torch.autograd.grad(out, x, torch.ones(2, *out.shape, dtype=out.dtype), is_grads_batched=True)


def test_features_may_change_in_place():
    plain, linear = pair(create())
    for model in (plain, linear):
        model.features.denseblock1.register_forward_hook(lambda module, args, out: out.mul_(2))
    x = images()
    assert_same_step(step(linear, x), step(plain, x))


@pytest.mark.parametrize('placement', ['stage', 'final'])
def test_features_may_change_without_autograd(placement):
    plain, linear = pair(create(se_placement=placement))

    def change(module, args, out):
        out.detach()[:, ::2].mul_(3)

    for model in (plain, linear):
        for block in blocks(model):
            block.register_forward_hook(change)
    x = images()
    assert_same_step(step(linear, x), step(plain, x))


def test_a_block_called_without_a_gradient():
    block, x = aside().features.denseblock1, torch.randn(2, 16, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(block.forward_memory_efficient(x), block(x)) < 1e-9


def test_weights_after_a_block_must_not_change_before_backward():
    for model in pair(create(se_placement='stage')):
        loss = model(images()).square().sum()
        with torch.no_grad():
            model.features.se1.fc2.weight.mul_(3)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            loss.backward()


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_an_attention_without_a_gradient():
    model = create(se_placement='layer')
    model.features.denseblock1.denselayer1.requires_grad_(False).se = Zero()
    plain, linear = pair(model)
    x = images()
    assert_same_step(step(linear, x), step(plain, x))


def test_a_gradient_by_another_way_says_what_to_do():
    _, linear = pair(create(se_placement='layer'))
    kept = []
    linear.features.denseblock1.denselayer2.se.register_forward_hook(lambda module, args, out: kept.append(out))
    out = linear(images())
    with pytest.raises(RuntimeError, match=r'another way than its output.*set_grad_checkpointing\(False\)'):
        kept[0].sum().backward(retain_graph=True)
    (out.sum() + kept[0].sum()).backward()


def test_backward_within_autocast():
    """Discouraged, and timm's convolutions then compute in the forward pass's type."""
    x, grads = images(2, dtype=torch.float32), []
    for model in pair(create(dtype=torch.float32)):
        loss = model.features(x).square().sum()
        with torch.autocast('cpu', torch.bfloat16):
            loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.features.parameters()]))
    assert relative_error(*grads) < 1e-4


def test_a_backward_pass_that_fails_leaves_nothing():
    def fail(grad):
        raise ValueError

    def run():
        with suppress(ValueError):
            model(x).square().sum().backward()
        return sum(isinstance(t, torch.Tensor) for t in gc.get_objects())

    model, x = aside(), images()
    model.features.denseblock2.denselayer1.conv1.weight.register_hook(fail)
    run()
    gc.collect()
    gc.disable()  # memory must not wait for it
    try:
        assert run() == run()
    finally:
        gc.enable()


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


@pytest.mark.slow
def test_two_processes():
    two_processes(function=forked.compare_gradients)


@pytest.mark.slow
@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_compiled_in_one_graph(placement):
    plain, linear = pair(create(se_placement=placement, block_config=(1, 2)))
    x = images()
    out = torch.compile(linear, fullgraph=True, backend='aot_eager')(x)
    out.square().sum().backward()
    expected, grads, buffers = step(plain, x)
    del grads['the input']
    ours = {name: param.grad for name, param in linear.named_parameters()}
    assert_same_step((out.detach(), ours, dict(linear.named_buffers())), (expected, grads, buffers))


# As timm's.


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


def test_single_pixels_raise_as_timms_do():
    model = aside(block_config=(2, 2, 2, 2, 2))
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        model(images(1, size=32))


@pytest.mark.slow
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


@pytest.mark.slow
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
