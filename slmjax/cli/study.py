"""slmjax study ACTION --study=FILE[:ARG] --out=DIR, or --study=DIR/NAME for a study that has been run

plan          runs with N, D and FLOPs, how many programs are compiled, what it costs; nothing runs
run           trains what is left to train, here or --on a cluster; run it again to go on where it stopped
status        a table of the runs, from their folders, and why some failed; --watch keeps it on the screen
compare       final losses of one tag against another, e.g. --rows=width --columns=lr, and what each column cost
logs RUN_ID   what a run has recorded (the beginning of its id will do)
cancel        asks what is running, here or on a cluster, to save and stop
pull          brings a study's records home from gs://, s3://, HOST:PATH or a mounted folder; again: only what is new
report        fits a law to each model family, compares them, and writes report.html, fit.json and figures

status, compare and logs read a study in an object store too: --study=gs://BUCKET/.../NAME.
"""

import difflib
import subprocess
import sys
from pathlib import Path

from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax import paths, records
from slmjax.cli import options
from slmjax.config import ConfigError
from slmjax.launchers import backends
from slmjax.launchers.backend import Backend, BackendError
from slmjax.scaling import families, show

ACTIONS = ("plan", "run", "status", "compare", "logs", "cancel", "pull", "report")


def define(flag_values: FlagValues) -> None:
    absl_flags.DEFINE_string("study", None, "study: FILE.py[:ARG], a name, or its folder", flag_values=flag_values)
    options.define_out(flag_values)
    options.define_json(flag_values)
    absl_flags.DEFINE_string("on", "local", "run: where, " + ", ".join(backends.BACKENDS), flag_values=flag_values)
    absl_flags.DEFINE_integer("jobs", None, "run: packs to train at a time; local: 1, each on its share of the machine",
                              lower_bound=1, flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_string("script", None, "run: what a cluster is given for each pack, from launch/",
                             flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_integer("chains_per_pack", 1, "run, on a cluster: trunks with their branches, or single runs, "
                              "that one process trains", lower_bound=1, flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_integer("devices_per_node", None, "run, on Slurm: more nodes for a mesh of more devices",
                              lower_bound=1, flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_string("arguments", "", "run: more of them for sbatch, as one string", flag_values=flag_values)
    absl_flags.DEFINE_string("mirror", None, "run, on sky and tpu: the study's copy in a store, gs://BUCKET/.../NAME",
                             flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_boolean("dry_run", False, "run: print what would be started, and where", flag_values=flag_values)
    absl_flags.DEFINE_float("device_hours", None, "run: stop the study once it has cost this much",
                            flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_boolean("watch", False, "run, status: stay until everything has ended", flag_values=flag_values)
    absl_flags.DEFINE_float("flops_per_s", None, "plan: measured speed, for the time it will take",
                            flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_float("tokens_per_s", None, "plan: the same, in tokens", flag_values=flag_values)
    absl_flags.DEFINE_list("budgets", None, "report: FLOPs to forecast for, e.g. 1e18,1e19", flag_values=flag_values)
    absl_flags.DEFINE_string("rows", None, "compare: tag whose values are rows", flag_values=flag_values)
    absl_flags.DEFINE_string("columns", None, "compare: tag whose values are columns", flag_values=flag_values)
    absl_flags.DEFINE_boolean("tensorboard", False, "pull: event files too", flag_values=flag_values)
    absl_flags.DEFINE_boolean("follow", False, "logs: wait for more until the run ends", short_name="f",
                              flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_boolean("output", False, "logs: what the run's process has printed", flag_values=flag_values)


def run(flags: FlagValues, args: list[str]) -> int:
    if not args or args[0] not in ACTIONS:
        near = difflib.get_close_matches(args[0], ACTIONS, 1) if args else []
        hint = f"did you mean {near[0]!r}?" if near else f"actions: {', '.join(ACTIONS)}"
        raise ConfigError(f"study {args[0]!r} is not known; {hint}" if args else f"study needs an action; {hint}")
    action, *rest = args
    if len(rest) != (action == "logs"):
        raise ConfigError(f"study {action} takes {'one RUN_ID' if action == 'logs' else 'no further argument'}: {rest}")
    if flags.study is None:
        raise ConfigError("--study=FILE[:ARG] is needed, or --study=DIR/NAME for a study that has been run")
    return globals()[f"_{action}"](flags, *rest)


def _source(flags: FlagValues):
    if "://" in flags.study or Path(flags.study).is_dir():
        raise ConfigError(f"--study={flags.study} is a folder; planning and running need the study's file")
    return options.load_study(flags.study)


def _folder(flags: FlagValues, here: str = "") -> paths.Path:
    """The study's folder, given itself or by its file. here: what needs it on this machine, if anything does."""
    folder = paths.as_path(flags.study)
    if paths.is_remote(folder) and here:
        raise ConfigError(
            f"{here} the study's folder on this machine; first: slmjax study pull --study={flags.study} --out=DIR"
        )
    if not paths.is_remote(folder) and not folder.is_dir():
        folder = Path(flags.out) / options.load_study(flags.study).name
    if not (folder / "study.json").exists():
        raise ConfigError(f"{folder} is not a study folder: it has no study.json; slmjax study run makes one")
    return folder


def _tags(tags: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in tags.items())


def _plan(flags: FlagValues) -> int:
    from slmjax.launchers.plan import make_plan

    plan = make_plan(_source(flags))
    seconds = plan.seconds(flags.flops_per_s, flags.tokens_per_s)
    if flags.json:
        options.print_json(plan.to_json() | {"seconds": seconds})
        return 0
    programs = list(dict.fromkeys(run.program_id for run in plan.runs))
    sparse = any(run.N_total != run.N for run in plan.runs)
    rows = [
        {
            "run": run.run_id,
            "tags": _tags(run.tags),
            "N": show.count(run.N),
            **({"N total": show.count(run.N_total)} if sparse else {}),
            "D": show.count(run.D),
            "D/N": f"{run.tokens_per_param:.3g}",
            "C": f"{run.C:.2e}",
            "steps": f"{run.first_step}-{run.steps}",
            "own FLOPs": f"{run.own_flops:.2e}",
            "program": str(programs.index(run.program_id) + 1),
        }
        for run in plan.runs
    ]
    options.print_table(rows, left=("run", "tags"))
    print(f"{plan.name}: {len(plan.runs)} runs, {plan.programs} programs to compile")
    print(f"cost: {plan.own_flops:.3e} FLOPs, {show.count(plan.own_tokens)} tokens")
    print(f"memory: up to {plan.most_state_bytes / 1e6:.3g} MB of weights, gradients and optimizer state a run")
    if plan.separate_flops:
        share = plan.branched_flops / plan.separate_flops
        print(
            f"trunks and branches: {plan.branched_flops:.3e} FLOPs, {share:.0%} of training each branch from its start"
        )
    if seconds:
        print(f"time: {show.duration(seconds)} of training at this speed, compilation apart")
    return 0


def _run(flags: FlagValues) -> int:
    from slmjax.launchers import budget, driver, table

    source = _source(flags)
    folder = Path(flags.out) / source.name
    place = _backend(flags, folder)
    if flags.dry_run:
        print("\n".join(driver.preview(source, folder, place)))
        return 0
    source.save(Path(flags.out))
    if flags.device_hours is not None:
        budget.set_bound(folder, flags.device_hours)
    try:
        exit_code = driver.run(source, folder, place, watch=flags.watch)
    except BackendError as error:
        print(f"slmjax study: {error}", file=sys.stderr)
        return 1
    _show_status(table.look(folder), flags.json)
    if not flags.json:
        print(f"records, checkpoints and logs: {folder}")
        if exit_code == 3:
            stopped = "stopped with everything saved; the same command goes on"
            left = "left; what is handed over goes on, and the same command watches it again"
            print(budget.exceeded(folder) or (stopped if place.attached else left))
    return exit_code


def _backend(flags: FlagValues, folder: Path) -> Backend:
    """What --on names, with the flags that are for it; a flag of another one is refused."""
    given = {
        "jobs": flags.jobs,
        "script": Path(flags.script) if flags.script else None,
        "chains_per_pack": flags.chains_per_pack,
        "devices_per_node": flags.devices_per_node,
        "arguments": flags.arguments,
        "mirror": flags.mirror,
    }
    backends.check_name(flags.on)
    of_cluster = ("jobs", "script", "chains_per_pack", "arguments")
    takes = {"local": ("jobs",), "slurm": (*of_cluster, "devices_per_node")}.get(flags.on, (*of_cluster, "mirror"))
    for name in given:
        if name not in takes and flags[name].present:
            raise ConfigError(f"--{name} means nothing with --on={flags.on}, which takes --{', --'.join(takes)}")
    options = {name: given[name] for name in takes if given[name] is not None}
    return backends.open_backend(flags.on, folder, **options)


def _status(flags: FlagValues) -> int:
    from slmjax.launchers import table

    folder = _folder(flags)
    if not flags.watch:
        _show_status(table.look(folder), flags.json)
        return 0
    if flags.json:
        raise ConfigError("study status --json tells once; leave out --watch, or look again as often as is needed")

    def make_table(rows):
        return options.make_table(rows, table.LEFT, table.STYLES)

    table.watch(folder, make_table, lambda seen: _show_status(seen, as_json=False))
    return 0


def _show_status(look, as_json: bool) -> None:
    from slmjax.launchers import table

    if as_json:
        options.print_json([table.to_json(row) for row in look.rows])
        return
    options.print_table(look.shown, left=table.LEFT, styles=table.STYLES)
    print("\n".join(look.notes))


def _compare(flags: FlagValues) -> int:
    from slmjax.launchers.compare import compare

    if not flags.rows or not flags.columns:
        raise ConfigError("study compare needs two tags: --rows=TAG --columns=TAG")
    table = compare(_folder(flags), flags.rows, flags.columns)
    if flags.json:
        options.print_json(table.to_json())
        return 0
    best = table.best()
    # A bound beside a loss, or beside another bound, is told from one.
    heads = {
        column: f"{flags.columns}={column}" + ("" if kind == "exact" else f" ({kind})")
        for column, kind in table.loss_kinds.items()
    }
    lines = []
    for row in table.row_values:
        line, first = {flags.rows: str(row)}, table.losses.get((row, table.column_values[0]))
        for column in table.column_values:
            loss = table.losses.get((row, column))
            relative = f" {loss[0] / first[0] - 1:+.2%}" if loss and first and column != table.column_values[0] else ""
            cell = f"{loss[0]:.4f}{relative}{' *' if best.get(row) == column else '  '}" if loss else "-"
            line[heads[column]] = cell
        lines.append(line)
    less = {heads[c]: f"{mean:+.4f} ± {se:.4f}  " for c, (mean, se) in table.differences().items()}
    if less:
        lines.append({flags.rows: "mean difference", **{key: less.get(key, "-") for key in list(lines[0])[1:]}})
    costs = {heads[column]: f"{flops:.3e}  " for column, flops in table.flops.items() if column in heads}
    lines.append({flags.rows: "FLOPs", **{key: costs.get(key, "-") for key in list(lines[0])[1:]}})
    options.print_table(lines)
    print("held-out loss in nats per token, relative to the first column; * the lowest of its row")
    if "bound" in {*table.loss_kinds.values()}:
        print("(bound): an upper bound on the loss")
    if less:
        print(f"mean difference to the first column over {flags.rows}, ± its standard error over these rows")
    return 0


def _logs(flags: FlagValues, prefix: str) -> int:
    from slmjax.launchers import logs, status

    folder = _folder(flags, here="study logs --output needs" if flags.output else "")
    run_id = status.find_run(folder, prefix).run_id
    if flags.output:
        command = backends.output_command(folder, run_id, flags.follow)
        return subprocess.run(command).returncode
    for line in logs.lines(folder / run_id, as_json=flags.json, follow=flags.follow):
        print(line, flush=True)
    return 0


def _cancel(flags: FlagValues) -> int:
    try:
        asked = backends.cancel(_folder(flags, here="study cancel needs"))
    except BackendError as error:
        print(f"slmjax study: {error}", file=sys.stderr)
        return 1
    print(f"asked to save and stop: {', '.join(asked)}" if asked else "nothing is running")
    return 0


def _pull(flags: FlagValues) -> int:
    from slmjax.launchers import pull, rsync

    if rsync.is_ssh(flags.study) and not Path(flags.study).is_dir():
        pulled = rsync.pull(flags.study, Path(flags.out), flags.tensorboard)
    else:
        pulled = pull.pull(paths.as_path(flags.study.rstrip("/")), Path(flags.out), flags.tensorboard)
    if flags.json:
        options.print_json(vars(pulled) | {"folder": str(pulled.folder)})
        return 0
    new, missing = pulled.runs - pulled.finished, len(pulled.missing)
    begun = f"; {missing} have not begun" if missing else ""
    print(
        f"{pulled.folder}: {pulled.runs} runs, {pulled.finished} of them complete here before, {new} looked at{begun}"
    )
    print(f"{pulled.files} files came, {show.count(pulled.bytes)} bytes")
    print(f"next: slmjax fit {pulled.folder}")
    return 0


def _fits(folder: Path) -> dict:
    """The fits that a report has left in the folder: where, of which kind of loss, and how the families compare."""
    fit, further = folder / "fit.json", sorted(folder.glob("fit-*.json"))
    said = {"fit": str(fit)} | ({"further_fits": [str(file) for file in further]} if further else {})
    compared = records.read_json(families.comparisons_file(fit))
    if compared is not None:
        return said | compared
    conventions = (records.read_json(fit) or {}).get("conventions", {})
    return said | {"loss_kinds": {conventions.get("family"): conventions.get("loss_kind")} if conventions else {}}


def _report(flags: FlagValues) -> int:
    from slmjax.scaling.report import write_report

    folder = _folder(flags, here="study report needs")
    budgets = [float(budget) for budget in flags.budgets] if flags.budgets else None
    name = records.read_json(folder / "study.json")["name"]
    command = f"slmjax study report --study={folder}" + (f" --budgets={','.join(flags.budgets)}" if budgets else "")
    path = write_report(folder, budgets=budgets, command=command)
    if flags.json:
        options.print_json({"name": name, "report": str(path), **_fits(folder)})
    else:
        print(f"report: {path}")
    return 0
