"""The minimum of loss over log N within one compute budget, for many copies of the losses at once.

A minimum counts only when it lies inside: the best run is neither the smallest nor the largest, the curve bends
upwards, and its lowest point lies between the sizes that were run. Nothing is extrapolated.

Letters: K copies, n sizes (sorted), g fine grid.
"""

import dataclasses
import math

import numpy as np

METHODS = ("parabola", "akima", "all_points")
FINE = 25  # grid steps of the Akima spline per distance between sizes, as Porian et al. 2024

OUTCOMES = (
    "",
    "the smallest size is the best: its minimum lies below the sizes that were run",
    "the largest size is the best: its minimum lies above the sizes that were run",
    "fewer than three sizes lie within the window of the best",
    "the parabola bends downwards",
    "the parabola has its lowest point outside the sizes that were run",
)
INSIDE, SMALLEST, LARGEST, FEW, BENT, OUTSIDE = range(6)


@dataclasses.dataclass(frozen=True)
class Minima:
    """log N* [K] and loss [K] of every copy (nan where there is no interior minimum), and what became of it [K]."""

    log_N_K: np.ndarray
    loss_K: np.ndarray
    outcome_K: np.ndarray

    @property
    def inside_K(self) -> np.ndarray:
        return self.outcome_K == INSIDE

    def reason(self, k: int) -> str:
        """Why copy k has no minimum; empty when it has one."""
        return OUTCOMES[self.outcome_K[k]]


def find_minima(log_N_n: np.ndarray, loss_Kn: np.ndarray, weight_Kn: np.ndarray, method: str, window: float) -> Minima:
    """Interior minima of K copies of one budget.

    Args:
      loss_Kn: nats; weight_Kn: how often copy k holds run n (0: not at all).
      window: decades of N either side of the best run that the parabola sees.
    """
    held_Kn = weight_Kn > 0
    best_K = np.where(held_Kn, loss_Kn, np.inf).argmin(axis=1)
    num = len(log_N_n)
    first_K, last_K = held_Kn.argmax(axis=1), num - 1 - held_Kn[:, ::-1].argmax(axis=1)
    if method == "akima":
        log_N_K, loss_K = _akima(log_N_n, loss_Kn, held_Kn)
        outcome_K = np.select(
            [held_Kn.sum(axis=1) < 3, log_N_K <= log_N_n[first_K], log_N_K >= log_N_n[last_K]],
            [FEW, SMALLEST, LARGEST],
            INSIDE,
        )
    else:
        reach = np.inf if method == "all_points" else window * math.log(10) * (1 + 1e-9)
        seen_Kn = np.where(np.abs(log_N_n - log_N_n[best_K, None]) <= reach, weight_Kn, 0.0)
        log_N_K, loss_K, bend_K = _parabola(log_N_n, loss_Kn, seen_Kn)
        outcome_K = np.select(
            [
                best_K == first_K,
                best_K == last_K,
                (seen_Kn > 0).sum(axis=1) < 3,
                ~((bend_K > 0) & (loss_K > 0)),
                (log_N_K < log_N_n[first_K]) | (log_N_K > log_N_n[last_K]),
            ],
            [SMALLEST, LARGEST, FEW, BENT, OUTSIDE],
            INSIDE,
        )
    inside_K = outcome_K == INSIDE
    return Minima(np.where(inside_K, log_N_K, np.nan), np.where(inside_K, loss_K, np.nan), outcome_K)


def _parabola(log_N_n, loss_Kn, weight_Kn):
    """Vertex, its loss, and curvature [K] of weighted least-squares parabolas of the loss in log N."""
    middle, half = 0.5 * (log_N_n[0] + log_N_n[-1]), 0.5 * np.ptp(log_N_n)
    x_n = (log_N_n - middle) / half
    power_nP = np.stack([np.ones_like(x_n), x_n, x_n**2], axis=1)
    normal_KPP = np.einsum("kn,np,nq->kpq", weight_Kn, power_nP, power_nP)
    # Copies with fewer than three sizes have no parabola; a pseudo-inverse lets the others of the batch through.
    c_KP = np.einsum(
        "kpq,kq->kp", np.linalg.pinv(normal_KPP, rcond=1e-13, hermitian=True), (weight_Kn * loss_Kn) @ power_nP
    )
    with np.errstate(all="ignore"):
        x_K = -c_KP[:, 1] / (2 * c_KP[:, 2])
        return middle + half * x_K, c_KP[:, 0] + 0.5 * c_KP[:, 1] * x_K, c_KP[:, 2]


def _akima(log_N_n, loss_Kn, held_Kn):
    """Minima [K] of Akima splines of log loss in log N, on a grid FINE times finer than the runs."""
    from scipy.interpolate import Akima1DInterpolator

    log_N_K, log_loss_K = np.full(len(loss_Kn), np.nan), np.full(len(loss_Kn), np.nan)
    supports, member_K = np.unique(held_Kn, axis=0, return_inverse=True)
    for s, held_n in enumerate(supports):
        if held_n.sum() < 3:
            continue
        u_n = log_N_n[held_n]
        grid_g = np.linspace(u_n[0], u_n[-1], (len(u_n) - 1) * FINE)
        lanes = np.flatnonzero(member_K.ravel() == s)
        spline_gK = Akima1DInterpolator(u_n, np.log(loss_Kn[np.ix_(lanes, np.flatnonzero(held_n))]).T)(grid_g)
        lowest = spline_gK.argmin(axis=0)
        log_N_K[lanes], log_loss_K[lanes] = grid_g[lowest], spline_gK[lowest, np.arange(len(lanes))]
    return log_N_K, np.exp(log_loss_K)
