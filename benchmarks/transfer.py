"""What attention costs a trained DenseNet when it enters, and what it brings: three ways in, three places.

    python benchmarks/transfer.py

The network is densenet121, trained on CIFAR-10 (--weights FILE; --pretrain DIR trains one with `timm-densese train`,
from ImageNet weights where the Hub answers). SE enters it with random gates, as it does in copied code; with the
compensation that this package had before (gates at 0.5, neighbours doubled); and as the identity (gates at 1). Each is
scored as it is, then trained on, on a tenth of CIFAR-10 and on MSLD's five patient-safe folds, beside the plain net.

It attained, on one core of an AMD EPYC with torch 2.14.1: at once, an accuracy of 0.10 to 0.76 with random gates and
the plain net's 0.779 as the identity; after two epochs 0.78 in every way and place, with SE and without.

It writes benchmarks/results/transfer.json and .png after every run, and goes on after an interruption. Everything
takes one core about two hours. Read each row with its spread: two seeds, and folds of 46 images.
"""
import argparse
import copy
import itertools
import json
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from common import RESULTS, device, save
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_state_dict

from timm_densese import SE_PLACEMENTS
from timm_densese.data.images import read_image
from timm_densese.data.splits import split_images
from timm_densese.hub import find_weights
from timm_densese.models.attention import IdentityGate

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / 'shared'
WAYS = ('random', 'compensated', 'identity')
SIZE = {'cifar10': 48, 'msld': 64}
Images = tuple[torch.Tensor, torch.Tensor]


def load_images(folders: list[Path], size: int, every: int = 1) -> Images:
    """Read class folders as one tensor of images (N, 3, size, size) and one of labels (N,)."""
    classes = sorted(p.name for p in folders[0].iterdir())
    files = [(file, label) for folder in folders for label, name in enumerate(classes)
             for file in sorted((folder / name).iterdir())[::every]]
    pixels = torch.stack([torch.from_numpy(np.array(read_image(file).resize((size, size), 3))) for file, _ in files])
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    images = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    return images.contiguous(memory_format=torch.channels_last), torch.tensor([label for _, label in files])


def enter(net: torch.nn.Module, way: str, placement: str) -> torch.nn.Module:
    """Give a copy of a DenseNet with SE in it, or a plain copy."""
    if way == 'plain':
        return copy.deepcopy(net)
    model = timm.create_model('se_densenet121', num_classes=net.num_classes, se_placement=placement)
    model.load_state_dict(net.state_dict())
    if way == 'identity':
        return model
    for gate in model.modules():
        if isinstance(gate, IdentityGate):
            gate.scale = 1.
    for site in model.attn_sites:
        if way == 'random':
            model.get_submodule(site).fc2.reset_parameters()
        elif 'denselayer' in site or 'transition' in site:  # the convolution before the gate doubles
            model.get_submodule(site.replace('.se', '.conv' if 'transition' in site else '.conv2')).weight.data *= 2
        else:  # the norm after the gate makes up for it, with its eps
            norm = model.features.norm5 if site.endswith('4') else model.get_submodule(
                site.replace('.se', '.transition')).norm
            norm.weight.data *= 2 * ((norm.running_var / 4 + norm.eps) / (norm.running_var + norm.eps)).sqrt()
            norm.running_mean /= 2
            norm.running_var /= 4
    return model


@torch.inference_mode()
def score(model: torch.nn.Module, data: Images) -> dict:
    model.eval()
    logits = torch.cat([model(batch.to(device())).float().cpu() for batch in data[0].split(100)])
    found = {'accuracy': (logits.argmax(1) == data[1]).float().mean().item(),
             'loss': F.cross_entropy(logits, data[1]).item()}
    if logits.shape[1] == 2:
        found['auroc'] = float(roc_auc_score(data[1], logits[:, 1] - logits[:, 0]))
    return found


def train(model: torch.nn.Module, data: Images, test: Images, epochs: int, seed: int) -> list[dict]:
    """Train a model on; its scores before and after each epoch."""
    torch.manual_seed(seed)
    model.to(device(), memory_format=torch.channels_last)
    batch_size = min(64, len(data[0]) // 4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, epochs * (len(data[0]) // batch_size))
    scores = [score(model, test)]
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(data[0])).split(batch_size):
            if len(index) == batch_size:
                images = data[0][index]
                size, (top, left) = images.shape[-1], torch.randint(9, (2,)).tolist()
                images = F.pad(images, (4, 4, 4, 4), mode='reflect')[..., top:top + size, left:left + size]
                flip = torch.rand(len(index)) < .5
                images[flip] = images[flip].flip(3)
                loss = F.cross_entropy(model(images.to(device())), data[1][index].to(device()), label_smoothing=.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        scores.append(score(model, test))
    return scores


def source_net(args: argparse.Namespace) -> tuple[torch.nn.Module, str]:
    """Load the trained DenseNet, or train one first; and say which it is."""
    weights = args.weights
    described = f'densenet121 trained on CIFAR-10, {weights.name}'
    if args.pretrain:
        run = args.work / 'pretrain'
        weights = run / 'model_best.pth.tar'
        start = ['--pretrained'] if find_weights('timm/densenet121.ra_in1k') else ['--lr', '3e-3', '--no-layer-decay']
        described = f'densenet121 from {"ImageNet" if start[0] == "--pretrained" else "random"} weights on CIFAR-10'
        if not (run / 'last.pth.tar').exists():
            subprocess.run([
                sys.executable, '-m', 'timm_densese', 'train', args.pretrain, '--output', run, '--val-split', 'test',
                '--model', 'densenet121', '--img-size', '64', '--epochs', '5', '-b', '128', *start], check=True)
    if not weights.is_file():
        sys.exit(f'{weights} is not there. Give --weights FILE, a densenet121 trained on CIFAR-10, or --pretrain DIR.')
    state_dict = load_state_dict(str(weights))
    net = timm.create_model('densenet121', num_classes=len(state_dict['classifier.weight']))
    net.load_state_dict(state_dict)
    return net, described


def unpack(data: Path, work: Path) -> Path:
    """Give the folder with train/ and test/, unpacked from the archive in `data` where it holds one."""
    archive = data / 'cifar10.tar.xz'
    if (data / 'train').is_dir() or not archive.is_file():
        return data
    if not (work / 'cifar10').is_dir():
        with tarfile.open(archive) as tar:
            tar.extractall(work / 'cifar10.partial', filter='data')
        (work / 'cifar10.partial').rename(work / 'cifar10')
    return work / 'cifar10'


def summarise(runs: list[dict]) -> str:
    """The table in Markdown: means of the runs, at once and after the last epoch, which follows with its extremes."""
    blocks = []
    for data, metric, title in (('cifar10', 'accuracy', 'CIFAR-10, accuracy'), ('msld', 'auroc', 'MSLD, AUROC')):
        found: dict = {}
        for run in runs:
            if run['data'] == data:
                found.setdefault((run['placement'], run['way']), []).append([s[metric] for s in run['scores']])
        if not found:
            continue
        of_plain = found['', 'plain']
        last = len(of_plain[0]) - 1
        lines = [f'| {title} | ' + ' | '.join([f'{way}, at once' for way in WAYS]
                                             + [f'{way}, epoch {last}' for way in WAYS]) + ' |', '|' + '---|' * 7,
                 f'| no SE | {_cell(of_plain, 0)} | | | {_cell(of_plain, last)} | | |']
        for placement in SE_PLACEMENTS:
            cells = [_cell(found.get((placement, way)), epoch) for epoch in (0, last) for way in WAYS]
            lines.append(f"| `'{placement}'` | " + ' | '.join(cells) + ' |')
        blocks.append('\n'.join(lines))
    return '\n\n'.join(blocks)


def _cell(runs: list[list[float]] | None, epoch: int) -> str:
    if not runs:
        return ''
    values = [run[epoch] for run in runs]
    spread = f' ({min(values):.2f} to {max(values):.2f})' if epoch else ''
    return f'{statistics.mean(values):.3f}{spread}'


def draw(runs: list[dict]) -> Figure:
    figure = Figure(figsize=(10, 5.6), layout='constrained')
    axes = figure.subplots(2, len(SE_PLACEMENTS), sharey='row', squeeze=False)
    colors = {'plain': 'black', 'random': 'tab:red', 'compensated': 'tab:orange', 'identity': 'tab:blue'}
    for row, (data, metric) in zip(axes, (('cifar10', 'accuracy'), ('msld', 'auroc')), strict=True):
        for ax, placement in zip(row, SE_PLACEMENTS, strict=True):
            for way, color in colors.items():
                found = [[s[metric] for s in r['scores']] for r in runs if r['data'] == data and r['way'] == way
                         and r['placement'] in ('', placement)]
                if found:
                    mean = np.mean(found, 0)
                    ax.plot(mean, 'o-', color=color, ms=3, label=way)
                    ax.fill_between(range(len(mean)), np.min(found, 0), np.max(found, 0), color=color, alpha=.12)
            ax.set(title=f'{data}, {placement!r}', xlabel='epochs after SE entered', ylabel=metric)
            ax.title.set_fontsize(9)
            ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--weights', type=Path, default=SHARED / 'weights' / 'densenet121_cifar10.safetensors')
    parser.add_argument('--pretrain', type=Path, metavar='DIR', help="CIFAR-10's class folders, to train a net on")
    parser.add_argument('--cifar10', type=Path, default=SHARED / 'data' / 'cifar10', help='its folders, or archive')
    parser.add_argument('--msld', type=Path, default=SHARED / 'data' / 'msld', help='the originals, a folder a class')
    parser.add_argument('--work', type=Path, default=ROOT / 'output' / 'transfer', help='folder for splits and runs')
    parser.add_argument('--name', default='transfer', help='name of the results')
    parser.add_argument('--epochs', type=int, nargs=2, default=(2, 8), help='on CIFAR-10 and on MSLD (%(default)s)')
    parser.add_argument('--seeds', type=int, default=2, help='seeds (%(default)s)')
    parser.add_argument('--every', type=int, default=10, help='take each tenth image of CIFAR-10')
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    net, described = source_net(args)
    cifar10 = unpack(args.cifar10, args.work)
    if not (args.work / 'msld').is_dir():
        split_images(args.msld, args.work / 'msld', folds=5)

    data: dict[str, list[tuple[Images, Images]]] = {
        'cifar10': [(load_images([cifar10 / 'train'], SIZE['cifar10'], args.every),
                     load_images([cifar10 / 'test'], SIZE['cifar10'], max(1, args.every // 2)))],
        'msld': [(load_images([args.work / 'msld' / f'fold{k}' / part for part in ('train', 'val')], SIZE['msld']),
                  load_images([args.work / 'msld' / f'fold{k}' / 'test'], SIZE['msld'])) for k in range(5)]}
    file = RESULTS / f'{args.name}.json'
    record = json.loads(file.read_text()) if file.is_file() else {}
    settings = {'weights': described, 'epochs': list(args.epochs), 'every': args.every, 'size': SIZE}
    if record and {k: record[k] for k in settings} != settings:
        sys.exit(f'{file} was measured otherwise: {record["weights"]}, epochs {record["epochs"]}, every '
                 f'{record["every"]}. Remove it, or give another --name.')
    runs = record.get('runs', [])
    done = {(r['data'], r['fold'], r['seed'], r['way'], r['placement']) for r in runs}
    models = [('plain', ''), *((way, placement) for placement in SE_PLACEMENTS for way in WAYS)]
    for seed, name in itertools.product(range(args.seeds), data):
        for (fold, (train_data, test)), (way, placement) in itertools.product(enumerate(data[name]), models):
            if (name, fold, seed, way, placement) in done:
                continue
            torch.manual_seed(seed)
            start = copy.deepcopy(net)
            if name == 'msld':
                start.reset_classifier(2)
            scores = train(enter(start, way, placement), train_data, test, args.epochs[name == 'msld'], seed)
            runs.append({'data': name, 'fold': fold, 'seed': seed, 'way': way, 'placement': placement,
                         'images': len(test[1]), 'scores': scores})
            save(args.name, {**settings, 'command': 'python benchmarks/transfer.py', 'runs': runs})
            print(f'{name} fold {fold} seed {seed} {way} {placement}: '
                  + ' '.join(f'{s["accuracy"]:.3f}' for s in scores), flush=True)
    draw(runs).savefig(RESULTS / f'{args.name}.png', dpi=110)
    print(summarise(runs))


if __name__ == '__main__':
    main()
