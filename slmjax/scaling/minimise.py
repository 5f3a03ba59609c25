"""Batched BFGS: many small smooth problems at once, one value-and-gradient of all of them per step.

A bootstrap is thousands of five-parameter fits that share their data. A line search per problem would make every
problem wait for the slowest, so each step costs exactly one evaluation: a step that does not descend is taken back and
tried shorter at the next one. Problems that have converged leave the batch. NumPy only.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# value_K, gradient_KP = objective(theta_KP, lanes_K): lanes says which problem each row is
Objective = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Minimum(NamedTuple):
    """Per problem: the point, its value, the length of its gradient, whether it converged, and the steps it took."""

    theta_KP: np.ndarray
    value_K: np.ndarray
    gradient_norm_K: np.ndarray
    converged_K: np.ndarray
    num_steps_K: np.ndarray


def minimise(
    objective: Objective,
    start_KP: np.ndarray,
    inverse_hessian_PP: np.ndarray,
    max_steps: int = 600,
    tolerance: float = 1e-13,
    floor: float = 1e-24,
) -> Minimum:
    """Minimise K problems from K starts.

    Args:
      objective: values of order one; a non-finite value is a step too far and is taken back.
      inverse_hessian_PP: first guess for every problem, in the units of theta squared per unit of value.
      tolerance: a problem has converged when the decrease its quadratic model still promises is below
        tolerance * value + floor.
    """
    K, P = start_KP.shape
    theta_KP = start_KP.astype(float)
    lanes = np.arange(K)
    value_K, gradient_KP = objective(theta_KP, lanes)
    if not np.isfinite(value_K).all():
        raise ValueError("a start of the fit has no finite objective; the inputs span too many orders of magnitude")
    h_KPP = np.broadcast_to(inverse_hessian_PP, (K, P, P)).copy()
    scale_K = np.ones(K)
    converged_K, restarted_K, num_steps_K = np.zeros(K, bool), np.zeros(K, bool), np.zeros(K, int)
    plain_PP = np.diag(np.median(np.diag(inverse_hessian_PP)) * np.ones(P))
    for step in range(max_steps):
        theta, value, gradient, h = theta_KP[lanes], value_K[lanes], gradient_KP[lanes], h_KPP[lanes]
        direction = -np.einsum("kpq,kq->kp", h, gradient)
        slope = np.einsum("kp,kp->k", gradient, direction)
        done = -slope <= tolerance * value + floor
        if done.any():
            converged_K[lanes[done]] = True
            lanes = lanes[~done]
            if not len(lanes):
                break
            theta, value, gradient, h = theta[~done], value[~done], gradient[~done], h[~done]
            direction, slope = direction[~done], slope[~done]
        num_steps_K[lanes] = step + 1
        # No step longer than 2 in any coordinate (e^2 in a coefficient): exponents overflow beyond.
        step_kP = direction * (scale_K[lanes] * np.minimum(1.0, 2.0 / np.abs(direction).max(axis=1)))[:, None]
        trial_value, trial_gradient = objective(theta + step_kP, lanes)
        usable = np.isfinite(trial_value) & np.isfinite(trial_gradient).all(axis=1)
        accept = usable & (trial_value <= value + 1e-4 * scale_K[lanes] * slope)
        # At rounding level a step that does not rise is as good as one can tell.
        accept |= usable & (trial_value <= value) & (-slope <= 1e-10 * value + floor)
        # A rejected step teaches the Hessian nothing: its secant, far from the minimum, stranded one start in ten.
        change = np.where(accept[:, None], trial_gradient - gradient, 0.0)
        h_KPP[lanes] = _bfgs_update(h, step_kP, change)
        theta_KP[lanes] = np.where(accept[:, None], theta + step_kP, theta)
        value_K[lanes] = np.where(accept, trial_value, value)
        gradient_KP[lanes] = np.where(accept[:, None], trial_gradient, gradient)
        scale_K[lanes] = np.where(accept, 1.0, _shorter(scale_K[lanes], slope, trial_value - value))
        # So short and still no descent: the Hessian is worn out. Begin again with a plain one, once; then it is over.
        stuck = lanes[scale_K[lanes] < 1e-6]
        again, over = stuck[~restarted_K[stuck]], stuck[restarted_K[stuck]]
        h_KPP[again], scale_K[again], restarted_K[again] = plain_PP, 1.0, True
        if len(over):
            converged_K[over] = _promised(h_KPP, gradient_KP, over) <= 1e-7 * value_K[over] + floor
            lanes = lanes[~np.isin(lanes, over)]
            if not len(lanes):
                break
    return Minimum(theta_KP, value_K, np.linalg.norm(gradient_KP, axis=1), converged_K, num_steps_K)


def _shorter(scale_K, slope_K, rise_K):
    """Where the parabola through the value, the slope and a rejected trial has its minimum, within a tenth to .6."""
    with np.errstate(all="ignore"):
        lowest_K = -slope_K * scale_K**2 / (2 * (rise_K - slope_K * scale_K))
    return np.clip(np.where(np.isfinite(lowest_K), lowest_K, 0.0), 0.1 * scale_K, 0.6 * scale_K)


def _promised(h_KPP, gradient_KP, lanes):
    return np.einsum("kp,kpq,kq->k", gradient_KP[lanes], h_KPP[lanes], gradient_KP[lanes])


def _bfgs_update(h_KPP, s_KP, y_KP):
    """Inverse-Hessian update from step s and change of gradient y; one without positive curvature teaches nothing."""
    sy_K = np.einsum("kp,kp->k", s_KP, y_KP)
    teaches_K = sy_K > 1e-12 * np.linalg.norm(s_KP, axis=1) * np.linalg.norm(y_KP, axis=1)
    rho_K = np.where(teaches_K, 1.0 / np.where(teaches_K, sy_K, 1.0), 0.0)
    hy_KP = np.einsum("kpq,kq->kp", h_KPP, y_KP)
    yhy_K = np.einsum("kp,kp->k", y_KP, hy_KP)
    outer_KPP = hy_KP[:, :, None] * s_KP[:, None, :]
    ss_KPP = s_KP[:, :, None] * s_KP[:, None, :]
    return (
        h_KPP
        - rho_K[:, None, None] * (outer_KPP + outer_KPP.transpose(0, 2, 1))
        + (rho_K * (1 + rho_K * yhy_K))[:, None, None] * ss_KPP
    )
