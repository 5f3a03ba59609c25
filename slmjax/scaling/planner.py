"""Which runs to pay for next: those that shrink the interval of a forecast most per FLOP, and when none pays any more.

The law is linearised at the estimate. A run at x adds information g g'/s^2, with g the gradient of log loss there and s
the scatter of runs of its compute, so what it does to the variance at the target is known before it is trained (optimal
design for one prediction, c-optimality). Two things a run can not or not so simply shrink are counted too: the scatter
of the target run itself, and the form's own error, which only a larger run brings closer. Runs are picked one at a
time.

Letters: P parameters, n fitted points, c candidates.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from slmjax.scaling import show
from slmjax.scaling.allocation import best, make_cost
from slmjax.scaling.backtest import back_test
from slmjax.scaling.fit import Fit
from slmjax.scaling.prediction import LEAST_NEAR

LEVEL = 0.95
NORMAL_95 = 1.959964
# Of the interval's width: a run that brings less than its share of this, by its FLOPs of the budget and as one of the
# runs asked for, does not pay.
LEAST_SHRINK = 0.05
POWERS = (1.0, 0.5, 0.0)
NUM_SIZES, NUM_RATIOS = 12, 8
SCHEDULES = ("single", "wsd")
DECAY_SHARE = 0.1  # of a WSD branch's tokens


class Candidate(NamedTuple):
    """A run that could be trained."""

    N: float
    D: float
    flops: float


class Step(NamedTuple):
    """One proposed run, what it costs beside those proposed before it, and the width of the interval (in log loss) when
    it is done."""

    N: float
    D: float
    flops: float
    width: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """The next runs, in the order of worth.

    Attributes:
      target: flops, N and D of the forecast whose interval is to shrink.
      width: of its 95% interval in log loss now; `floor`: what it can not fall below with runs no larger than these.
      verdict: why there are not more steps.
    """

    target: dict[str, float]
    steps: tuple[Step, ...]
    width: float
    floor: float
    verdict: str

    @property
    def flops(self) -> float:
        return sum(step.flops for step in self.steps)

    def table(self) -> str:
        lines = [
            f"forecast at {self.target['flops']:.4g} FLOPs (N={show.count(self.target['N'])}, "
            f"D={show.count(self.target['D'])}): 95% interval {_percent(self.width)} wide now, "
            f"{_percent(self.floor)} with the law known exactly"
        ]
        if self.steps:
            rows, before = (
                [("run", "N", "D", "FLOPs", "95% width after", "shrinks it by", "per 1% of the FLOPs")],
                self.width,
            )
            for i, step in enumerate(self.steps, 1):
                gain = 1 - step.width / before
                per_share = gain / (100 * step.flops / self.flops)
                rows.append(
                    (str(i), show.count(step.N), show.count(step.D), f"{step.flops:.3g}", _percent(step.width),
                     f"{gain:.1%}", f"{per_share:.2%}")
                )  # fmt: skip
                before = step.width
            lines += show.columns(rows)
        return "\n".join([*lines, self.verdict]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "width": self.width,
            "floor": self.floor,
            "flops": self.flops,
            "steps": [step._asdict() for step in self.steps],
            "verdict": self.verdict,
        }


def suggest(
    fit: Fit,
    flops: float,
    num_runs: int,
    budget: float,
    candidates: Sequence[Candidate] | None = None,
    cost: str = "6ND",
    schedule: str = "single",
    decay_share: float = DECAY_SHARE,
) -> Plan:
    """The next runs for the forecast of the loss at the optimum of `flops`.

    Args:
      num_runs, budget: at most so many runs, for at most so many FLOPs together.
      candidates: what may be run; a grid of sizes and tokens per parameter when None (see `grid`).
      schedule: "single": every run pays for itself. "wsd": runs of one size branch off one trunk, so a further D costs
        its decay and what it adds to the trunk.
      decay_share: of a branch's tokens, with schedule="wsd".
    """
    if num_runs < 1:
        raise ValueError(f"num_runs={num_runs}: ask for at least one run")
    if not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"budget={budget} must be a positive number of FLOPs")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    if not 0 < decay_share < 1:
        raise ValueError(f"decay_share={decay_share} must lie between 0 and 1")
    price = make_cost(fit, cost)
    N, D = best(fit, flops, price)
    model = Interval.of(fit, Candidate(N, D, float(flops)))
    if candidates is None:
        candidates = grid(fit, flops, budget, cost)
    affordable = [c for c in candidates if c.flops <= budget]
    if not affordable:
        least = min((c.flops for c in candidates), default=math.nan)
        raise ValueError(f"budget={budget:.3g} FLOPs pays for none of the candidates; the cheapest takes {least:.3g}")
    steps, verdict = _pick(model, affordable, num_runs, budget, schedule, decay_share, LEAST_SHRINK)
    return Plan({"flops": float(flops), "N": N, "D": D}, tuple(steps), model.width(), model.floor(), verdict)


def spend(model: "Interval", candidates: Sequence[Candidate], budget: float) -> list[Step]:
    """Runs for all of a budget, each paying for itself, in the order of worth: what to do with money that is there."""
    if not candidates:
        return []
    return _pick(model, candidates, len(candidates), budget, "single", DECAY_SHARE, least_shrink=0.0)[0]


def _pick(model, candidates, num_runs, budget, schedule, decay_share, least_shrink):
    # By worth per FLOP alone a large decisive run never comes; by worth alone the budget goes to one. The better of
    # both is within a constant factor of the best set (Leskovec et al. 2007), and half-way between is often better yet.
    plans = [
        _greedy(model, candidates, num_runs, budget, schedule, decay_share, least_shrink, power) for power in POWERS
    ]
    return min(plans, key=lambda plan: plan[0][-1].width if plan[0] else model.width())


def grid(
    fit: Fit, flops: float, budget: float, cost: str = "6ND", sizes: Sequence[float] | None = None
) -> list[Candidate]:
    """Candidates for a forecast at `flops`: sizes from the smallest fitted to the target's optimum (or the given ones),
    by tokens per parameter over the fitted range (the optimum's included), none above the budget or the
    target."""
    for N in sizes or ():
        if not (math.isfinite(N) and N > 0):
            raise ValueError(f"sizes: {N} is not a positive number of parameters")
    price = make_cost(fit, cost)
    N, D = best(fit, flops, price)
    N_n, D_n = (np.array([p[name] for p in fit.points], float) for name in ("N", "D"))
    N_c = np.geomspace(N_n.min(), max(N_n.max(), N), NUM_SIZES) if sizes is None else np.array(sizes, float)
    ratio_n = np.append(D_n / N_n, D / N)
    ratios = np.geomspace(ratio_n.min(), ratio_n.max(), NUM_RATIOS)
    made = [Candidate(float(N), float(N * r), float(price.flops(N, N * r))) for N in N_c for r in ratios]
    # Runs cheaper than all fitted ones would tell of a corner of the law that no forecast needs.
    least = min(p["C"] for p in fit.points)
    return [c for c in made if least <= c.flops <= min(budget, flops) and D_n.min() <= c.D] or made


@dataclasses.dataclass(frozen=True)
class Interval:
    """The width of a forecast's interval as a function of runs not yet made.

    covariance_PP: of the coordinates, such that the law's variance at the target is that of the bootstrap draws.
    inflation: of that variance over the linearised law's; a new run is worth as much less as the fitted ones were.
    scatter: of a run at the target, as the fitted runs nearest in compute show it.
    largest: the largest fitted value of C and of the law's inputs, which a run may move.
    """

    fit: Fit
    target: Candidate
    covariance_PP: np.ndarray
    target_P: np.ndarray
    inflation: float
    scatter: float
    largest: dict[str, float]

    @classmethod
    def of(cls, fit: Fit, target: Candidate) -> "Interval":
        if fit.form.inputs != ("N", "D"):
            raise ValueError(
                f"{fit.law} is a law of {', '.join(fit.form.inputs)}; runs are planned for laws of N and D"
            )
        covariance_PP, target_P = _covariance(fit, fit.points), gradients(fit, [target])[0]
        # The bootstrap knows of outliers and of a form that does not fit; the linearised law takes its size from there.
        drawn = _central_variance(fit, target)
        inflation = drawn / float(target_P @ covariance_PP @ target_P) if drawn > 0 else 1.0
        nearby = float(scatter(fit, [target])[0])
        return cls(fit, target, inflation * covariance_PP, target_P, inflation, nearby, _largest(fit.points))

    def of_only(self, points: Sequence[dict]) -> "Interval":
        """Had only these of the fitted runs been made, and all else been known as it is."""
        covariance_PP = self.inflation * _covariance(self.fit, points)
        return dataclasses.replace(self, covariance_PP=covariance_PP, largest=_largest(points))

    def width(self) -> float:
        """Of the 95% interval, in log loss."""
        return float(self._width(float(self.target_P @ self.covariance_PP @ self.target_P), self.largest))

    def floor(self) -> float:
        """With the law known exactly, and no run larger than now."""
        return float(self._width(0.0, self.largest))

    def widths_after(self, candidates: Sequence[Candidate], signal_cP: np.ndarray) -> np.ndarray:
        """Width [c] after each candidate alone (Sherman-Morrison), given their `signals`."""
        along_c = signal_cP @ self.covariance_PP @ self.target_P
        own_c = np.einsum("cp,pq,cq->c", signal_cP, self.covariance_PP, signal_cP)
        now = float(self.target_P @ self.covariance_PP @ self.target_P)
        variance_c = np.maximum(now - along_c**2 / (self.inflation + own_c), 0.0)
        largest = {name: np.maximum(value, _targets(candidates)[name]) for name, value in self.largest.items()}
        return self._width(variance_c, largest)

    def after(self, candidate: Candidate, signal_P: np.ndarray) -> "Interval":
        along_P = self.covariance_PP @ signal_P
        covariance_PP = self.covariance_PP - np.outer(along_P, along_P) / (self.inflation + signal_P @ along_P)
        largest = {name: max(value, float(_targets([candidate])[name][0])) for name, value in self.largest.items()}
        return dataclasses.replace(self, covariance_PP=covariance_PP, largest=largest)

    def _width(self, variance, largest):
        beyond = [np.log(_targets([self.target])[name][0] / np.asarray(value)) for name, value in largest.items()]
        discrepancy = back_test(self.fit).discrepancy.half_width(LEVEL, np.maximum(0.0, np.max(beyond, axis=0)))
        return 2 * np.hypot(NORMAL_95 * np.sqrt(variance + self.scatter**2), discrepancy)


def gradients(fit: Fit, at: Sequence[Candidate]) -> np.ndarray:
    """d(log loss)/d(coordinates) [c, P] of the estimate."""
    targets = _targets(at)
    u_Fc = np.log([targets[name] for name in fit.form.inputs]) - fit.centre[:, None]
    loss_cc, pullback = fit.form.loss(np.tile(fit.theta, (len(at), 1)), u_Fc)
    return pullback(np.diag(1 / np.diag(loss_cc)))


def signals(fit: Fit, at: Sequence[Candidate]) -> np.ndarray:
    """Gradients [c, P] over the scatter of a run there: a run adds the outer product of its own to the information."""
    return gradients(fit, at) / scatter(fit, at)[:, None]


def scatter(fit: Fit, at: Sequence[Candidate]) -> np.ndarray:
    """Of log loss about the law [c]: root mean square residual of the third of the fitted runs nearest in compute."""
    n = len(fit.points)
    residual_n = fit.residuals() * math.sqrt(n / max(n - fit.num_free, 1))
    log_C_n, log_C_c = np.log([p["C"] for p in fit.points]), np.log(_targets(at)["C"])
    near_ck = np.argsort(np.abs(log_C_c[:, None] - log_C_n), axis=1, kind="stable")[:, : max(LEAST_NEAR, n // 3)]
    return np.maximum(np.sqrt((residual_n[near_ck] ** 2).mean(axis=1)), 1e-9)


def _covariance(fit, points):
    signal_nP = signals(fit, [Candidate(p["N"], p["D"], p["C"]) for p in points])
    normal_PP = signal_nP.T @ signal_nP
    normal_PP += 1e-9 * np.trace(normal_PP) * np.eye(len(normal_PP))  # a term the runs do not see
    return np.linalg.inv(normal_PP)


def _largest(points):
    return {name: max(p[name] for p in points) for name in ("N", "D", "C")}


def _targets(at):
    N_c, D_c, C_c = np.array([(c.N, c.D, c.flops) for c in at], float).T
    return {"N": N_c, "D": D_c, "C": C_c}


def _central_variance(fit, target):
    """Variance of the drawn log losses at the target from their central 68%: a few wild draws do not set the plan."""
    shift_K = np.log(fit.predict_draws(N=target.N, D=target.D) / fit.predict(N=target.N, D=target.D))
    low, high = np.quantile(np.where(np.isfinite(shift_K), shift_K, 1e3), [0.1587, 0.8413])
    return float((high - low) / 2) ** 2


def _greedy(model, candidates, num_runs, budget, schedule, decay_share, least_shrink, power):
    """Steps and why they end. Each step has the largest shrink / FLOPs^power among the runs that pay."""
    steps: list[Step] = []
    left = list(candidates)
    signal_cP = signals(model.fit, left)
    spent, now = 0.0, model.width()
    while len(steps) < num_runs and left:
        flops_c = np.array([_extra_flops(steps, c, schedule, decay_share) for c in left])
        shrink_c = 1 - model.widths_after(left, signal_cP) / now
        pays_c = shrink_c >= least_shrink * np.maximum(flops_c / budget, 1 / num_runs)
        affordable_c = spent + flops_c <= budget
        if not pays_c.any():
            return steps, (
                f"more runs stop paying: the best one left would shrink the interval by {float(shrink_c.max()):.1%}; "
                f"{_percent(model.floor())} of width is the scatter of runs and the law's own error at this distance"
            )
        if not (pays_c & affordable_c).any():
            return steps, f"the budget is spent: the {budget - spent:.3g} FLOPs left buy no run that pays"
        pick = int(np.argmax(np.where(pays_c & affordable_c, shrink_c / flops_c**power, -np.inf)))
        chosen = left.pop(pick)
        model = model.after(chosen, signal_cP[pick])
        signal_cP = np.delete(signal_cP, pick, axis=0)
        spent, now = spent + float(flops_c[pick]), model.width()
        steps.append(Step(chosen.N, chosen.D, float(flops_c[pick]), now))
    if not left:
        return steps, "all candidates are taken"
    more = float((1 - model.widths_after(left, signal_cP) / now).max())
    return steps, f"these are the {num_runs} runs asked for; one more would shrink the interval by up to {more:.1%}"


def _extra_flops(steps, candidate, schedule, decay_share):
    """What a run adds to the bill of those already chosen."""
    if schedule == "single":
        return candidate.flops
    per_token = candidate.flops / candidate.D
    trunk = max([(1 - decay_share) * step.D for step in steps if step.N == candidate.N], default=0.0)
    longer = max(0.0, (1 - decay_share) * candidate.D - trunk)
    return per_token * (longer + decay_share * candidate.D)


def _percent(width):
    """A width in log loss, as the share of the loss it is."""
    return f"{100 * math.expm1(width):.3g}%"
