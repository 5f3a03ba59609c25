"""What only the report of a study says: its runs, those left out, what they vary, and their provenance."""

import json
from collections.abc import Mapping

from slmjax.scaling import show
from slmjax.scaling.families import label
from slmjax.scaling.report.page import escape, folded, table
from slmjax.scaling.report.sections import framed


def header(name, runs, point_set):
    first = next((run.start for run in runs if run.start), {})
    kinds = sorted({run.start.get("loss_kind", "exact") for run in runs if run.start}, key="exact".__ne__)
    loss = f"loss: {' or '.join(show.kind_of_loss(kind) for kind in kinds) or 'unknown'}, nats per token"
    said = [f"{len(runs)} runs, {len(point_set)} finished and annealed", escape(loss)]
    names = point_set.families()
    if len(names) > 1:
        own, *others = (label(name, point_set.only(name).loss_kind) for name in names)
        said.append(f"families: {escape(own)}, fitted here, and {escape(', '.join(others))}, compared")
    said += [f"{key} <code>{escape(str(first[key])[:12])}</code>" for key in ("corpus", "tokenizer") if first.get(key)]
    return [
        '<p class="eyebrow">slmjax scaling report</p>',
        f"<h1>{escape(name)}</h1>",
        f'<p class="lede">{" · ".join(said)}</p>',
    ]


def no_law(refusal, point_set):
    """In place of the answer, where no law can be fitted: why, and the best run so far."""
    body = [f'<p class="headline"><b>No law could be fitted.</b> {escape(refusal)}.</p>']
    if point_set.points:
        best = min(point_set.points, key=lambda p: p.loss)
        body.append(
            f"<p>Best run so far: <code>{escape(best.run_id)}</code> with N = {show.count(best.N)}, "
            f"D = {show.count(best.D)} and loss {show.at_most(f'{best.loss:.4f}', best.loss_kind)}.</p>"
        )
    return framed(body)


def bytes_per_token(runs):
    """Of all runs alike, to read a loss in bits per byte; None where they differ or do not say."""
    said = {run.start.get("bytes_per_token") for run in runs if run.start}
    return said.pop() if len(said) == 1 else None


def run_tables(runs, point_set):
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
                show.at_most(f"{p.loss:.4f}" + (f" ± {p.se:.4f}" if p.se else ""), p.loss_kind),
                "" if (bits := run.end.get("bits_per_byte")) is None else show.at_most(f"{bits:.3f}", p.loss_kind),
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
            + (" ≤: an upper bound." if any(p.loss_kind == "bound" for p in points) else "")
        )
        parts = ["<h2>Finished runs</h2>", table(header, rows, range(2, 10), wrap=(1,)), f'<p class="note">{note}</p>']
    if point_set.excluded:
        rows = [[f"<code>{escape(e.run_id)}</code>", _tags(e.tags), escape(e.reason)] for e in point_set.excluded]
        parts += ["<h2>Runs left out</h2>", table(["Run", "Tags", "Reason"], rows, wrap=(1, 2))]
    return parts


def provenance(runs, fitted, command, further=()):
    """further: files of the fits of other families."""
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
        others = "".join(f" (of further families <code>{escape(name)}</code>)" for name in further)
        parts.append(
            '<p class="note">Beside this file: the fit with its bootstrap draws, <code>fit.json</code>'
            f"{others}, and the figures, <code>figures/</code>.</p>"
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
