"""Scaling laws as objects: a functional form, its parameters, its gradient, starts for a fit, and its source.

A law works in two systems. *Coordinates* theta_KP (K candidate fits of P numbers each) are what the optimiser sees:
logarithms of coefficients, and exponents, on logarithms of the inputs minus their means; in raw coordinates log A and
alpha are .999 correlated and most starts never converge. *Values* are the published parameters (A, alpha, ...).
How to fit is `fit.py`'s business.

Letters: K candidates, n points, P parameters, F inputs.
"""

import dataclasses
import importlib
import itertools
from collections.abc import Callable

import numpy as np

MAX_EXPONENT = 3.0


@dataclasses.dataclass(frozen=True)
class PowerSum:
    """L = E + sum over inputs f of A_f x_f^-alpha_f. Coordinates: log E, log A_1, .., alpha_1, .."""

    name: str
    formula: str
    inputs: tuple[str, ...]
    coefficients: tuple[str, ...]
    exponents: tuple[str, ...]
    source: str

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("E", *self.coefficients, *self.exponents)

    def log_loss(self, theta_KP: np.ndarray, u_Fn: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        """log L [K, n] at centred log inputs u, and its pullback: d/d(log L) [K, n] -> d/d(theta) [K, P].

        Written by hand: automatic differentiation of the same expression costs about eight times as much per point.
        """
        F = len(self.inputs)
        floor_K1 = np.exp(theta_KP[:, :1])
        terms = [np.exp(theta_KP[:, 1 + f, None] - theta_KP[:, 1 + F + f, None] * u_Fn[f]) for f in range(F)]
        loss_Kn = sum(terms, floor_K1)

        def pullback(g_Kn):
            share_Kn = g_Kn / loss_Kn
            grad_KP = np.empty_like(theta_KP)
            grad_KP[:, 0] = floor_K1[:, 0] * share_Kn.sum(axis=1)
            for f, term_Kn in enumerate(terms):
                weighted_Kn = np.multiply(term_Kn, share_Kn, out=term_Kn)
                grad_KP[:, 1 + f] = weighted_Kn.sum(axis=1)
                grad_KP[:, 1 + F + f] = -(weighted_Kn @ u_Fn[f])
            return grad_KP

        return np.log(loss_Kn), pullback

    def values(self, theta_KP: np.ndarray, centre_F: np.ndarray) -> np.ndarray:
        """Published parameters [K, P] of coordinates that were centred on log inputs centre_F."""
        F = len(self.inputs)
        exponents_KF = theta_KP[:, 1 + F :]
        with np.errstate(over="ignore", under="ignore"):  # a refit that ran off has no finite coefficient: inf says so
            coefficients_KF = np.exp(theta_KP[:, 1 : 1 + F] + exponents_KF * centre_F)
        return np.concatenate([np.exp(theta_KP[:, :1]), coefficients_KF, exponents_KF], axis=1)

    def coordinates(self, values_KP: np.ndarray, centre_F: np.ndarray) -> np.ndarray:
        """Inverse of `values`."""
        F = len(self.inputs)
        exponents_KF = values_KP[:, 1 + F :]
        return np.concatenate(
            [np.log(values_KP[:, :1]), np.log(values_KP[:, 1 : 1 + F]) - exponents_KF * centre_F, exponents_KF], axis=1
        )

    def slopes(self, theta_KP: np.ndarray, u_FK: np.ndarray) -> np.ndarray:
        """dL / d(log input) [F, K] of candidate k at its own inputs u[:, k]."""
        F = len(self.inputs)
        return np.stack(
            [-theta_KP[:, 1 + F + f] * np.exp(theta_KP[:, 1 + f] - theta_KP[:, 1 + F + f] * u_FK[f]) for f in range(F)]
        )

    def identified(self, smallest_loss: float) -> dict[str, tuple[float, float, float]]:
        """Per parameter (low, high, span): an interval that reaches low or high is unbounded there, and one whose ends
        differ by more than the factor span says little. A floor below a thousandth of the smallest loss is no floor; an
        exponent above 3 is a term seen at its smallest input only; A and B are read at N = 1 and D = 1, far outside any
        data, so they may be wide."""
        limits = {"E": (1e-3 * smallest_loss, np.inf, 4.0)}
        return (
            limits
            | dict.fromkeys(self.coefficients, (0.0, 1e15, 1e3))
            | dict.fromkeys(self.exponents, (0.0, MAX_EXPONENT, 4.0))
        )

    def box(self, smallest_loss: float) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates [P] low and high outside which a fit is drawn back, so that a term the data do not determine
        comes to rest instead of running off to infinity. A term at the mean input counts from 1e-4 of the loss."""
        F = len(self.inputs)
        low = [np.log(1e-3 * smallest_loss), *[np.log(1e-4 * smallest_loss)] * F, *[0.0] * F]
        return np.array(low), np.array([np.inf] * (1 + F) + [MAX_EXPONENT] * F)

    def starts(
        self, u_Fn: np.ndarray, loss_n: np.ndarray, num_starts: int, exponent_grid: np.ndarray | None = None
    ) -> np.ndarray:
        """Coordinates [S, P], best first, by variable projection: with the exponents fixed the law is linear in E and
        the A_f, so each cell of an exponent grid is solved exactly (relative least squares, coefficients >= 0)."""
        grid = np.geomspace(0.03, 1.5, 14) if exponent_grid is None else exponent_grid
        exponents_GF = np.array(list(itertools.product(grid, repeat=len(self.inputs))))
        features_GnJ = np.stack(
            [np.ones((len(exponents_GF), len(loss_n))), *np.exp(-exponents_GF.T[:, :, None] * u_Fn[:, None, :])],
            axis=-1,
        )
        coefficients_GJ, error_G = nonnegative_least_squares(features_GnJ / loss_n[:, None], np.ones(len(loss_n)))
        best_S = np.argsort(error_G, kind="stable")[:num_starts]
        # A coefficient of exactly zero has no logarithm: begin at a thousandth of the typical loss.
        log_coefficients_SJ = np.log(np.maximum(coefficients_GJ[best_S], 1e-3 * np.median(loss_n)))
        return np.concatenate([log_coefficients_SJ, exponents_GF[best_S]], axis=1)


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


CHINCHILLA = PowerSum(
    name="chinchilla",
    formula="L = E + A/N^alpha + B/D^beta",
    inputs=("N", "D"),
    coefficients=("A", "B"),
    exponents=("alpha", "beta"),
    source="Hoffmann et al. 2022 (arXiv 2203.15556), approach 3; fitted as Besiroglu et al. 2024 (arXiv 2404.10102)",
)

POWER_LAW = PowerSum(
    name="power_law",
    formula="L = E + A/C^alpha",
    inputs=("C",),
    coefficients=("A",),
    exponents=("alpha",),
    source="Henighan et al. 2020 (arXiv 2010.14701), loss against compute with a floor",
)

LAWS = {law.name: law for law in (CHINCHILLA, POWER_LAW)}


def load_law(name: str):
    """A law by its name here, or by the dotted path of a module that defines `law` (how a fork adds one)."""
    if name in LAWS:
        return LAWS[name]
    if "." not in name:
        raise ValueError(
            f"no law {name!r}; there are {', '.join(LAWS)}, or give the dotted path of a module that defines `law`"
        )
    try:
        return importlib.import_module(name).law
    except (ImportError, AttributeError) as error:
        raise ValueError(f"law {name!r}: {error}; the module must be importable and define `law`") from None
