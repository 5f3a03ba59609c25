"""Where a run's decay begins, and how much of two runs is one computation."""

from slmjax.config.fields import RunConfig
from slmjax.config.keys import flatten


def decay_steps(cfg: RunConfig) -> int:
    """Length of a decay in steps; 0 for schedules without one."""
    if cfg.schedule.name not in ("wsd", "wsd_s"):
        return 0
    span = cfg.train.steps if cfg.schedule.name == "wsd" else min(cfg.schedule.period_ends or (cfg.train.steps,))
    return cfg.schedule.decay_steps or max(1, round(cfg.schedule.decay_fraction * span))


def decay_start(cfg: RunConfig) -> int:
    """First step of the final decay: where a branch leaves its trunk. train.steps when nothing decays."""
    return cfg.train.steps - decay_steps(cfg)


def shared_steps(a: RunConfig, b: RunConfig) -> int:
    """How many first steps of two runs are the same computation: what one may take from the other's checkpoints.

    A WSD run, its trunk and every other branch of that trunk agree until the first of their decays begins (MiniCPM,
    2404.06395, section 4.2); runs that differ in anything else share nothing.
    """
    may_differ = ("train.steps", "train.eval_sequences", "data.decay_weights", "optim.max_skips")
    flat_a, flat_b = ({k: v for k, v in flatten(c).items() if k not in may_differ} for c in (a, b))
    same = {k: v for k, v in flat_a.items() if not k.startswith(("schedule.", "mesh.", "log."))}
    if any(flat_b[k] != v for k, v in same.items()) or a.schedule.warmup_steps != b.schedule.warmup_steps:
        return 0
    if not {a.schedule.name, b.schedule.name} <= {"constant", "wsd"}:
        return 0
    return min(decay_start(a), decay_start(b))
