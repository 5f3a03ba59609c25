"""Kaplan's surface, in which the smaller of model and data decides; with a floor in `kaplan_floor.py`."""

import dataclasses

import numpy as np

from slmjax.scaling.laws import _projection
from slmjax.scaling.laws._terms import COEFFICIENT, EXPONENT, FLOOR, Term, TermLaw, floor


@dataclasses.dataclass(frozen=True)
class Kaplan(TermLaw):
    """Coordinates of N_c and D_c are the logs of the losses alpha_N log(N_c/N) and alpha_D log(D_c/D) at the centre:
    those are what the data fix."""

    def terms(self, theta, u):
        a, x, y = theta["N_c"], theta["alpha_N"], theta["alpha_D"]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            of_N, of_D = (a - x * u["N"]) / y, (theta["D_c"] - y * u["D"]) / y
            both = np.logaddexp(of_N, of_D)
            share_N, share_D = np.exp(of_N - both), np.exp(of_D - both)
        surface = Term(
            y * both,
            {
                "N_c": share_N,
                "D_c": share_D,
                "alpha_N": -share_N * u["N"],
                "alpha_D": both - share_N * of_N - share_D * (of_D + u["D"]),
            },
            {"N": -x * share_N, "D": -y * share_D},
        )
        return [surface, *([floor(theta["E"])] if "E" in self.kinds else [])]

    def shift(self, theta, by):
        moved_N = theta["N_c"] - theta["alpha_N"] * by["N"]
        moved_D = theta["D_c"] - theta["alpha_D"] * by["D"]
        return dict(theta) | {"N_c": moved_N, "D_c": moved_D}

    def values(self, theta_KP, centre_F):
        return self._amounts(super().values(theta_KP, centre_F), lambda log, exponent: log / exponent)

    def coordinates(self, values_KP, centre_F):
        return super().coordinates(self._amounts(values_KP, lambda log, exponent: log * exponent), centre_F)

    def identified(self, smallest_loss):
        """N_c and D_c lie far outside any data, so they may be wide."""
        return super().identified(smallest_loss) | dict.fromkeys(("N_c", "D_c"), (1e3, 1e30, 1e3))

    def _amounts(self, values_KP, change):
        """N_c, where N alone would give a loss of one, from the loss at N = 1, or back; D_c likewise."""
        out_KP, column = np.array(values_KP, float), self.parameters.index
        with np.errstate(over="ignore", divide="ignore"):
            for name, exponent in (("N_c", "alpha_N"), ("D_c", "alpha_D")):
                log_K = np.log(out_KP[:, column(name)])
                out_KP[:, column(name)] = np.exp(change(log_K, out_KP[:, column(exponent)]))
        return out_KP

    def starts(self, u_Fn, loss_n, num_starts):
        """L^(1/alpha_D) is linear in two coefficients once the exponents and the floor are given."""
        floors = np.array([0.0, 0.3, 0.6, 0.85]) * loss_n.min() if "E" in self.kinds else [0.0]
        exponents = np.geomspace(0.03, 1.0, 10)
        found = []
        for E in floors:
            cells_G2 = _projection.grid(exponents, exponents)
            above_n = np.log(loss_n - E)
            for y in exponents:
                x_g = cells_G2[cells_G2[:, 1] == y, 0]
                powers_gn2 = np.exp(np.stack([-x_g[:, None] / y * u_Fn[0], np.tile(-u_Fn[1], (len(x_g), 1))], -1))
                scale = np.exp(above_n / y)
                coefficients_g2, _ = _projection.nonnegative_least_squares(
                    powers_gn2 / scale[:, None], np.ones(len(scale))
                )
                logs_g2 = y * np.log(np.maximum(coefficients_g2, 1e-3 ** (1 / y)))
                given = {"N_c": logs_g2[:, 0], "D_c": logs_g2[:, 1], "alpha_N": x_g, "alpha_D": np.full(len(x_g), y)}
                given["E"] = np.full(len(x_g), np.log(max(E, 1e-2 * loss_n.min())))
                found.append(np.stack([given[p] for p in self.parameters], axis=1))
        return _projection.nearest(self, np.concatenate(found), u_Fn, loss_n, num_starts)


law = Kaplan(
    name="kaplan",
    formula="L = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D",
    source="Kaplan et al. 2020 (arXiv 2001.08361), equation 1.5; values of its table 2, fits to L(N, D)",
    inputs=("N", "D"),
    kinds={"N_c": COEFFICIENT, "D_c": COEFFICIENT, "alpha_N": EXPONENT, "alpha_D": EXPONENT},
    levels={"N": 2, "D": 2},
    published={"kaplan2020": {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103}},
)

with_floor = dataclasses.replace(
    law,
    name="kaplan_floor",
    formula="L = E + [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D",
    source="the form of Kaplan et al. 2020 (arXiv 2001.08361) above a floor",
    kinds={"E": FLOOR, **law.kinds},
    levels={"N": 3, "D": 3},
    published={},
)
