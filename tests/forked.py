"""What a process of a test's own runs: it is forked from one that has imported torch, which takes seconds."""
import multiprocessing
import os
import signal
import sys


def run(function, args, env, stdout, stderr) -> None:
    """Run a function of this module as a process that a shell starts; its value is the exit status."""
    for name, file, descriptor in (('stdout', stdout, 1), ('stderr', stderr, 2)):
        if file:
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
            setattr(sys, name, open(descriptor, 'w', closefd=False))  # noqa: SIM115  as Python does at its start
    os.environ.update(env)
    if any(name.startswith('HF_') for name in env):  # which the client reads when it is imported
        for name in list(sys.modules):
            if name.partition('.')[0] in ('huggingface_hub', 'timm', 'timm_densese'):
                del sys.modules[name]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server's processes ignore
    multiprocessing.set_start_method('fork', force=True)
    sys.exit(function(args))


def command(args) -> int:
    from timm_densese.cli import main

    return main(args)


def module(args) -> None:
    """Run python -m timm_densese."""
    import runpy

    sys.argv = ['timm_densese', *args]
    runpy.run_module('timm_densese', run_name='__main__', alter_sys=True)


def benchmark(args) -> None:
    """Run a script of benchmarks/."""
    import importlib

    sys.argv = list(args)
    importlib.import_module(args[0]).main()


def load_models(names) -> None:
    import timm

    import timm_densese  # noqa: F401

    for name in names:
        try:
            timm.create_model(name, pretrained=True)
            print('loaded')
        except OSError as e:
            print('failed:', e)


def compare_gradients(args) -> None:
    """In each of two processes: say whether linear memory has the plain gradients, and both processes the same."""
    import timm
    import torch
    import torch.distributed as dist

    import timm_densese  # noqa: F401

    dist.init_process_group('gloo')
    torch.manual_seed(0)
    model = timm.create_model(
        'se_densenet121', growth_rate=8, block_config=(2, 3, 2), num_classes=5, dtype=torch.float64)
    grads = []
    for linear in (False, True):
        net = torch.nn.parallel.DistributedDataParallel(model.train())
        model.set_grad_checkpointing(linear)
        net.zero_grad()
        torch.manual_seed(dist.get_rank())
        net(torch.randn(4, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(grads[1], grads[0], strict=True) if b.norm() > 0)
    others = [g.clone() for g in grads[1]]
    for g in others:
        dist.broadcast(g, 0)
    same = all(torch.equal(a, b) for a, b in zip(others, grads[1], strict=True))
    dist.destroy_process_group()
    assert worst < 1e-9, worst
    assert same


def read_checkpoints(paths) -> None:
    """Print why files are no checkpoints, with a gigabyte more than the process has."""
    import resource
    from pathlib import Path

    from timm_densese.errors import CheckpointFileError
    from timm_densese.models.untrusted import read_checkpoint

    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
    for path in paths:
        try:
            read_checkpoint(Path(path))
        except CheckpointFileError as e:
            print(path.split('/')[-1], str(e).split(': ', 1)[1])


def read_images(folder) -> None:
    """Print the size of each image of a folder, or what is wrong with it, and the megabytes that all of it took."""
    import resource
    from pathlib import Path

    from timm_densese.data.images import read_image

    def used():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)

    before = used()
    for file in sorted(Path(folder[0]).iterdir()):
        try:
            print(file.name, read_image(file).size)
        except Exception as e:
            print(file.name, type(e).__name__, e)
    print('MB', (used() - before) >> 20)
