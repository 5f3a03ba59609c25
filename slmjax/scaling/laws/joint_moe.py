"""Mixture-of-experts models by active size, tokens and the number of experts at once."""

import dataclasses

import numpy as np

from slmjax.scaling.laws import _projection
from slmjax.scaling.laws._experts import E_MAX, E_START, effective
from slmjax.scaling.laws._terms import COEFFICIENT, FLOOR, SIGNED, Term, TermLaw, floor

SIDES = (("N", "a", "delta", "alpha", "gamma"), ("D", "b", "omega", "beta", "zeta"))


@dataclasses.dataclass(frozen=True)
class JointMoe(TermLaw):
    def centre(self, log_x_Fn):
        """E itself counts: Ê saturates at E_start and at E_max experts."""
        return np.array([*log_x_Fn[:2].mean(axis=1), 0.0])

    def terms(self, theta, u):
        experts, by_E, by_start, by_max = effective(u["E"], theta["E_start"], theta["E_max"])
        found = [floor(theta["c"], "c")]
        for x, coefficient, per_expert, exponent, bend in SIDES:
            power = theta[exponent] + theta[bend] * experts
            by_experts = theta[per_expert] + theta[bend] * u[x]
            found.append(
                Term(
                    theta[coefficient] + theta[per_expert] * experts + power * u[x],
                    {
                        coefficient: 1.0,
                        per_expert: experts,
                        exponent: u[x],
                        bend: experts * u[x],
                        "E_start": by_experts * by_start,
                        "E_max": by_experts * by_max,
                    },
                    {x: power, "E": by_experts * by_E},
                )
            )
        return found

    def shift(self, theta, by):
        moved = {}
        for x, coefficient, per_expert, exponent, bend in SIDES:
            moved[coefficient] = theta[coefficient] + theta[exponent] * by[x]
            moved[per_expert] = theta[per_expert] + theta[bend] * by[x]
        return dict(theta) | moved

    def starts(self, u_Fn, loss_n, num_starts):
        """Plain powers of N, D and Ê; the exponents bend with Ê only once the fit runs."""
        exponents = -np.geomspace(0.05, 0.6, 7)
        cells_G4 = _projection.grid(exponents, exponents, (-0.4, -0.2, 0.0), (-0.2, 0.0, 0.3))
        alpha_G1, beta_G1, delta_G1, omega_G1 = cells_G4.T[:, :, None]
        log_start, log_max = np.log(2.0), np.log(300.0)
        experts_n = effective(u_Fn[2], log_start, log_max)[0]
        of_N = np.exp(alpha_G1 * u_Fn[0] + delta_G1 * experts_n)
        of_D = np.exp(beta_G1 * u_Fn[1] + omega_G1 * experts_n)
        best_S, logs_SJ = _projection.best_cells(
            np.stack([np.ones_like(of_N), of_N, of_D], axis=-1), loss_n, num_starts
        )
        alpha, beta, delta, omega = cells_G4[best_S].T
        given = dict(zip(("c", "a", "b"), logs_SJ.T, strict=True))
        given |= {"alpha": alpha, "beta": beta, "delta": delta, "omega": omega}
        level = np.ones(len(best_S))
        given |= {"gamma": 0 * level, "zeta": 0 * level, "E_start": log_start * level, "E_max": log_max * level}
        return np.stack([given[p] for p in self.parameters], axis=1)


law = JointMoe(
    name="joint_moe",
    formula="L = a Ê^delta N^(alpha + gamma ln Ê) + b Ê^omega D^(beta + zeta ln Ê) + c, "
    "1/Ê = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max",
    source="Ludziejewski et al. 2025 (arXiv 2502.05172), equation 6; N active parameters, E experts",
    inputs=("N", "D", "E"),
    kinds={
        "c": FLOOR,
        "a": COEFFICIENT,
        "b": COEFFICIENT,
        "alpha": SIGNED,
        "beta": SIGNED,
        "delta": SIGNED,
        "omega": SIGNED,
        "gamma": SIGNED,
        "zeta": SIGNED,
        "E_start": E_START,
        "E_max": E_MAX,
    },
    levels={"N": 3, "D": 3, "E": 4},
    published={
        "ludziejewski2025": {
            "c": 1.3637,
            "a": 35.91,
            "b": 35.98,
            "alpha": -0.1889,
            "beta": -0.1775,
            "delta": -0.2285,
            "omega": 0.5529,
            "gamma": 0.0098,
            "zeta": -0.0259,
            "E_start": 2.0732,
            "E_max": 290.4521,
        }
    },
)
