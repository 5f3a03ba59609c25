"""How much of a run its decay should take, by a fitted schedule law.

Letters: K draws, T steps.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from slmjax.scaling import show
from slmjax.scaling.curves.schedule_curves import ScheduleFit

SHARES = (0.025, 0.05, 0.1, 1 / 6, 0.2, 0.3)
# Multiple of the peak at fraction x of the decay, which ends at `end`; as in `slmjax.schedules`, which stands higher.
SHAPES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "linear": lambda x, end: 1 - (1 - end) * x,
    "1-sqrt": lambda x, end: 1 - (1 - end) * np.sqrt(x),
    "cosine": lambda x, end: end + (1 - end) * 0.5 * (1 + np.cos(np.pi * x)),
    "exponential": lambda x, end: end**x,
}


class DecayForecast(NamedTuple):
    """Final loss of each share, under the estimate [shares] and under each bootstrap draw [K, shares]."""

    shares: tuple[float, ...]
    losses: np.ndarray
    loss_draws: np.ndarray

    @property
    def best(self) -> float:
        return self.shares[int(np.argmin(self.losses))]

    @property
    def support(self) -> dict[float, float]:
        """The fraction of draws in which each share is the best."""
        best_K = np.argmin(self.loss_draws, axis=1)
        return {share: float((best_K == i).mean()) if len(best_K) else 0.0 for i, share in enumerate(self.shares)}

    def table(self) -> str:
        rows = [("decay", "final loss", "above the best", "best in draws")]
        rows += [
            (f"{share:.1%}", f"{loss:.4f}", f"{loss - self.losses.min():.4f}", f"{self.support[share]:.0%}")
            for share, loss in zip(self.shares, self.losses, strict=True)
        ]
        return "\n".join(show.columns(rows)) + "\n"


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
    return DecayForecast(
        shares=tuple(shares),
        losses=np.array([fit.predict(lr_T, last)[0] for lr_T in schedules]),
        loss_draws=np.stack(draws, axis=1),
    )
