"""Batch size from training curves: the critical batch of one model, and the batch that needs the fewest tokens.

Letters: n runs, m models and loss levels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Tradeoff(NamedTuple):
    """(S/min_steps - 1) (D/min_tokens - 1) = 1 between the steps S and tokens D that reach one loss
    (McCandlish et al. 2018, arXiv 1812.06162, equation 2.11)."""

    min_steps: float
    min_tokens: float

    @property
    def critical_batch(self) -> float:
        """Tokens per step that take twice the fewest steps and twice the fewest tokens."""
        return self.min_tokens / self.min_steps

    def steps(self, batch: float) -> float:
        return self.min_steps * (1 + self.critical_batch / batch)

    def tokens(self, batch: float) -> float:
        return self.min_tokens * (1 + batch / self.critical_batch)


def fit_tradeoff(batch_n: Sequence[float], tokens_n: Sequence[float]) -> Tradeoff:
    """The trade-off through runs that reached the same loss: tokens needed against batch (tokens per step).

    The relation is linear in reciprocals, min_steps/S + min_tokens/D = 1, and so solved without a start.
    """
    batch_n, tokens_n = _positive(batch_n, "batch"), _positive(tokens_n, "tokens")
    if len(np.unique(batch_n)) < 3 or len(batch_n) != len(tokens_n):
        raise ValueError("the trade-off of steps and tokens needs at least three batch sizes, each with its tokens")
    reciprocals_n2 = np.stack([batch_n / tokens_n, 1 / tokens_n], axis=1)
    scale_2 = np.abs(reciprocals_n2).max(axis=0)
    solution_2 = np.linalg.lstsq(reciprocals_n2 / scale_2, np.ones(len(batch_n)), rcond=None)[0] / scale_2
    if (solution_2 <= 0).any():
        raise ValueError(
            "the tokens needed do not follow a trade-off: they must rise with the batch, and the steps fall; "
            "compare runs at one loss, each batch with its own tuned learning rate"
        )
    return Tradeoff(*solution_2.tolist())


class BatchLaw(NamedTuple):
    """B* = coefficient L^-exponent tokens, and the optima (loss, batch) it went through."""

    coefficient: float
    exponent: float
    optima: list[tuple[float, float]]
    num_left_out: int

    def __call__(self, loss: float) -> float:
        return self.coefficient * loss**-self.exponent


def fit_batch_law(levels: Sequence[tuple[float, Sequence[float], Sequence[float]]]) -> BatchLaw:
    """MiniCPM's B*(L) (arXiv 2404.06395, appendix A.2).

    Args:
      levels: for every model and loss level (loss, batches [n], tokens to reach the loss with each [n]). The vertex of
        a parabola in log batch is its optimum; a level whose vertex is no minimum, or lies outside its batches, is left
        out.
    """
    optima, num_left_out = [], 0
    for loss, batch_n, tokens_n in levels:
        x_n = np.log(_positive(batch_n, "batch"))
        if len(np.unique(x_n)) < 4 or len(x_n) != len(tokens_n):
            raise ValueError(f"loss level {loss}: a parabola needs at least four batch sizes, each with its tokens")
        curvature, slope, _ = np.polyfit(x_n - x_n.mean(), np.log(_positive(tokens_n, "tokens")), 2)
        vertex = x_n.mean() - slope / (2 * curvature) if curvature > 0 else math.inf
        if x_n.min() <= vertex <= x_n.max():
            optima.append((float(loss), math.exp(vertex)))
        else:
            num_left_out += 1
    if len({loss for loss, _ in optima}) < 3:
        raise ValueError(
            f"{len(optima)} loss levels with an optimum inside their batches are too few; give three losses"
        )
    log_m2 = np.log(optima)
    slope, intercept = np.polyfit(log_m2[:, 0], log_m2[:, 1], 1)
    return BatchLaw(math.exp(intercept), -float(slope), optima, num_left_out)


def _positive(values, name):
    array = np.asarray(values, float)
    if not (np.isfinite(array) & (array > 0)).all():
        raise ValueError(f"{name}: a value is not a positive finite number")
    return array
