"""Repeated data and excess parameters: each further epoch, and each parameter beyond what the unique tokens support,
is worth less."""

import dataclasses

import numpy as np

from slmjax.scaling.laws import _projection
from slmjax.scaling.laws._terms import COEFFICIENT, EXPONENT, FLOOR, Term, TermLaw, floor, positive

DECAY = positive(1e-2, 1e3)  # of R_D and R_N: beyond a thousand repetitions no run could show the decay


def worth(log_ratio, log_constant):
    """log(1 + r (1 - exp(-R/r))) of R = exp(log_ratio) - 1 repetitions, 0 without any; and its derivatives by log_ratio
    and by log_constant."""
    r = np.exp(log_constant)
    num_times = np.exp(np.clip(log_ratio, 0.0, 50.0))
    faded = np.exp(-(num_times - 1) / r)
    worth_ = 1 + r * (1 - faded)
    by_constant = r * (1 - faded - (num_times - 1) / r * faded) / worth_
    return np.log(worth_), np.where(log_ratio > 0, num_times * faded / worth_, 0.0), by_constant


@dataclasses.dataclass(frozen=True)
class DataConstrained(TermLaw):
    """L = E + A/N'^alpha + B/D'^alpha with D' = U + U R_D (1 - exp(-(D/U - 1)/R_D)), N' likewise around U_N, the size
    for which U tokens are compute-optimal: alpha A U_N^-alpha = alpha B U^-alpha. Runs with D <= U repeat nothing."""

    def centre(self, log_x_Fn):
        """D and U keep their ratio: they share a centre."""
        centre_N, centre_D, _ = log_x_Fn.mean(axis=1)
        return np.array([centre_N, centre_D, centre_D])

    def terms(self, theta, u):
        a, b, alpha = theta["A"], theta["B"], theta["alpha"]
        unique = np.minimum(u["U"], u["D"])
        fresh = np.where(u["U"] < u["D"], 1.0, 0.0)  # U counts where it binds, else D does
        supported = unique + (a - b) / alpha
        excess = np.maximum(u["N"] - supported, 0.0)
        size, size_by_excess, size_by_R = worth(excess, theta["R_N"])
        data, data_by_times, data_by_R = worth(u["D"] - unique, theta["R_D"])
        binds = u["N"] > supported
        log_size = np.where(binds, supported + size, u["N"])
        by_supported = np.where(binds, 1 - size_by_excess, 0.0)
        by_N = np.where(binds, size_by_excess, 1.0)
        log_data = unique + data
        by_unique_D = 1 - data_by_times
        return [
            floor(theta["E"]),
            Term(
                a - alpha * log_size,
                {
                    "A": 1 - by_supported,
                    "B": by_supported,
                    "alpha": -log_size + by_supported * (a - b) / alpha,
                    "R_N": -alpha * size_by_R * binds,
                },
                {
                    "N": -alpha * by_N,
                    "U": -alpha * by_supported * fresh,
                    "D": -alpha * by_supported * (1 - fresh),
                },
            ),
            Term(
                b - alpha * log_data,
                {"B": 1.0, "alpha": -log_data, "R_D": -alpha * data_by_R},
                {
                    "U": -alpha * by_unique_D * fresh,
                    "D": -alpha * np.where(fresh > 0, data_by_times, 1.0),
                },
            ),
        ]

    def shift(self, theta, by):
        moved = {c: theta[c] - theta["alpha"] * by[x] for c, x in (("A", "N"), ("B", "D"))}
        return dict(theta) | moved

    def starts(self, u_Fn, loss_n, num_starts):
        """Exponents and constants on a grid; U_N depends on A and B, so it begins where the two terms are alike."""
        cells_G3 = _projection.grid(np.geomspace(0.1, 0.8, 8), *[(0.5, 2.0, 8.0, 32.0, 128.0)] * 2)
        alpha_G1, r_D, r_N = cells_G3.T[:, :, None]
        unique = np.minimum(u_Fn[2], u_Fn[1])
        size = np.where(u_Fn[0] > unique, unique + worth(np.maximum(u_Fn[0] - unique, 0.0), np.log(r_N))[0], u_Fn[0])
        data = unique + worth(u_Fn[1] - unique, np.log(r_D))[0]
        powers = [np.exp(-alpha_G1 * size), np.exp(-alpha_G1 * data)]
        best_S, logs_SJ = _projection.best_cells(
            np.stack([np.ones_like(powers[0]), *powers], axis=-1), loss_n, num_starts
        )
        alpha, r_D, r_N = cells_G3[best_S].T
        return np.concatenate([logs_SJ, np.stack([alpha, np.log(r_D), np.log(r_N)], axis=1)], axis=1)


law = DataConstrained(
    name="data_constrained",
    formula="L = E + A/N'^alpha + B/D'^alpha, D' = U + U R_D (1 - exp(-(D/U - 1)/R_D)), N' so from U_N with R_N",
    source="Muennighoff et al. 2023 (arXiv 2305.16264), equations 5 and 6; U unique tokens",
    inputs=("N", "D", "U"),
    kinds={"E": FLOOR, "A": COEFFICIENT, "B": COEFFICIENT, "alpha": EXPONENT, "R_D": DECAY, "R_N": DECAY},
    levels={"N": 3, "D": 3, "U": 2},
    published={
        # E, A, B and alpha held at the C4 law; R_D* and R_N* fitted to 182 runs.
        "muennighoff2023": {
            "E": 1.8691437,
            "A": 520.82495,
            "B": 1487.7161,
            "alpha": 0.3526596,
            "R_D": 15.387756,
            "R_N": 5.309743,
        }
    },
    remarks={
        "muennighoff2023": "their optimiser stopped on a flat valley in single precision: the objective has a slightly "
        "lower minimum elsewhere, and the 182 runs hardly determine R_D and R_N"
    },
)
