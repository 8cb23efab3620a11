"""What depends on the device: on a GPU where there is one, else on the CPU. benchmarks/gpu.py runs this file."""
import copy
import os

import pytest
import torch
import torch.distributed as dist
from common import record  # benchmarks/common.py
from conftest import relative_error
from nets import CHANNELS_LAST, assert_same_step, create, images, pair, step, trained
from timm.layers import convert_sync_batchnorm
from timm.models import reparameterize_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from timm_densese import SE_PLACEMENTS

DEVICE = os.environ.get('DEVICE') or ('cuda' if torch.cuda.is_available() else 'cpu')
needs_cuda = pytest.mark.skipif(DEVICE != 'cuda', reason='needs a GPU that CUDA runs on')


@pytest.fixture(autouse=True)
def _float32_is_float32():
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = kept


@pytest.fixture
def process():
    """A process group of one process."""
    store = dist.HashStore()
    dist.init_process_group('nccl' if DEVICE == 'cuda' else 'gloo', store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def on_device(*things):
    return [thing.to(DEVICE) for thing in things]


def test_floating_point_operations_are_counted():
    """In 16 bits, where kernels would run that no counter sees."""
    counts = []
    for device in ('cpu', DEVICE):
        fused = reparameterize_model(trained()).to(device, torch.bfloat16)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            fused(images(1, dtype=torch.bfloat16).to(device))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize('layout', [CHANNELS_LAST, torch.contiguous_format])
@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_fused(placement, layout):
    model, x = on_device(trained(se_placement=placement), images(2, dtype=torch.float32))
    model, x = model.to(memory_format=layout), x.contiguous(memory_format=layout)
    fused = reparameterize_model(model)
    with torch.inference_mode():
        assert relative_error(fused(x), model(x)) < 1e-5


@pytest.mark.parametrize('layout', [CHANNELS_LAST, torch.contiguous_format])
@pytest.mark.parametrize('placement', SE_PLACEMENTS)
def test_linear_memory(placement, layout):
    plain, linear = (m.to(DEVICE, memory_format=layout) for m in pair(create(se_placement=placement)))
    x = images().to(DEVICE).contiguous(memory_format=layout)
    assert_same_step(step(linear, x), step(plain, x), tolerance=1e-8)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    plain, linear = (m.to(DEVICE) for m in pair(create(dtype=torch.float32)))
    x = images(8, dtype=torch.float32).to(DEVICE)
    exact = step(copy.deepcopy(plain), x)[1]
    ours, theirs = (step(model, x, torch.autocast(DEVICE, dtype))[1] for model in (linear, plain))
    errors = torch.tensor([(relative_error(ours[n], exact[n]), relative_error(theirs[n], exact[n])) for n in exact])
    assert errors.isfinite().all()
    assert errors.mean(0)[0] < 1.5 * errors.mean(0)[1]
    fused, model = reparameterize_model(plain.eval()), plain.eval()
    with torch.inference_mode():
        expected = model(x)
        with torch.autocast(DEVICE, dtype):
            assert relative_error(fused(x).float(), expected) < 3 * relative_error(model(x).float(), expected)


def test_distributed(process):
    plain, linear = on_device(*pair(create()))
    wrapped = DistributedDataParallel(linear)
    x = images().to(DEVICE)
    wrapped(x).square().sum().backward()
    plain(x).square().sum().backward()
    for ours, theirs in zip(linear.parameters(), plain.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-8


@needs_cuda
def test_synchronised_batch_norms(process):
    """Linear memory steps aside for them. What runs in its place, timm's checkpoints, updates statistics twice."""
    plain, linear = (convert_sync_batchnorm(m) for m in on_device(*pair(create())))
    x = images().to(DEVICE)
    (out, grads, _), (expected, expected_grads, _) = step(linear, x), step(plain, x)
    assert_same_step((out, grads, {}), (expected, expected_grads, {}))


@needs_cuda
def test_cuda_graph_of_inference():
    fused, x = on_device(reparameterize_model(trained()), images(2, dtype=torch.float32))
    with torch.inference_mode():
        expected = fused(x)
        graph, out = record(lambda: fused(x))
        x.mul_(2)
        graph.replay()
        assert relative_error(out, fused(x)) < 1e-6
        assert relative_error(out, expected) > 1e-3


@needs_cuda
def test_cuda_graph_of_training():
    linear = pair(create(dtype=torch.float32))[1].to(DEVICE)
    x = images(dtype=torch.float32).to(DEVICE)

    def run():
        linear.zero_grad(set_to_none=False)
        linear(x).square().sum().backward()

    graph, _ = record(run)
    graph.replay()
    grads = [param.grad.clone() for param in linear.parameters()]
    run()
    for grad, param in zip(grads, linear.parameters(), strict=True):
        assert relative_error(grad, param.grad) < 1e-4


@needs_cuda
def test_compiled():
    plain, linear = (m.to(DEVICE) for m in pair(create(dtype=torch.float32, block_config=(1, 2))))
    x = images(dtype=torch.float32).to(DEVICE)
    torch.compile(linear, fullgraph=True)(x).square().sum().backward()
    plain(x).square().sum().backward()
    for ours, theirs in zip(linear.parameters(), plain.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-2
