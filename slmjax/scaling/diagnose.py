"""What a fit hangs on: refits without each scale, the pull of each run, and runs that do not belong.

Every refit is the same problem with some points weighted zero, so all of them are solved at once, without a bootstrap.

Letters: K refits, n points, P parameters, Q free coordinates, F inputs.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from slmjax.scaling import allocation, design, estimate, show
from slmjax.scaling.fitted import Fit
from slmjax.scaling.profile import problem_of

OUTLIER = 3.5  # robust standard deviations, as Iglewicz and Hoaglin 1993 advise
MAX_SCALES = 12  # more levels than this are joined into groups of about equal numbers of runs
GAUSSIAN = 1.4826  # median absolute deviation to standard deviation


@dataclasses.dataclass(frozen=True)
class Refit:
    """The fit without some of its points.

    parameters: by name; target: what the refit says at the target, beside `Diagnosis.target`.
    """

    without: str
    num_left_out: int
    parameters: dict[str, float]
    target: float
    determined: bool


@dataclasses.dataclass(frozen=True)
class Influence:
    """One run: its residual in robust standard deviations, and what leaving it out does.

    shift: change of every parameter, in bootstrap standard errors; target: relative change at the target.
    """

    run_id: str
    N: float
    D: float
    loss: float
    z: float
    shift: dict[str, float]
    target: float

    @property
    def outlier(self) -> bool:
        return abs(self.z) > OUTLIER


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Everything below speaks of one number at a target as well: the loss there, or N* at a budget.

    Attributes:
      scales: refits without each size (or whatever input was asked for), in its order.
      influences: every run, the one that moves the target most first.
    """

    law: str
    parameters: dict[str, float]
    said: str
    target: float
    by: str
    scales: tuple[Refit, ...]
    influences: tuple[Influence, ...]
    notes: tuple[str, ...]

    @property
    def outliers(self) -> tuple[Influence, ...]:
        """Runs whose residual lies more than 3.5 robust standard deviations from the others', worst first."""
        return tuple(sorted((one for one in self.influences if one.outlier), key=lambda one: -abs(one.z)))

    def table(self, num_runs: int = 8) -> str:
        names = list(self.parameters)
        rows = [("without", "points", *names, self.said, "change")]
        rows.append(("nothing", "", *(f"{value:.4g}" for value in self.parameters.values()), f"{self.target:.4g}", ""))
        rows += [
            (
                refit.without,
                str(refit.num_left_out),
                *(f"{refit.parameters[name]:.4g}" for name in names),
                f"{refit.target:.4g}",
                f"{refit.target / self.target - 1:+.2%}" if refit.determined else "not determined",
            )
            for refit in self.scales
        ]
        runs = [("run", "N", "D", "loss", "z", f"change of {self.said}", "largest shift (s.e.)")]
        for one in self.influences[:num_runs]:
            name = max(one.shift, key=lambda name: abs(one.shift[name]))
            shift = f"{name} {one.shift[name]:+.2f}"
            runs.append(
                (
                    one.run_id,
                    show.count(one.N),
                    show.count(one.D),
                    f"{one.loss:.4f}",
                    f"{one.z:+.1f}",
                    f"{one.target:+.2%}",
                    shift,
                )
            )
        lines = [f"{self.law} without each {self.by}", "", *show.columns(rows), "", "runs that move it most", ""]
        lines += [*show.columns(runs), ""]
        lines += [
            f"outlier: {one.run_id}: residual {one.z:+.1f} robust standard deviations (loss {one.loss:.4f}, "
            f"N {show.count(one.N)}, D {show.count(one.D)})"
            for one in self.outliers
        ] or ["no outliers"]
        return "\n".join(lines + [f"note: {note}" for note in self.notes]) + "\n"


def diagnose(
    fit: Fit,
    by: str = "N",
    flops: float | None = None,
    at: Mapping[str, float] | None = None,
    cost: str = "6ND",
) -> Diagnosis:
    """Refit without each scale and without each run, and flag outliers.

    Args:
      by: the input whose levels are left out one at a time; more than twelve are joined into groups.
      flops: watch N* at this budget (laws of N and D), or
      at: watch the loss at these inputs. With neither, the loss at the largest value of every input.
      cost: with flops, how N and D spend them: "6ND", or as the runs "logged" them.
    """
    if flops is not None and at is not None:
        raise ValueError("diagnose: give flops or at, not both: one number is watched")
    if flops is not None and not (math.isfinite(flops) and flops > 0):
        raise ValueError(f"flops={flops} must be a positive number")
    form = fit.form
    if by not in form.inputs:
        raise ValueError(f"by={by!r} is not an input of {fit.law}; it has {', '.join(form.inputs)}")
    if at is None:
        at = {name: max(p[name] for p in fit.points) for name in form.inputs}
    missing = [name for name in form.inputs if name not in at]
    if missing:
        raise ValueError(f"at: {', '.join(missing)} missing; {fit.law} is a law of {', '.join(form.inputs)}")

    rule = None if flops is None else allocation.make_cost(fit, cost)

    def target(theta_KP):
        if rule is not None:
            return allocation.allocate(fit, theta_KP, flops, rule)[0]
        u_F1 = (np.log([at[name] for name in form.inputs]) - fit.centre)[:, None]
        with np.errstate(all="ignore"):
            return form.loss(theta_KP, u_F1)[0][:, 0]

    problem = problem_of(fit)
    scales, determined = _without_scales(fit, problem, by, target)
    influences = _influences(fit, problem, target)
    notes = [] if determined else ["a refit that is not determined lacks the variety of runs that the law needs"]
    if rule is not None:
        notes.append(f"N* is for {rule}")
    inputs = ", ".join(f"{name}={at[name]:.3g}" for name in form.inputs)
    said = f"N* at {flops:.3g}" if flops is not None else f"loss at {inputs}"
    full = float(target(fit.theta[None])[0])
    return Diagnosis(fit.law, fit.parameters, said, full, by, scales, influences, tuple(notes))


def robust_z(residual_n: np.ndarray) -> np.ndarray:
    """Distance of each residual from the median, in standard deviations read from the median absolute deviation."""
    away_n = residual_n - np.median(residual_n)
    spread = GAUSSIAN * float(np.median(np.abs(away_n)))
    # An exact fit leaves residuals of rounding size, which are nobody's fault.
    return away_n / max(spread, 1e-12)


def _without_scales(fit, problem, by, target):
    log_x_n = np.log([p[by] for p in fit.points])
    member_n = design.levels(log_x_n)
    num_levels = int(member_n.max()) + 1
    if num_levels > MAX_SCALES:
        rank_n = np.empty(len(log_x_n))
        rank_n[np.argsort(log_x_n, kind="stable")] = np.arange(len(log_x_n))
        # Runs of one level stay together: a level belongs where its first run does.
        first_n = np.array([rank_n[member_n == level].min() for level in member_n])
        group_n = (first_n * MAX_SCALES / len(log_x_n)).astype(int)
        member_n = np.unique(group_n, return_inverse=True)[1]
    groups = [member_n == g for g in range(int(member_n.max()) + 1)]
    theta_KP = delete(problem, np.array(groups))
    value_K, at_K = fit.form.values(theta_KP, fit.centre), target(theta_KP)
    varied_F = [f for f, name in enumerate(fit.form.inputs) if name in fit.form.levels]
    out = []
    for out_n, value_P, at in zip(groups, value_K, at_K, strict=True):
        kept_Fn = problem.u_Fn[:, ~out_n]
        sound = int((~out_n).sum()) > fit.num_free and all(
            int(design.levels(kept_Fn[f]).max()) + 1 >= fit.form.levels[fit.form.inputs[f]] for f in varied_F
        )
        ends = np.exp([log_x_n[out_n].min(), log_x_n[out_n].max()])
        size = show.count(ends[0]) if ends[1] / ends[0] < 1 + 2 * design.SAME_VALUE else show.count_range(ends)
        parameters = dict(zip(fit.form.parameters, value_P.tolist(), strict=True)) | fit.fixed
        out.append(Refit(f"{by} = {size}", int(out_n.sum()), parameters, float(at), sound))
    return tuple(out), all(refit.determined for refit in out)


def _influences(fit, problem, target):
    runs = list(dict.fromkeys(p["run_id"] for p in fit.points))
    index = {run_id: r for r, run_id in enumerate(runs)}
    run_n = np.array([index[p["run_id"]] for p in fit.points])
    theta_KP = delete(problem, run_n == np.arange(len(runs))[:, None])
    change_KP = fit.form.values(theta_KP, fit.centre) - fit.form.values(fit.theta[None], fit.centre)
    full, at_K = float(target(fit.theta[None])[0]), target(theta_KP)
    errors, z_n = fit.standard_errors(), robust_z(fit.residuals())
    out = []
    for r, run_id in enumerate(runs):
        worst = max(np.flatnonzero(run_n == r), key=lambda i: abs(z_n[i]))
        p = fit.points[worst]
        shift = {
            name: float(change) / max(errors[name], 1e-300)
            for name, change in zip(fit.form.parameters, change_KP[r], strict=True)
            if name not in fit.fixed
        }
        out.append(Influence(run_id, p["N"], p["D"], p["loss"], float(z_n[worst]), shift, float(at_K[r] / full - 1)))
    return tuple(sorted(out, key=lambda one: (-abs(one.target), one.run_id)))


def delete(problem: estimate.Problem, out_Kn: np.ndarray) -> np.ndarray:
    """Coordinates [K, P] of the fit without the points that row k marks."""
    theta_KQ, _ = estimate.refit(problem, estimate.solve(problem), (~out_Kn).astype(float))
    return problem.held.expand(theta_KQ)
