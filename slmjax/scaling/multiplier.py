"""Two families side by side at their own optima: how much more compute the second needs for the first one's loss, and
how their best sizes compare. Made for masked diffusion beside autoregression, where a bound is read as a loss; any two
families whose losses count the same tokens can be compared.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from slmjax.scaling import show
from slmjax.scaling.isoflop import IsoFlop
from slmjax.scaling.lines import Estimate, Line, weighted_line

ANCHORS = ("first", "second")


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """Per budget of the first family: the optima of both there, and the compute multiplier at equal loss."""

    names: tuple[str, str]
    rows: tuple[dict, ...]

    def table(self) -> str:
        first, second = self.names
        rows = [("C", f"loss {first}", f"loss {second}", f"N* {first}", f"N* {second}", "multiplier", "95% interval")]
        rows += [
            (
                f"{row['C']:.3g}",
                f"{row['loss'][0]:.4g}",
                f"{row['loss'][1]:.4g}",
                show.count(row["N"][0]),
                show.count(row["N"][1]),
                show.times(row["multiplier"].value),
                show.interval(row["multiplier"].interval(0.95), show.times),
            )
            for row in self.rows
        ]
        said = f"multiplier: compute {second} needs for the loss that {first} reaches with C"
        return "\n".join([*show.columns(rows), said]) + "\n"


def optimum_line(C_n: Sequence[float], y_n: Sequence[float], num_draws: int = 1000, seed: int = 0) -> Line:
    """A power law through optima that somebody printed, one a budget; draws scatter them as the line's residuals do."""
    log_C_n, log_y_n = np.log(np.asarray(C_n, float)), np.log(np.asarray(y_n, float))
    if len(log_C_n) < 3:
        raise ValueError(f"{len(log_C_n)} budgets leave no residual to judge the line by; give at least three")
    if not (np.isfinite(log_C_n).all() and np.isfinite(log_y_n).all()):
        raise ValueError("the budgets and optima must be positive finite numbers")
    one_n, num_free = np.ones(len(log_C_n)), len(log_C_n) - 2
    line = weighted_line(log_C_n, log_y_n, np.empty((0, len(log_C_n))), one_n)
    fitted_n = line.level + line.slope * (log_C_n - line.centre)
    sd = math.sqrt(float(np.sum((log_y_n - fitted_n) ** 2)) / num_free)
    # Few budgets: each draw has its own guess of the scatter, so that the interval is Student's and not the normal's.
    rng = np.random.default_rng(seed)
    scale_K1 = np.sqrt(num_free / rng.chisquare(num_free, (num_draws, 1)))
    draws_Kn = fitted_n + sd * scale_K1 * rng.standard_normal((num_draws, len(log_C_n)))
    return weighted_line(log_C_n, log_y_n, draws_Kn, one_n)


def compute_multiplier(first: Line, second: Line, flops: float, anchor: str = "first") -> Estimate:
    """C_second / C_first where both reach the same loss.

    Args:
      first, second: lines of the optimal loss in C.
      flops: the compute of the family that `anchor` names. State it with the number: the two differ where the
        exponents do (SMDM: 15.5 at 1e19 of autoregression, 14.4 at 1e19 of masked diffusion).
    """
    if anchor not in ANCHORS:
        raise ValueError(f"anchor={anchor!r} is not one of {', '.join(ANCHORS)}")
    given, sought = (first, second) if anchor == "first" else (second, first)
    value = given.at(flops)
    if not (given.slope < 0 and sought.slope < 0):
        raise ValueError("a loss that does not fall with compute has no compute multiplier")

    def log_C(log_loss, slope, level):
        return sought.centre + (log_loss - level) / slope

    num = min(len(value.draws), len(sought.slope_draws))
    sign = 1 if anchor == "first" else -1
    best = log_C(math.log(value.value), sought.slope, sought.level)
    draws_K = log_C(np.log(value.draws[:num]), sought.slope_draws[:num], sought.level_draws[:num])
    return Estimate(
        math.exp(sign * (best - math.log(flops))), np.exp(np.minimum(sign * (draws_K - math.log(flops)), 700))
    )


def side_by_side(first: IsoFlop, second: IsoFlop, names: tuple[str, str] = ("AR", "MDM")) -> SideBySide:
    """Both families at every budget of the first, each from its own lines."""
    rows = []
    for optimum in first.optima:
        at = [{name: fit.lines[name].at(optimum.C).value for name in ("N", "loss")} for fit in (first, second)]
        rows.append(
            {
                "C": optimum.C,
                "N": tuple(one["N"] for one in at),
                "loss": tuple(one["loss"] for one in at),
                "multiplier": compute_multiplier(first.lines["loss"], second.lines["loss"], optimum.C),
            }
        )
    return SideBySide(names, tuple(rows))
