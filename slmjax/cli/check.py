"""slmjax check coord --config=FILE[:ARG] [--widths=64,128,256] [--depths=2,4,8] [--plot=FILE.png]
slmjax check reversal [--pairs=64] [--out=OUT]
slmjax check parallel [--tasks=copy,shuffle] [--items=4] [--out=OUT]

Whether a claim holds, by training something small; exit code 1 when it does not.

coord      trains a few steps at several widths and depths and looks whether activations keep their size, as they must
           for a learning rate to transfer
reversal   teaches pairs (A, B) to three models and asks for A given B: masked diffusion recalls it, autoregression is
           at chance
parallel   ParallelBench in small: what filling several tokens a call costs a trained masked-diffusion model, beside
           what it costs perfect marginals
"""

from pathlib import Path

from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax import environment
from slmjax.cli import options
from slmjax.config import ConfigError

STEPS = {"coord": 5, "reversal": 2000, "parallel": 3000}
READS = {  # beside steps and json
    "coord": ("config", "widths", "depths", "seeds", "tolerance", "plot"),
    "reversal": ("pairs", "out", "seed"),
    "parallel": ("tasks", "items", "out", "seed"),
}


def define(flag_values: FlagValues) -> None:
    options.define_config(flag_values)
    options.define_json(flag_values)
    options.define_out(flag_values)
    integer = absl_flags.DEFINE_integer
    absl_flags.DEFINE_list("widths", ["64", "128", "256", "512"], "to compare; empty: none", flag_values=flag_values)
    absl_flags.DEFINE_list("depths", [], "to compare; empty: none", flag_values=flag_values)
    integer("steps", None, f"updates ({', '.join(f'{k}: {v}' for k, v in STEPS.items())})", flag_values=flag_values)
    integer("seeds", 3, "to average over", flag_values=flag_values)
    absl_flags.DEFINE_float("tolerance", 0.1, "largest slope of log activation against log size",
                            flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_string("plot", None, "file for a figure", flag_values=flag_values)
    integer("pairs", 64, "to learn", lower_bound=2, upper_bound=4096, flag_values=flag_values)
    absl_flags.DEFINE_list("tasks", ["copy", "reverse", "sort", "replace_index", "shuffle"], "of ParallelBench",
                           flag_values=flag_values)  # fmt: skip
    integer("items", 4, "in a waiting line", lower_bound=2, upper_bound=16, flag_values=flag_values)
    integer("seed", 0, "of what is learnt and of the models", lower_bound=0, flag_values=flag_values)


def run(flags: FlagValues, args: list[str]) -> int:
    if len(args) != 1 or args[0] not in READS:
        raise ConfigError(f"check {' '.join(args)!r} is not known; checks: {', '.join(READS)}")
    (kind,) = args
    for name in {name for names in READS.values() for name in names} - set(READS[kind]):
        if flags[name].present:
            raise ConfigError(f"--{name} has no effect on check {kind}, which reads --{', --'.join(READS[kind])}")
    steps = STEPS[kind] if flags.steps is None else flags.steps
    if steps < 1:
        raise ConfigError(f"--steps={steps} must be at least 1")
    return {"coord": _coord, "reversal": _reversal, "parallel": _parallel}[kind](flags, steps)


def _coord(flags: FlagValues, steps: int) -> int:
    cfg = options.config_of(flags)
    wanted = [(axis, _sizes(axis, getattr(flags, f"{axis}s"))) for axis in ("width", "depth")]
    wanted = [(axis, sizes) for axis, sizes in wanted if sizes]
    if not wanted:
        raise ConfigError("check coord needs --widths, --depths, or both")
    environment.prepare(num_devices=1)
    from slmjax.check import coord

    checks = [coord.coordinates(cfg, axis, sizes, steps, flags.seeds) for axis, sizes in wanted]
    failed = {each.axis: each.failures(flags.tolerance) for each in checks}
    if flags.json:
        options.print_json({"failures": failed, "tolerance": flags.tolerance})
    else:
        print("\n\n".join(each.table(flags.tolerance) for each in checks))
    if flags.plot:
        coord.plot(checks, Path(flags.plot), f"{cfg.model.parametrization.name}: mean |activation|")
    return int(any(failed.values()))


def _sizes(axis: str, entries: list[str]) -> tuple[int, ...]:
    """Two sizes or more, ascending; none when the flag is empty."""
    sizes = sorted({int(entry) for entry in entries if entry.isdigit() and int(entry)})
    if len(sizes) != len([entry for entry in entries if entry]) or len(sizes) == 1:
        raise ConfigError(f"--{axis}s={','.join(entries)} must be two or more different sizes, e.g. 64,128,256")
    return tuple(sizes)


def _reversal(flags: FlagValues, steps: int) -> int:
    environment.prepare(num_devices=1)
    from slmjax.check import reversal

    rows = reversal.measure(f"pairs:{flags.pairs}:3:{flags.seed}", steps, Path(flags.out), flags.seed)
    if flags.json:
        options.print_json([row._asdict() for row in rows])
    else:
        table = [
            {
                "": row.model,
                "B given A": f"{row.forward:.1%}",
                "A given B": f"{row.reverse:.1%}",
                "chance": f"{row.chance:.1%}",
            }
            for row in rows
        ]
        options.print_table(table, left=("",))
    return int(not reversal.holds(rows))


def _parallel(flags: FlagValues, steps: int) -> int:
    from slmjax.data import waiting_line

    for task in flags.tasks:
        waiting_line.parse(f"line:{task}:{flags.items}:{flags.seed}")  # refuses what there is not
    environment.prepare(num_devices=1)
    from slmjax.check import parallel

    rows = parallel.measure(flags.tasks, flags.items, steps, Path(flags.out), flags.seed)
    if flags.json:
        options.print_json(
            [{"task": r.task, "per_call": r.per_call, **r.score._asdict(), "ideal": r.ideal} for r in rows]
        )
    else:
        table = [
            {
                "task": row.task,
                "tokens a call": str(row.per_call),
                "calls": str(row.score.calls),
                "valid": f"{row.score.accuracy:.3f} ± {row.score.accuracy_se:.3f}",
                "perfect marginals": "-" if row.ideal is None else f"{row.ideal:.3f}",
                "": "" if row.holds else "off",
            }
            for row in rows
        ]
        options.print_table(table, left=("task",))
    return int(not all(row.holds for row in rows))
