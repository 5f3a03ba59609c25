"""Learning-rate schedules: pure functions of (config, global step) that return a multiple of the peak rate.

They run on the host and enter the compiled step as an input, so changing one never recompiles, and a resumed run needs
nothing restored. Steps are numbered from 0: the multiplier of step s is that of the update that completes s + 1 steps.
"""

import math

import numpy as np

from slmjax.config import RunConfig, ScheduleConfig, decay_start, decay_steps, exported


def decay_multiplier(cfg: ScheduleConfig, x: float, length: int) -> float:
    """Multiple of the peak at fraction x in [0, 1] of a decay of `length` steps, ending at `final_ratio`.

    Shapes: Hägele et al. (2405.18392) for linear, 1-sqrt and cosine; Wen et al. (2410.05192, WSD-S) for inverse;
    MiniCPM (2404.06395, section 4.2) for half_life, which has no floor and whose end is set by `half_life_steps`.
    """
    floor = cfg.final_ratio
    match cfg.decay_shape:
        case "linear":
            return floor + (1 - floor) * (1 - x)
        case "1-sqrt":
            return floor + (1 - floor) * (1 - math.sqrt(x))
        case "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * x))
        case "inverse":
            return floor / (x + (1 - x) * floor)
        case "exponential":
            return floor**x
        case "half_life":
            return 0.5 ** (x * length / cfg.half_life_steps)
    raise AssertionError(cfg.decay_shape)  # validate() refuses the rest


def multiplier(cfg: RunConfig, step: int) -> float:
    """Multiple of `optim.lr` for the update made at `step`.

    Raises:
      ValueError: step at or past train.steps, unless schedule.after_end is `hold`, which keeps the schedule's end.
    """
    schedule, steps = cfg.schedule, cfg.train.steps
    if step >= steps:
        if schedule.after_end == "refuse":
            raise ValueError(
                f"step {step} is past the end of a schedule of train.steps={steps}; train for more steps, "
                "or set schedule.after_end='hold' to keep the final rate"
            )
        step = steps
    if "." in schedule.name:
        return exported("schedule.name", schedule.name, "multiplier")(schedule, steps, step)
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps  # the paper's s/W with s counted from 1, so that no update is wasted
    match schedule.name:
        case "constant":
            return 1.0
        case "wsd":
            return _decay(schedule, step, decay_start(cfg), decay_steps(cfg))
        case "wsd_s":
            return _decay(schedule, step, _period_end(cfg, step) - decay_steps(cfg), decay_steps(cfg))
    x = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    falling = 1 - x if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * x))
    return schedule.final_ratio + (1 - schedule.final_ratio) * falling


def _decay(schedule: ScheduleConfig, step: int, start: int, length: int) -> float:
    # x = 0 at the first step of the decay and 1 one step past its last, as Hägele et al. write it: a run ends on the
    # last rate above the floor, and no update is made at a rate of 0.
    return 1.0 if step < start else decay_multiplier(schedule, (step - start) / length, length)


def _period_end(cfg: RunConfig, step: int) -> int:
    """Where the wsd_s period that `step` is in ends; of a step past the run, the run's end."""
    return next((end for end in cfg.schedule.period_ends if step < end), cfg.train.steps)


def phase(cfg: RunConfig, step: int) -> str:
    """`warmup`, `stable` or `decay`: what the rate was doing at `step`."""
    if step < cfg.schedule.warmup_steps:
        return "warmup"
    if cfg.schedule.name == "constant":
        return "stable"
    if cfg.schedule.name == "wsd":
        return "stable" if step < decay_start(cfg) else "decay"
    if cfg.schedule.name == "wsd_s":
        return "stable" if step < _period_end(cfg, step) - decay_steps(cfg) else "decay"
    return "decay"


def multipliers(cfg: RunConfig, first: int, last: int) -> np.ndarray:
    """float32 [last - first]: the multipliers of steps first..last-1."""
    return np.array([multiplier(cfg, step) for step in range(first, last)], np.float32)
