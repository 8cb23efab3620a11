"""The suite talks to a Hub of its own, started here because huggingface_hub reads HF_ENDPOINT on its first import."""
import argparse
import atexit
import csv
import gc
import hashlib
import io
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from html.parser import HTMLParser
from pathlib import Path

from hub_server import HubServer

_scratch = tempfile.TemporaryDirectory(prefix='timm-densese-tests-')
atexit.register(_scratch.cleanup)
_server = HubServer(Path(_scratch.name) / 'hub')
_server.root.mkdir()
_running = _server.running()
_running.__enter__()
atexit.register(_running.__exit__, None, None, None)
# Runs with other numbers of threads differ in the last bits, and processes beside others wait for each other's threads.
os.environ['OMP_NUM_THREADS'] = '1'
os.environ['HF_ENDPOINT'] = _server.endpoint
os.environ['HF_HOME'] = str(Path(_scratch.name) / 'home')
os.environ['HF_HUB_DISABLE_PROGRESS_BARS'] = '1'
os.environ['HF_HUB_DISABLE_XET'] = '1'  # the test Hub speaks LFS
os.environ['TORCHINDUCTOR_VEC_ISA_OK'] = '0'  # what is compiled has no vectors: finding the machine's takes 8 s
# What a shell starts in the background ignores Ctrl-C, and so does all that it starts: the tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402

if os.environ.get('DEVICE') == 'cpu' or not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'  # before Triton is imported, for tests/models/test_kernels.py

import forked  # noqa: E402
import pytest  # noqa: E402
import safetensors.torch  # noqa: E402
import timm  # noqa: E402
import yaml  # noqa: E402
from filelock import FileLock  # noqa: E402

import timm_densese  # noqa: E402, F401
from timm_densese.cli import main  # noqa: E402
from timm_densese.data.splits import split_images  # noqa: E402
from timm_densese.demo import generate_images  # noqa: E402
from timm_densese.training import TrainConfig, train  # noqa: E402

gc.set_threshold(100_000)  # of what tests drop, little is in cycles

MODELS = ('se_densenet121', 'se_densenet161', 'se_densenet169', 'se_densenet201', 'se_densenet264d',
          'se_densenetblur121d')
# A DenseNet small enough for float64 and compilers.
SMALL = dict(growth_rate=8, block_config=(2, 3, 2))

# A run that takes a second.
SMALL_RUN = dict(model='se_densenet121', model_kwargs=dict(SMALL, growth_rate=4), img_size=32, workers=0, patience=0)

MSLD = Path(__file__).parents[2] / 'shared' / 'data' / 'msld'
needs_msld = pytest.mark.skipif(
    not MSLD.is_dir(), reason='the MSLD images are missing: they lie beside the repository, in ../shared/data/msld')


@pytest.fixture(scope='session')
def hub() -> HubServer:
    return _server


def hash_files(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.glob('*/*.jpg')}


def write_split(root: Path, per_class: int, test: float = .2) -> Path:
    """A split of generated images, spots and stripes, of 48 pixels."""
    generate_images(root / 'images', per_class=per_class, size=48)
    split_images(root / 'images', root / 'split', val=.25, test=test)
    return root / 'split'


@pytest.fixture(scope='session')
def shared_folder(tmp_path_factory):
    """Make a folder once for all processes of the tests: who comes second waits for it. Nobody changes it."""
    def folder(name: str, fill) -> Path:
        root = tmp_path_factory.getbasetemp()
        path = (root.parent if os.environ.get('PYTEST_XDIST_WORKER') else root) / f'shared-{name}'
        with FileLock(f'{path}.lock'):
            if not (path / 'whole').exists():
                path.mkdir()
                fill(path)
                (path / 'whole').touch()
        return path

    return folder


@pytest.fixture(scope='session')
def trained(shared_folder) -> tuple[Path, Path]:
    """A split of generated images, spots and stripes, and the best checkpoint of a small model trained on it."""
    def fill(root: Path) -> None:
        split = write_split(root, 40, test=.3)
        torch.manual_seed(0)
        train(TrainConfig(data_dir=str(split), output=str(root / 'run'), model='se_densenet121',
                          model_kwargs=dict(SMALL, se_placement='stage'), img_size=32, workers=0, epochs=7, lr=1e-2,
                          batch_size=8))

    root = shared_folder('trained', fill)
    return root / 'split', root / 'run' / 'model_best.pth.tar'


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported is in use for good: the collector need not look at it


def pytest_collection_modifyitems(items) -> None:
    """The longest files come first, so that at the end no process is left with one while the other waits."""
    longest = ('test_benchmarks.py', 'test_study.py', 'test_splits.py', 'test_loop.py', 'test_records.py')
    items.sort(key=lambda item: item.path.name not in longest)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Commands. A new process of Python takes seconds to import torch, so most tests run them in this one.


def run_cli(*args) -> subprocess.CompletedProcess:
    """Run a command here; what it raises comes out, where a process would print a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(arg) for arg in args])
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


def start_alone(function, *args, stdout='', stderr=os.devnull, **env) -> multiprocessing.Process:
    """Start a function of forked.py in a process of its own, with more in its environment."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['timm_densese.training', 'timm_densese.cli', 'torch.utils.tensorboard'])
    process = context.Process(
        target=forked.run, args=(function, [str(arg) for arg in args], env, str(stdout), str(stderr)))
    process.start()
    return process


def start_cli(*args, **kwargs) -> multiprocessing.Process:
    """Start a command in a process that can be killed."""
    return start_alone(forked.command, *args, **kwargs)


def finish(process: multiprocessing.Process, stdout: Path, stderr: Path) -> subprocess.CompletedProcess:
    process.join()
    return subprocess.CompletedProcess(stdout, process.exitcode, stdout.read_text(), stderr.read_text())


@pytest.fixture
def run_alone(tmp_path_factory):
    """Run a command, or a function of forked.py, in a process of its own, to its end."""
    def run(*args, function=forked.command, **env) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp('said')
        stdout, stderr = folder / 'stdout', folder / 'stderr'
        return finish(start_alone(function, *args, stdout=stdout, stderr=stderr, **env), stdout, stderr)

    return run


def two_processes(*args, function=forked.command, stdout=os.devnull) -> None:
    """Run a command in two processes that know of each other, as torchrun starts them; they print to stdout0 and 1."""
    store = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)  # outlives them
    env = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(store.port),
               TORCHELASTIC_USE_AGENT_STORE='True')
    processes = [start_alone(function, *args, RANK=str(rank), LOCAL_RANK=str(rank), **env,
                             stdout=stdout if stdout == os.devnull else f'{stdout}{rank}') for rank in range(2)]
    try:
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
    finally:
        for process in processes:  # one that hangs would keep pytest from ending
            process.kill()


def wait_for_checkpoints(process: multiprocessing.Process, folder: Path, changes: int = 1) -> None:
    """Wait until files named last.pth.tar in a folder or below it have been written so many times more."""
    def look() -> dict[Path, int]:
        return {file: file.stat().st_ino for file in folder.rglob('last.pth.tar')}

    seen, deadline = look(), time.monotonic() + 120
    while changes > 0:
        assert process.exitcode is None, 'it was done before'
        assert time.monotonic() < deadline, 'no checkpoint came'
        time.sleep(.005)
        with suppress(FileNotFoundError):
            now = look()
            changes -= now != seen
            seen = now


@pytest.fixture
def small_disk(tmp_path):
    """An empty folder that is a file system of its own, of 1.5 MB."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1500k', 'tmpfs', str(folder)], capture_output=True,
                             text=True) if shutil.which('mount') else None
    if mounted is None or mounted.returncode:
        pytest.skip(f'a small file system is missing: mount -t tmpfs failed ({mounted and mounted.stderr.strip()})')
    yield folder
    subprocess.run(['umount', '-l', str(folder)], check=True)


# Trainings.


@pytest.fixture(scope='session')
def small_split(shared_folder) -> Path:
    """A split for what looks at the training and not at what is learned."""
    return shared_folder('small', lambda root: write_split(root, 20)) / 'split'


def run_training(data: Path, output: Path, **options):
    """Train a small model, for one epoch where nothing else is said."""
    return train(TrainConfig(**{
        **SMALL_RUN, 'data_dir': str(data), 'output': str(output), 'epochs': 1, **options}))


def read_summary(output: Path) -> list[dict[str, float]]:
    with open(output / 'summary.csv', newline='') as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def load_saved(output: Path, name: str = 'last.pth.tar'):
    with torch.serialization.safe_globals([argparse.Namespace]):  # the options, as in timm's checkpoints
        return torch.load(output / name, weights_only=True)


def same(a, b) -> bool:
    """Compare nested tensors and values bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# Checkpoints to publish, and the Hub that takes them.


IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
CLASSES = ['chickenpox', 'measles', 'monkeypox']


@pytest.fixture
def owner(monkeypatch, hub: HubServer):
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    hub.faults.clear()
    yield hub
    assert not any(f.times for f in hub.faults), 'a fault that was set up did not happen'


@pytest.fixture
def no_waiting(monkeypatch):
    """The client's pauses between attempts, in no time; the attempts are the real ones."""
    monkeypatch.setattr('time.sleep', lambda seconds: None)


@pytest.fixture
def cold_cache(monkeypatch, tmp_path):
    for module in ('huggingface_hub.constants', 'huggingface_hub.file_download.constants'):
        monkeypatch.setattr(f'{module}.HF_HUB_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


_seeds = itertools.count(1)


def save_run(folder, net=None, prefix='', args=None, saved=None):
    """A checkpoint as the loops write it, with raw and averaged weights that differ."""
    folder.mkdir(parents=True, exist_ok=True)
    if net is None:
        torch.manual_seed(next(_seeds))  # other weights in each test: the Hub would know the same again
        net = timm.create_model('se_densenet121', num_classes=3, **SMALL)
    with torch.no_grad():
        raw = {prefix + k: v + .01 if v.is_floating_point() else v for k, v in net.state_dict().items()}
        ema = {prefix + k: v.clone() for k, v in net.state_dict().items()}
    state = {'arch': 'se_densenet121', 'epoch': 7, 'metric': .25, 'state_dict': raw, 'state_dict_ema': ema}
    torch.save({**state, **(saved or {})}, folder / 'model_best.pth.tar')
    options = {'model': 'se_densenet121', 'model_kwargs': dict(SMALL), 'class_names': CLASSES, 'eval_metric': 'loss',
               'input_size': [3, 64, 64], 'mean': [.1, .2, .3], 'std': [.4, .5, .6], 'lr': .001, 'pretrained': False,
               'data_dir': str(folder / 'secret-place')}
    (folder / 'args.yaml').write_text(yaml.safe_dump({**options, **(args or {})}))
    return folder / 'model_best.pth.tar', net.eval()


@torch.inference_mode()
def same_logits(model, expected) -> bool:
    return torch.equal(model.eval()(IMAGE), expected.eval()(IMAGE))


# Models.


def trained_densenet(name: str, **kwargs) -> torch.nn.Module:
    """A DenseNet with the statistics of a trained one: every norm fitted to its input, some variances near zero."""
    model = timm.create_model(name, **kwargs)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                # The variance of these channels is far under the norms' eps (1e-5), which then sets their scale.
                module.weight[::5] *= 1e-3
        for norm in norms:
            norm.weight.uniform_(.5, 1.5)
            norm.bias.normal_(0, .2)
            norm.momentum = None  # average of the batches
        model.train()
        model(torch.randn(4, model.in_chans, 64, 64, dtype=norms[0].weight.dtype))
        for norm in norms:
            norm.momentum = .1
    return model.eval()


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    return ((output - expected).norm() / expected.norm()).item()


def put_on_hub(hub: HubServer, repo_id: str, model: torch.nn.Module) -> None:
    """Give a repository the file that timm's have."""
    hub.put(repo_id, {'model.safetensors': safetensors.torch.save(model.state_dict())})


class PageReader(HTMLParser):
    """What a page shows (`text`, what is folded too) and what it fetches or links to; it may run no script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.sources, self.links, self._style = '', [], [], False
        self.feed(page)
        self.text = ' '.join(self.text.partition('<body>')[2].split())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        assert tag not in ('script', 'link', 'iframe')
        assert not any(name.startswith('on') for name, _ in attrs)
        self.sources += [value for name, value in attrs if name == 'src']
        self.links += [value for name, value in attrs if name == 'href']
        self.text += '<body>' if tag == 'body' else ' ' * (tag not in ('b', 'a'))

    def handle_data(self, data: str) -> None:
        self.text += data
