"""The report of a study: one self-contained HTML file, derived from the records alone, the answer first.

What will a bigger run reach, with which N and D, how sure; then the evidence: loss against compute, curves, residuals,
coefficients, every run, every run left out, provenance. When no law can be fitted the reason stands in its place.
"""

import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from slmjax import records
from slmjax.scaling import forecast, laws, plots, show
from slmjax.scaling.fit import Fit, fit
from slmjax.scaling.forecast import Forecast
from slmjax.scaling.page import bullets, escape, folded, key_figures, page, picture, table
from slmjax.scaling.points import load_points, load_runs

MULTIPLES = (1, 10, 100, 1000)  # of the largest run's compute, when no budgets are given


def write_report(
    study_dir: str | Path,
    out: str | Path | None = None,
    budgets: Sequence[float] | None = None,
    law: str = "chinchilla",
    command: str | None = None,
) -> Path:
    """Write `report.html`, with `fit.json` and `figures/*.svg, *.pdf` beside it; returns its path.

    Args:
      study_dir: the folder with study.json.
      out: folder to write to; the study folder when None.
      budgets: FLOPs to forecast for; 1, 10, 100 and 1000 times the largest run's when None.
      command: what reproduces the page, printed at its end.
    """
    study_dir, out = Path(study_dir), Path(out or study_dir)
    if not all(math.isfinite(C) and C > 0 for C in budgets or ()):
        raise ValueError(f"budgets={list(budgets)} must be positive numbers of FLOPs")
    runs, point_set = load_runs(study_dir), load_points([study_dir])
    name = records.read_json(study_dir / "study.json")["name"]
    fitted, refusal = _try_fit(point_set, law)
    cost, made, no_optimum = _forecasts(fitted, point_set, budgets) if fitted else ("6ND", [], "")
    figures = {
        figure_name: plots.save(figure, out / "figures" / figure_name)
        for figure_name, figure in _figures(runs, point_set, fitted, cost, made).items()
    }
    if fitted:
        _replace(out / "fit.json", fitted.to_json())
    else:  # one left by an earlier report would contradict this page
        (out / "fit.json").unlink(missing_ok=True)
    call = f"from slmjax.scaling.report import write_report; write_report({json.dumps(str(study_dir))})"
    command = command or f"python -c {shlex.quote(call)}"
    body = [
        *_header(name, runs, point_set),
        *_answer(fitted, refusal or no_optimum, made, runs, point_set),
        *_optimum_section(made, runs),
        *_figure_sections(figures, fitted),
        *_coefficients(fitted),
        *_run_tables(runs, point_set),
        *_provenance(runs, fitted, command),
    ]
    return _replace(out / "report.html", page(f"{name}: scaling report", body))


def _replace(path, text):
    """Write as a whole or not at all: a report may be read while it is made again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".writing")
    unfinished.write_text(text)
    os.replace(unfinished, path)
    return path


def _try_fit(point_set, law) -> tuple[Fit | None, str]:
    try:
        return fit(point_set, law), ""
    except ValueError as error:
        return None, str(error)


def _forecasts(fitted, point_set, budgets) -> tuple[str, list[Forecast], str]:
    """Cost rule, optimum per budget, why there is none. FLOPs are as logged if a rule in N fits them, else 6 N D."""
    largest = max(p.C for p in point_set.points)
    try:
        forecast.make_cost(fitted, "logged")
        cost = "logged"
    except ValueError:
        cost = "6ND"
    try:
        return cost, [forecast.optimum(fitted, C, cost) for C in (budgets or [m * largest for m in MULTIPLES])], ""
    except ValueError as error:
        return cost, [], str(error)


# --- the answer ------------------------------------------------------------------------------------------------------


def _header(name, runs, point_set):
    first = next((run.start for run in runs if run.start), {})
    said = [
        f"{len(runs)} runs, {len(point_set)} finished and annealed",
        f"loss: {first.get('loss_kind', 'unknown')}, nats per token",
    ]
    said += [f"{key} <code>{escape(str(first[key])[:12])}</code>" for key in ("corpus", "tokenizer") if first.get(key)]
    return [
        '<p class="eyebrow">slmjax scaling report</p>',
        f"<h1>{escape(name)}</h1>",
        f'<p class="lede">{" · ".join(said)}</p>',
    ]


def _answer(fitted, refusal, made, runs, point_set):
    if fitted is None:
        body = [f'<p class="headline"><b>No law could be fitted.</b> {escape(refusal)}.</p>']
        if point_set.points:
            best = min(point_set.points, key=lambda p: p.loss)
            body.append(
                f"<p>Best run so far: <code>{escape(best.run_id)}</code> with N = {show.count(best.N)}, "
                f"D = {show.count(best.D)} and loss {best.loss:.4f}.</p>"
            )
        return _framed(body)
    if not made:
        return _framed([f'<p class="headline"><b>No compute-optimal size.</b> {escape(refusal)}.</p>'])
    shown = next((f for f in made if f.reach["C"] > 2), made[-1])
    loss, N, D, ratio = (shown[key] for key in ("loss", "N", "D", "tokens_per_param"))
    headline = (
        f"With {show.times(shown.reach['C'])} the compute of the largest run "
        f"({show.power_of_ten(shown.target['flops'])} FLOPs), train "
        f"<b>{show.count(N.value)} parameters</b> on <b>{show.count(D.value)} tokens</b> and expect a held-out loss of "
        f"<b>{loss.value:.3f}</b>, 95% between <b>{loss.intervals[0.95][0]:.3f} and {loss.intervals[0.95][1]:.3f}</b>."
    )
    items = [
        ("Loss, nats per token", f"{loss.value:.3f}", show.interval(loss.intervals[0.95], "{:.3f}".format)),
        ("Parameters N", show.count(N.value), show.interval(N.intervals[0.95], show.count)),
        ("Tokens D", show.count(D.value), show.interval(D.intervals[0.95], show.count)),
        ("Tokens per parameter", f"{ratio.value:.3g}", show.interval(ratio.intervals[0.95], show.count)),
    ]
    sure = bullets(_how_sure(fitted, shown, point_set))
    return _framed([f'<p class="headline">{headline}</p>', key_figures(items), sure])


def _framed(body):
    return ['<section class="answer">', *body, "</section>"]


def _how_sure(fitted, shown, point_set):
    points, b = point_set.points, fitted.bootstrap
    N, D = show.count_range(p.N for p in points), show.count_range(p.D for p in points)
    scatter = f"they scatter {100 * fitted.residual_rms():.2g}% around the law"
    lines = [f"Fitted to {len(points)} runs, N from {N}, D from {D}; {scatter}."]
    weak = fitted.weakly_identified()
    if weak:
        lines.append(
            f'<span class="flag">Weakly identified: {", ".join(map(escape, weak))}.</span> '
            + escape("; ".join(f"{name}: {why}" for name, why in weak.items()))
            + "."
        )
    else:
        lines.append("All parameters of the law are bounded by these runs.")
    if shown.reach["C"] > 1.05:
        beyond = [
            f"{name} is {show.times(shown.reach[name])} the largest fitted"
            if shown.reach[name] > 1.05
            else f"{name} stays within the fitted range"
            for name in ("N", "D")
        ]
        lines.append(
            f"This extrapolates compute {show.times(shown.reach['C'])}: {' and '.join(beyond)}. "
            "The interval assumes that the law still holds there; it has not been back-tested."
        )
    if b["num_agreeing"] < 0.98 * b["num"]:
        lines.append(
            f"{b['num'] - b['num_agreeing']} of {b['num']} bootstrap refits found different minima from two starts: "
            "read the intervals with care."
        )
    return lines + [escape(note) + "." for note in fitted.notes]


def _optimum_section(made, runs):
    if not made:
        return []
    bytes_per_token = {run.start.get("bytes_per_token") for run in runs if run.start}
    per_byte = bytes_per_token.pop() if len(bytes_per_token) == 1 else None
    columns = {"N": show.count, "D": show.count, "tokens_per_param": show.count, "loss": "{:.3f}".format}
    rows = []
    for f in made:
        reach, cells = f.reach["C"], []
        for key, text in columns.items():
            ends = "".join(f"<small>{show.interval(f[key].intervals[level], text)}</small>" for level in (0.8, 0.95))
            cells.append(text(f[key].value) + ends)
        if per_byte:
            cells.append(f"{f['loss'].value / math.log(2) / per_byte:.3f}")
        rows.append(
            [
                show.power_of_ten(f.target["flops"]),
                f'<span class="flag">{show.times(reach)}, extrapolation</span>' if reach > 1.05 else show.times(reach),
                *cells,
            ]
        )
    header = ["Budget (FLOPs)", "Of largest run", "N", "D", "D/N", "Loss", *(["Bits/byte"] if per_byte else [])]
    return [
        "<h2>Compute-optimal sizes</h2>",
        table(header, rows, numeric=(0, *range(2, len(header)))),
        f'<p class="note">Under each value its 80%, then its 95% interval. {escape(made[0].cost)}. '
        "Intervals of N, D and D/N come from the bootstrap of the law; those of the loss also hold the scatter of "
        "single runs.</p>",
    ]


# --- the evidence ----------------------------------------------------------------------------------------------------


def _figures(runs, point_set, fitted, cost, made):
    figures = {}
    if point_set.points:
        budgets = [f.target["flops"] for f in made]
        figures["loss_against_compute"] = plots.loss_against_compute(point_set, fitted if made else None, cost, budgets)
    if any(run.start and (run.train or run.evals) for run in runs):
        figures["loss_curves"] = plots.loss_curves(runs)
    if fitted:
        figures["residuals"] = plots.residuals(fitted)
    return figures


def _figure_sections(figures, fitted):
    said = {
        "loss_against_compute": (
            "Loss against compute",
            "Every finished run, coloured by size, with its standard error; the thin lines are the law at that "
            "size, the heavy one its compute-optimal frontier."
            if fitted
            else "Every finished run, coloured by size.",
        ),
        "loss_curves": (
            "Loss curves",
            "Held-out loss; training loss faint behind it. A branch (dashed) leaves its trunk where the decay begins.",
        ),
        "residuals": (
            "Residuals of the fit",
            "Observed minus predicted loss. Shaded: one root-mean-square residual. Structure is what the law misses.",
        ),
    }
    return [
        part
        for name, figure in figures.items()
        for part in (f"<h2>{said[name][0]}</h2>", picture(figure, said[name][0], said[name][1]))
    ]


def _coefficients(fitted):
    if fitted is None:
        return []
    law = laws.load_law(fitted.law)
    errors, i80, i95, weak = (
        fitted.standard_errors(),
        fitted.intervals(0.8),
        fitted.intervals(0.95),
        fitted.weakly_identified(),
    )

    rows = [
        [
            f"<code>{name}</code>",
            f"{value:.5g}",
            f"{errors[name]:.2g}",
            show.interval(i80[name]),
            show.interval(i95[name]),
            f'<span class="flag">{escape(weak[name])}</span>' if name in weak else "",
        ]
        for name, value in fitted.parameters.items()
    ]
    text = (
        f"<code>{escape(law.formula)}</code>. {escape(law.source)}. "
        f"Minimum of the sum of Huber({fitted.delta:g}) of log-loss residuals: {fitted.objective:.6g}. "
        "Intervals: percentiles of a bootstrap over runs."
    )
    return [
        "<h2>The law</h2>",
        f"<p>{text}</p>",
        table(
            ["Parameter", "Estimate", "Std. error", "80% interval", "95% interval", ""], rows, range(1, 5), wrap=(5,)
        ),
        f'<p class="note">{escape(fitted.convergence().capitalize())}.</p>',
    ]


def _run_tables(runs, point_set):
    points, by_id = point_set.points, {run.run_id: run for run in runs}
    rows = []
    for p in points:
        run = by_id[p.run_id]
        speed = [line["tokens_per_s"] for line in run.train if line.get("tokens_per_s")]
        epochs = (
            ""
            if p.epochs is None
            else f'<span class="flag">{p.epochs:.2g}</span>'
            if p.epochs > 1
            else f"{p.epochs:.2g}"
        )
        rows.append(
            [
                f"<code>{escape(p.run_id)}</code>",
                _tags(p.tags),
                show.count(p.N),
                show.count(p.D),
                show.power_of_ten(p.C),
                epochs,
                f"{p.loss:.4f}" + (f" ± {p.se:.4f}" if p.se else ""),
                "" if run.end.get("bits_per_byte") is None else f"{run.end['bits_per_byte']:.3f}",
                show.count(sorted(speed)[len(speed) // 2]) if speed else "",
                show.duration(run.end.get("wall_s")),
                run.status + (f"<small>{run.num_attempts} attempts</small>" if run.num_attempts > 1 else ""),
            ]
        )
    header = ["Run", "Tags", "N", "D", "C (FLOPs)", "Epochs", "Loss", "Bits/byte", "Tokens/s", "Wall", "Status"]
    parts = []
    if rows:
        n, flops = points[0].n_convention.replace("_", "-"), points[0].flops_convention.replace("_", " ")
        note = (
            f"N: {n} parameters. C: FLOPs per token {flops} × D. "
            "Loss: held-out, nats per token, ± standard error of the evaluation. Tokens/s: median."
        )
        parts = ["<h2>Finished runs</h2>", table(header, rows, range(2, 10), wrap=(1,)), f'<p class="note">{note}</p>']
    if point_set.excluded:
        rows = [[f"<code>{escape(e.run_id)}</code>", _tags(e.tags), escape(e.reason)] for e in point_set.excluded]
        parts += ["<h2>Runs left out</h2>", table(["Run", "Tags", "Reason"], rows, wrap=(1, 2))]
    return parts


def _provenance(runs, fitted, command):
    shared, varying = _shared({run.run_id: _flat(run.provenance) for run in runs if run.provenance})
    settings, axes = _shared({run.run_id: _flat(run.config) for run in runs if run.config})
    parts = ["<h2>Provenance</h2>", f"<p>To make this page again:</p><pre>{escape(command)}</pre>"]
    if shared or varying:
        rows = [[f"<code>{escape(k)}</code>", escape(v)] for k, v in shared.items()]
        parts.append(
            table(
                ["Of all runs", ""],
                rows
                + [[f"<code>{escape(k)}</code>", f"differs between runs ({n} values)"] for k, n in varying.items()],
                wrap=(1,),
            )
        )
    if axes:
        parts.append(
            '<p class="note">What the runs vary: '
            + ", ".join(f"<code>{escape(k)}</code> ({n} values)" for k, n in axes.items())
            + ".</p>"
        )
    if settings:
        parts.append(
            folded(
                f"Configuration shared by all runs ({len(settings)} settings)",
                table(
                    ["Setting", "Value"],
                    [[f"<code>{escape(k)}</code>", escape(v)] for k, v in settings.items()],
                    wrap=(1,),
                ),
            )
        )
    if fitted:
        parts.append(
            '<p class="note">Beside this file: the fit with its bootstrap draws, <code>fit.json</code>, and the '
            "figures, <code>figures/</code>.</p>"
        )
    return parts


def _flat(nested: Mapping, prefix: str = "") -> dict[str, str]:
    out = {}
    for key, value in nested.items():
        out |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": json.dumps(value) if not isinstance(value, str) else value}
        )
    return out


def _shared(by_run):
    """(settings with one value in all runs, {setting: number of values} of the others)."""
    keys = sorted({key for flat in by_run.values() for key in flat})
    values = {key: sorted({flat.get(key, "absent") for flat in by_run.values()}) for key in keys}
    return {k: v[0] for k, v in values.items() if len(v) == 1}, {k: len(v) for k, v in values.items() if len(v) > 1}


def _tags(tags):
    return escape(", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in tags.items()))
