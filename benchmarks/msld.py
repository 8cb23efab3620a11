"""Monkeypox recognition on MSLD: densenet121 against se_densenet121 in each placement, one recipe.

    python benchmarks/msld.py ../shared/data/msld

Every model is trained and tested on the five folds of one leak-free split (no patient, copy or look-alike on two
sides) from two seeds. It starts from ImageNet weights where the Hub answers, at 224 pixels; otherwise from random
weights at 64 pixels, and says so. Last, clearly labelled, the split that published scores leak by: augmented copies of
every image, dealt at random over training and test.

It writes benchmarks/results/msld.json and .png, and goes on after an interruption from the runs in --work.
"""
import argparse
import json
import platform
import random
import shutil
from pathlib import Path

import numpy as np
import timm
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from torchvision import transforms

from timm_densese.checkpoints import find_weights, load_model
from timm_densese.data.images import find_images
from timm_densese.data.splits import split_images
from timm_densese.files import replace_file
from timm_densese.metrics import score, softmax, write_metrics
from timm_densese.predict import compute_logits
from timm_densese.training import TrainConfig, train

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / 'benchmarks' / 'results' / 'msld'
MODELS = {
    'densenet121': ('densenet121', {}),
    **{f"se_densenet121 '{p}'": ('se_densenet121', {'se_placement': p}) for p in ('final', 'stage', 'layer')},
}
METRICS = ('accuracy', 'balanced_accuracy', 'f1', 'auroc')
FOLDS, SEEDS, COPIES = 5, (0, 1), 3
GOAL = .89


def make_leaking_split(source: Path, out: Path) -> None:
    """Write augmented copies of every image and deal them out at random, as the blog's exercise does."""
    if out.exists():
        return
    random.seed(0)
    torch.manual_seed(0)
    augment = transforms.Compose([
        transforms.RandomHorizontalFlip(), transforms.RandomRotation(30), transforms.ColorJitter(.2, .2, .2),
        transforms.RandomResizedCrop(224, scale=(.7, 1))])
    partial = out.with_name(f'{out.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    for path in sorted(source.glob('*/*.jpg')):
        with Image.open(path) as file:
            image = file.convert('RGB')
        for copy in range(COPIES + 1):
            split = random.choices(('train', 'val', 'test'), (.7, .1, .2))[0]
            folder = partial / split / path.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            (augment(image) if copy else image).save(folder / f'{path.stem}_{copy}.png')
    partial.rename(out)


def run(data: Path, output: Path, name: str, recipe: dict, seed: int) -> dict:
    """Train one model on one split, and measure the best checkpoint on the test images."""
    arch, model_kwargs = MODELS[name]
    shutil.rmtree(output, ignore_errors=True)
    result = train(TrainConfig(**{
        **recipe, 'data_dir': str(data), 'output': str(output), 'model': arch, 'model_kwargs': model_kwargs,
        'seed': seed}))
    loaded = load_model(str(output / 'model_best.pth.tar'))
    paths = find_images([str(data / 'test')])
    labels = np.array([loaded.class_names.index(path.parent.name) for path in paths])
    scores = score(labels, softmax(compute_logits(loaded, paths).values.double().numpy()), loaded.class_names)
    shutil.rmtree(output)
    return {
        **{name: scores[name].item() for name in ('accuracy', 'balanced_accuracy')},
        **{name: scores[f'{name}/Monkeypox'].item() for name in ('f1', 'auroc')},
        'images': len(labels), 'best_epoch': result['best_epoch'],
    }


def summarise(runs: list[dict]) -> dict:
    """Mean and 95% interval (Student's t) of each metric over runs."""
    out: dict = {'runs': len(runs)}
    for metric in METRICS:
        values = np.array([r[metric] for r in runs])
        mean = values.mean()
        half = stats.t.ppf(.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else None
        out[metric] = {'mean': mean, 'low': mean - half, 'high': mean + half} if half is not None else {'mean': mean}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, help='the MSLD originals, a folder a class')
    parser.add_argument('--work', type=Path, default=ROOT / 'output' / 'msld', help='folder for splits and runs')
    parser.add_argument('--scratch-epochs', type=int, default=12, help='epochs where there are no ImageNet weights')
    args = parser.parse_args()

    recipe = yaml.safe_load((ROOT / 'configs' / 'msld.yaml').read_text())
    pretrained = find_weights('timm/densenet121.ra_in1k')
    if not pretrained:
        recipe.update(pretrained=False, img_size=64, epochs=args.scratch_epochs, layer_decay=None, warmup_epochs=1)
    weights = 'ImageNet weights' if pretrained else 'from scratch (no ImageNet weights: the Hub did not answer)'
    recipe.update(patience=0, workers=0)
    print(f'{weights}, {recipe["img_size"]} pixels, {recipe["epochs"]} epochs')

    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / 'folds').exists():
        split_images(args.data, args.work / 'folds', val=.1, folds=FOLDS, seed=0)
    make_leaking_split(args.data, args.work / 'leaking')

    done = args.work / 'runs.jsonl'
    runs = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    # Seeds outermost and models innermost: wherever it is interrupted, the models have the same folds behind them.
    plan = [(name, f'fold{fold}', seed) for seed in SEEDS for fold in range(FOLDS) for name in MODELS]
    plan += [(name, 'leaking', SEEDS[0]) for name in ('densenet121', "se_densenet121 'final'")]
    for name, split, seed in plan:
        key = {'model': name, 'split': split, 'seed': seed}
        if any(key.items() <= r.items() for r in runs):
            continue
        data = args.work / ('leaking' if split == 'leaking' else f'folds/{split}')
        result = {**key, **run(data, args.work / 'training', name, recipe, seed)}
        runs.append(result)
        with open(done, 'a') as file:
            file.write(json.dumps(result) + '\n')
        print(f'{name} {split} seed {seed}: accuracy {result["accuracy"]:.3f}, AUROC {result["auroc"]:.3f}', flush=True)
        report(runs, weights, recipe)


def report(runs: list[dict], weights: str, recipe: dict) -> None:
    table = {name: summarise(r) for name in MODELS if (r := [
        x for x in runs if x['model'] == name and x['split'] != 'leaking'])}
    leaking = {f'{name}, LEAKING split': summarise(r) for name in MODELS if (r := [
        x for x in runs if x['model'] == name and x['split'] == 'leaking'])}
    images = sum(x['images'] for x in runs if x['model'] == 'densenet121' and x['seed'] == SEEDS[0]
                 and x['split'] != 'leaking')
    best = max(table, key=lambda name: table[name]['accuracy']['mean'])
    low, high = stats.binomtest(round(GOAL * images), images).proportion_ci(method='wilson')
    needed = next((k / images for k in range(images + 1) if stats.binomtest(k, images).proportion_ci(
        method='wilson').low >= GOAL), None)
    goal = (
        f'The goal of {GOAL:.0%}: the best mean here is {table[best]["accuracy"]["mean"]:.1%} ({best}, {weights}), '
        f'{GOAL - table[best]["accuracy"]["mean"]:+.1%} away. On {images} test images an accuracy of {GOAL:.0%} has a '
        f'95% interval of {low:.1%} to {high:.1%}; to show {GOAL:.0%} at that confidence takes '
        + (f'{needed:.1%} on these images.' if needed else 'more images than these.')
        + (' It needs ImageNet weights first: none could be downloaded for this run.' if 'scratch' in weights else ''))
    replace_file(RESULTS.with_suffix('.json'), json.dumps({
        'weights': weights, 'recipe': recipe, 'split': f'{FOLDS} folds by patient, bytes, look and name; seed 0',
        'torch': torch.__version__, 'timm': timm.__version__, 'python': platform.python_version(),
        'interval': "95%, Student's t over runs, which share images", 'table': table, 'leaking': leaking, 'goal': goal,
        'runs': runs}, indent=1) + '\n')
    write_card_metrics(table, weights, recipe)

    figure = Figure(figsize=(8, 3.6), layout='constrained')
    ax = figure.subplots()
    rows = [*table.items(), *leaking.items()]
    for i, metric in enumerate(METRICS):
        for j, (_, row) in enumerate(rows):
            m = row[metric]
            error = [[m['mean'] - m['low']], [m['high'] - m['mean']]] if 'low' in m else None
            ax.errorbar(i + (j - (len(rows) - 1) / 2) * .13, m['mean'], yerr=error, fmt='x' if j >= len(table) else 'o',
                        color=f'C{j}', capsize=3, label=rows[j][0] if i == 0 else None)
    ax.axhline(GOAL, color='gray', linestyle=':', linewidth=1)
    ax.set(xticks=range(len(METRICS)), xticklabels=METRICS, ylabel='test score, 95% interval',
           title=f'MSLD, {weights}, {recipe["img_size"]} pixels')
    ax.title.set_fontsize(9)
    ax.legend(fontsize=7, loc='upper left', bbox_to_anchor=(1, 1))
    figure.savefig(RESULTS.with_suffix('.png'), dpi=120)
    if len(runs) == len(MODELS) * FOLDS * len(SEEDS) + 2:
        print(f'\n| {weights} | runs | ' + ' | '.join(METRICS) + ' |')
        print('|---' * (len(METRICS) + 2) + '|')
        for name, row in rows:
            cells = [f'{m["mean"]:.3f}' + (f' ({m["low"]:.3f} to {m["high"]:.3f})' if 'low' in m else '')
                     for m in (row[metric] for metric in METRICS)]
            print(f'| {name} | {row["runs"]} | ' + ' | '.join(cells) + ' |')
        print(f'\n{goal}')


def write_card_metrics(table: dict, weights: str, recipe: dict) -> None:
    """Write se_densenet121's results, with the others to compare, as `timm-densese card --metrics` reads them."""
    metrics = {name: {metric: {'value': m.pop('mean'), **m} for metric in METRICS if (m := dict(row[metric]))}
               for name, row in table.items()}
    ours = "se_densenet121 'final'"
    write_metrics(RESULTS.with_name('se_densenet121_msld.json'), {
        'dataset': {'name': 'MSLD', 'split': 'test'}, 'command': 'python benchmarks/msld.py DIR',
        'conditions': f'Trained {weights}, {recipe["img_size"]} pixels, {recipe["epochs"]} epochs; means over '
                      f'{table[ours]["runs"]} runs of {FOLDS} folds that part no patient.',
        'interval': "95%, Student's t over runs, which share images", 'metrics': metrics.pop(ours),
        'comparison': metrics})


if __name__ == '__main__':
    main()
