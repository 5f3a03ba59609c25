"""Routed models: loss against the size of the dense base and the number of experts, bilinear in their logs."""

import dataclasses

import numpy as np

from slmjax.scaling.laws import _projection
from slmjax.scaling.laws._experts import E_MAX, E_START, effective
from slmjax.scaling.laws._terms import SIGNED, Kind, Term, TermLaw

LN10 = np.log(10)


@dataclasses.dataclass(frozen=True)
class Routing(TermLaw):
    def centre(self, log_x_Fn):
        """E itself counts: Ê saturates at E_start and at E_max experts."""
        return np.array([log_x_Fn[0].mean(), 0.0])

    def terms(self, theta, u):
        a, b, c = theta["a"], theta["b"], theta["c"]
        experts, by_E, by_start, by_max = effective(u["E"], theta["E_start"], theta["E_max"])
        per_expert = b + c * u["N"] / LN10
        return [
            Term(
                a * u["N"] + per_expert * experts + theta["d"] * LN10,
                {
                    "a": u["N"],
                    "b": experts,
                    "c": u["N"] * experts / LN10,
                    "d": LN10,
                    "E_start": per_expert * by_start,
                    "E_max": per_expert * by_max,
                },
                {"N": a + c * experts / LN10, "E": per_expert * by_E},
            )
        ]

    def shift(self, theta, by):
        moved = {
            "b": theta["b"] + theta["c"] * by["N"] / LN10,
            "d": theta["d"] + theta["a"] * by["N"] / LN10,
        }
        return dict(theta) | moved

    def starts(self, u_Fn, loss_n, num_starts):
        """With E_start and E_max given, log L is linear in the rest."""
        found = []
        for start, most in _projection.grid((1.2, 2.0, 4.0), (100.0, 300.0, 1000.0)):
            experts_n = effective(u_Fn[1], np.log(start), np.log(most))[0]
            x_nJ = np.stack([u_Fn[0], experts_n, u_Fn[0] * experts_n / LN10, np.full(len(loss_n), LN10)], axis=1)
            linear_J = np.linalg.lstsq(x_nJ, np.log(loss_n), rcond=None)[0]
            found.append([*linear_J, np.log(start), np.log(most)])
        return _projection.nearest(self, np.array(found), u_Fn, loss_n, num_starts)


def _fit(*values):
    return dict(zip(("a", "b", "c", "d", "E_start", "E_max"), values, strict=True))


law = Routing(
    name="clark_routing",
    formula="log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d, "
    "1/Ê = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max",
    source="Clark et al. 2022 (arXiv 2202.01169), equations 4 and 5; N of the dense base, E experts",
    inputs=("N", "E"),
    kinds={
        "a": SIGNED,
        "b": SIGNED,
        "c": SIGNED,
        "d": Kind("linear", (-10.0, 10.0), (-10.0, 10.0, 4.0)),
        "E_start": E_START,
        "E_max": E_MAX,
    },
    levels={"N": 2, "E": 4},
    published={
        "s_base": _fit(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
        "rl_r": _fit(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
        "hash": _fit(-0.087, -0.136, 0.012, 1.157, 4.175, 477.7),
    },
)
