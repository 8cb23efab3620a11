"""Scores against scikit-learn, intervals by patient, and metrics.json."""
import time

import numpy as np
import pytest
from sklearn import metrics as sk

from timm_densese.errors import MetricsError
from timm_densese.metrics import (
    bootstrap,
    choose_temperature,
    fit_temperature,
    format_metric,
    read_metrics,
    score,
    with_intervals,
    write_metrics,
)


def test_three_classes_by_hand():
    labels = np.array([0, 0, 1, 1, 2, 2])
    p = np.array([[.8, .1, .1], [.2, .7, .1], [.1, .8, .1], [.3, .4, .3], [.1, .1, .8], [.6, .2, .2]])
    scores = score(labels, p, ['a', 'b', 'c'])
    assert scores['accuracy'] == pytest.approx(4 / 6)
    assert scores['specificity/b'] == pytest.approx(3 / 4)
    assert scores['precision/b'] == pytest.approx(2 / 3)
    assert scores['recall/c'] == pytest.approx(1 / 2)
    assert scores['auroc/c'] == pytest.approx(sk.roc_auc_score(labels == 2, p[:, 2]))
    # Bins of 1/15: 0.8 three times (right: 3), 0.7 (wrong), 0.4 (right), 0.6 (wrong).
    assert scores['ece'] == pytest.approx((3 * .2 + .7 + .6 + .6) / 6)
    assert np.isnan(score(labels[:4], p[:4], ['a', 'b', 'c'])['recall/c'])


def test_samples_at_once_are_scikit_learns_one_by_one():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 60).round(1) + 1e-3  # many ties
    p /= p.sum(1, keepdims=True)
    labels, names = rng.integers(0, 3, 60), 'abc'
    samples = bootstrap(np.arange(60) // 2, 20)
    found = score(labels, p, names, weights=samples.astype(float))
    for k, counts in enumerate(samples):
        y, q = np.repeat(labels, counts), np.repeat(p, counts, axis=0)
        called = q.argmax(1)
        assert found['accuracy'][k] == pytest.approx(sk.accuracy_score(y, called))
        assert found['balanced_accuracy'][k] == pytest.approx(sk.balanced_accuracy_score(y, called))
        assert found['nll'][k] == pytest.approx(sk.log_loss(y, q, labels=range(3)))
        assert found['brier'][k] == pytest.approx(sk.brier_score_loss(y, q, labels=range(3), scale_by_half=False))
        assert found['auroc'][k] == pytest.approx(np.mean([found[f'auroc/{name}'][k] for name in names]))
        for i, name in enumerate(names):
            assert found[f'auroc/{name}'][k] == pytest.approx(sk.roc_auc_score(y == i, q[:, i]))
            assert found[f'auprc/{name}'][k] == pytest.approx(sk.average_precision_score(y == i, q[:, i]))
            assert found[f'f1/{name}'][k] == pytest.approx(sk.f1_score(y == i, called == i))
            assert found[f'precision/{name}'][k] == pytest.approx(sk.precision_score(y == i, called == i))


def test_a_hundred_classes_take_seconds():
    rng = np.random.default_rng(0)
    p, labels = rng.dirichlet(np.ones(100), 1000), rng.integers(0, 100, 1000)
    start = time.process_time()
    with_intervals(lambda w: score(labels, p, [str(i) for i in range(100)], weights=w), bootstrap(np.arange(1000), 250))
    assert time.process_time() - start < 5  # an eighth of 1,000 samples of 2,000 images


def test_intervals_count_patients_not_images():
    rng = np.random.default_rng(0)
    right = rng.random(40) < .7

    def interval(groups, right):
        def measure(weights):
            weights = np.ones((1, len(right))) if weights is None else weights
            return {'accuracy': weights @ right / weights.sum(1)}
        found = with_intervals(measure, bootstrap(groups, 1000))['accuracy']
        return found['high'] - found['low']

    one_each = interval(np.arange(40), right)
    copied = np.repeat(right, 25)
    assert interval(np.repeat(np.arange(40), 25), copied) == pytest.approx(one_each)
    assert interval(np.arange(1000), copied) < one_each / 3  # what taking copies for images would claim


def test_an_interval_without_width_is_undefined():
    labels = np.array([0] * 9 + [1])  # one image of b, and one patient of c would be no other
    p = np.eye(2)[[0] * 6 + [1] * 4] * .8 + .1
    found = with_intervals(lambda w: score(labels, p, 'ab', weights=w), bootstrap(np.arange(10), 100))
    assert found['recall/b'] == {'value': 1., 'interval': 'undefined'}
    assert format_metric(found['recall/b']) == '1.000 (interval undefined)'
    assert found['recall/a']['low'] < found['recall/a']['value'] < found['recall/a']['high']
    one_patient = with_intervals(lambda w: score(labels, p, 'ab', weights=w), bootstrap(np.zeros(10), 100))
    assert all(metric['interval'] == 'undefined' for metric in one_patient.values())


def test_metrics_json(tmp_path):
    results = {'dataset': {'name': 'x'}, 'command': 'y', 'metrics': {'accuracy': {'value': .5}}, 'classes': ['猴痘']}
    write_metrics(tmp_path / 'a' / 'metrics.json', results)
    assert read_metrics(tmp_path / 'a' / 'metrics.json') == results
    assert '猴痘' in (tmp_path / 'a' / 'metrics.json').read_text(encoding='utf-8')
    with pytest.raises(ValueError, match='JSON'):
        write_metrics(tmp_path / 'nan.json', {**results, 'metrics': {'accuracy': {'value': float('nan')}}})
    assert not (tmp_path / 'nan.json').exists()


@pytest.mark.parametrize('content', ['', '[]', '{}', '{"dataset": {"name": "x"}, "command": "y", "metrics": {"a": 1}}',
                                     '{"dataset": {"name": 1}, "command": "y", "metrics": {}}'])
def test_metrics_that_cannot_be_read(content, tmp_path):
    (tmp_path / 'a.json').write_text(content)
    with pytest.raises(MetricsError, match='It must be JSON such as'):
        read_metrics(tmp_path / 'a.json')


def test_validation_that_tells_no_temperature():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    logits = rng.normal(0, 2, (40, 2)) + 2 * np.eye(2)[labels]
    temperature, reason = choose_temperature(logits, labels)
    assert temperature == pytest.approx(fit_temperature(logits, labels))
    assert reason == ''
    right = 9 * np.eye(2)[labels]
    for values, truth, said in ((logits[:19], labels[:19], '19 images'), (logits, 0 * labels, 'one class'),
                                (right, labels, 'right on all'), (right, 1 - labels, 'bound of its search')):
        temperature, reason = choose_temperature(values, truth)
        assert temperature is None
        assert said in reason
