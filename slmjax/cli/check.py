"""slmjax check coord --config=FILE[:ARG] [--widths=64,128,256] [--depths=2,4,8] [--plot=FILE.png]

Trains a few steps at several widths and depths and looks whether activations keep their size, as they must for a
learning rate to transfer. Exit code 1 when one does not.
"""

from pathlib import Path

from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax import environment
from slmjax.cli import options
from slmjax.config import ConfigError

KINDS = ("coord",)


def define(flag_values: FlagValues) -> None:
    options.define_config(flag_values)
    options.define_json(flag_values)
    absl_flags.DEFINE_list("widths", ["64", "128", "256", "512"], "to compare; empty: none", flag_values=flag_values)
    absl_flags.DEFINE_list("depths", [], "to compare; empty: none", flag_values=flag_values)
    absl_flags.DEFINE_integer("steps", 5, "updates at each size", flag_values=flag_values)
    absl_flags.DEFINE_integer("seeds", 3, "to average over", flag_values=flag_values)
    absl_flags.DEFINE_float("tolerance", 0.1, "largest slope of log activation against log size",
                            flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_string("plot", None, "file for a figure", flag_values=flag_values)


def run(flags: FlagValues, args: list[str]) -> int:
    if args != ["coord"]:
        raise ConfigError(f"check {' '.join(args)!r} is not known; checks: {', '.join(KINDS)}")
    cfg = options.config_of(flags)
    wanted = [(axis, _sizes(axis, getattr(flags, f"{axis}s"))) for axis in ("width", "depth")]
    wanted = [(axis, sizes) for axis, sizes in wanted if sizes]
    if not wanted:
        raise ConfigError("check coord needs --widths, --depths, or both")
    environment.prepare(num_devices=1)
    from slmjax import check

    checks = [check.coordinates(cfg, axis, sizes, flags.steps, flags.seeds) for axis, sizes in wanted]
    failed = {each.axis: each.failures(flags.tolerance) for each in checks}
    if flags.json:
        options.print_json({"failures": failed, "tolerance": flags.tolerance})
    else:
        print("\n\n".join(each.table(flags.tolerance) for each in checks))
    if flags.plot:
        check.plot(checks, Path(flags.plot), f"{cfg.model.parametrization.name}: mean |activation|")
    return int(any(failed.values()))


def _sizes(axis: str, entries: list[str]) -> tuple[int, ...]:
    """Two sizes or more, ascending; none when the flag is empty."""
    sizes = sorted({int(entry) for entry in entries if entry.isdigit() and int(entry)})
    if len(sizes) != len([entry for entry in entries if entry]) or len(sizes) == 1:
        raise ConfigError(f"--{axis}s={','.join(entries)} must be two or more different sizes, e.g. 64,128,256")
    return tuple(sizes)
