"""Thresholds against scikit-learn's curves, what they attain, and the files that they travel in."""
import json

import numpy as np
import pytest
from sklearn import metrics as sk

from timm_densese.errors import MetricsError, OptionError
from timm_densese.metrics import bootstrap
from timm_densese.thresholds import (
    Calibration,
    Goal,
    Thresholds,
    call,
    check_goal,
    choose_thresholds,
    name_call,
    operating_point,
    read_calibration,
)

CLASSES = ['ill', 'well']


@pytest.fixture
def drawn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    p = 1 / (1 + np.exp(-rng.normal(1 - 2 * labels, 1.5)))
    return labels, np.stack([p, 1 - p], 1)


@pytest.mark.parametrize('goal', [.5, .9, .95, 1.])
def test_a_threshold_is_the_highest_that_attains_the_sensitivity(drawn, goal):
    labels, p = drawn
    found, said = choose_thresholds(labels, p, CLASSES, 'ill', Goal(sensitivity=goal))
    _, sensitivities, thresholds = sk.roc_curve(labels == 0, p[:, 0], drop_intermediate=False)
    assert found.low == found.high == thresholds[sensitivities >= goal].max()
    assert said.startswith('chosen on')


@pytest.mark.parametrize('goal', [.5, .9, .95, 1.])
def test_a_threshold_is_the_lowest_that_attains_the_specificity(drawn, goal):
    labels, p = drawn
    found, _ = choose_thresholds(labels, p, CLASSES, 'ill', Goal(specificity=goal))
    kept = np.mean(p[labels == 1, 0] < found.high)
    assert kept >= goal
    assert np.mean(p[labels == 1, 0] < np.nextafter(found.high, 0)) < goal or kept == goal


def test_two_thresholds_leave_room_between(drawn):
    labels, p = drawn
    found, _ = choose_thresholds(labels, p, CLASSES, 'ill', Goal(sensitivity=.95, specificity=.95))
    assert found.low < found.high
    called = call(p[:, 0], found)
    assert set(called) == {1, 0, -1}
    assert np.mean(called[labels == 0] != 0) >= .95
    assert np.mean(called[labels == 1] != 1) >= .95
    # Where one attains both, there is one.
    apart = np.where(labels[:, None] == [0, 1], .9, .1)
    found, _ = choose_thresholds(labels, apart, CLASSES, 'ill', Goal(sensitivity=.95, specificity=.95))
    assert found.low == found.high


def test_few_images_are_said_to_be_few_and_none_choose_nothing():
    labels, p = np.array([0, 0, 1]), np.array([[.9, .1], [.6, .4], [.3, .7]])
    _, said = choose_thresholds(labels, p, CLASSES, 'ill', Goal(sensitivity=.9))
    assert 'which are few' in said
    found, said = choose_thresholds(labels[:2], p[:2], CLASSES, 'ill', Goal(sensitivity=.9))
    assert found is None
    assert '2 of ill and 0 others' in said


def test_what_thresholds_attain_is_the_confusion_matrix(drawn):
    labels, p = drawn
    ill = labels == 0
    called = call(p[:, 0], Thresholds('ill', .4, .4))[None]
    (tn, fp), (fn, tp) = sk.confusion_matrix(ill, called[0])
    found = operating_point(ill, called, bootstrap(np.arange(200), 50), prevalence=.01)
    assert found['sensitivity']['value'] == pytest.approx(tp / (tp + fn))
    assert found['specificity']['value'] == pytest.approx(tn / (tn + fp))
    assert found['ppv']['value'] == pytest.approx(tp / (tp + fp))
    assert found['npv']['value'] == pytest.approx(tn / (tn + fn))
    assert 'not_sure' not in found
    positive = .01 * tp / (tp + fn)
    assert found['ppv_at_prevalence']['value'] == pytest.approx(positive / (positive + .99 * fp / (fp + tn)))
    same = operating_point(ill, called, bootstrap(np.arange(200), 50), prevalence=ill.mean())
    for name in ('ppv', 'npv'):
        assert same[f'{name}_at_prevalence']['value'] == pytest.approx(same[name]['value'])
        assert same[name]['low'] < same[name]['value'] < same[name]['high']


def test_not_sure_is_a_share():
    found = operating_point(np.arange(4) < 2, np.array([[1, -1, 0, 0]]), bootstrap(np.arange(4), 50))
    assert found['not_sure']['value'] == .25
    assert found['sensitivity']['value'] == 1


def test_goals():
    assert check_goal(Goal(), CLASSES, [3, 4]) is None
    assert check_goal(Goal(sensitivity=.9), CLASSES, [3, 4]) == 'ill'  # the rarer
    assert check_goal(Goal(specificity=.9, positive='well'), CLASSES, [3, 4]) == 'well'
    for goal, classes, said in ((Goal(sensitivity=.9), ['a', 'b', 'c'], 'need --positive: one of a, b, c'),
                                (Goal(sensitivity=.9, positive='x'), CLASSES, 'no such class'),
                                (Goal(prevalence=.1), CLASSES, 'give --sensitivity')):
        with pytest.raises(OptionError, match=said):
            check_goal(goal, classes, [1] * len(classes))


def test_calls_have_names():
    assert [name_call(p, Thresholds('ill', .3, .7), CLASSES) for p in (.2, .3, .7)] == ['well', 'not sure', 'ill']
    assert name_call(.2, Thresholds('a', .3, .3), ['a', 'b', 'c']) == 'not a'


# The file.


def write(tmp_path, **content):
    (tmp_path / 'c.json').write_text(json.dumps(content))
    return tmp_path / 'c.json'


@pytest.mark.parametrize('content', [
    '[]', '{', '{}', *(json.dumps({'temperature': t}) for t in (None, -1, float('nan'), 'warm', [])),
    '{"threshold": {"positive": "ill"}}', '{"threshold": {"left_out": "one class"}, "temperature": null}'])
def test_a_file_without_temperature_and_threshold(tmp_path, content):
    (tmp_path / 'c.json').write_text(content)
    with pytest.raises(MetricsError, match='temperature'):
        read_calibration(tmp_path / 'c.json', 'abc', CLASSES)


def test_a_calibration_belongs_to_its_model(tmp_path, capsys):
    file = write(tmp_path, temperature=2, weights='abc', model='run/best')
    assert read_calibration(file, 'abc', CLASSES) == Calibration(2.)
    with pytest.raises(MetricsError, match='those of run/best'):
        read_calibration(file, 'abd', CLASSES)
    with pytest.raises(MetricsError, match='val/ holds 3 images'):
        read_calibration(write(tmp_path, temperature=None, temperature_left_out='val/ holds 3 images'), 'abc', CLASSES)
    assert read_calibration(write(tmp_path, temperature=2), 'abc', CLASSES).temperature == 2
    assert 'does not say on which weights' in capsys.readouterr().err
    assert read_calibration(None, 'abc', CLASSES) == Calibration()


def test_the_runs_of_a_study_have_their_own_thresholds(tmp_path):
    file = write(tmp_path, temperature=None, threshold={'positive': 'ill', 'low': .5, 'high': .5}, runs={
        'abc': {'threshold': {'positive': 'ill', 'low': .3, 'high': .4}}})
    assert read_calibration(file, 'abc', CLASSES) == Calibration(1., Thresholds('ill', .3, .4))
    with pytest.raises(MetricsError, match='other weights'):
        read_calibration(file, 'abd', CLASSES)
    with pytest.raises(MetricsError, match='none of the classes'):
        read_calibration(file, 'abc', ['a', 'b'])
