"""Variable projection: with its exponents fixed, a law is linear in its coefficients, so a grid of exponents with an
exact linear solve in every cell finds starts that no grid over all parameters could afford.

Letters: G grid cells, n points, J coefficients.
"""

import itertools
from collections.abc import Sequence

import numpy as np

EXPONENTS = np.geomspace(0.03, 1.5, 14)


def grid(*axes: Sequence[float]) -> np.ndarray:
    """Every combination [G, number of axes]."""
    return np.array(list(itertools.product(*axes)), float)


def best_cells(
    features_GnJ: np.ndarray, loss_n: np.ndarray, num: int, signs: Sequence[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The `num` cells of least relative squared error, best first, and the logs of their coefficients [num, J].

    `signs` of the terms; the coefficients themselves are >= 0. One of exactly zero has no logarithm: it begins at a
    thousandth of the typical loss.
    """
    signed_GnJ = features_GnJ if signs is None else features_GnJ * np.asarray(signs)
    coefficients_GJ, error_G = nonnegative_least_squares(signed_GnJ / loss_n[:, None], np.ones(len(loss_n)))
    best_S = np.argsort(error_G, kind="stable")[:num]
    return best_S, np.log(np.maximum(coefficients_GJ[best_S], 1e-3 * np.median(np.abs(loss_n))))


def nearest(law, theta_SP: np.ndarray, u_Fn: np.ndarray, loss_n: np.ndarray, num: int) -> np.ndarray:
    """The `num` candidates [num, P] whose losses lie nearest in relative square, best first."""
    with np.errstate(all="ignore"):
        error_S = ((law.loss(theta_SP, u_Fn)[0] / loss_n - 1) ** 2).sum(axis=1)
    return theta_SP[np.argsort(np.where(np.isfinite(error_S), error_S, np.inf), kind="stable")[:num]]


def nonnegative_least_squares(x_GnJ: np.ndarray, y_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Argmin over c >= 0 of |x_g c - y|^2 for G small problems, by trying every support of c: c [G, J], error [G]."""
    G, _, J = x_GnJ.shape
    best_GJ, best_G = np.zeros((G, J)), np.full(G, float(y_n @ y_n))
    for size in range(1, J + 1):
        for support in itertools.combinations(range(J), size):
            x_Gns = x_GnJ[:, :, support]
            # Pseudo-inverse: two exponents of a grid can make two columns of a short design nearly equal.
            c_Gs = np.einsum("Gsn,n->Gs", np.linalg.pinv(x_Gns, rcond=1e-12), y_n)
            error_G = ((np.einsum("Gns,Gs->Gn", x_Gns, c_Gs) - y_n) ** 2).sum(axis=1)
            better_G = (c_Gs >= 0).all(axis=1) & (error_G < best_G)
            best_G[better_G] = error_G[better_G]
            best_GJ[better_G] = 0.0
            best_GJ[np.ix_(better_G, support)] = c_Gs[better_G]
    return best_GJ, best_G
