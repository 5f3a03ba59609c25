"""Bias-corrected percentiles: their closed form for normal draws, and what no transformation may change."""

import math

import numpy as np
import pytest

from slmjax.scaling.bias_corrected import bias_corrected


def normal_draws(K=2001):
    from scipy.special import ndtri

    return ndtri((np.arange(K) + 0.5) / K)[:, None]


def test_the_distance_between_median_and_estimate_is_taken_off_twice(seed):
    """Draws N(b, 1) of an estimate at 0: the corrected ones are N(-b, 1), in whatever order they come."""
    shift = np.random.default_rng(seed).uniform(-0.8, 0.8)
    normal_Km = normal_draws(20_001)  # of 2,001 the tail is too thin: for some shifts it lies .03 off
    draws_Km = np.random.default_rng(seed).permutation(normal_Km + shift)
    corrected_Km = bias_corrected(draws_Km, np.zeros(1))
    for level in (0.1, 0.5, 0.9):
        plain, ours = (float(np.quantile(each, level)) for each in (normal_Km, corrected_Km))
        assert ours == pytest.approx(plain - shift, abs=0.02)


def test_centred_and_fixed_draws_come_back_as_they_are():
    assert np.array_equal(bias_corrected(normal_draws(), np.zeros(1)), normal_draws())
    assert np.array_equal(bias_corrected(np.full((100, 1), 3.0), np.array([3.0])), np.full((100, 1), 3.0))


def test_an_increasing_function_has_the_same_percentiles_and_infinity_stays(seed):
    draws_Km = np.random.default_rng(seed).normal(size=(500, 3))
    estimate_m = np.array([0.2, -0.3, 0.0])
    of_logs = np.exp(bias_corrected(draws_Km, estimate_m))
    assert np.array_equal(of_logs, bias_corrected(np.exp(draws_Km), np.exp(estimate_m)))
    draws_Km[:50] = math.inf
    corrected_Km = bias_corrected(draws_Km, estimate_m)
    assert np.isinf(corrected_Km).any(axis=0).all() and not np.isnan(corrected_Km).any()


def test_draws_all_on_one_side_leave_the_nearest_ones():
    corrected_Km = bias_corrected(normal_draws(101), np.array([10.0]))
    assert np.isfinite(corrected_Km).all() and np.quantile(corrected_Km, 0.1) > np.quantile(normal_draws(101), 0.9)
