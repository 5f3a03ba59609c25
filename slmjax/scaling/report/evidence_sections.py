"""The evidence for a fit, as HTML: back-test, choice of form, IsoFLOP, agreement, and what the fit hangs on.

Each section takes `Evidence` and, where it shows one, its figure; one that cannot be made says why in a sentence.
"""

import math

from slmjax.scaling import show
from slmjax.scaling.report.evidence import Evidence, Refusal
from slmjax.scaling.report.page import escape, folded, picture, table
from slmjax.scaling.report.sections import LEVELS, refused, sentence

NUM_INFLUENTIAL = 8


def back_test(e: Evidence, made: str | Refusal) -> list[str]:
    title = "Back-test"
    if isinstance(made, Refusal):
        return refused(title, made.why)
    rows = [
        [
            show.power_of_ten(o.flops),
            str(o.num_fitted),
            str(o.num_hidden),
            show.times(o.reach),
            f"{100 * math.expm1(o.bias):+.2f}%" if e.fit.residual == "log" else f"{o.bias:+.4f}",
            f"{100 * math.expm1(o.error):.2f}%" if e.fit.residual == "log" else f"{o.error:.4f}",
            *(f"{o.covered[level]:.0%}" for level in LEVELS),
        ]
        for o in e.tested.outcomes
    ]
    header = ["Cut (FLOPs)", "Fitted", "Hidden", "Reach", "Bias", "Mean error", "80% held", "95% held"]
    caption = (
        "All runs above a cut are hidden and forecast from those below it; the form's own error is learned from lower "
        "cuts only. Left: every hidden run; right: the share that the intervals held, against nominal (dashed)."
    )
    return [
        f"<h2>{title}</h2>",
        f"<p>{sentence(e.tested.sentence())}.</p>",
        picture(made, title, caption),
        folded("Coverage and error at every cut", table(header, rows, range(len(header)))),
    ]


def choice(e: Evidence, made: str | Refusal) -> list[str]:
    title = "Choice of form"
    if isinstance(made, Refusal):
        return refused(title, made.why)
    rows = []
    for s in e.choice.scores:
        margin = "" if s.law == e.choice.winner else f"{s.margin:.4f}"
        ends = "" if s.law == e.choice.winner else show.interval(s.margin_95, "{:+.4f}".format)
        name = f"<code>{escape(s.law)}</code>" + (" (fitted here)" if s.law == e.fit.law else "")
        rows.append([name, str(s.num_parameters), f"{s.error:.4f}", margin, ends, f"{max(s.regret_G):.4f}",
                     f"{s.in_sample:.4f}"])  # fmt: skip
    header = ["Form", "Parameters", "Held-out error", "Margin", "95% of the margin", "Worst regret", "In sample"]
    cuts = [
        [f"{c.by} &lt; {show.power_of_ten(c.value)}", str(c.num_fitted), str(c.num_hidden), show.times(c.reach),
         *(f"{s.error_G[g]:.4f}" for s in e.choice.scores)]
        for g, c in enumerate(e.choice.cuts)
    ]  # fmt: skip
    cut_header = ["Cut", "Fitted", "Hidden", "Reach", *(f"<code>{escape(s.law)}</code>" for s in e.choice.scores)]
    caption = (
        "Forms fitted below a cut in C or N and scored on the larger runs above it, never on their own fit; in "
        "brackets the number of parameters. Diamonds: means over the cuts."
    )
    left_out = [f"{escape(name)} is {escape(other)} in other parameters." for name, other in e.choice.same_as.items()]
    left_out += [f"Left out: {escape(name)}: {escape(why)}." for name, why in e.choice.refused.items()]
    return [
        f"<h2>{title}</h2>",
        f"<p>{sentence(e.choice.sentence())}.</p>",
        picture(made, title, caption),
        table(header, rows, range(1, len(header))),
        '<p class="note">Mean absolute error in log loss. Regret: error minus the least of any form at the same cut. '
        + " ".join(left_out) + "</p>",
        folded("Error of every form at every cut", table(cut_header, cuts, range(1, len(cut_header)))),
    ]  # fmt: skip


def isoflop(e: Evidence, made: str | Refusal) -> list[str]:
    title = "IsoFLOP"
    if isinstance(made, Refusal):
        return refused(title, made.why)
    found = e.isoflop
    line = found.lines["N"]
    ends = show.interval(line.exponent.interval(0.95), "{:.3f}".format)
    used = f"{len(found.optima)} of {len(found.budgets)} budgets"
    text = f"N* grows as C<sup>{line.slope:.3f}</sup>, 95% {ends}, from {used}."
    rows = [
        [show.power_of_ten(o.C), show.count(o.N), show.count(o.D), f"{o.D / o.N:.3g}", f"{o.loss:.4f}",
         f"{o.sd_log_N:.2g}"]
        for o in found.optima
    ]  # fmt: skip
    notes = [f"{show.power_of_ten(d.C)} FLOPs discarded: {escape(d.reason)}." for d in found.discarded]
    notes += [sentence(note) + "." for note in found.notes if note not in e.points.notes]
    header = ["Budget (FLOPs)", "N*", "D*", "D*/N*", "Loss*", "Std. dev. of log N*"]
    caption = (
        f"Loss against size at each budget, with a parabola through the sizes within {found.window:g} decades of the "
        "best. Right: the best sizes and the line through them."
    )
    return [
        f"<h2>{title}</h2>",
        f"<p>{text}</p>",
        picture(made, title, caption),
        folded("The best size of every budget", table(header, rows, range(len(header)))),
        f'<p class="note">{" ".join(notes)}</p>',
    ]


def agreement(e: Evidence) -> list[str]:
    title = "Agreement of the methods"
    if isinstance(e.agreement, Refusal):
        return refused(title, e.agreement.why)
    found, rows = e.agreement, []
    for row in found.rows:
        cells = []
        for one, text in (
            (row.exponent_N, "{:.3f}".format),
            (row.exponent_D, "{:.3f}".format),
            (row.N_at_largest, show.count),
            (row.N_at_ten_times, show.count),
        ):
            cells.append(f"{text(one.value)}<small>{show.interval(one.interval(0.95), text)}</small>")
        rows.append([escape(row.method), *cells])
    at = show.power_of_ten(found.flops)
    header = ["Method", "N* ~ C<sup>a</sup>", "D* ~ C<sup>b</sup>", f"N* at {at}", f"N* at 10× {at}"]
    apart = {}
    for one, other, what in found.disagreements:
        apart.setdefault((one, other), []).append(what)
    said = [f"{escape(one)} and {escape(other)} disagree on {escape('; '.join(what))}." for (one, other), what in
            apart.items()] or ["All 95% intervals overlap."]  # fmt: skip
    reasons = [f"{escape(reason)}." for reason in found.reasons]
    heading = " Worth knowing: " if found.agree else " What may explain it: "
    return [
        f"<h2>{title}</h2>",
        table(header, rows, range(1, len(header))),
        f"<p>{' '.join(said)}</p>",
        f'<p class="note">Under each value its 95% interval.{_plain_cost(e)}'
        f"{heading + ' '.join(reasons) if reasons else ''}</p>",
    ]


def _plain_cost(e):
    """Where the runs logged other FLOPs than 6 N D, a parametric N* here is not the one that the page begins with."""
    return " The law's N* is that of C = 6 N D here." if e.cost is not None and e.cost.coefficient else ""


def diagnosis(e: Evidence) -> list[str]:
    """Refits without each scale, the runs that pull most, and outliers."""
    title = "What the fit hangs on"
    if isinstance(e.diagnosis, Refusal):
        return refused(title, e.diagnosis.why)
    found = e.diagnosis
    names = list(found.parameters)
    text = show.count if found.said.startswith("N*") else "{:.4f}".format
    rows = [["nothing", "", *(f"{value:.4g}" for value in found.parameters.values()), text(found.target), ""]]
    rows += [
        [escape(r.without), str(r.num_left_out), *(f"{r.parameters[name]:.4g}" for name in names), text(r.target),
         f"{r.target / found.target - 1:+.1%}" if r.determined else '<span class="flag">not determined</span>']
        for r in found.scales
    ]  # fmt: skip
    header = ["Without", "Points", *(f"<code>{escape(name)}</code>" for name in names), escape(found.said), "Change"]
    runs = [
        [
            f"<code>{escape(one.run_id)}</code>",
            *("" if value is None else show.count(value) for value in (one.N, one.D)),
            f"{one.loss:.4f}",
            f"{one.z:+.1f}",
            f"{one.target:+.2%}",
        ]
        for one in found.influences[:NUM_INFLUENTIAL]
    ]
    run_header = ["Run", "N", "D", "Loss", "z", f"Without it, {escape(found.said)}"]
    flagged = [
        f'<span class="flag"><code>{escape(one.run_id)}</code></span> (loss {one.loss:.4f}, z {one.z:+.1f})'
        for one in found.outliers
    ]
    said = f"Outliers, beyond 3.5 robust standard deviations: {', '.join(flagged)}." if flagged else "No outliers."
    notes = "".join(f" {sentence(note)}." for note in found.notes) + _plain_cost(e)
    return [
        f"<h2>{title}</h2>",
        table(header, rows, range(1, len(header))),
        f'<p class="note">Refits without each {escape(found.by)}.{notes}</p>',
        f"<p>{said}</p>",
        folded("The runs that move it most", table(run_header, runs, range(1, len(run_header)))),
    ]
