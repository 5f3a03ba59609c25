"""A surface whose data term depends on model size: what Farseer adds to Chinchilla, with power laws for U, B and A.

Its authors' own form has exponentials of powers and nine parameters; with power laws it has seven. On the Chinchilla
runs it extrapolates best of the forms here: mean error .0041 in log loss beyond 1e21 FLOPs, Chinchilla's .0105.
"""

import dataclasses

import numpy as np

from slmjax.scaling.laws import _projection
from slmjax.scaling.laws._terms import COEFFICIENT, EXPONENT, FLOOR, SIGNED, Term, TermLaw, floor, positive


@dataclasses.dataclass(frozen=True)
class Farseer(TermLaw):
    """The unit of D is part of the form: B(N) is a power of N at one D only, here amid the token counts of studies.
    (At 1e9, as for N, the same errors are .0053 and with D in ones .0084.)"""

    def centre(self, log_x_Fn):
        return np.array([log_x_Fn[0].mean(), np.log(self.units["D"])])

    def terms(self, theta, u):
        steepness = np.exp(theta["A"] - theta["q"] * u["N"])
        of_size = Term(theta["U"] - theta["a"] * u["N"], {"U": 1.0, "a": -u["N"]}, {"N": -theta["a"]})
        fall = steepness * u["D"]
        of_data = Term(
            theta["B"] - theta["b"] * u["N"] - fall,
            {"B": 1.0, "b": -u["N"], "A": -fall, "q": fall * u["N"]},
            {"N": -theta["b"] + theta["q"] * fall, "D": -steepness},
        )
        return [floor(theta["E"]), of_size, of_data]

    def shift(self, theta, by):
        moved = {c: theta[c] - theta[x] * by["N"] for c, x in (("U", "a"), ("B", "b"), ("A", "q"))}
        return dict(theta) | moved

    def starts(self, u_Fn, loss_n, num_starts):
        exponents = np.geomspace(0.05, 1.2, 8)
        cells_G4 = _projection.grid(exponents, (-0.2, 0.0, 0.2), exponents, (-0.1, 0.0, 0.1))
        a_G1, b_G1, A_G1, q_G1 = cells_G4.T[:, :, None]
        with np.errstate(over="ignore"):
            of_data = np.exp(-b_G1 * u_Fn[0] - A_G1 * np.exp(-q_G1 * u_Fn[0]) * u_Fn[1])
        features_GnJ = np.stack([np.ones_like(of_data), np.exp(-a_G1 * u_Fn[0]), of_data], axis=-1)
        best_S, logs_SJ = _projection.best_cells(features_GnJ, loss_n, num_starts)
        a, b, A, q = cells_G4[best_S].T
        return np.stack([logs_SJ[:, 0], logs_SJ[:, 1], a, logs_SJ[:, 2], b, np.log(A), q], axis=1)


law = Farseer(
    name="farseer",
    formula="L = E + U N^-a + B N^-b D^-(A N^-q) (N in 1e9, D in 1e9)",
    source="after Farseer (arXiv 2506.10972): L = E + U(N) + B(N) D^-A(N), here with power laws for U, B and A",
    inputs=("N", "D"),
    kinds={
        "E": FLOOR,
        "U": COEFFICIENT,
        "a": EXPONENT,
        "B": COEFFICIENT,
        "b": SIGNED,
        "A": positive(1e-3, 3.0),
        "q": SIGNED,
    },
    levels={"N": 3, "D": 3},
    units={"N": 1e9, "D": 1e9},
)
