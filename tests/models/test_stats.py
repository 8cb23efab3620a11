"""Counts against timm's own table (results/benchmark-infer-amp-nchw-pt113-cu117-rtx3090.csv of its repository)."""
import pytest
import timm

from timm_densese.models.stats import model_stats

# GMACs, activations and parameters, the latter in millions, each rounded to two decimals.
TIMM = {
    'densenet121': (2.87, 6.90, 7.98),
    'densenet161': (7.79, 11.06, 28.68),
    'densenet169': (3.40, 7.30, 14.15),
    'densenet201': (4.34, 7.85, 20.01),
    'densenetblur121d': (3.11, 7.90, 8.00),
    'seresnet50': (4.11, 11.13, 28.09),
}


@pytest.mark.parametrize('name', TIMM)
def test_counts_are_timms(name):
    stats = model_stats(timm.create_model(name, device='meta'))
    found = (stats['macs'] / 1e3, stats['activations'], stats['params'])
    assert tuple(round(value, 2) for value in found) == TIMM[name]
