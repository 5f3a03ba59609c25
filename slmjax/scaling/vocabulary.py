"""The best vocabulary of a model by two routes of Tao et al. 2024 (arXiv 2407.13623): the envelope of runs that vary V
(approach 1), and where the FLOPs of reading a text stop falling with V (approach 2). Approach 3 is a law,
`laws/vocabulary.py`. All three speak of N_v = V d, the parameters of one embedding.

Letters: n runs or sizes.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from slmjax.scaling.envelope import power_line, record_lows
from slmjax.scaling.laws.vocabulary import TOKENS_PER_CHARACTER
from slmjax.scaling.lines import Line

MAX_VOCABULARY = 200_000  # tokens per character were measured up to here; beyond, the source holds them constant


class Allocation(NamedTuple):
    """Power laws of compute along the envelope, and the frontier's own C [n], N, N_v and H."""

    lines: dict[str, Line]
    frontier: dict[str, np.ndarray]


def tokens_per_character(V: np.ndarray) -> np.ndarray:
    """Tokens that one character of English web text becomes under a vocabulary of V words."""
    log_V = np.log(np.minimum(V, MAX_VOCABULARY))
    square, slope, constant = TOKENS_PER_CHARACTER
    return square * log_V**2 + slope * log_V + constant


def flops(N, V, d, H):
    """Training FLOPs of H characters on N non-vocabulary parameters and one embedding of V words of width d."""
    return 6 * (N + V * d) * H * tokens_per_character(V)


def allocate(
    C_n: np.ndarray,
    loss_n: np.ndarray,
    quantities: Mapping[str, np.ndarray],
    delta: float = 1e-3,
    exponents: Mapping[str, float] | None = None,
) -> Allocation:
    """Approach 1: the runs that beat every cheaper one, and Huber lines of each quantity [n] in C through them.

    Args:
      loss_n: unigram-normalised, so that vocabularies compare.
      quantities: positive numbers by name, e.g. {"N": .., "N_v": .., "H": ..}.
      exponents: slopes that are imposed, e.g. {"N": 0.5, "H": 0.5} as the paper does.
    """
    for name, value_n in {"C": C_n, **quantities}.items():
        if not (np.isfinite(value_n).all() and (value_n > 0).all()):
            raise ValueError(f"{name} holds values that are not positive finite numbers; remove those runs")
    if not np.isfinite(loss_n).all():
        raise ValueError("loss holds values that are not finite; remove those runs")
    low_m = record_lows(C_n, loss_n)
    if len(low_m) < 3:
        raise ValueError(f"{len(low_m)} runs beat every cheaper one, and a power law along them needs three; add runs")
    one_1m = np.ones((1, len(low_m)))
    lines = {
        name: power_line(np.log(C_n[low_m]), np.log(value_n[low_m]), one_1m, delta, (exponents or {}).get(name))
        for name, value_n in quantities.items()
    }
    return Allocation(lines, {"C": C_n[low_m]} | {name: value_n[low_m] for name, value_n in quantities.items()})


def cheapest_vocabulary(N: float, d: float) -> float:
    """Approach 2: the V that reads a given text with the fewest FLOPs, where d(FLOPs)/dV = 0.

    A larger V makes fewer tokens of a text and each of them dearer. By bisection on log V: the derivative of
    (N + V d) f(V) by log V is V d f + (N + V d) f', negative below the minimum.
    """
    for name, value in (("N", N), ("d", d)):
        if not value > 0:
            raise ValueError(f"{name}={value} must be a positive number")
    square, slope, constant = TOKENS_PER_CHARACTER
    low, high = 0.0, float(np.log(MAX_VOCABULARY))

    def rises(log_V):
        embedding = np.exp(log_V) * d
        ratio = (square * log_V + slope) * log_V + constant
        return embedding * ratio + (N + embedding) * (2 * square * log_V + slope) > 0

    if not rises(high):
        raise ValueError(
            f"N={N:.3g} at width {d:.4g} would use more than {MAX_VOCABULARY} words, beyond what was measured"
        )
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if rises(middle) else (middle, high)
    return float(np.exp(high))


def derivative_exponent(N_n: np.ndarray, d_n: np.ndarray, delta: float = 1e-3) -> float:
    """Approach 2: gamma of N_v ~ N^gamma over models [n] of given widths, a Huber line through the first of them."""
    log_N_v_n = np.log([cheapest_vocabulary(N, d) * d for N, d in zip(N_n, d_n, strict=True)])
    x_n, y_n = np.log(N_n[1:] / N_n[0]), log_N_v_n[1:] - log_N_v_n[0]
    # One number: where the pull of all points, each clipped at delta, changes sign.
    low, high = float((y_n / x_n).min()), float((y_n / x_n).max())
    for _ in range(60):
        middle = 0.5 * (low + high)
        pulls_down = float(np.clip(middle * x_n - y_n, -delta, delta) @ x_n) > 0
        low, high = (low, middle) if pulls_down else (middle, high)
    return 0.5 * (low + high)


def scaled_vocabulary(N: float, d: float, anchor_N: float, anchor_N_v: float, gamma: float) -> float:
    """Approach 2: V of a model of N parameters and width d, from the N_v that was best for a small one."""
    return anchor_N_v * (N / anchor_N) ** gamma / d
