"""Vocabulary size as a third thing to scale: approach 3 of Tao et al., a surface over non-vocabulary parameters, the
embedding and characters of text. The loss is unigram-normalised (negative is better), so residuals are raw."""

import dataclasses

import numpy as np

from slmjax.scaling.laws import _projection
from slmjax.scaling.laws._terms import COEFFICIENT, EXPONENT, Term, TermLaw, positive

V_CENTRE = np.log(2e4)  # near the vocabularies in use; tokens per character need V itself, not its ratio to a mean
TOKENS_PER_CHARACTER = (0.00639222, -0.15811069, 1.20470122)  # of log^2 V, log V and 1: the authors' code


@dataclasses.dataclass(frozen=True)
class Vocabulary(TermLaw):
    """`V_unit`: what the logarithm of V counts in; published numbers need 1e3 (see `vocabulary_parity.py`)."""

    V_unit: float = 1.0

    def centre(self, log_x_Fn):
        centre_N, _, centre_d, centre_H = log_x_Fn.mean(axis=1)
        return np.array([centre_N, V_CENTRE, centre_d, centre_H])

    def tokens_per_character(self, u_V):
        """log of the tokens that one character becomes, and its derivative by log V."""
        square, slope, constant = TOKENS_PER_CHARACTER
        log_V = u_V + V_CENTRE - np.log(self.V_unit)
        ratio = (square * log_V + slope) * log_V + constant
        return np.log(ratio), (2 * square * log_V + slope) / ratio

    def terms(self, theta, u):
        beta, alpha2 = theta["beta"], theta["alpha2"]
        ratio, ratio_by_V = self.tokens_per_character(u["V"])
        tokens, embedding = u["H"] + ratio, u["V"] + u["d"]
        return [
            Term(theta["E"], {"E": 1.0}, sign=-1.0),
            Term(theta["A1"] - beta * u["N"], {"A1": 1.0, "beta": -u["N"]}, {"N": -beta}),
            Term(theta["A2"] - alpha2 * embedding, {"A2": 1.0, "alpha2": -embedding}, {"V": -alpha2, "d": -alpha2}),
            Term(theta["B"] - beta * tokens, {"B": 1.0, "beta": -tokens}, {"H": -beta, "V": -beta * ratio_by_V}),
        ]

    def shift(self, theta, by):
        moved = {
            "A1": theta["A1"] - theta["beta"] * by["N"],
            "A2": theta["A2"] - theta["alpha2"] * (by["V"] + by["d"]),
            "B": theta["B"] - theta["beta"] * by["H"],
        }
        return dict(theta) | moved

    def starts(self, u_Fn, loss_n, num_starts):
        cells_G2 = _projection.grid(_projection.EXPONENTS, _projection.EXPONENTS)
        beta_G1, alpha2_G1 = cells_G2.T[:, :, None]
        tokens = u_Fn[3] + self.tokens_per_character(u_Fn[1])[0]
        powers = [np.exp(-beta_G1 * u_Fn[0]), np.exp(-alpha2_G1 * (u_Fn[1] + u_Fn[2])), np.exp(-beta_G1 * tokens)]
        best_S, logs_SJ = _projection.best_cells(
            np.stack([np.ones_like(powers[0]), *powers], axis=-1), loss_n, num_starts, signs=(-1, 1, 1, 1)
        )
        return np.concatenate([logs_SJ, cells_G2[best_S, ::-1]], axis=1)


law = Vocabulary(
    name="vocabulary",
    formula="L = -E + A1/N^beta + A2/(V d)^alpha2 + B/D^beta, D = H (.0064 ln^2 V - .1581 ln V + 1.2047) "
    "(N in 1e6, V, d in 1e3, H in 1e9)",
    source="Tao et al. 2024 (arXiv 2407.13623), approach 3; N without embeddings, V words, d width, H characters",
    inputs=("N", "V", "d", "H"),
    kinds={
        "E": positive(1e-2, 1e2),
        "A1": COEFFICIENT,
        "A2": COEFFICIENT,
        "B": COEFFICIENT,
        "alpha2": EXPONENT,
        "beta": EXPONENT,
    },
    levels={"N": 3, "V": 3, "H": 3},
    units={"N": 1e6, "V": 1e3, "d": 1e3, "H": 1e9},
    residual="raw",
)
