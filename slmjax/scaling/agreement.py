"""Where the parametric fit, IsoFLOP and the envelope agree on the best N and D, and why they may not.

Each method is one row: exponents of N* and D*, N* at the largest budget and at ten times it, with intervals. Nothing
is fitted here.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from slmjax.scaling import allocation, show
from slmjax.scaling.envelope import Envelope
from slmjax.scaling.fitted import Fit
from slmjax.scaling.isoflop import IsoFlop
from slmjax.scaling.lines import Estimate

LEVEL = 0.95
OFF_CENTRE = 0.25  # of a budget's range of log N: farther from its middle, the parabola leans on one side
DRIFT = 0.1  # of that range, from the smallest budget to the largest: a bias that grows with C bends the exponent
SKEWED = 0.25  # cubic over quadratic term at half a decade from the best
NAMES = {"akima": "IsoFLOP, Akima", "parabola": "IsoFLOP, parabola near the best", "all_points": "IsoFLOP, all points"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One method. Exponents are local slopes between the largest budget and ten times it."""

    method: str
    exponent_N: Estimate
    exponent_D: Estimate
    N_at_largest: Estimate
    N_at_ten_times: Estimate


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The methods side by side.

    Attributes:
      flops: the largest budget of the runs.
      cost: how the parametric fits count FLOPs; None without one. The other methods read the FLOPs of the runs.
      disagreements: pairs of methods whose 95% intervals do not overlap, with what they disagree on.
      reasons: what in the data or in a method may explain it.
    """

    flops: float
    rows: tuple[Row, ...]
    disagreements: tuple[tuple[str, str, str], ...]
    reasons: tuple[str, ...]
    cost: str | None = None

    @property
    def agree(self) -> bool:
        return not self.disagreements

    def table(self) -> str:
        rows = [("method", "N* ~ C^a", "95%", "D* ~ C^b", "95%", f"N* at {self.flops:.3g}", "95%", "at 10x", "95%")]
        for row in self.rows:
            cells = [row.method]
            for one in (row.exponent_N, row.exponent_D):
                cells += [f"{one.value:.3f}", show.interval(one.interval(LEVEL), "{:.3f}".format)]
            for one in (row.N_at_largest, row.N_at_ten_times):
                cells += [show.count(one.value), show.interval(one.interval(LEVEL), show.count)]
            rows.append(tuple(cells))
        lines = show.columns(rows)
        if self.agree:
            lines += ["", "the methods agree: all 95% intervals overlap"]
        else:
            said = {}
            for one, other, what in self.disagreements:
                said.setdefault((one, other), []).append(what)
            lines += ["", *(f"{one} and {other} disagree on {'; '.join(what)}" for (one, other), what in said.items())]
        if self.cost is not None:
            lines.append(f"parametric: {self.cost}; the other methods: the FLOPs of the runs")
        heading = "worth knowing" if self.agree else "may explain it"
        return "\n".join(lines + [f"{heading}: {reason}" for reason in self.reasons]) + "\n"


def compare(
    methods: Sequence[Fit | IsoFlop | Envelope], flops: float | None = None, cost: str | None = None
) -> Agreement:
    """Put fits of the same runs side by side.

    Args:
      methods: fits of a law of N and D, IsoFLOP fits and envelopes; at least two.
      flops: the budget to compare at; None is the largest C of the runs.
      cost: how N and D spend FLOPs in a parametric fit, "6ND" or "logged"; None is as the runs logged them where a rule
        in N says it, as the other methods read them, else 6ND. The table says which.
    """
    if len(methods) < 2:
        raise ValueError(f"{len(methods)} method has nothing to agree with; give at least two")
    if flops is None:
        flops = max(map(_largest, methods))
    if not (math.isfinite(flops) and flops > 0):
        raise ValueError(f"flops={flops} must be a positive number")
    rules = [_cost(method, cost) if isinstance(method, Fit) else None for method in methods]
    rows = tuple(_row(method, flops, rule) for method, rule in zip(methods, rules, strict=True))
    what = {
        "exponent_N": "the exponent of N*",
        "N_at_largest": f"N* at {flops:.3g} FLOPs",
        "N_at_ten_times": f"N* at {10 * flops:.3g} FLOPs",
    }
    apart = tuple(
        (one.method, other.method, said)
        for i, one in enumerate(rows)
        for other in rows[i + 1 :]
        for name, said in what.items()
        if not _overlap(getattr(one, name), getattr(other, name))
    )
    readings = [method for method in methods if isinstance(method, IsoFlop)]
    reasons = [reason for method in methods for reason in _reasons(method)]
    # What is wrong with the design shows in every reading of it: once is enough.
    reasons += [reason for reading in readings[:1] for reason in _design_reasons(reading)]
    said = "; ".join(dict.fromkeys(str(rule) for rule in rules if rule is not None))
    return Agreement(flops, rows, apart, tuple(reasons), said or None)


def _overlap(one, other):
    (low, high), (other_low, other_high) = one.interval(LEVEL), other.interval(LEVEL)
    return low <= other_high and other_low <= high


def _cost(fit, name):
    if name is not None:
        return allocation.make_cost(fit, name)
    try:
        return allocation.make_cost(fit, "logged")
    except ValueError:  # no rule in N says what the runs logged
        return allocation.Cost("6ND")


def _largest(method):
    if isinstance(method, Fit):
        if any(p["C"] is None for p in method.points):
            raise ValueError("not all runs of the parametric fit have FLOPs; say at which budget to compare: flops=")
        return max(p["C"] for p in method.points)
    return max(o.C for o in method.optima) if isinstance(method, IsoFlop) else max(p["C"] for p in method.frontier)


def _row(method, flops, cost) -> Row:
    if isinstance(method, Fit):
        return _parametric(method, flops, cost)
    name = NAMES[method.method] if isinstance(method, IsoFlop) else f"envelope, {method.reading}"
    N, D = method.lines["N"], method.lines["D"]
    return Row(name, N.exponent, D.exponent, N.at(flops), N.at(10 * flops))


def _parametric(fit, flops, cost) -> Row:
    theta_KP = np.concatenate([fit.theta[None], fit.draws])
    (N_K, D_K), (N10_K, D10_K) = (allocation.allocate(fit, theta_KP, C, cost) for C in (flops, 10 * flops))
    if not (0 < N_K[0] < math.inf and 0 < N10_K[0] < math.inf):
        raise ValueError(f"the fitted {fit.law} has no compute-optimal size at {flops:.3g} FLOPs: {fit.parameters}")
    with np.errstate(all="ignore"):
        exponents = (np.log10(N10_K / N_K), np.log10(D10_K / D_K))
    numbers = (*exponents, N_K, N10_K)
    return Row(
        f"parametric, {fit.law}",
        *(Estimate(float(value_K[0]), value_K[1:][np.isfinite(value_K[1:])]) for value_K in numbers),
    )


def _reasons(method):
    if isinstance(method, IsoFlop):
        name = NAMES[method.method]
        if method.method == "all_points":
            yield f"{name}: a parabola through all points is biased on wide or off-centre budgets"
        if method.discarded:
            yield f"{name}: {len(method.discarded)} of {len(method.budgets)} budgets discarded, no minimum inside them"
    elif isinstance(method, Envelope):
        if method.ends == "keep":
            yield "envelope: what the smallest and largest size hold is kept, where the next size was not run"
        yield from (f"envelope: {note}" for note in method.notes if note.startswith("losses along a run"))
    else:
        yield from (
            f"parametric: {name} is weakly identified: {why}" for name, why in method.weakly_identified().items()
        )


def _design_reasons(fit):
    """What the budgets' sizes and the shape of their losses do to every reading of them."""
    budgets = {budget.C: budget for budget in fit.budgets}
    used = [(o, budgets[o.C]) for o in fit.optima]
    # 0 in the middle of the sizes that were run, -.5 and .5 at the edges
    place_G = np.array([(math.log(o.N) - b.log_N.mean()) / np.ptp(b.log_N) for o, b in used])
    off = int((np.abs(place_G) > OFF_CENTRE).sum())
    if off:
        yield f"IsoFLOP budgets: the best size of {off} of {len(used)} budgets is far from the middle of the sizes run"
    log_C_G = np.log([o.C for o, _ in used])
    drift = float(np.polyfit(log_C_G - log_C_G.mean(), place_G, 1)[0]) * np.ptp(log_C_G)
    if len(used) > 2 and abs(drift) > DRIFT:
        towards = "larger" if drift > 0 else "smaller"
        yield (
            f"IsoFLOP budgets: the best size drifts towards the {towards} of the sizes run as the budget grows "
            f"(by {abs(drift):.0%} of their range), which biases a parabola's exponent"
        )
    skew_G = np.array([skew for skew in (_skew(b, o) for o, b in used) if skew is not None])
    if len(skew_G) and abs(np.median(skew_G)) > SKEWED:
        side = "below" if np.median(skew_G) < 0 else "above"
        yield f"IsoFLOP budgets: the loss rises faster {side} the best size than opposite, which shifts a parabola"


def _skew(budget, optimum):
    """Cubic over quadratic term of the loss half a decade from the best; None where the sizes cannot tell."""
    reach = math.log(10)
    u_n = (budget.log_N - math.log(optimum.N)) / (0.5 * reach)
    near_n = np.abs(u_n) <= 2
    if near_n.sum() < 5:
        return None
    cubic, square, *_ = np.polyfit(u_n[near_n], budget.loss[near_n], 3)
    return cubic / square if square > 0 else None
