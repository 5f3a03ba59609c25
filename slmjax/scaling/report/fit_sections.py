"""What only the report of a fit says: its points, those left out, what their numbers mean, and where they came from."""

import contextlib
from importlib import metadata

import numpy as np

from slmjax.scaling import backtest, diagnose, show
from slmjax.scaling.report import sections
from slmjax.scaling.report.evidence import Evidence
from slmjax.scaling.report.page import escape, folded, table
from slmjax.scaling.report.sources import Source

UNKNOWN = "not said"


def header(e: Evidence, found: list[Source]) -> list[str]:
    name = ", ".join(dict.fromkeys(source.path.rsplit("/", 1)[-1] for source in found)) or "points"
    said = [f"{len(e.points)} points"]
    said += [f"{len(e.points.excluded)} left out"] if e.points.excluded else []
    said += [f"<code>{escape(e.fit.form.formula)}</code>"]
    return [
        '<p class="eyebrow">slmjax scaling-law fit</p>',
        f"<h1>{escape(e.fit.law)}: {escape(name)}</h1>",
        f'<p class="lede">{" · ".join(said)}</p>',
    ]


def conventions(e: Evidence) -> list[str]:
    """What N, C and the loss mean here."""
    rows = [
        [
            escape(name.removesuffix("_convention").replace("_", " ")),
            escape(UNKNOWN if value in (None, "None") else value),
        ]
        for name, value in e.fit.conventions.items()
    ]
    return ["<h2>Conventions</h2>", table(["", "All points"], rows, wrap=(1,))]


def exclusions(e: Evidence) -> list[str]:
    """Every run left out, by reason."""
    if not e.points.excluded:
        return ["<h2>Runs left out</h2>", '<p class="note">None.</p>']
    by_reason = {}
    for run in e.points.excluded:
        by_reason.setdefault(run.reason, []).append(run.run_id)
    rows = [
        [escape(reason), str(len(run_ids)), ", ".join(f"<code>{escape(run_id)}</code>" for run_id in run_ids)]
        for reason, run_ids in by_reason.items()
    ]
    return ["<h2>Runs left out</h2>", table(["Reason", "Runs", ""], rows, numeric=(1,), wrap=(0, 2))]


def all_points(e: Evidence) -> list[str]:
    residual_n = e.fit.residuals()
    percent_n = 100 * np.expm1(residual_n) if e.fit.residual == "log" else residual_n
    z_n = diagnose.robust_z(residual_n)
    further = [name for name in e.fit.form.inputs if name not in ("N", "D", "C")]
    rows = []
    for p, residual, z in zip(e.fit.points, percent_n.tolist(), z_n.tolist(), strict=True):
        counts = [("" if p[name] is None else show.count(p[name])) for name in ("N", "D", *further)]
        flops = "" if p["C"] is None else show.power_of_ten(p["C"])
        loss = f"{p['loss']:.4f}" + (f" ± {p['se']:.4f}" if p["se"] else "")
        far = f'<span class="flag">{z:+.1f}</span>' if abs(z) > diagnose.OUTLIER else f"{z:+.1f}"
        missed = f"{residual:+.2f}%" if e.fit.residual == "log" else f"{residual:+.4f}"
        rows.append([f"<code>{escape(p['run_id'])}</code>", *counts, flops, loss, missed, far])
    name = sections.capital(show.loss_name(e.fit.loss_kind))
    header = ["Run", "N", "D", *further, "C (FLOPs)", name, "Observed − predicted", "z"]
    content = table(header, rows, range(1, len(header)))
    return ["<h2>Points</h2>", folded(f"All {len(rows)} points with their residuals", content)]


def provenance(e: Evidence, found: list[Source], command: str) -> list[str]:
    """How to make the page again, and from what."""
    rows = [[f"<code>{escape(s.path)}</code>", str(s.num_points), f"<code>{s.sha256}</code>"] for s in found]
    made_with = {}
    for name in ("slmjax", "numpy", "scipy"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # a source tree that was not installed
            made_with[name] = metadata.version(name)
    fit = e.fit
    settings = [
        f"law {fit.law}", f"Huber delta {fit.delta:g} on {fit.residual} loss", f"weights {fit.weights}",
        f"{fit.bootstrap['num']} resamples by {fit.resample}, seed {fit.seed}",
        f"back-test at {len(e.cuts)} cuts of {backtest.NUM_BOOTSTRAP} resamples",
    ]  # fmt: skip
    settings += [f"held fixed: {name} = {value:g}" for name, value in fit.fixed.items()]
    return [
        "<h2>Provenance</h2>",
        f"<p>To make this page again:</p><pre>{escape(command)}</pre>",
        table(["Source", "Points", "SHA-256"], rows, numeric=(1,), wrap=(0, 2)) if rows else
        '<p class="note">The points were made in memory: no source file to digest.</p>',
        f'<p class="note">{escape("; ".join(settings))}. Made with '
        + ", ".join(f"{name} {version}" for name, version in made_with.items())
        + ".</p>",
    ]  # fmt: skip
