"""slmjax bench [--config=FILE[:ARG] [--config.a.b=value ...]] [--seconds=20] [--json]

How fast a config trains on this machine, against plain JAX (a jitted step without slmjax, in a process of its own with
JAX's own settings), measured in turn in one call: tokens per second, time per step, seconds to compile with an empty
and a filled cache, memory of a step, and the share of the best matrix product that the machine was seen to do. Without
--config, four small shapes: `a`, where the vocabulary dominates, `s`, a wind tunnel's cell, `e`, 8 experts with 2
active, and `m`, masked diffusion. A model with experts is also compared with the dense one of equal active parameters,
an objective that hides tokens with next-token prediction on the same model.
"""

from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax import environment
from slmjax.cli import options
from slmjax.config import ConfigError

BUILTIN = ("a", "s", "e", "m")


def define(flag_values: FlagValues) -> None:
    options.define_config(flag_values)
    options.define_json(flag_values)
    absl_flags.DEFINE_float("seconds", 20.0, "to train for, compilation apart", lower_bound=1.0,
                            flag_values=flag_values)  # fmt: skip


def run(flags: FlagValues, args: list[str]) -> int:
    if args:
        raise ConfigError(f"bench takes no argument {args[0]!r}; write --config={args[0]}")
    given = options.config_of(flags) if flags["config"].value is not None else None
    environment.prepare()
    from slmjax import bench

    configs = {"config": given} if given else {name: bench.builtin(name) for name in BUILTIN}
    results = []
    for name, cfg in configs.items():
        results.append(bench.measure(cfg, name, flags.seconds / len(configs)))
        if not flags.json:
            _show(results[-1])
    if flags.json:
        options.print_json([result.to_json() for result in results])
    return 0


def _show(result) -> None:
    pages = "huge pages" if result.huge_pages else "no huge pages"
    print(
        f"{result.name}: {result.num_devices} x {result.device}, {result.cores} cores, {pages}; "
        f"best matrix product {result.peak_gflop_per_s:.0f} GFLOP/s ({result.peak_by})"
    )
    rows = [
        {
            "": row.what,
            "tok/s": f"{row.tokens_per_s:,.0f}",
            "ms/step": f"{row.ms_per_step:.2f}",
            "x plain JAX": f"{row.ratio:.2f}",
            **({"x dense": f"{row.dense_ratio:.2f}"} if row.dense_ratio else {}),
            **({"x next token": f"{row.causal_ratio:.2f}"} if row.causal_ratio else {}),
            "GFLOP/s": f"{row.gflop_per_s:.1f}",
            "of peak": f"{row.peak_share:.0%}",
            "compile s": f"{row.compile_cold_s:.1f}",
            "from cache s": f"{row.compile_warm_s:.1f}",
            "step MB": f"{row.step_mb:.0f}",
        }
        | ({"MFU": f"{row.mfu:.1%}"} if row.mfu else {})
        for row in result.rows
    ]
    options.print_table(rows, left=("",))
