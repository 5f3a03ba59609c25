"""slmjax train --config=FILE[:ARG] [--config.a.b=value ...] --out=DIR [--distributed]

Trains one run in DIR/<run_id>. The run's name is a hash of its config: the same command resumes what it began, and does
nothing once the run is finished. Ctrl-C or SIGTERM saves and exits with 3; another Ctrl-C ends at once.

With --distributed the same command runs in several processes, whose devices share one batch: srun starts them, or you
do with JAX_COORDINATOR_ADDRESS=HOST:PORT JAX_NUM_PROCESSES=N JAX_PROCESS_ID=0..N-1. DIR is a folder they share.
"""

from pathlib import Path

from absl.flags import FlagValues

from slmjax import environment, records
from slmjax.cli import options
from slmjax.config import ConfigError
from slmjax.study import Run


def define(flag_values: FlagValues) -> None:
    options.define_config(flag_values)
    options.define_out(flag_values)
    options.define_json(flag_values)
    options.define_distributed(flag_values)


def run(flags: FlagValues, args: list[str]) -> int:
    if args:
        raise ConfigError(f"train takes no argument {args[0]!r}; write --config={args[0]}")
    run, folder = Run(options.config_of(flags)), Path(flags.out)
    if (folder / run.run_id / "DONE").exists() and not flags.distributed:
        return _tell(folder / run.run_id, True, 0, flags.json)
    environment.prepare()
    with options.joined(flags):
        from slmjax import processes, train

        def report() -> int:
            return _tell(folder / run.run_id, finished, exit_code, flags.json)

        finished = (folder / run.run_id / "DONE").exists()
        exit_code = train.train_pack([run], folder).exit_code
        return processes.of_first(report)


def _tell(run_dir: Path, finished_before: bool, exit_code: int, as_json: bool) -> int:
    told = records.load_run(run_dir)
    end = told.end or {}
    if as_json:
        options.print_json({"run_id": told.run_id, "folder": str(run_dir), **end})
    elif told.done:
        began = "was finished already" if finished_before else "is done"
        bits = f", {end['bits_per_byte']:.4f} bits per byte" if end["bits_per_byte"] is not None else ""
        print(f"{run_dir} {began}: {end['step']} steps, held-out loss {end['loss']:.4f}{bits}")
    elif end.get("status") == "preempted":
        print(f"{run_dir} is saved at step {end['step']}; the same command goes on from there")
    elif end.get("status") == "failed" and end["reason"].startswith(("ConfigError:", "DataError:")):
        return 2  # said already, when it failed
    return exit_code
