"""Scores against scikit-learn and formulas, intervals by patient, leaks, and the page."""
import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import PageReader, put_on_hub, run_training
from PIL import Image
from scipy.stats import binomtest
from sklearn import metrics as sk

from timm_densese.checkpoints import load_model
from timm_densese.cli import main
from timm_densese.data.images import find_images
from timm_densese.data.splits import split_images
from timm_densese.demo import generate_images
from timm_densese.errors import ImagesError, ModelNotFoundError, OptionError, UserError
from timm_densese.evaluate import evaluate, run_split
from timm_densese.metrics import fit_temperature, format_metric, softmax
from timm_densese.predict import compute_logits
from timm_densese.publish import publish
from timm_densese.thresholds import Goal, choose_thresholds
from timm_densese.training import TrainConfig, train


def run(trained, out, model=None, data=None, **kwargs):
    return evaluate(str(model or trained[1]), data or trained[0], out, resamples=20, workers=0, **kwargs)


@pytest.fixture(scope='module')
def results(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp('evaluate') / 'report'
    assert main(['evaluate', str(trained[1]), str(trained[0]), '--output', str(out), '--workers', '0']) == 0
    return out


def logits_of(trained, split):
    loaded = load_model(str(trained[1]))
    paths = find_images([str(trained[0] / split)])
    found = compute_logits(loaded, paths)
    return found.values.double(), np.array([['spots', 'stripes'].index(path.parent.name) for path in paths])


def test_numbers_are_scikit_learns(trained, results):
    logits, labels = logits_of(trained, 'test')
    p = logits.softmax(1).numpy()
    found = json.loads((results / 'metrics.json').read_text())
    value = {name: metric['value'] for name, metric in found['metrics'].items()}
    stripes = found['per_class']['stripes']
    assert value['accuracy'] == pytest.approx(sk.accuracy_score(labels, p.argmax(1)))
    assert value['balanced_accuracy'] == pytest.approx(sk.balanced_accuracy_score(labels, p.argmax(1)))
    assert value['auroc'] == pytest.approx(sk.roc_auc_score(labels, p[:, 1]))
    assert value['nll'] == pytest.approx(sk.log_loss(labels, p))
    assert value['brier'] == pytest.approx(((p - np.eye(2)[labels]) ** 2).sum(1).mean())
    precision, recall, f1, _ = sk.precision_recall_fscore_support(labels, p.argmax(1), average='binary')
    assert [stripes[k]['value'] for k in ('precision', 'recall', 'f1')] == pytest.approx([precision, recall, f1])
    assert stripes['specificity']['value'] == pytest.approx(sk.recall_score(1 - labels, 1 - p.argmax(1)))
    assert stripes['auprc']['value'] == pytest.approx(sk.average_precision_score(labels, p[:, 1]))
    assert found['confusion'] == sk.confusion_matrix(labels, p.argmax(1)).tolist()
    for metric in (*found['metrics'].values(), *stripes.values()):
        if 'interval' in metric:
            assert (metric['value'], metric['interval']) == (1, 'undefined')
        else:
            assert metric['low'] <= metric['value'] + .05
            assert metric['low'] < metric['high']
    assert value['accuracy'] > .6  # it learned something, so that the rest means something


def test_temperature_is_fitted_on_val_alone(trained, results, tmp_path):
    logits, labels = logits_of(trained, 'val')
    expected = fit_temperature(logits.numpy(), labels)
    assert json.loads((results / 'metrics.json').read_text())['temperature'] == pytest.approx(expected)
    losses = [torch.nn.functional.cross_entropy(logits / (t * expected), torch.tensor(labels)).item()
              for t in (.9, 1, 1.1)]
    assert losses[1] == min(losses)
    other = tmp_path / 'data'
    shutil.copytree(trained[0], other)
    shutil.rmtree(other / 'test' / 'spots')
    changed = run(trained, tmp_path / 'report', data=other)
    assert changed['temperature'] == pytest.approx(expected)
    assert any('No images of spots' in warning for warning in changed['warnings'])
    assert 'auroc' not in changed['metrics']  # undefined with one class


@pytest.mark.slow
def test_leaks_are_told(trained, tmp_path):
    assert not any('LEAK' in w for w in run(trained, tmp_path / 'a')['warnings'])
    found = run(trained, tmp_path / 'b', split='train')
    assert f'LEAK: {found["dataset"]["images"]} of the {found["dataset"]["images"]} images were trained on' in str(
        found['warnings'])

    data = tmp_path / 'data'
    shutil.copytree(trained[0], data)
    leaked = min((data / 'train' / 'spots').iterdir())
    shutil.copy(leaked, data / 'test' / 'spots' / 'renamed.png')
    found = run(trained, tmp_path / 'c', data=data)
    assert any(w.startswith('LEAK: 1 of the') for w in found['warnings'])
    # Another picture of a patient that was trained on.
    (data / 'test' / 'spots' / 'renamed.png').unlink()
    with open(data / 'split.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    group = next(row['group'] for row in rows if row['split'] == 'train')
    next(row for row in rows if row['split'] == 'test')['group'] = group
    with open(data / 'split.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert any('1 of the 24 images are of patients or groups trained on' in w
               for w in run(trained, tmp_path / 'd', data=data)['warnings'])
    found = run(trained, tmp_path / 'g', data=trained[0] / 'test')
    assert not any('LEAK' in w or 'cannot be excluded' in w for w in found['warnings'])
    # Without split.csv, by the files of train/; without those, it says that it does not know.
    (data / 'split.csv').unlink()
    shutil.copy(leaked, data / 'test' / 'spots' / 'renamed.png')
    assert any(w.startswith('LEAK: 1 of the') for w in run(trained, tmp_path / 'e', data=data)['warnings'])
    publish(trained[1], 'owner/name', output=tmp_path / 'published')
    found = run(trained, tmp_path / 'f', f'local-dir:{tmp_path / "published"}', data=data / 'test')
    assert any('cannot be excluded' in w for w in found['warnings'])


@pytest.mark.slow
def test_leaks_are_found_whatever_the_split_is_called_and_where_no_table_lists_the_images(trained, tmp_path):
    rng = np.random.default_rng(0)

    def picture():
        return Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).resize((96, 96))

    for split in ('Train', 'test'):
        for label in ('spots', 'stripes'):
            (tmp_path / 'data' / split / label).mkdir(parents=True)
            for i in range(3):
                picture().save(tmp_path / 'data' / split / label / f'{i}.png')
    saved = torch.load(trained[1], weights_only=False)
    saved['args'].data_dir, saved['args'].train_split = str(tmp_path / 'data'), 'Train'
    torch.save(saved, tmp_path / 'model.pth.tar')
    told = run(trained, tmp_path / 'a', tmp_path / 'model.pth.tar', tmp_path / 'data')['warnings']
    assert not any('LEAK' in w or 'cannot be excluded' in w for w in told)
    source = Image.open(tmp_path / 'data' / 'Train' / 'spots' / '1.png')
    source.rotate(10).save(tmp_path / 'data' / 'test' / 'spots' / 'turned.jpg')
    shutil.copy(tmp_path / 'data' / 'Train' / 'spots' / '2.png', tmp_path / 'data' / 'test' / 'spots' / 'same.png')
    told = run(trained, tmp_path / 'b', tmp_path / 'model.pth.tar', tmp_path / 'data')['warnings']
    assert any('LEAK: 1 of the 8 images were trained on' in w for w in told)
    assert any('LEAK: 1 of the 8 images show pictures that were trained on' in w for w in told)


@pytest.mark.slow
def test_images_that_were_trained_on_and_are_gone_are_told(tmp_path):
    """Split anew under the same name, or trained on in the run that another began from."""
    generate_images(tmp_path / 'images', per_class=20, size=32)
    for seed in range(2):
        split_images(tmp_path / 'images', tmp_path / f'seed{seed}', seed=seed)
    os.rename(tmp_path / 'seed0', tmp_path / 'split')
    run_training(tmp_path / 'split', tmp_path / 'first')
    os.rename(tmp_path / 'split', tmp_path / 'seed0')
    os.rename(tmp_path / 'seed1', tmp_path / 'split')
    run_training(tmp_path / 'split', tmp_path / 'second', initial_checkpoint=str(tmp_path / 'first' / 'last.pth.tar'))

    def told(name, data):
        return evaluate(str(tmp_path / name / 'last.pth.tar'), data, tmp_path / f'{name}-{data.name}', resamples=20,
                        workers=0)['warnings']

    for name in ('first', 'second'):
        warnings = told(name, tmp_path / 'split')
        assert any(f'{tmp_path / "split" / "train"} no longer holds the images' in w for w in warnings)
    found = evaluate(str(tmp_path / 'first' / 'last.pth.tar'), tmp_path / 'seed0', tmp_path / 'val', split='val',
                     resamples=20, workers=0)
    assert 'val/ chose the epoch of the training: its scores are no test.' in found['warnings']
    assert not any('no longer' in w for w in told('first', tmp_path / 'seed0'))  # moved, and found by what it holds
    found = evaluate(str(tmp_path / 'first' / 'last.pth.tar'), tmp_path / 'seed0', tmp_path / 'compared', resamples=20,
                     workers=0, compare=str(tmp_path / 'second' / 'last.pth.tar'))
    assert any(w.startswith('second/last.pth.tar: LEAK') for w in found['warnings'])


@pytest.mark.slow
def test_converted_images_are_known_by_split_csv(trained, tmp_path):
    generate_images(tmp_path / 'images', per_class=12, size=32)
    for path in (tmp_path / 'images').glob('*/*.png'):
        Image.open(path).save(path.with_suffix('.bmp'))
        path.unlink()
    split_images(tmp_path / 'images', tmp_path / 'split', val=.25, test=.25, group_regex=r'^(\d+)')
    found = run(trained, tmp_path / 'report', data=tmp_path / 'split')
    assert found['dataset']['groups'] < found['dataset']['images']
    assert any('LEAK' in w for w in run(trained, tmp_path / 'b', data=tmp_path / 'split', split='train')['warnings'])


@pytest.mark.slow
def test_two_models_in_pairs(trained, tmp_path):
    again = run(trained, tmp_path / 'a', compare=str(trained[1]))['paired']
    assert all(d == {'value': 0, 'interval': 'undefined'} for d in again['differences'].values())
    assert again['mcnemar'] == {'right_model_only': 0, 'right_baseline_only': 0, 'p': 1.}

    plain = tmp_path / 'plain'
    train(TrainConfig(data_dir=str(trained[0]), output=str(plain), model='resnet10t', img_size=32, workers=0, epochs=1))
    found = run(trained, tmp_path / 'b', compare=str(plain / 'last.pth.tar'))
    ours, baseline = found['metrics'], found['comparison']['plain/last.pth.tar']  # not the path, which others may read
    for name, difference in found['paired']['differences'].items():
        assert difference['value'] == pytest.approx(ours[name]['value'] - baseline[name]['value'])
    mcnemar = found['paired']['mcnemar']
    n = mcnemar['right_model_only'] + mcnemar['right_baseline_only']
    assert n > 0
    assert mcnemar['p'] == pytest.approx(binomtest(mcnemar['right_model_only'], n).pvalue)
    assert 'Against' in (tmp_path / 'b' / 'report.html').read_text()


def test_the_page_is_one_file_and_the_json_makes_a_card(trained, results, tmp_path):
    page = PageReader((results / 'report.html').read_text())
    assert len(page.sources) >= 4
    assert all(source.startswith('data:image/') for source in page.sources)
    assert not page.links
    assert 'no medical device' in page.text
    found = json.loads((results / 'metrics.json').read_text())
    best = found['metrics']['balanced_accuracy']
    told = ' '.join(found['warnings'])
    assert page.text.startswith(f'{told} run/model_best.pth.tar has a balanced accuracy of {best["value"]:.3f}'.strip())
    for name in ('confusion', 'roc', 'pr', 'reliability'):
        assert Image.open(results / f'{name}.png').size[0] > 300

    publish(trained[1], 'owner/name', metrics=results / 'metrics.json', output=tmp_path / 'published')
    card = (tmp_path / 'published' / 'README.md').read_text()
    accuracy = json.loads((results / 'metrics.json').read_text())['metrics']['accuracy']
    assert format_metric(accuracy) in card
    assert 'bootstrap samples of' in card


def test_names_cannot_become_html_and_broken_images_are_counted(trained, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(trained[0] / 'test', data)
    for path in list((data / 'spots').iterdir()):
        path.rename(path.with_name(f'<img src=x onerror=alert(1)>{path.name}'))
    (data / 'stripes' / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\nnothing')
    for path in list((data / 'spots').iterdir()):
        shutil.copy(path, data / 'stripes' / path.name)  # so that some are wrong
    found = run(trained, tmp_path / 'report', data=data)
    page = (tmp_path / 'report' / 'report.html').read_text()
    assert '<img src=x' not in page
    assert '&lt;img src=x' in page
    assert list(found['unreadable']) == ['stripes/broken.png']
    assert 'broken.png' in page


def test_every_way_to_name_a_model(trained, hub, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    publish(trained[1], 'owner/evaluated')
    publish(trained[1], 'owner/name', output=tmp_path / 'published')
    image = torch.randn(1, 3, 32, 32)
    expected = load_model(str(trained[1]))
    for name in ('hf-hub:owner/evaluated', f'local-dir:{tmp_path / "published"}'):
        found = load_model(name)
        assert torch.equal(found.model(image), expected.model(image))
        assert found.label_names == ['spots', 'stripes']
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in expected.data_config.items()} == {
            k: list(v) if isinstance(v, tuple) else v for k, v in found.data_config.items()}
    for name, message in (('nothing', 'is no file and no model'), (str(tmp_path), 'It is a folder'),
                          (f'local-dir:{tmp_path}', 'no config.json'), ('se_densenet264d', 'no pretrained weights'),
                          ('hf-hub:owner/missing', 'no such repository')):
        with pytest.raises(UserError, match=message):
            load_model(name)
    assert issubclass(ModelNotFoundError, UserError)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda data: next((data / 'test').iterdir()).rename(data / 'test' / 'other'), 'It has others: other'),
    (lambda data: shutil.rmtree(data / 'test'), 'It has others: train, val'),
    (lambda data: [p.write_bytes(b'') for p in (data / 'test').rglob('*.png')], 'None of the 24 images'),
    (lambda data: shutil.rmtree(data), 'is not a folder'),
])
def test_folders_that_do_not_fit(trained, tmp_path, change, message):
    data = tmp_path / 'data'
    shutil.copytree(trained[0], data)
    change(data)
    with pytest.raises(ImagesError, match=message):
        run(trained, tmp_path / 'report', data=data)
    assert not (tmp_path / 'report').exists()


def test_a_report_that_is_there_is_not_replaced(trained, tmp_path):
    (tmp_path / 'kept').write_text('mine')
    with pytest.raises(UserError, match='not empty'):
        run(trained, tmp_path)
    assert [path.name for path in Path(tmp_path).iterdir()] == ['kept']


@pytest.mark.slow
def test_imagenet_folders_by_their_synsets(hub, tmp_path):
    put_on_hub(hub, 'timm/densenet121.ra_in1k', timm.create_model('densenet121'))
    for synset in ('n01440764', 'n15075141'):  # the first and the last class
        (tmp_path / 'val' / synset).mkdir(parents=True)
        Image.new('RGB', (40, 40), (99, 50, 20)).save(tmp_path / 'val' / synset / '1.png')
    found = evaluate('se_densenet121', tmp_path, tmp_path / 'report', split='val', resamples=2, workers=0)
    assert len(found['classes']) == 1000
    assert [p['label'] for p in found['predictions']] == ['n01440764', 'n15075141']


def test_a_threshold_from_val_and_scores_by_site(trained, tmp_path, capsys):
    split, checkpoint = trained
    with open(tmp_path / 'sites.csv', 'w') as file:
        file.write('file,site\n')
        for i, path in enumerate(sorted((split.parent / 'images').rglob('*.png'))):
            file.write(f'{path.relative_to(split.parent / "images")},{"north" if i % 3 else "south"}\n')
    results = evaluate(str(checkpoint), split, tmp_path / 'report', workers=0, resamples=50,
                       goal=Goal(sensitivity=.9, specificity=.9, positive='stripes', prevalence=.1),
                       subgroups=tmp_path / 'sites.csv')
    threshold = results['threshold']
    validation = run_split(load_model(str(checkpoint)), split, 'val', results['classes'], 32, 0)
    p = softmax(validation.logits / (results['temperature'] or 1.))
    expected, _ = choose_thresholds(validation.labels, p, results['classes'], 'stripes', Goal(.9, .9))
    assert (threshold['low'], threshold['high']) == (expected.low, expected.high)
    called = [('stripes' if row['probabilities']['stripes'] >= threshold['high'] else
               'spots' if row['probabilities']['stripes'] < threshold['low'] else 'not sure')
              for row in results['predictions']]
    found = [c for c, row in zip(called, results['predictions'], strict=True) if row['label'] == 'stripes']
    assert threshold['metrics']['sensitivity']['value'] == pytest.approx(1 - found.count('spots') / len(found))
    sites = results['subgroups']['site']
    assert sites['north']['images'] + sites['south']['images'] == len(results['predictions'])
    page = (tmp_path / 'report' / 'report.html').read_text()
    assert 'negative predictive value' in page
    assert 'by site' in page
    # predict says the same of the same images.
    capsys.readouterr()
    assert main(['predict', str(checkpoint), str(split / 'test'), '--json', '--calibration',
                 str(tmp_path / 'report' / 'metrics.json')]) == 0
    said = {row['file']: row['called'] for row in json.loads(capsys.readouterr().out)['predictions']}
    assert said == {str(split / row['file']): c for row, c in zip(results['predictions'], called, strict=True)}


def test_the_rarer_class_is_counted_by_name(trained, tmp_path):
    """In a model whose outputs are in another order than the folders."""
    shutil.copytree(trained[0], tmp_path / 'data')
    for path in sorted((tmp_path / 'data' / 'test' / 'spots').iterdir())[2:]:
        path.unlink()
    model = timm.create_model('resnet10t', num_classes=2)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'model.pth')
    loaded = load_model(str(tmp_path / 'model.pth'), architecture='resnet10t', class_names=['stripes', 'spots'])
    found = evaluate(loaded, tmp_path / 'data', tmp_path / 'out', resamples=20, workers=0, goal=Goal(sensitivity=.5))
    assert found['threshold']['positive'] == 'spots'


@pytest.mark.parametrize('change', [shutil.rmtree, lambda spots: spots.rename(spots.with_name('others'))])
def test_val_has_the_models_classes(trained, tmp_path, change):
    shutil.copytree(trained[0], tmp_path / 'data')
    change(tmp_path / 'data' / 'val' / 'spots')
    if not (tmp_path / 'data' / 'val' / 'others').exists():
        shutil.rmtree(tmp_path / 'data' / 'val' / 'stripes')
    with pytest.raises(ImagesError, match='val must hold a folder for each class'):
        run(trained, tmp_path / 'out', data=tmp_path / 'data')


def test_a_threshold_needs_val(trained, tmp_path):
    with pytest.raises(OptionError, match='choose a threshold on val/'):
        evaluate(str(trained[1]), trained[0] / 'test', tmp_path / 'report', goal=Goal(sensitivity=.9))
