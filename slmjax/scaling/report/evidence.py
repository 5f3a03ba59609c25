"""Everything a report says about a fit, computed once: each part is its result, or the sentence why there is none.

No text and no figure is made here.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from slmjax.scaling import (
    agreement,
    allocation,
    backtest,
    choose,
    diagnose,
    envelope,
    forecast,
    isoflop,
    laws,
    prediction,
    profile,
)
from slmjax.scaling.agreement import Agreement
from slmjax.scaling.allocation import Cost
from slmjax.scaling.backtest import BackTest, Cut
from slmjax.scaling.choose import Choice
from slmjax.scaling.diagnose import Diagnosis
from slmjax.scaling.fit import Fit
from slmjax.scaling.forecast import Forecast, Quantity
from slmjax.scaling.isoflop import IsoFlop
from slmjax.scaling.points import PointSet
from slmjax.scaling.profile import Profile

MULTIPLES = (1, 10, 100, 1000)  # of the largest run's compute, when no budgets are given
MOST_PROFILED = 6  # free parameters; each costs some thirty fits


class Refusal(NamedTuple):
    """Why a part is not there."""

    why: str


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What one fit is worth.

    Attributes:
      cost: how N and D spend a budget; None for a law without an optimum.
      forecasts: compute-optimal sizes at the budgets, of a law of N and D.
      losses: for a law of C, its loss at the budgets.
      isoflop: read by parabolas near the best, which a figure can show; the agreement holds Akima splines too.
    """

    points: PointSet
    fit: Fit
    tested: BackTest
    cuts: list[Cut]
    cost: Cost | None
    forecasts: list[Forecast] | Refusal
    losses: dict[float, Quantity] | Refusal
    isoflop: IsoFlop | Refusal
    agreement: Agreement | Refusal
    choice: Choice | Refusal
    diagnosis: Diagnosis | Refusal
    profile: Profile | Refusal


def require_budgets(budgets: Sequence[float] | None) -> None:
    if not all(math.isfinite(C) and C > 0 for C in budgets or ()):
        raise ValueError(f"budgets={list(budgets)} must be positive numbers of FLOPs")


def gather(point_set: PointSet, fit: Fit, budgets: Sequence[float] | None = None) -> Evidence:
    """All parts of a fit to these points; budgets: FLOPs to forecast for, MULTIPLES of the largest run's when None."""
    require_budgets(budgets)
    tested = backtest.back_test(fit)
    cost, forecasts = _forecasts(fit, budgets)
    reading = _attempt(lambda: isoflop.isoflop(_with_flops(point_set), method="parabola"))
    optimum = None if isinstance(forecasts, Refusal) else shown(forecasts)
    return Evidence(
        points=point_set,
        fit=fit,
        tested=tested,
        cuts=list(tested.cuts) if tested.outcomes else [],
        cost=cost,
        forecasts=forecasts,
        losses=_attempt(lambda: _losses(fit, budgets)),
        isoflop=reading,
        agreement=_attempt(lambda: _agreement(point_set, fit, cost, reading)),
        choice=_attempt(lambda: _choice(point_set, fit)),
        diagnosis=_attempt(lambda: _diagnosis(fit, optimum, cost)),
        profile=_attempt(lambda: _profile(fit)),
    )


def shown(forecasts: list[Forecast]) -> Forecast:
    """The forecast a page begins with: the first that asks for clearly more compute than any run had."""
    return next((f for f in forecasts if f.reach["C"] > 2), forecasts[-1])


def _attempt(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ValueError as error:
        return Refusal(str(error))


def _with_flops(point_set):
    if any(None in (p.N, p.D, p.C) for p in point_set.points):
        raise ValueError("not all runs have N, D and C")
    return point_set


def _budgets(fit, budgets):
    if any(p["C"] is None for p in fit.points):
        raise ValueError("the runs have no FLOPs, so no budget can be forecast for")
    return list(budgets or [m * max(p["C"] for p in fit.points) for m in MULTIPLES])


def _forecasts(fit, budgets) -> tuple[Cost | None, list[Forecast] | Refusal]:
    """FLOPs are as logged if a rule in N fits them, else 6 N D."""
    if fit.form.inputs != ("N", "D"):
        return None, Refusal(
            f"{fit.law} is a law of {', '.join(fit.form.inputs)}; a compute-optimal N and D need a law of N and D"
        )
    try:
        cost = allocation.make_cost(fit, "logged")
    except ValueError:
        cost = allocation.Cost("6ND")
    made = _attempt(lambda: [forecast.optimum(fit, C, cost.name) for C in _budgets(fit, budgets)])
    return (None if isinstance(made, Refusal) else cost), made


def _losses(fit, budgets):
    if fit.form.inputs != ("C",):
        raise ValueError(f"{fit.law} is a law of {', '.join(fit.form.inputs)}, not of C")
    C_m = np.array(_budgets(fit, budgets))
    made = prediction.predict(fit, {"C": C_m})
    ends = made.widened(backtest.back_test(fit).discrepancy)
    return {
        float(C): Quantity(
            "loss",
            prediction.to_loss(fit, made.value_m[i]),
            {
                level: tuple(prediction.to_loss(fit, float(made.value_m[i] + end_m[i])) for end_m in pair)
                for level, pair in ends.items()
            },
        )
        for i, C in enumerate(C_m)
    }


def _agreement(point_set, fit, cost, reading):
    """The parametric fit beside two readings of the budgets and the envelope, as far as there are any."""
    if cost is None:
        raise ValueError(
            f"{fit.law} gives no compute-optimal N, so there is nothing that other methods could agree with"
        )
    others = [
        _attempt(lambda: isoflop.isoflop(_with_flops(point_set), method="akima")),
        reading,
        _attempt(lambda: envelope.envelope(envelope.curves_of_points(_with_flops(point_set)))),
    ]
    made = [one for one in others if not isinstance(one, Refusal)]
    if not made:
        raise ValueError("; ".join(dict.fromkeys(one.why for one in others)))
    return agreement.compare([fit, *made], cost=cost.name)


def _choice(point_set, fit):
    """Over all laws of N and D; a law of other inputs is scored against those that read the same."""
    if fit.form.inputs == ("N", "D"):
        forms = [*dict.fromkeys([*choose.default_forms(), fit.law])]
    else:
        same = [name for name in laws.names() if laws.load_law(name).inputs == fit.form.inputs]
        forms = [name for name in dict.fromkeys([*same, fit.law]) if laws.load_law(name).residual == "log"]
    if len(forms) < 2:
        raise ValueError(f"no other law here reads {', '.join(fit.form.inputs)}, so there is no choice to make")
    if fit.fixed:
        raise ValueError(f"{', '.join(fit.fixed)} held fixed, and the forms are compared with all parameters free")
    return choose.choose(point_set, forms, delta=fit.delta)


def _diagnosis(fit, optimum, cost):
    by = "N" if "N" in fit.form.inputs else fit.form.inputs[0]
    if optimum is None:
        return diagnose.diagnose(fit, by)
    return diagnose.diagnose(fit, by, optimum.target["flops"], cost=cost.name)


def _profile(fit):
    if fit.num_free > MOST_PROFILED:
        raise ValueError(f"profile intervals are made for up to {MOST_PROFILED} free parameters, and {fit.law} has "
                         f"{fit.num_free}")  # fmt: skip
    return profile.profile(fit)
