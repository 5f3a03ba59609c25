"""How much of a run its decay should take, by a fitted schedule law.

Letters: K draws, T steps.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from slmjax.scaling import show
from slmjax.scaling.curves.schedule_curves import ScheduleFit

SHARES = (0.025, 0.05, 0.1, 1 / 6, 0.2, 0.3, 0.5)
NEAR = 1e-3  # of the loss: shares this close to the best are as good for most purposes
# Multiple of the peak at fraction x of the decay, which ends at `end`; as in `slmjax.schedules`, which stands higher.
SHAPES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "linear": lambda x, end: 1 - (1 - end) * x,
    "1-sqrt": lambda x, end: 1 - (1 - end) * np.sqrt(x),
    "cosine": lambda x, end: end + (1 - end) * 0.5 * (1 + np.cos(np.pi * x)),
    "exponential": lambda x, end: end**x,
}


class DecayForecast(NamedTuple):
    """Final loss of each share: under the estimate [shares], under each bootstrap draw [K, shares], and under the fit
    without each curve [shares], by its name.

    Draws tell what the scatter along the curves leaves open; fits without a curve, what hangs on which were run.
    """

    shares: tuple[float, ...]
    losses: np.ndarray
    loss_draws: np.ndarray
    losses_without: dict[str, np.ndarray]

    @property
    def best(self) -> float:
        """The best of the shares."""
        return self.shares[int(np.argmin(self.losses))]

    @property
    def optimum(self) -> float:
        """The best share between them; -inf or inf where the least or the largest of them is the best."""
        return _vertex(self.shares, self.losses)

    @property
    def optimum_without(self) -> dict[str, float]:
        return {name: _vertex(self.shares, losses) for name, losses in self.losses_without.items()}

    @property
    def support(self) -> dict[float, float]:
        """The fraction of draws in which each share is the best."""
        best_K = np.argmin(self.loss_draws, axis=1)
        return {share: float((best_K == i).mean()) if len(best_K) else 0.0 for i, share in enumerate(self.shares)}

    def interval(self, level: float) -> tuple[float, float]:
        """Ends of the best share over the draws, at `level`."""
        vertex_K = [_vertex(self.shares, losses) for losses in self.loss_draws]
        ends = np.quantile(vertex_K, [(1 - level) / 2, (1 + level) / 2], method="nearest")
        return float(ends[0]), float(ends[1])

    def range_without(self) -> tuple[float, float]:
        """Least and largest best share of the estimate and of the fits without a curve."""
        optima = [self.optimum, *self.optimum_without.values()]
        return min(optima), max(optima)

    def near(self, within: float = NEAR) -> tuple[float, float]:
        """The range of shares around the best whose loss is above it by at most `within` of it."""
        level, log_share = (1 + within) * self.losses.min(), np.log(self.shares)
        best = int(np.argmin(self.losses))
        ends = []
        for side in (slice(best, None, -1), slice(best, None)):
            above = np.flatnonzero(self.losses[side] > level)
            if len(above):
                i = slice(above[0] - 1, above[0] + 1)
                ends.append(float(np.exp(np.interp(level, self.losses[side][i], log_share[side][i]))))
            else:
                ends.append(-math.inf if side.step else math.inf)
        return ends[0], ends[1]

    def above(self, share: float) -> tuple[float, tuple[float, float]]:
        """Loss of one of the shares above the best of them, and its 95% interval over the draws."""
        i = self.shares.index(share)
        above_K = self.loss_draws[:, i] - self.loss_draws.min(axis=1)
        ends = np.quantile(above_K, [0.025, 0.975]) if len(above_K) else (math.nan, math.nan)
        return float(self.losses[i] - self.losses.min()), (float(ends[0]), float(ends[1]))

    def table(self) -> str:
        rows = [("decay", "final loss", "above the best", "95%", "best in draws")]
        for share, loss in zip(self.shares, self.losses, strict=True):
            above, ends = self.above(share)
            drawn = (
                (show.interval(ends, "{:.4f}".format), f"{self.support[share]:.0%}")
                if len(self.loss_draws)
                else ("", "")
            )
            rows.append((f"{share:.1%}", f"{loss:.4f}", f"{above:.4f}", *drawn))
        return "\n".join([*show.columns(rows), "", *self._sentences()]) + "\n"

    def _sentences(self):
        said = show.interval((self.optimum,), _percent) if math.isfinite(self.optimum) else f"{self.best:.1%} or beyond"
        drawn = f"; 95% of draws {show.interval(self.interval(0.95), _percent)}" if len(self.loss_draws) else ""
        yield f"best share: {said}{drawn}"
        if self.losses_without:
            each = "; ".join(
                f"without {name} {_percent(share) if math.isfinite(share) else 'outside the shares tried'}"
                for name, share in self.optimum_without.items()
            )
            yield f"it hangs on the curves fitted: {each}"
        yield f"within {NEAR:.1%} of the least loss: {show.interval(self.near(), _percent)}"


def _percent(share):
    return f"{share:.1%}"


def _vertex(shares, losses):
    """The least of the parabola in log share through the best of the shares and its two neighbours."""
    i = int(np.argmin(losses))
    if i in (0, len(shares) - 1):
        return math.inf if i else -math.inf
    x_3 = np.log(shares[i - 1 : i + 2]) - math.log(shares[i])
    square, slope, _ = np.polyfit(x_3, losses[i - 1 : i + 2], 2)
    return shares[i] * math.exp(-slope / (2 * square))


def decayed(
    total_steps: int, peak: float, shape: str, share: float, warmup_steps: int, final_ratio: float
) -> np.ndarray:
    """Rates of steps 0 to total_steps: warm-up from 0, a stretch at the peak, and a decay to final_ratio of it."""
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r} is not one of {', '.join(SHAPES)}")
    if not (total_steps > warmup_steps >= 0 and peak > 0):
        raise ValueError(
            f"total_steps={total_steps} must exceed warmup_steps={warmup_steps}, and peak={peak} be positive"
        )
    if not 0 < share <= 1 - warmup_steps / total_steps:
        raise ValueError(f"a decay over {share:g} of {total_steps} steps does not fit behind {warmup_steps} of warm-up")
    if not 0 < final_ratio <= 1:
        raise ValueError(f"final_ratio={final_ratio} is not within (0, 1]; the law knows no rate of zero, so say 1e-4")
    begin = total_steps - max(1, round(share * total_steps))
    x_T = np.clip((np.arange(total_steps + 1) - begin) / (total_steps - begin), 0.0, 1.0)
    lr_T = peak * SHAPES[shape](x_T, final_ratio)
    lr_T[:warmup_steps] = np.linspace(0.0, peak, warmup_steps)
    return lr_T


def best_decay(
    fit: ScheduleFit,
    total_steps: int,
    peak: float,
    shape: str = "1-sqrt",
    shares: Sequence[float] = SHARES,
    warmup_steps: int = 2160,
    final_ratio: float = 1e-4,
) -> DecayForecast:
    """Final loss of a run of `total_steps` under each decay share; peak in the units of the fitted curves' rates."""
    last = np.array([total_steps])
    schedules = [decayed(total_steps, peak, shape, share, warmup_steps, final_ratio) for share in shares]
    draws = [fit.predict_draws(lr_T, last)[:, 0] if len(fit.draws) else np.empty(0) for lr_T in schedules]
    without = [fit.predict_without(lr_T, last) for lr_T in schedules]
    return DecayForecast(
        shares=tuple(shares),
        losses=np.array([fit.predict(lr_T, last)[0] for lr_T in schedules]),
        loss_draws=np.stack(draws, axis=1),
        losses_without={name: np.array([each[name][0] for each in without]) for name in without[0]},
    )
