"""Comparisons against scipy, and studies drawn where the truth is known."""
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from timm_densese.comparisons import (
    compare_models,
    corrected_t_test,
    describe_difference,
    detectable_difference,
    holm,
    mean_scores,
    paired_differences,
    power,
)
from timm_densese.metrics import bootstrap, score, with_intervals
from timm_densese.study.pooled import PRIMARY, Pool, compare

CLASSES = ['well', 'ill']


def test_t_test_without_overlap_is_scipys():
    differences = np.random.default_rng(0).normal(.02, .05, 10)
    found = corrected_t_test(differences, train=1, test=0)
    expected = stats.ttest_1samp(differences, 0)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.mean / found.error == pytest.approx(expected.statistic)
    overlapping = corrected_t_test(differences, train=80, test=20)
    assert overlapping.error == pytest.approx(differences.std(ddof=1) * np.sqrt(1 / 10 + .25))


@pytest.mark.parametrize('differences', [np.zeros(5), np.full(5, .1), np.array([.1])])
def test_runs_that_do_not_differ_tell_nothing(differences):
    assert corrected_t_test(differences, 80, 20).p == 1


def test_holm_by_hand():
    assert holm([.04, .01, .5, .02]) == pytest.approx([.08, .04, .5, .06])
    assert holm([.6, .9]) == [1, 1]
    assert holm([]) == []


@pytest.mark.slow
def test_power_is_how_often_the_test_finds():
    rng = np.random.default_rng(0)
    drawn = rng.normal(.05, .05, (4000, 6))
    error = .05 / np.sqrt(6)
    found = np.mean(stats.ttest_1samp(drawn, 0, axis=1).pvalue < .05)
    assert power(.05, error, 5) == pytest.approx(found, abs=.025)
    assert power(detectable_difference(error, 5), error, 5) == pytest.approx(.8, abs=1e-6)
    assert power(0, error, 5, level=.01) == pytest.approx(.01, abs=1e-3)
    assert power(.02, .01, 4) == pytest.approx(
        stats.nct.sf(stats.t.isf(.025, 4), 4, 2) + stats.nct.cdf(-stats.t.isf(.025, 4), 4, 2), abs=1e-3)
    assert detectable_difference(1., 1, .01) > 50  # two runs tell next to nothing


def test_words():
    test = corrected_t_test(np.array([.1, .12, .09, .11, .1]), 80, 20)
    said = describe_difference(test, test.p, {'value': .1, 'low': .05, 'high': .15}, 1, 60, 'patients')
    assert (said['verdict'], said['words']) == ('better', 'better, by 0.100')
    across = describe_difference(test, test.p, {'value': .1, 'low': -.01, 'high': .21}, 1, 60, 'patients')
    assert across['verdict'] == 'cannot tell'
    test = corrected_t_test(np.array([-.1, -.12, -.09, -.11, -.1]), 80, 20)
    said = describe_difference(test, test.p, {'value': -.1, 'low': -.15, 'high': -.05}, 1, 60, 'patients')
    assert said['verdict'] == 'worse'
    test = corrected_t_test(np.array([.1, -.02, .06, .03, -.04]), 80, 20)
    said = describe_difference(test, test.p, {'value': .03, 'low': -.1, 'high': .1}, 1, 60, 'patients')
    assert said['verdict'] == 'cannot tell'
    # Four times the patients halve the error.
    assert said['patients_needed'] == pytest.approx(60 * (said['detectable'] / test.mean) ** 2, abs=1)
    assert 'patients would' in said['words']
    test = corrected_t_test(np.array([.1, -.1, .1, -.1]), 80, 20)
    said = describe_difference(test, 1., {'value': 0., 'low': -.1, 'high': .1}, 1, 60, 'patients')
    assert said['patients_needed'] is None
    assert 'nor would 100 times as many' in said['words']


def test_a_baseline_in_pairs():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 50)
    ours, baseline = rng.dirichlet(np.ones(2), (2, 50))
    samples = bootstrap(np.arange(50), 200)
    found = compare_models(labels, ours, baseline, 'ab', samples, 'plain')
    swapped = compare_models(labels, baseline, ours, 'ab', samples, 'ours')
    for name, difference in found['paired']['differences'].items():
        assert difference['value'] == pytest.approx(-swapped['paired']['differences'][name]['value'])
        assert difference['low'] == pytest.approx(-swapped['paired']['differences'][name]['high'])
    right, baseline_right = ours.argmax(1) == labels, baseline.argmax(1) == labels
    assert found['paired']['mcnemar']['right_model_only'] == (right & ~baseline_right).sum() > 0
    assert found['paired']['mcnemar'] == {
        **swapped['paired']['mcnemar'], 'right_model_only': swapped['paired']['mcnemar']['right_baseline_only'],
        'right_baseline_only': swapped['paired']['mcnemar']['right_model_only']}


def test_mean_over_seeds_is_sklearns():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=60)
    p = rng.dirichlet(np.ones(3), (2, 60))
    found = mean_scores(labels, p, 'abc')
    assert found['auroc'][0] == pytest.approx(np.mean(
        [sk.roc_auc_score(labels, q, multi_class='ovr', average='macro') for q in p]))
    assert found['balanced_accuracy'][0] == pytest.approx(np.mean(
        [sk.balanced_accuracy_score(labels, q.argmax(1)) for q in p]))


# Studies without a training: predictions are drawn, patients have several images that are alike.


def draw(rng, patients=80, seeds=2, folds=5, shifts=(0., 0.), of_patient=1., of_run=.1, images=3.):
    """Draw the predictions of models whose evidence for the right class is 1 plus a shift; of_patient and of_run say
    how much it varies between patients, for each model, and between runs."""
    sizes = 1 + rng.poisson(images, patients)
    ill = rng.permutation(patients) % 2
    groups = np.repeat(np.arange(patients), sizes)
    labels, fold_of = ill[groups], (rng.permutation(patients) % folds)[groups]
    shared = rng.normal(0, of_patient, patients)[groups] + rng.normal(0, 1, len(groups))
    probabilities = {}
    for i, shift in enumerate(shifts):
        own = rng.normal(0, .7 * of_patient, patients)[groups]
        runs = rng.normal(0, of_run, (seeds, folds))[:, fold_of]
        evidence = 1 + shift + shared + own + runs + rng.normal(0, .7, (seeds, len(groups)))
        right = 1 / (1 + np.exp(-evidence))
        of_class = labels == np.arange(2)[:, None, None]
        probabilities[f'model{i}'] = np.where(of_class, right, 1 - right).transpose(1, 2, 0)
    return Pool(CLASSES, [str(i) for i in range(len(groups))], labels, groups, fold_of,
                {name: list(range(seeds)) for name in probabilities}, probabilities, {})


def draw_study(rng, *shifts, overlap=.23, **kwargs):
    """As `draw`, with training sets that overlap: what a model is better by in all its runs varies between studies, by
    as much as Nadeau and Bengio's correction takes it to."""
    return draw(rng, shifts=(0., *(shift + rng.normal(0, overlap) for shift in shifts)), **kwargs)


def judge(pool):
    models = {name: {} for name in pool.probabilities}
    compare(pool, models, 'model0', bootstrap(pool.groups, 50), 'patients', train=70, test=20)
    return models['model1']['test']


@pytest.mark.slow
@pytest.mark.parametrize('overlap', [0, .23])
def test_models_that_do_not_differ_are_seldom_said_to(overlap):
    rng = np.random.default_rng(0)
    said = [judge(draw_study(rng, 0., overlap=overlap))['verdict'] != 'cannot tell' for _ in range(400)]
    assert np.mean(said) <= .05


@pytest.mark.slow
@pytest.mark.parametrize('shift', [.4, .8])
def test_a_real_difference_is_found_as_often_as_the_power_says(shift):
    rng = np.random.default_rng(0)
    population = draw(rng, patients=20_000, seeds=1, folds=1000, shifts=(0., shift))
    without, better = (score(population.labels, p[0], CLASSES)[PRIMARY].item()
                       for p in population.probabilities.values())
    tests = [judge(draw_study(rng, shift)) for _ in range(200)]
    found = np.mean([test['verdict'] == 'better' for test in tests])
    printed = np.mean([power(better - without, test['error'], test['df']) for test in tests])
    assert found == pytest.approx(printed, abs=.1)


@pytest.mark.slow
def test_intervals_by_patient_cover_the_truth_and_by_image_do_not():
    rng = np.random.default_rng(0)
    design = dict(seeds=1, of_run=0., of_patient=1.5, shifts=(0.,), folds=1)
    population = draw(rng, patients=20_000, **design)
    truth = score(population.labels, population.probabilities['model0'][0], CLASSES)['accuracy'].item()
    covered = {'patient': 0, 'image': 0}
    for _ in range(1000):
        pool = draw(rng, patients=100, **design)
        right = pool.probabilities['model0'][0].argmax(1) == pool.labels
        for unit, groups in (('patient', pool.groups), ('image', np.arange(len(right)))):
            found = with_intervals(lambda weights, right=right: {
                'accuracy': np.array([right.mean()]) if weights is None else weights @ right / weights.sum(1)},
                bootstrap(groups, 300))['accuracy']
            covered[unit] += found['low'] <= truth <= found['high']
    assert 930 <= covered['patient'] <= 970
    assert covered['image'] < 850


def test_differences_are_drawn_over_seeds_too():
    rng = np.random.default_rng(0)
    pool = draw(rng, seeds=4, of_run=0.)
    ours, theirs = pool.probabilities.values()
    samples = bootstrap(pool.groups, 400)
    alike = paired_differences(pool.labels, ours, theirs, CLASSES, samples)['accuracy']
    # Half of the seeds are right on everything: the difference now depends on which are drawn.
    ours = ours.copy()
    ours[:2] = np.eye(2)[pool.labels]
    apart = paired_differences(pool.labels, ours, theirs, CLASSES, samples)['accuracy']
    assert apart['value'] > alike['value']
    assert apart['high'] - apart['low'] > 1.5 * (alike['high'] - alike['low'])
    same = paired_differences(pool.labels, theirs, theirs, CLASSES, samples)['accuracy']
    assert same == {'value': 0, 'interval': 'undefined'}
