"""slmjax fit SOURCE ... [--columns=N=col,D=col,loss=col] [--json=FILE] [--report=FILE.html]  |  slmjax fit --verify=DIR

Fits a scaling law. A SOURCE is a study folder, a .csv or a .jsonl file; runs left out are listed with the reason.
--json keeps the fit for slmjax forecast; --report writes a study folder's report, with fit.json and figures beside it.
--verify computes published fits again from the public tables in DIR and says which numbers hold; exit 1 when one fails.
"""

from pathlib import Path

from absl import flags as absl_flags
from absl.flags import FlagValues

from slmjax.config import ConfigError
from slmjax.scaling import fit as fitting
from slmjax.scaling import points, report, verify


def define(flag_values: FlagValues) -> None:
    def string(name, default, text):
        absl_flags.DEFINE_string(name, default, text, flag_values=flag_values)

    string("form", "chinchilla", "the law: chinchilla, power_law, or a dotted module that defines `law`")
    string("n", "non_embedding", f"what N counts in a study: {', '.join(points.N_CONVENTIONS)}")
    string("flops", "with_head", f"what C counts in a study: {', '.join(points.FLOPS_CONVENTIONS)}")
    string("family", None, "fit the runs of this model family alone")
    string("json", None, "file for the fit; - for standard output")
    string("report", None, "file for the report; one study folder as the only source")
    string("verify", None, "folder of public tables: compute the published fits again")
    absl_flags.DEFINE_list("columns", None, "of tables: N=header,D=header,loss=header[,C=...,se=...,family=...]",
                           flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_float("delta", 1e-3, "residual in log loss beyond which a point pulls with constant force",
                            flag_values=flag_values)  # fmt: skip
    absl_flags.DEFINE_integer("bootstrap", 1000, "resamples for the intervals", flag_values=flag_values)
    absl_flags.DEFINE_integer("seed", 0, "of the resamples", flag_values=flag_values)


def run(flags: FlagValues, args: list[str]) -> int:
    if flags.verify is not None:
        return _verify(Path(flags.verify), args)
    if not args:
        raise ConfigError("fit needs a SOURCE: a study folder, a .csv or a .jsonl file")
    if flags.report:
        return _report(flags, args)
    point_set = points.load_points(args, _columns(flags.columns), flags.n, flags.flops)
    if flags.family:
        point_set = point_set.only(flags.family)
    fitted = fitting.fit(point_set, flags.form, flags.delta, flags.bootstrap, flags.seed)
    if flags.json == "-":
        print(fitted.to_json(), end="")
        return 0
    print(fitted.table())
    for left_out in point_set.excluded:
        print(f"left out: {left_out.run_id}: {left_out.reason}")
    if flags.json:
        Path(flags.json).write_text(fitted.to_json())
        print(f"fit: {flags.json}")
    return 0


def _verify(folder: Path, args: list[str]) -> int:
    if args or not folder.is_dir():
        raise ConfigError(f"--verify={folder} must be the folder of the public tables, and takes no SOURCE")
    checks = list(verify.run(folder))
    print(verify.table(checks), end="")
    return 0 if all(check.holds for check in checks) else 1


def _columns(entries: list[str] | None) -> dict[str, str] | None:
    """{"N": header, ...} of N=header entries; load_points refuses names it does not know."""
    if entries is None:
        return None
    bad = [entry for entry in entries if "=" not in entry]
    if bad:
        raise ConfigError(f"--columns={bad[0]!r} must read name=header, e.g. --columns=N=params,D=tokens,loss=final")
    return dict(entry.split("=", 1) for entry in entries)


def _report(flags: FlagValues, sources: list[str]) -> int:
    """The report of a study, moved to where the user wants it."""
    given = [name for name in ("json", "columns", "family") if getattr(flags, name) is not None]
    given += [name for name in ("n", "flops", "delta", "bootstrap", "seed") if flags[name].using_default_value is False]
    if given or len(sources) != 1 or not Path(sources[0]).is_dir():
        raise ConfigError(
            f"--report writes the report of one study folder with its own fit; leave out "
            f"{', '.join(f'--{name}' for name in given) or 'the other sources'}"
        )
    target = Path(flags.report)
    made = report.write_report(sources[0], target.parent, law=flags.form)
    print(f"report: {made.replace(target)}")
    return 0
