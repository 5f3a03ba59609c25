"""Held-out loss is the mean per token, its standard error covers what it claims, nothing stands in for a failure."""

import math

import numpy as np
import pytest

from slmjax import evaluate


def test_loss_is_per_token_and_bits_are_per_byte():
    result = evaluate.summary(np.array([10.0, 30.0]), np.array([10, 10]), bytes_per_token=2.5)
    assert result["loss"] == 2.0 and result["num_tokens"] == 20
    assert result["bits_per_byte"] == pytest.approx(2.0 / math.log(2) / 2.5)
    assert evaluate.summary(np.array([10.0, 30.0]), np.array([10, 10]), None)["bits_per_byte"] is None


def test_rows_of_equal_weight_give_the_textbook_standard_error(seed):
    rng = np.random.default_rng(seed)
    nll_M = rng.normal(300, 20, 64)
    result = evaluate.summary(nll_M, np.full(64, 100), None)
    assert result["loss"] == pytest.approx(nll_M.mean() / 100)
    assert result["loss_se"] == pytest.approx(np.std(nll_M / 100, ddof=1) / 8)


def test_heavier_rows_count_for_more(seed):
    rng = np.random.default_rng(seed)
    weight_M = rng.integers(1, 100, 50)
    per_token_M = rng.normal(3, 0.5, 50)
    result = evaluate.summary(per_token_M * weight_M, weight_M, None)
    assert result["loss"] == pytest.approx(np.average(per_token_M, weights=weight_M))
    order = rng.permutation(50)
    again = evaluate.summary((per_token_M * weight_M)[order], weight_M[order], None)
    assert again["loss_se"] == pytest.approx(result["loss_se"])


def test_the_standard_error_covers_the_truth_as_often_as_it_says(seed):
    rng, hits, trials = np.random.default_rng(seed), 0, 2000
    for _ in range(trials):
        weight_M = rng.integers(20, 100, 60)
        nll_M = 3.0 * weight_M + rng.normal(0, np.sqrt(weight_M))
        result = evaluate.summary(nll_M, weight_M, None)
        hits += abs(result["loss"] - 3.0) < 1.96 * result["loss_se"]
    # 95% less a little for 60 rows; 4 standard deviations of a count of 2000 are 2%.
    assert 0.92 < hits / trials < 0.97


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_null(bad):
    result = evaluate.summary(np.array([1.0, bad]), np.array([1, 1]), 2.0)
    assert result["loss"] is result["loss_se"] is result["bits_per_byte"] is None


def test_one_row_has_no_standard_error():
    result = evaluate.summary(np.array([5.0]), np.array([2]), None)
    assert result["loss"] == 2.5 and result["loss_se"] is None


def test_no_tokens_have_no_loss():
    result = evaluate.summary(np.zeros(3), np.zeros(3), 2.0)
    assert result["loss"] is result["loss_se"] is None and result["num_tokens"] == 0
