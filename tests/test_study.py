"""A study as a user runs it: whole, killed, in two processes, with runs that fail, and what it says."""
import csv
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import PageReader, run_cli, start_cli, two_processes, wait_for_checkpoints
from sklearn import metrics as sk

from timm_densese.data.splits import read_split
from timm_densese.demo import generate_images
from timm_densese.errors import OptionError
from timm_densese.metrics import format_metric
from timm_densese.study.plan import parse_model, plan_runs
from timm_densese.study.results import write_table
from timm_densese.training import TrainConfig

ROOT = Path(__file__).parents[1]
KWARGS = "growth_rate=4 block_config=(2,3,2)"
MODELS = [f'densenet121 {KWARGS}', f'se_densenet121 {KWARGS}']
OPTIONS = ('--folds', 2, '--img-size', 32, '--epochs', 3, '--batch-size', 8, '--workers', 0, '--lr', .01,
           '--no-model-ema')
GOAL = ('--sensitivity', .9, '--prevalence', .05, '--positive', 'spots')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """24 images of 12 patients, two of each class."""
    root = tmp_path_factory.mktemp('study')
    generate_images(root / 'images', per_class=12, size=48)
    one, other = sorted((root / 'images' / 'spots').iterdir())[:2]
    shutil.copy(one, other)  # the same bytes under two names
    with open(root / 'patients.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['file', 'patient', 'site'])
        for i, path in enumerate(sorted((root / 'images').rglob('*.png'))):
            writer.writerow([path.relative_to(root / 'images'), f'P{i // 2}', 'A' if i < 6 else 'B'])
    return root


@pytest.fixture(scope='module')
def whole(images):
    """A study of two models that nothing disturbed."""
    output = images / 'whole'
    done = run_cli(*command(images, output, *GOAL, '--subgroups', images / 'patients.csv'))
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def command(images, output, *more):
    return ('study', images / 'images', '--models', *MODELS, *OPTIONS, '--groups', images / 'patients.csv', '--output',
            output, *more)


def read(output):
    with open(output / 'predictions.csv', newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_each_image_is_tested_once_by_models_that_never_saw_its_patient(whole):
    output, _ = whole
    rows = read(output)
    for model in MODELS:
        tested = [row for row in rows if row['model'] == model and row['split'] == 'test']
        assert len(tested) == len({row['image'] for row in tested}) == 24
    for fold in '01':
        trained_on = {row['group'] for row in read_split(output / 'split' / f'fold{fold}').rows
                      if row[f'fold{fold}'] == 'train'}
        assert trained_on
        assert not trained_on & {row['group'] for row in rows if row['fold'] == fold}


@pytest.mark.slow
def test_scores_are_those_of_the_predictions(whole):
    output, said = whole
    results = json.loads((output / 'metrics.json').read_text())
    for model in MODELS:
        rows = [row for row in read(output) if row['model'] == model and row['split'] == 'test']
        truth = np.array([row['label'] == 'stripes' for row in rows])
        p = np.array([float(row['probability stripes']) for row in rows])
        metrics = results['models'][model]['metrics']
        assert metrics['auroc']['value'] == pytest.approx(sk.roc_auc_score(truth, p))
        assert metrics['balanced_accuracy']['value'] == pytest.approx(sk.balanced_accuracy_score(truth, p > .5))
    assert '4 runs: 2 models, 2 folds, 1 seed; 4 are to be done.' in said
    assert '[1/4]' in said
    assert '3 left, about' in said
    difference = results['models'][MODELS[1]]['differences']['balanced_accuracy']['value']
    assert difference == pytest.approx(results['models'][MODELS[1]]['metrics']['balanced_accuracy']['value']
                                       - results['models'][MODELS[0]]['metrics']['balanced_accuracy']['value'])


@pytest.mark.slow
def test_page_and_tables(whole):
    output, _ = whole
    page = PageReader((output / 'report.html').read_text())
    for words in (*MODELS, 'cannot tell', 'sensitivity', 'prevalence of 0.05', 'site', 'few: this tells little'):
        assert words in page.text, words
    table = (output / 'table.md').read_text()
    assert table.count('\n') == 4
    assert 'difference from densenet121' in table
    with open(output / 'scores.csv', newline='') as file:
        scores = list(csv.DictReader(file))
    assert {row['model'] for row in scores} == set(MODELS)


@pytest.mark.slow
def test_predict_uses_the_threshold_of_its_checkpoint(whole, images, tmp_path):
    output, _ = whole
    results = json.loads((output / 'metrics.json').read_text())
    known = list(results['runs'].values())
    assert len(known) == 2
    for run in known:
        shown = run_cli('predict', output / run['checkpoint'], images / 'images' / 'spots', '--calibration',
                        output / 'metrics.json', '--json')
        assert shown.returncode == 0, shown.stderr
        found = json.loads(shown.stdout)
        assert found['threshold']['low'] == run['threshold']['low']
        for row in found['predictions']:
            p, = (c['probability'] for c in row['predictions'] if c['class'] == 'spots')
            assert row['called'] == ('spots' if p >= run['threshold']['low'] else 'stripes')
    other = next(name for name in MODELS if name != results['model'])
    folder = next(folder for folder in (output / 'runs').iterdir() if folder.name.startswith(other.split()[0]))
    refused = run_cli('predict', folder / 'fold0-seed42' / 'model_best.pth.tar', images / 'images', '--calibration',
                      output / 'metrics.json')
    assert refused.returncode == 1
    assert 'other weights' in refused.stderr


@pytest.mark.slow
def test_publish_takes_its_scores_with_a_checkpoint_of_its_best_model(whole, tmp_path):
    output, _ = whole
    results = json.loads((output / 'metrics.json').read_text())
    run = next(iter(results['runs'].values()))
    done = run_cli('publish', output / run['checkpoint'], 'me/best', '--metrics', output / 'metrics.json', '--output',
                   tmp_path / 'model')
    assert done.returncode == 0, done.stderr
    assert 'timm-densese study' in (tmp_path / 'model' / 'README.md').read_text()


@pytest.mark.slow
def test_killed_at_three_random_moments_and_resumed_equals_an_uninterrupted_one(images, whole, tmp_path):
    args = command(images, tmp_path / 'killed', *GOAL, '--subgroups', images / 'patients.csv')
    rng = random.Random(0)
    for _ in range(3):  # of 4 runs with 3 epochs each
        process = start_cli(*args)
        wait_for_checkpoints(process, tmp_path / 'killed', rng.randint(1, 3))
        time.sleep(rng.uniform(0, .1))
        assert process.exitcode is None, 'it was done before it could be killed'
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    process = start_cli(*args, stderr=tmp_path / 'stderr.txt')
    process.join()
    assert process.exitcode == 0, (tmp_path / 'stderr.txt').read_text()
    assert_same_study(whole[0], tmp_path / 'killed')


@pytest.mark.slow
def test_two_processes_equal_one(images, whole, tmp_path):
    two_processes(*command(images, tmp_path / 'two', *GOAL, '--subgroups', images / 'patients.csv'),
                  stdout=tmp_path / 'said')
    said = [(tmp_path / f'said{rank}').read_text() for rank in range(2)]
    assert [text.count('runs: 2 models') for text in said] == [1, 0]
    assert_same_study(whole[0], tmp_path / 'two')


def assert_same_study(one, other):
    assert (one / 'predictions.csv').read_bytes() == (other / 'predictions.csv').read_bytes()
    results = [json.loads((output / 'metrics.json').read_text()) for output in (one, other)]
    assert results[0] == results[1]


@pytest.mark.slow
def test_same_command_goes_on_and_adds_models(images, whole, tmp_path):
    output, _ = whole
    before = {file: file.stat().st_mtime_ns for file in (output / 'runs').rglob('model_best.pth.tar')}
    again = run_cli(*command(images, output))
    assert again.returncode == 0, again.stderr
    assert '0 are to be done' in again.stdout
    assert {file: file.stat().st_mtime_ns for file in (output / 'runs').rglob('model_best.pth.tar')} == before
    changed = run_cli(*command(images, output, '--lr', .1))
    assert changed.returncode == 2
    assert 'lr was 0.01, and is 0.1' in changed.stderr
    changed = run_cli(*command(images, output), '--split-seed', 3)
    assert 'split seed was 0, and is 3' in changed.stderr


BROKEN_NET = """
from timm.models import register_model
from timm.models.densenet import DenseNet


class BrokenNet(DenseNet):
    def forward(self, x):
        if not self.training and x.any():
            raise RuntimeError('broken on purpose')
        return super().forward(x)


@register_model
def broken_net(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
    model = BrokenNet(4, (2, 2), **kwargs)
    model.pretrained_cfg = model.default_cfg = dict(architecture='broken_net', input_size=(3, 32, 32))
    return model
"""


@pytest.mark.slow
def test_weights_that_saw_the_images_are_told(images, whole, tmp_path):
    start = next((whole[0] / 'runs').glob('se_*/fold0-seed42/model_best.pth.tar'))
    done = run_cli('study', images / 'images', '--models', MODELS[1], *OPTIONS, '--epochs', 1, '--initial-checkpoint',
                   start, '--output', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    assert 'WARNING: The weights that the training started from were trained on ' \
        f'{whole[0]}/split/fold0/train: images of this study' in done.stdout
    assert 'were trained on' not in whole[1]


def test_a_run_that_fails_is_named_and_the_others_stand(images, tmp_path, monkeypatch):
    (tmp_path / 'broken_net.py').write_text(BROKEN_NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if path])
    done = run_cli('study', images / 'images', '--models', MODELS[0], 'broken_net', *OPTIONS, '--device-modules',
                   'broken_net', '--output', tmp_path / 'out')
    assert done.returncode == 1, done.stderr
    assert 'failed: broken_net, fold 0, seed 42: RuntimeError: broken on purpose' in done.stderr
    results = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    assert list(results['models']) == [MODELS[0]]
    assert len(results['failed']) == 2
    assert 'broken_net' in PageReader((tmp_path / 'out' / 'report.html').read_text()).text


@pytest.mark.slow
@pytest.mark.parametrize(('options', 'said'), [
    (('--models', 'resnett18'), 'did you mean'),
    (('--models', 'resnet10t', 'resnet10t'), 'twice'),
    (('--models', 'resnet10t drop'), 'is not NAME=VALUE'),
    (('--models', 'resnet10t no_such=1'), 'no_such'),
    (('--folds', '1'), 'at least 2'),
    (('--seeds', '0'), 'at least 1'),
    (('--folds', '30'), 'too few'),
    (('--sensitivity', '1.5'), 'at most 1'),
    (('--sensitivity', '.9', '--positive', 'dots'), 'there is no such class'),
    (('--positive', 'spots'), 'give --sensitivity'),
    (('--prevalence', '2'), 'below 1'),
    (('--subgroups', 'missing.csv'), 'cannot be read'),
    (('--groups', 'missing.csv'), 'cannot be read'),
])
def test_wrong_options_are_one_line_before_any_run(images, tmp_path, options, said):
    args = {'--models': ('resnet10t',), **{'--output': (tmp_path / 'out',)}}
    args.setdefault(options[0], ())
    args[options[0]] = options[1:]
    done = run_cli('study', images / 'images', *(x for key, value in args.items() for x in (key, *value)), '--img-size',
                   32, '--batch-size', 4, '--workers', 0)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'out' / 'runs').exists()


@pytest.mark.slow
def test_what_the_study_rests_on_may_not_change(images, whole, tmp_path):
    output = tmp_path / 'out'
    shutil.copytree(images / 'images', tmp_path / 'images')
    shutil.copy(images / 'patients.csv', tmp_path / 'patients.csv')
    args = ('study', tmp_path / 'images', '--models', MODELS[0], *OPTIONS, '--epochs', 1, '--groups',
            tmp_path / 'patients.csv', '--output', output)
    assert run_cli(*args).returncode == 0
    table = (tmp_path / 'patients.csv').read_bytes()
    (tmp_path / 'patients.csv').write_bytes(table.replace(b'P3', b'P4'))
    refused = run_cli(*args)
    assert refused.returncode == 2
    assert 'SHA-256 of groups was' in refused.stderr
    (tmp_path / 'patients.csv').write_bytes(table)
    extra = tmp_path / 'images' / 'spots' / 'extra.png'
    shutil.copy(min((tmp_path / 'images' / 'spots').iterdir()), extra)
    refused = run_cli(*args)
    assert refused.returncode == 2
    assert 'images was 24, named' in refused.stderr
    extra.unlink()
    changed = min((tmp_path / 'images' / 'spots').iterdir())
    content = changed.read_bytes()
    changed.unlink()  # the study has a link to it
    shutil.copy(min((tmp_path / 'images' / 'stripes').iterdir()), changed)
    refused = run_cli(*args)
    assert refused.returncode == 2
    assert f'1 of 24 have changed since it began, such as spots/{changed.name}' in refused.stderr
    changed.write_bytes(content)
    assert run_cli(*args).returncode == 0


@pytest.mark.slow
def test_a_fold_that_lacks_a_class_is_refused_before_any_run(images, tmp_path):
    done = run_cli('study', images / 'images', '--models', MODELS[0], *OPTIONS, '--val', .02, '--output',
                   tmp_path / 'out')
    assert done.returncode in (1, 2)
    assert not (tmp_path / 'out' / 'runs').exists()


def test_each_model_has_a_folder_of_its_own(tmp_path):
    names = ['m x=(1,2)', 'm x=[1,2]', 'm x=1_2', 'local-dir:a/b', 'local-dir:a_b', 'm_x=1_2']
    plan = plan_runs(dict.fromkeys(names, TrainConfig()), tmp_path, folds=2, seeds=2)
    assert len({run.folder for run in plan}) == len(plan) == 24
    assert {run.folder.parent.parent for run in plan} == {tmp_path / 'runs'}


def test_output_of_something_else_is_refused(images, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('x')
    done = run_cli(*command(images, tmp_path / 'mine'))
    assert done.returncode == 2
    assert [path.name for path in (tmp_path / 'mine').iterdir()] == ['thesis.txt']


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(images, tmp_path):
    process = start_cli(*command(images, tmp_path / 'out', '--epochs', 500), stderr=tmp_path / 'stderr.txt')
    wait_for_checkpoints(process, tmp_path / 'out')
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert '0 of 4 runs are done and kept: the same command goes on.' in (tmp_path / 'stderr.txt').read_text()


def test_the_readme_says_what_the_study_says():
    results = json.loads((ROOT / 'benchmarks' / 'results' / 'study-cifar10' / 'metrics.json').read_text())
    tests = [model['test'] for model in results['models'].values() if 'test' in model]
    assert {test['verdict'] for test in tests} == {'cannot tell'}
    least, most = (f([test['detectable'] for test in tests if test['detectable']]) for f in (min, max))
    best = format_metric(max((model['metrics']['accuracy'] for model in results['models'].values()),
                             key=lambda accuracy: accuracy['value']))
    text = (ROOT / 'README.md').read_text()
    assert f'Differences of {least:.3f} to {most:.3f} in balanced accuracy would have shown' in text
    assert f'Accuracy is {best}' in text


@pytest.mark.parametrize('name', ['study-cifar10', 'study-scratch'])
def test_docs_quote_the_studies(name):
    text = (ROOT / 'docs' / 'study.md').read_text()
    quoted = text.split(f'<!-- {name} -->\n')[1].split(f'<!-- /{name} -->')[0]
    folder = ROOT / 'benchmarks' / 'results' / name
    assert quoted == (folder / 'table.md').read_text()
    assert quoted == write_table(json.loads((folder / 'metrics.json').read_text()))


def test_names_of_models():
    assert parse_model("with_attention base=resnet18 attn_layer=eca") == (
        'with_attention base=resnet18 attn_layer=eca', 'with_attention', {'base': 'resnet18', 'attn_layer': 'eca'})
    with pytest.raises(OptionError, match='is not NAME=VALUE'):
        parse_model('densenet121 se_densenet121')
    with pytest.raises(OptionError, match='closing quotation'):
        parse_model("densenet121 'a")
