"""Held-out loss with its standard error, in nats per token and bits per byte."""

import math

import numpy as np


def summary(nll_M: np.ndarray, weight_M: np.ndarray, bytes_per_token: float | None) -> dict:
    """Loss over M rows from each row's summed loss (nats) and weight (tokens).

    The standard error treats rows as independent draws: the spread of row totals about loss x weight, over the square
    root of their number; of one row it is None. bits_per_byte is None where there is no text behind the tokens.
    """
    nll_M, weight_M = np.asarray(nll_M, np.float64), np.asarray(weight_M, np.float64)
    M, weight = len(nll_M), weight_M.sum()
    loss = nll_M.sum() / weight
    residual_M = nll_M - loss * weight_M
    se = math.sqrt(np.square(residual_M).sum() / (M - 1) / M) / (weight / M) if M > 1 else math.nan
    return {
        "loss": _json(loss),
        "loss_se": _json(se),
        "bits_per_byte": _json(loss / math.log(2) / bytes_per_token) if bytes_per_token else None,
        "num_tokens": int(weight),
    }


def _json(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
