"""slmjax fit SOURCE ... [--columns=N=col,D=col,loss=col] [--json=FILE] [--report=FILE.html]  |  slmjax fit --verify=DIR

Fits a scaling law. A SOURCE is a study folder, a .csv, .tsv or .jsonl file, or a folder of TensorBoard event files.
--columns says what the columns of a table are, and works for files and event folders alike. An entry names a column or
a product of columns and numbers: N=params_m*1e6, D=step*batch_size*2048. loss and se may name a unit: loss=val:bits
(units: nats, bits, bits_per_byte, unigram_normalized). Beside N, D and loss: C, se, step, planned, epochs; family,
run_id, status, tokenizer, corpus, loss_kind; metric and value (a long table, one row per metric); any other name is an
input of the law, as U=unique_tokens or E=num_experts. In a tracker's wide export, columns called "RUN - METRIC" are
found by METRIC. run_id=file makes each file one run. Runs left out are listed with the reason.
--form=auto fits the law of N and D that forecasts best the larger runs hidden from it; the fit says by which margin.
--show adds tables: agreement (parametric, IsoFLOP and envelope side by side), choice (which form predicts larger runs
that it has not seen), diagnosis (outliers, influence, each size left out), profile (profile likelihood), backtest.
Runs of several model families (dense, moe, mdm) are fitted each alone, N counting active parameters, and compared: how
much more compute the first family needs for the loss of the other (leverage), or, where one family's loss is a bound as
masked diffusion's is, how much more that one needs (compute multiplier, itself a bound); --family fits one of them.
--json keeps the fit for slmjax forecast, that of a further family beside it (fit.json, fit-moe.json), and how they
compare (fit.comparisons.json); --json=- prints all. --report writes a page with figures beside it.
--verify computes published fits again from the public tables in DIR and says which numbers hold; exit 1 when one fails.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax.cli import options
from slmjax.config import ConfigError
from slmjax.scaling import families, laws, points, report, verify
from slmjax.scaling import fit as fitting

AUTO = "auto"


def define(flag_values: FlagValues) -> None:
    def string(name, default, text):
        absl_flags.DEFINE_string(name, default, text, flag_values=flag_values)

    string("form", "chinchilla", f"the law: {', '.join(laws.names())}; auto; or a dotted module that defines `law`")
    string(
        "n",
        None,
        f"what N counts: {', '.join(points.N_CONVENTIONS)}; a study's is non_embedding (of several families "
        "active_non_embedding), a table's unknown",
    )
    string("flops", None, f"what C counts: {', '.join(points.FLOPS_CONVENTIONS)}; a study's is with_head")
    string("family", None, "fit the runs of this model family alone")
    string("json", None, "file for the fit; - for standard output")
    string("report", None, "file for the report, e.g. report.html")
    string("published", None, "a label of the law's published parameters, to stand beside ours")
    string("verify", None, "folder of public tables: compute the published fits again")
    _define_points(flag_values, string)
    absl_flags.DEFINE_float("delta", 1e-3, "residual in log loss beyond which a point pulls with constant force",
                            flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_list("show", [], f"further tables: {', '.join(SHOWN)}", flag_values=flag_values)
    string("residual", None, "log or raw: of what residuals are taken; the law says when not given")
    string("weights", "equal", "equal, or se: by the evaluations' standard errors")
    string("resample", "run", "what the bootstrap draws: run, or ladder (all runs of a size together)")
    absl_flags.DEFINE_list("fixed", [], "parameters held, e.g. E=1.69,alpha=0.34", flag_values=flag_values)
    absl_flags.DEFINE_integer("bootstrap", 1000, "resamples for the intervals", flag_values=flag_values)
    absl_flags.DEFINE_integer("seed", 0, "of the resamples", flag_values=flag_values)


def _define_points(flag_values: FlagValues, string) -> None:
    """Flags on how runs become points, and which."""

    def texts(name, text):
        absl_flags.DEFINE_multi_string(name, [], f"{text} (repeatable)", flag_values=flag_values)

    absl_flags.DEFINE_list("columns", None, "of tables: N=column,D=column*number,loss=column:unit[,C=...,se=...]",
                           flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_list("mix", [], f"fit together though they differ in: {', '.join(points.MIXABLE)}",
                           flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_integer("drop_highest", 0, "leave out this many points of highest loss", flag_values=flag_values)
    string("rows", "last", f"which rows of a run with several are points: {', '.join(points.ROWS)}")
    string(
        "join", None, "FILE:COLUMN, a table with one row per run and the column of run ids, to stand beside each row"
    )
    texts("where", "only runs with column=value, or !=, <, <=, >, >=")
    texts("exclude", "leave out a run: RUN_ID=reason")


def run(flags: FlagValues, args: list[str]) -> int:
    if flags.verify is not None:
        return _verify(Path(flags.verify), args)
    if not args:
        raise ConfigError("fit needs a SOURCE: a study folder, a .csv or .jsonl file, or a folder of event files")
    for name in flags.show:
        if name not in SHOWN:
            raise ConfigError(f"--show={name}: there are {', '.join(SHOWN)}")
    if flags.report and len(args) == 1 and _is_study(args[0]):
        return _study_report(flags, args)
    point_set = _point_set(flags, args)
    if not flags.family and "family" not in flags.mix and len(point_set.families()) > 1:
        return _fit_families(flags, args, point_set)
    fitted = _fit(flags, point_set)
    if flags.json == "-":
        print(fitted.to_json(), end="")
        print(_left_out(point_set.excluded), end="", file=sys.stderr)
        return 0
    print(fitted.table(flags.published))
    print(_left_out(point_set.excluded), end="")
    for name in flags.show:
        print(f"{name}\n{SHOWN[name](point_set, fitted)}")
    print(f"command: {command(flags, args)}")
    if flags.json:
        options.write_text(flags.json, fitted.to_json())
        print(f"fit: {flags.json}")
    if flags.report:
        print(f"report: {report.write_fit_report(point_set, fitted, Path(flags.report), command(flags, args))}")
    return 0


def _fit_families(flags: FlagValues, args: list[str], point_set: points.PointSet) -> int:
    """Every family's fit, and what they say of each other."""
    found = families.fit_families(point_set, lambda of_family: _fit(flags, of_family))
    first = next(iter(found.points))
    nothing = not found.fits and all(isinstance(comparison.pairs, str) for comparison in found.comparisons)
    if nothing or ((flags.report or flags.json) and first in found.refusals):
        raise ConfigError("; ".join(f"{name}: {why}" for name, why in found.refusals.items()))
    if flags.json == "-":
        fits = {name: json.loads(fitted.to_json()) for name, fitted in found.fits.items()}
        options.print_json({"fits": fits, **found.to_json()})
        print(_left_out(point_set.excluded), end="", file=sys.stderr)
        return 0
    for name, of_family in found.points.items():
        if name in found.refusals:
            print(f"family {found.labels[name]}: no fit: {found.refusals[name]}\n")
            continue
        print(f"family {found.labels[name]}\n{found.fits[name].table(flags.published)}")
        for further in flags.show:
            print(f"{further}\n{SHOWN[further](of_family, found.fits[name])}")
    print(_left_out(point_set.excluded), end="")
    for comparison in found.comparisons:
        print(comparison.table())
    print(f"command: {command(flags, args)}")
    if flags.json:
        for name, fitted in found.fits.items():
            target = flags.json if name == first else families.family_file(flags.json, name)
            options.write_text(target, fitted.to_json())
            print(f"fit of {name}: {target}")
        target = families.comparisons_file(flags.json)
        options.write_text(target, json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n")
        print(f"comparisons: {target}")
    if flags.report:
        page = report.write_fit_report(found.points[first], found.fits[first], Path(flags.report),
                                       command(flags, args), compared=found)  # fmt: skip
        print(f"report: {page}")
    return 0


def _fit(flags: FlagValues, point_set: points.PointSet) -> fitting.Fit:
    """The fit of the law that is named, or of the one chosen; its notes say by which margin."""
    options = {"weights": flags.weights, "resample": flags.resample, "fixed": _fixed(flags.fixed)}
    if flags.residual is not None:
        options["residual"] = flags.residual
    if flags.form != AUTO:
        return fitting.fit(point_set, flags.form, flags.delta, flags.bootstrap, flags.seed, **options)
    from slmjax.scaling.choose import fit_chosen

    return fit_chosen(point_set, delta=flags.delta, seed=flags.seed, num_bootstrap=flags.bootstrap, **options)[0]


# --- further tables: (points, fit) → text; what they need is imported when they are asked for ------------------------


def _agreement(point_set: points.PointSet, fitted: fitting.Fit) -> str:
    from slmjax.scaling import agreement, envelope, isoflop

    methods, missing = [fitted], []
    for name, made in (
        ("IsoFLOP, Akima", lambda: isoflop.isoflop(point_set, "akima")),
        ("IsoFLOP, parabola", lambda: isoflop.isoflop(point_set, "parabola")),
        ("envelope", lambda: envelope.envelope(envelope.curves_of_points(point_set))),
    ):
        try:
            methods.append(made())
        except ValueError as error:  # these runs do not allow it: said, and the others are shown
            missing.append(f"{name}: {error}\n")
    return agreement.compare(methods).table() + "".join(missing)


def _choice(point_set: points.PointSet, fitted: fitting.Fit) -> str:
    from slmjax.scaling.choose import choose

    return choose(point_set, delta=fitted.delta, seed=fitted.seed).table()


def _diagnosis(point_set: points.PointSet, fitted: fitting.Fit) -> str:
    from slmjax.scaling.diagnose import diagnose

    return diagnose(fitted).table()


def _profile(point_set: points.PointSet, fitted: fitting.Fit) -> str:
    from slmjax.scaling.profile import profile

    return profile(fitted).table()


def _backtest(point_set: points.PointSet, fitted: fitting.Fit) -> str:
    from slmjax.scaling.backtest import back_test

    return back_test(fitted).table()


SHOWN = {
    "agreement": _agreement,
    "choice": _choice,
    "diagnosis": _diagnosis,
    "profile": _profile,
    "backtest": _backtest,
}


# --- from flags ------------------------------------------------------------------------------------------------------


def _fixed(entries: list[str]) -> dict[str, float]:
    """{"E": 1.69} of E=1.69."""
    fixed = {}
    for entry in entries:
        name, _, text = entry.partition("=")
        try:
            fixed[name] = float(text)
        except ValueError:
            raise ConfigError(f"--fixed={entry} must read parameter=number, e.g. --fixed=E=1.69") from None
    return fixed


def _point_set(flags: FlagValues, sources: list[str]) -> points.PointSet:
    """The points that the flags choose, everything left out of them listed."""
    join = None
    if flags.join is not None:
        path, colon, column = flags.join.rpartition(":")
        if not colon:
            raise ConfigError(f"--join={flags.join} must read FILE:COLUMN, e.g. --join=runs.csv:Name")
        join = (path, column)
    reading = {"columns": options.column_map(flags.columns), "flops": flags.flops, "rows": flags.rows,
               "where": flags.where, "join": join,
               "reads": ("N", "D") if flags.form == AUTO else laws.load_law(flags.form).inputs}  # fmt: skip
    if flags.family:
        point_set = points.load_points(sources, n=flags.n, **reading).only(flags.family)
    else:
        point_set = families.load(sources, flags.n, **reading)
    reasons = (entry.partition("=") for entry in flags.exclude)
    point_set = point_set.exclude({run_id: reason or "no reason given" for run_id, _, reason in reasons})
    if flags.drop_highest:
        point_set = point_set.drop_highest(flags.drop_highest)
    return point_set.mix(flags.mix)


def command(flags: FlagValues, args: list[str]) -> str:
    """The command that makes the same fit: sources, and every flag that is not at its default, in order of name."""
    given = [flags[name] for name in sorted(flags) if flags[name].value != flags[name].default]
    return shlex.join(["slmjax", "fit", *args, *(line for flag in given for line in flag.serialize().splitlines())])


def _left_out(excluded: Sequence[points.Excluded]) -> str:
    """One line for each reason, with the runs it concerns."""
    by_reason = {}
    for run in excluded:
        by_reason.setdefault(run.reason, []).append(run.run_id)
    return "".join(f"left out: {', '.join(run_ids)}: {reason}\n" for reason, run_ids in by_reason.items())


def _verify(folder: Path, args: list[str]) -> int:
    if args or not folder.is_dir():
        raise ConfigError(f"--verify={folder} must be the folder of the public tables, and takes no SOURCE")
    checks = list(verify.run(folder))
    print(verify.table(checks), end="")
    return 0 if all(check.holds for check in checks) else 1


def _is_study(source: str) -> bool:
    return (Path(source) / "study.json").is_file()


def _study_report(flags: FlagValues, sources: list[str]) -> int:
    """The page of a study, with its curves, moved to where the user wants it."""
    given = [name for name in flags if flags[name].value != flags[name].default and name not in ("report", "form")]
    if given:
        raise ConfigError(
            f"--report of a study folder makes its own fit; leave out {', '.join(f'--{name}' for name in given)}"
        )
    target = Path(flags.report)
    made = report.write_report(sources[0], target.parent, law=flags.form)
    print(f"report: {made.replace(target)}")
    return 0
