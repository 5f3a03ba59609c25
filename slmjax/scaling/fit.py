"""Fitting a law to Points: sum of Huber on log loss, projected starts, and a bootstrap over runs.

The numbers are made in `estimate.py`, what the points must offer stands in `design.py`, the result is `fitted.Fit`.
Equal points and seed give equal bytes.

Letters: K resamples, n points, P parameters, Q free ones, F inputs.
"""

import math
from collections.abc import Mapping, Sequence

from slmjax.scaling import design, estimate, laws
from slmjax.scaling.fitted import POINT_FIELDS, Fit
from slmjax.scaling.points import Point, PointSet

__all__ = ["Fit", "fit"]

LEAST_BOOTSTRAP = 100


def fit(
    points: PointSet | Sequence[Point],
    law: str = "chinchilla",
    delta: float = 1e-3,
    num_bootstrap: int = 1000,
    seed: int = 0,
    *,
    residual: str | None = None,
    weights: str = "equal",
    resample: str = "run",
    fixed: Mapping[str, float] | None = None,
) -> Fit:
    """Fit a law by the minimum of sum_i weight_i Huber_delta(observed_i - predicted_i), with a bootstrap over runs.

    Args:
      points: at least one more than the law has free parameters, over several values of each input.
      law: one of `laws.names()` or the dotted path of a module that defines `law`.
      delta: residual beyond which a point pulls with constant force. In log loss, .1 is least squares in practice.
      num_bootstrap: resamples; units (see resample) are drawn with replacement, all points of one together.
      residual: "log" or "raw" loss; None is the law's own, log for all but the vocabulary law.
      weights: "equal", or "se" for the inverse variance of each run's evaluation.
      resample: "run", or "ladder" to draw all runs of one size together.
      fixed: published parameters held at a value, e.g. {"E": 1.69}.
    Raises:
      ValueError: mixed conventions, too few points, a degenerate design, impossible values or options.
    """
    point_set = points if isinstance(points, PointSet) else PointSet(tuple(points))
    form, fixed = laws.load_law(law), {name: float(value) for name, value in (fixed or {}).items()}
    residual = form.residual if residual is None else residual
    _require_options(delta, num_bootstrap, residual)
    log_x_Fn, loss_n = design.validated(point_set, form, residual, len(form.parameters) - len(fixed))
    centre_F = form.centre(log_x_Fn)
    u_Fn = log_x_Fn - centre_F[:, None]
    held = estimate.hold(form, fixed, form.starts(u_Fn, loss_n, 1)[0], centre_F)
    weight_n = design.point_weights(point_set.points, weights, residual)
    problem = estimate.Problem(form, u_Fn, loss_n, weight_n, residual, delta, held)

    found = estimate.solve(problem)
    run_n = design.resampling_units(point_set.points, "run")
    unit_n = design.resampling_units(point_set.points, resample)
    Q = len(found.theta_Q)
    resampled_Kn, num_redrawn = design.resamples(form, u_Fn, unit_n, run_n, Q, num_bootstrap, seed)
    draws_KQ, bootstrap = estimate.refit(problem, found, resampled_Kn)
    bootstrap |= {"num_runs": len(set(run_n)), "num_units": len(set(unit_n)), "num_redrawn": num_redrawn}
    theta_P = held.expand(found.theta_Q[None])[0]
    return Fit(
        law=law,
        theta=theta_P,
        centre=centre_F,
        draws=held.expand(draws_KQ),
        points=[{name: getattr(p, name) for name in POINT_FIELDS} | dict(p.inputs) for p in point_set.points],
        conventions=point_set.conventions(),
        objective=problem.total(theta_P),
        delta=delta,
        seed=seed,
        starts=found.starts,
        bootstrap=bootstrap,
        notes=[*point_set.notes, *_warnings(found.converged, bootstrap, Q), *_repeats(point_set.points, form)],
        residual=residual,
        weights=weights,
        resample=resample,
        fixed=fixed,
        left_out=[{"run_id": r.run_id, "reason": r.reason, "source": r.source} for r in point_set.excluded],
    )


def _require_options(delta, num_bootstrap, residual):
    if not (math.isfinite(delta) and delta > 0):
        raise ValueError(f"delta={delta} must be a positive number")
    if num_bootstrap < LEAST_BOOTSTRAP:
        raise ValueError(f"num_bootstrap={num_bootstrap} is too few for a 95% interval; use at least {LEAST_BOOTSTRAP}")
    if residual not in estimate.RESIDUALS:
        raise ValueError(f"residual={residual!r} is not one of {', '.join(estimate.RESIDUALS)}")


def _repeats(points, form):
    if "U" not in form.inputs and any((p.epochs or 0) > 1 for p in points):
        yield "the law takes a repeated token for a new one"


def _warnings(converged, bootstrap, num_free):
    if not converged:
        yield "the optimiser still crept along a flat valley when it was stopped: these runs hardly determine the law"
    if bootstrap["num_units"] < 2 * num_free:
        unit = "runs" if bootstrap["num_units"] == bootstrap["num_runs"] else "ladders"
        yield (
            f"{bootstrap['num_units']} {unit} for {num_free} parameters: resamples of so few {unit} understate "
            "the uncertainty"
        )
