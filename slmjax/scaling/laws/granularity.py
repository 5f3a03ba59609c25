"""Fine-grained experts: loss against size, tokens and granularity G, the dense MLP's width over that of an expert."""

import dataclasses

import numpy as np

from slmjax.scaling.laws import _projection
from slmjax.scaling.laws._terms import COEFFICIENT, EXPONENT, FLOOR, Term, TermLaw, floor


@dataclasses.dataclass(frozen=True)
class Granularity(TermLaw):
    def terms(self, theta, u):
        gamma, alpha, beta = theta["gamma"], theta["alpha"], theta["beta"]
        grains = theta["g"] - gamma * u["G"] - alpha * u["N"]
        return [
            floor(theta["c"], "c"),
            Term(grains, {"g": 1.0, "gamma": -u["G"], "alpha": -u["N"]}, {"G": -gamma, "N": -alpha}),
            Term(theta["a"] - alpha * u["N"], {"a": 1.0, "alpha": -u["N"]}, {"N": -alpha}),
            Term(theta["b"] - beta * u["D"], {"b": 1.0, "beta": -u["D"]}, {"D": -beta}),
        ]

    def shift(self, theta, by):
        moved = {
            "g": theta["g"] - theta["gamma"] * by["G"] - theta["alpha"] * by["N"],
            "a": theta["a"] - theta["alpha"] * by["N"],
            "b": theta["b"] - theta["beta"] * by["D"],
        }
        return dict(theta) | moved

    def starts(self, u_Fn, loss_n, num_starts):
        exponents = np.geomspace(0.05, 0.6, 7)
        cells_G3 = _projection.grid((0.3, 0.6, 1.0), exponents, exponents)
        gamma_G1, alpha_G1, beta_G1 = cells_G3.T[:, :, None]
        of_N = np.exp(-alpha_G1 * u_Fn[0])
        powers = [of_N * np.exp(-gamma_G1 * u_Fn[2]), of_N, np.exp(-beta_G1 * u_Fn[1])]
        best_S, logs_SJ = _projection.best_cells(np.stack([np.ones_like(of_N), *powers], axis=-1), loss_n, num_starts)
        return np.concatenate([logs_SJ, cells_G3[best_S]], axis=1)


PARAMETERS = ("c", "g", "a", "b", "gamma", "alpha", "beta")


def _fit(*values):
    return dict(zip(PARAMETERS, values, strict=True))


law = Granularity(
    name="granularity",
    formula="L = c + (g/G^gamma + a)/N^alpha + b/D^beta",
    source="Krajewski et al. 2024 (arXiv 2402.07871), equation 9; N all parameters without embeddings, E experts fixed",
    inputs=("N", "D", "G"),
    kinds=dict(zip(PARAMETERS, (FLOOR, *[COEFFICIENT] * 3, *[EXPONENT] * 3), strict=True)),
    levels={"N": 3, "D": 3, "G": 3},
    published={
        "experts_64": _fit(0.47, 2.1, 18.1, 30.8, 0.58, 0.115, 0.147),
        "experts_16": _fit(0.472, 1.18, 19.64, 57.07, 0.986, 0.124, 0.169),
    },
)
