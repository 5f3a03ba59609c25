"""slmjax study ACTION --study=FILE[:ARG] --out=DIR, or --study=DIR/NAME for a study that has been run

plan          runs with N, D and FLOPs, how many programs are compiled, what it costs; nothing runs
run           trains what is left to train; run it again to go on where it stopped
status        a table of the runs, from their folders
compare       final losses of one tag against another, e.g. --rows=width --columns=lr, and what each column cost
logs RUN_ID   what a run has recorded (the beginning of its id will do)
cancel        asks what is running here to save and stop
report        fits a law to each model family, compares them, and writes report.html, fit.json and figures
"""

import difflib
from pathlib import Path

from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax import records
from slmjax.cli import options
from slmjax.config import ConfigError
from slmjax.scaling import families, show

ACTIONS = ("plan", "run", "status", "compare", "logs", "cancel", "report")
STYLES = {"done": "green", "running": "cyan", "failed": "red", "diverged": "red", "killed": "red"}


def define(flag_values: FlagValues) -> None:
    absl_flags.DEFINE_string("study", None, "study: FILE.py[:ARG], a name, or its folder", flag_values=flag_values)
    options.define_out(flag_values)
    options.define_json(flag_values)
    absl_flags.DEFINE_integer("jobs", 1, "run: programs to train at a time, each on its share of the cores",
                              flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_float("flops_per_s", None, "plan: measured speed, for the time it will take",
                            flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_float("tokens_per_s", None, "plan: the same, in tokens", flag_values=flag_values)
    absl_flags.DEFINE_list("budgets", None, "report: FLOPs to forecast for, e.g. 1e18,1e19", flag_values=flag_values)
    absl_flags.DEFINE_string("rows", None, "compare: tag whose values are rows", flag_values=flag_values)
    absl_flags.DEFINE_string("columns", None, "compare: tag whose values are columns", flag_values=flag_values)
    absl_flags.DEFINE_boolean("follow", False, "logs: wait for more until the run ends", flag_values=flag_values)


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
    if Path(flags.study).is_dir():
        raise ConfigError(f"--study={flags.study} is a folder; planning and running need the study's file")
    return options.load_study(flags.study)


def _folder(flags: FlagValues) -> Path:
    """The study's folder, given itself or by its file."""
    folder = Path(flags.study)
    if not folder.is_dir():
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
    from slmjax.launchers import local

    source = _source(flags)
    exit_code = local.run(source, Path(flags.out), flags.jobs)
    folder = Path(flags.out) / source.name
    _show_status(folder, flags.json)
    if not flags.json:
        print(f"records, checkpoints and logs: {folder}")
        if exit_code == 3:
            print("stopped with everything saved; the same command goes on")
    return exit_code


def _status(flags: FlagValues) -> int:
    _show_status(_folder(flags), flags.json)
    return 0


def _show_status(folder: Path, as_json: bool) -> None:
    from slmjax.launchers import status

    rows = status.study_status(folder)
    if as_json:
        options.print_json([row.to_json() for row in rows])
        return
    table = [
        {
            "run": row.run_id,
            "tags": _tags(row.tags),
            "state": row.state,
            "step": f"{row.step}/{row.total_steps}" if row.step is not None else "-",
            "loss": f"{row.loss:.4f}" if row.loss is not None else "-",
            "bits/byte": f"{row.bits_per_byte:.4f}" if row.bits_per_byte is not None else "-",
            "tok/s": f"{row.tokens_per_s:,}" if row.tokens_per_s else "-",
            "heartbeat": show.duration(row.heartbeat_s) if row.state in ("running", "killed") else "-",
            "attempts": str(row.attempts),
            "reason": row.reason or "",
        }
        for row in rows
    ]
    options.print_table(table, left=("run", "tags", "state", "reason"), styles=STYLES)
    states = [row.state for row in rows]
    print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) + f" of {len(rows)} runs")


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

    folder = _folder(flags)
    run_id = status.find_run(folder, prefix).run_id
    for line in logs.lines(folder / run_id, as_json=flags.json, follow=flags.follow):
        print(line, flush=True)
    return 0


def _cancel(flags: FlagValues) -> int:
    from slmjax.launchers import status

    pids = status.cancel(_folder(flags))
    print(f"asked to save and stop: pid {', '.join(map(str, pids))}" if pids else "nothing is running here")
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

    folder = _folder(flags)
    budgets = [float(budget) for budget in flags.budgets] if flags.budgets else None
    name = records.read_json(folder / "study.json")["name"]
    command = f"slmjax study report --study={folder}" + (f" --budgets={','.join(flags.budgets)}" if budgets else "")
    path = write_report(folder, budgets=budgets, command=command)
    if flags.json:
        options.print_json({"name": name, "report": str(path), **_fits(folder)})
    else:
        print(f"report: {path}")
    return 0
