"""The Multi-Power Law: the loss along a whole run under any learning-rate schedule, with its exact derivatives.

    L(t) = L0 + A S_t^-alpha + B sum_{k <= t} (eta_k - eta_{k-1}) [1 - (1 + C eta_k^-gamma (S_t - S_{k-1}))^-beta]

(Luo et al. 2025, arXiv 2503.12811), S the cumulative learning rate, warm-up included: every change of the rate moves
the loss, and its effect sets in as learning rate is spent after it. `schedule_curves` fits it.

Letters: T steps of a run, n logged steps, G groups of rate changes, P parameters.
"""

from typing import NamedTuple

import numpy as np

PARAMETERS = ("L0", "A", "alpha", "B", "C", "beta", "gamma")
FORMULA = "L(t) = L0 + A S_t^-alpha + B sum_k (lr_k - lr_{k-1}) (1 - (1 + C lr_k^-gamma (S_t - S_{k-1}))^-beta)"
SOURCE = "Luo et al. 2025 (arXiv 2503.12811), Multi-Power Law"
# Its table of fitted parameters: peak rate 3e-4, warm-up from 0 over 2,160 steps.
PUBLISHED = {
    "25M": (3.04045406, 0.52468604, 0.50786857, 363.78751622, 2.06560812, 0.58279013, 0.64142257),
    "100M": (2.6514477, 0.60115152, 0.45295811, 437.9464276, 2.13245612, 0.59785199, 0.65523644),
    "400M": (2.37474466, 0.65421216, 0.42878731, 523.42464371, 2.02462735, 0.59350493, 0.63472457),
}
# A rate of exactly zero has no power -gamma; below this share of the peak the law has nothing left to say.
LEAST_SHARE_OF_PEAK = 1e-4
ROWS = 16  # logged steps evaluated together: their arrays stay in the level-2 cache


class Knots(NamedTuple):
    """A schedule as the law sees it from its logged steps: rates in units of `rate`, their sums in units of `total`.

    spent_n: S at the logged steps. change_G, log_rate_G, before_G: of every group of adjacent steps that change the
    rate, the change, the logarithm of the rate after it and S before it.
    """

    spent_n: np.ndarray
    change_G: np.ndarray
    log_rate_G: np.ndarray
    before_G: np.ndarray


def knots(lr_T: np.ndarray, steps_n: np.ndarray, width: int = 1, rate: float = 1.0, total: float = 1.0) -> Knots:
    """Changes of the rate, up to `width` adjacent and alike ones in a group; width 1 is the law to the letter.

    A group ends at every logged step, so that it lies wholly before or after it, where two steps do not follow each
    other, and where the change turns or more than doubles: a group across a gap or a jump puts the change at a place
    and a rate where the schedule never was. In the public curves groups of 16 move the loss by less than 5e-5.
    """
    lr_T = np.asarray(lr_T, float) / rate
    S_T = np.cumsum(lr_T)
    change_T = np.diff(lr_T, prepend=lr_T[0])
    k_G = np.flatnonzero(change_T)
    change_G = change_T[k_G]
    log_rate_G = np.log(np.maximum(lr_T[k_G], LEAST_SHARE_OF_PEAK * lr_T.max()))
    before_G = (S_T[k_G] - lr_T[k_G]) * rate / total
    if width > 1 and len(k_G):
        ratio = change_G[1:] / change_G[:-1]
        opens_G = np.concatenate([[True], (np.diff(k_G) > 1) | (ratio < 0.5) | (ratio > 2.0)])
        opens_G |= np.isin(k_G - 1, steps_n)
        since_G = np.arange(len(k_G)) - np.maximum.accumulate(np.where(opens_G, np.arange(len(k_G)), 0))
        first = np.flatnonzero(opens_G | (since_G % width == 0))
        whole_G = np.add.reduceat(change_G, first)
        log_rate_G = np.add.reduceat(change_G * log_rate_G, first) / whole_G
        before_G = np.add.reduceat(change_G * before_G, first) / whole_G
        change_G = whole_G
    return Knots(S_T[steps_n] * rate / total, change_G, log_rate_G, before_G)


def loss(values_P: np.ndarray, curve: Knots) -> np.ndarray:
    """Loss [n] at the logged steps; infinite where no learning rate has been spent yet."""
    L0, A, alpha, B, C, beta, gamma = values_P
    reach_G = C * np.exp(-gamma * curve.log_rate_G)
    response_n = np.empty(len(curve.spent_n))
    for rows, G in _blocks(curve):
        gone_nG = np.maximum(curve.spent_n[rows, None] - curve.before_G[:G], 0.0)
        left_nG = np.exp(-beta * np.log1p(gone_nG * reach_G[:G]))
        response_n[rows] = (1 - left_nG) @ curve.change_G[:G]
    with np.errstate(divide="ignore"):
        return L0 + A * curve.spent_n**-alpha + B * response_n


def loss_and_jacobian(values_P: np.ndarray, curve: Knots) -> tuple[np.ndarray, np.ndarray]:
    """Loss [n] and its derivatives [n, P] by log L0, log A, alpha, log B, log C, log beta, gamma."""
    L0, A, alpha, B, C, beta, gamma = values_P
    reach_G = C * np.exp(-gamma * curve.log_rate_G)
    change_G2 = np.stack([curve.change_G, curve.change_G * curve.log_rate_G], axis=1)
    jacobian_nP = np.empty((len(curve.spent_n), 7))
    for rows, G in _blocks(curve):
        z_nG = np.maximum(curve.spent_n[rows, None] - curve.before_G[:G], 0.0)
        z_nG *= reach_G[:G]
        log_nG = np.log1p(z_nG)
        left_nG = np.exp(-beta * log_nG)
        d_G = curve.change_G[:G]
        jacobian_nP[rows, 3] = B * (d_G.sum() - left_nG @ d_G)
        log_nG *= left_nG
        jacobian_nP[rows, 5] = B * beta * (log_nG @ d_G)
        z_nG /= 1 + z_nG
        z_nG *= left_nG
        by_C_n, by_gamma_n = (z_nG @ change_G2[:G]).T
        jacobian_nP[rows, 4] = B * beta * by_C_n
        jacobian_nP[rows, 6] = -B * beta * by_gamma_n
    power_n = A * curve.spent_n**-alpha
    jacobian_nP[:, 0] = L0
    jacobian_nP[:, 1] = power_n
    jacobian_nP[:, 2] = -power_n * np.log(curve.spent_n)
    return L0 + power_n + jacobian_nP[:, 3], jacobian_nP


def response(beta: float, C: float, gamma: float, curve: Knots) -> np.ndarray:
    """The sum over changes [n] alone, which the law multiplies by B."""
    return loss(np.array([0.0, 0.0, 0.0, 1.0, C, beta, gamma]), curve)


def _blocks(curve):
    """Rows evaluated together, and how many groups the last of them has seen: the others contribute nothing."""
    n = len(curve.spent_n)
    for start in range(0, n, ROWS):
        rows = slice(start, min(start + ROWS, n))
        yield rows, int(np.searchsorted(curve.before_G, curve.spent_n[rows].max()))


def natural(values_P: np.ndarray, rate: float, total: float) -> np.ndarray:
    """Values for rates in units of 1 from those for rates in units of `rate` and sums in units of `total`."""
    L0, A, alpha, B, C, beta, gamma = values_P
    return np.array([L0, A * total**alpha, alpha, B / rate, C * rate**gamma / total, beta, gamma])
