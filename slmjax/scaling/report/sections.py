"""What a report says of a fit itself, as HTML: the answer, the forecasts, and the law with its coefficients.

Each takes `Evidence` and returns a list of HTML parts. A section that cannot be made says why in one sentence.
"""

import math
import re

from slmjax.scaling import show
from slmjax.scaling.report.evidence import Evidence, Refusal, shown
from slmjax.scaling.report.page import bullets, escape, folded, key_figures, picture, table
from slmjax.scaling.report.sources import Known

LEVELS = (0.8, 0.95)
MOST_CORRELATED = 9  # parameters; a wider matrix is not read


def framed(body: list[str]) -> list[str]:
    return ['<section class="answer">', *body, "</section>"]


def refused(title: str, why: str) -> list[str]:
    return [f"<h2>{title}</h2>", f'<p class="note">Not here: {escape(why.rstrip("."))}.</p>']


# --- the answer ------------------------------------------------------------------------------------------------------


def answer(e: Evidence) -> list[str]:
    """What a bigger run will reach, with which N and D, and how sure that is."""
    sure = bullets(_how_sure(e))
    if not isinstance(e.forecasts, Refusal):
        return framed([*_optimum_answer(shown(e.forecasts), show.loss_name(e.fit.loss_kind)), sure])
    if not isinstance(e.losses, Refusal):
        return framed([*_loss_answer(e), sure])
    i95, weak = e.fit.intervals(0.95), e.fit.weakly_identified()
    items = [
        (escape(name), f"{value:.4g}", "fixed" if name in e.fit.fixed else show.interval(i95[name]))
        for name, value in e.fit.parameters.items()
    ]
    said = f"<b>No compute-optimal size.</b> {escape(e.forecasts.why)}."
    if weak:
        said += f" Weakly identified: <b>{', '.join(map(escape, weak))}</b>."
    return framed([f'<p class="headline">{said}</p>', key_figures(items), sure])


def _optimum_answer(f, name):
    """name: what the loss is called."""
    loss, N, D, ratio = (f[key] for key in ("loss", "N", "D", "tokens_per_param"))
    low, high = (_loss_text(end) for end in loss.intervals[0.95])
    headline = (
        f"{_budget_said(f.reach['C'], f.target['flops'])}, train "
        f"<b>{show.count(N.value)} parameters</b> on <b>{show.count(D.value)} tokens</b> and expect a held-out {name} "
        f"of <b>{loss.value:.3f}</b>, 95% between <b>{low} and {high}</b>."
    )
    items = [
        (f"{capital(name)}, nats per token", f"{loss.value:.3f}", show.interval(loss.intervals[0.95], _loss_text)),
        ("Parameters N", show.count(N.value), show.interval(N.intervals[0.95], show.count)),
        ("Tokens D", show.count(D.value), show.interval(D.intervals[0.95], show.count)),
        ("Tokens per parameter", f"{ratio.value:.3g}", show.interval(ratio.intervals[0.95], show.count)),
    ]
    return [f'<p class="headline">{headline}</p>', key_figures(items)]


def _loss_answer(e):
    largest, name = max(p["C"] for p in e.fit.points), show.loss_name(e.fit.loss_kind)
    C, loss = next((item for item in e.losses.items() if item[0] > 2 * largest), [*e.losses.items()][-1])
    low, high = (_loss_text(end) for end in loss.intervals[0.95])
    headline = (
        f"{_budget_said(C / largest, C)}, expect a held-out {name} of <b>{loss.value:.3f}</b>, 95% between "
        f"<b>{low} and {high}</b>."
    )
    items = [
        (
            f"{capital(name)} at {show.power_of_ten(C)} FLOPs",
            f"{q.value:.3f}",
            show.interval(q.intervals[0.95], _loss_text),
        )
        for C, q in e.losses.items()
    ]
    return [f'<p class="headline">{headline}</p>', key_figures(items)]


def _budget_said(reach, flops):
    return f"With {show.times(reach)} the compute of the largest run ({show.power_of_ten(flops)} FLOPs)"


def _loss_text(value):
    return f"{value:.3f}" if math.isfinite(value) else "unbounded"


def _how_sure(e):
    fit, b = e.fit, e.fit.bootstrap
    scatter = f"{100 * fit.residual_rms():.2g}%" if fit.residual == "log" else f"{fit.residual_rms():.2g} nats"
    ranges = [
        f"{name} from {_range(fit, name)}" for name in fit.form.inputs if all(p[name] is not None for p in fit.points)
    ]
    lines = [f"Fitted to {len(fit.points)} points, {', '.join(ranges)}; they scatter {scatter} around the law."]
    weak = fit.weakly_identified()
    if weak:
        why = "; ".join(f"{name}: {reason}" for name, reason in weak.items())
        lines.append(f'<span class="flag">Weakly identified: {", ".join(map(escape, weak))}.</span> {escape(why)}.')
    else:
        lines.append("All parameters of the law are bounded by these runs.")
    lines += _reach_said(e)
    lines.append(f"{sentence(e.tested.sentence())}.")
    lines += _choice_said(e)
    if not isinstance(e.agreement, Refusal):
        lines.append(_agreement_said(e.agreement))
    if b["num_agreeing"] < 0.98 * b["num"]:
        lines.append(
            f"{b['num'] - b['num_agreeing']} of {b['num']} bootstrap refits found different minima from two starts: "
            "read the intervals with care."
        )
    return lines + [sentence(note) + "." for note in fit.notes]


def _range(fit, name):
    values = [p[name] for p in fit.points]
    return (
        f"{show.power_of_ten(min(values))} to {show.power_of_ten(max(values))}"
        if name == "C"
        else show.count_range(values)
    )


def _reach_said(e):
    if isinstance(e.forecasts, Refusal):
        return []
    reach = shown(e.forecasts).reach
    if reach["C"] <= 1.05:
        return []
    beyond = [
        f"{name} is {show.times(reach[name])} the largest fitted"
        if reach[name] > 1.05
        else f"{name} stays within the fitted range"
        for name in ("N", "D")
    ]
    return [f"This extrapolates compute {show.times(reach['C'])}: {' and '.join(beyond)}."]


def _choice_said(e):
    """Whether another form forecasts hidden runs better than the one fitted."""
    if isinstance(e.choice, Refusal):
        return []
    same, by_law = e.choice.same_as, {score.law: score for score in e.choice.scores}
    ours, winner = by_law.get(same.get(e.fit.law, e.fit.law)), e.choice.scores[0]
    if ours is None or len(by_law) < 2:
        return []
    if ours is winner:
        return [f"Of {len(by_law)} forms, {escape(e.fit.law)} forecasts hidden larger runs best."]
    certain = ours.margin_95[0] > 0
    said = (
        f"{escape(winner.law)} forecasts hidden larger runs better than {escape(e.fit.law)}: mean error "
        f"{100 * math.expm1(winner.error):.2g}% against {100 * math.expm1(ours.error):.2g}%"
    )
    return [f'<span class="flag">{said}.</span>' if certain else f"{said}; these runs do not tell the two apart."]


def _agreement_said(agreement):
    names = "; ".join(escape(row.method) for row in agreement.rows)
    if agreement.agree:
        return f"The methods agree on N*: {names}."
    pairs = dict.fromkeys(f"{one} and {other}" for one, other, _ in agreement.disagreements)
    return f'<span class="flag">Methods disagree on N*: {escape("; ".join(pairs))}.</span>'


def capital(text: str) -> str:
    """Only the first letter: counts and names keep theirs."""
    return text[:1].upper() + text[1:]


def sentence(text):
    """Capitalised where it begins with a word, and not with the name of a file or a flag."""
    return escape(capital(text) if re.match(r"[a-z]+(-[a-z]+)*[:,]?( |$)", text) else text)


# --- the fit ----------------------------------------------------------------------------------------------------


def optimum_table(e: Evidence, bytes_per_token: float | None = None) -> list[str]:
    """N*, D*, D/N and loss at every budget, with both intervals."""
    title = "Compute-optimal sizes"
    if isinstance(e.forecasts, Refusal):
        return refused(title, e.forecasts.why)
    columns = {"N": show.count, "D": show.count, "tokens_per_param": show.count, "loss": _loss_text}
    rows = []
    for f in e.forecasts:
        reach, cells = f.reach["C"], []
        for key, text in columns.items():
            ends = "".join(f"<small>{show.interval(f[key].intervals[level], text)}</small>" for level in LEVELS)
            cells.append(text(f[key].value) + ends)
        if bytes_per_token:
            cells.append(f"{f['loss'].value / math.log(2) / bytes_per_token:.3f}")
        far = f'<span class="flag">{show.times(reach)}, extrapolation</span>' if reach > 1.05 else show.times(reach)
        rows.append([show.power_of_ten(f.target["flops"]), far, *cells])
    name = capital(show.loss_name(e.fit.loss_kind))
    header = ["Budget (FLOPs)", "Of largest run", "N", "D", "D/N", name, *(["Bits/byte"] if bytes_per_token else [])]
    return [
        f"<h2>{title}</h2>",
        table(header, rows, numeric=(0, *range(2, len(header)))),
        f'<p class="note">Under each value its 80%, then its 95% interval. {escape(e.forecasts[0].cost)}. '
        "Intervals of N, D and D/N come from the bootstrap of the law; those of the loss also hold the scatter of "
        "single runs and the law's own error as back-tests showed it.</p>",
    ]


def figure(title: str, made: str | Refusal, caption: str) -> list[str]:
    """A figure under its title, or why there is none."""
    if isinstance(made, Refusal):
        return refused(title, made.why)
    return [f"<h2>{title}</h2>", picture(made, title, caption)]


def coefficients(e: Evidence, known: Known | None) -> list[str]:
    """The law: estimates, intervals, the published ones where the runs are known, convergence, correlations."""
    fit, law = e.fit, e.fit.form
    errors, i80, i95, weak = fit.standard_errors(), fit.intervals(0.8), fit.intervals(0.95), fit.weakly_identified()
    profiled = {} if isinstance(e.profile, Refusal) else e.profile.intervals(0.95)
    theirs = law.published[known.label] if known else {}
    rows = []
    for name, value in fit.parameters.items():
        if name in fit.fixed:
            cells = ["fixed", "", ""]
        else:
            cells = [f"{errors[name]:.2g}", show.interval(i80[name]), show.interval(i95[name])]
        cells += [show.interval(profiled[name]) if name in profiled else ""] if profiled else []
        cells += [f"{theirs[name]:.6g}"] if known else []
        flag = f'<span class="flag">{escape(weak[name])}</span>' if name in weak else ""
        rows.append([f"<code>{escape(name)}</code>", f"{value:.5g}", *cells, flag])
    header = ["Parameter", "Estimate", "Std. error", "80% interval", "95% interval"]
    header += [*(["95%, profile"] if profiled else []), *([f"Published ({escape(known.label)})"] if known else []), ""]
    scale = "log-loss" if fit.residual == "log" else "loss"
    text = (
        f"<code>{escape(law.formula)}</code>. {escape(law.source)}. Minimum of the sum of Huber({fit.delta:g}) of "
        f"{scale} residuals: {fit.objective:.10g}."
    )
    notes = ["Intervals: percentiles of a bootstrap over " + ("runs." if fit.resample == "run" else "ladders.")]
    if profiled:
        notes.append("Profile: where the objective has risen as far as chance explains, all others fitted again.")
        notes += [sentence(note) + "." for note in e.profile.notes]
    else:
        notes.append(f"{sentence(e.profile.why)}.")
    return [
        "<h2>The law</h2>",
        f"<p>{text}</p>",
        table(header, rows, range(1, len(header) - 1), wrap=(len(header) - 1,)),
        f'<p class="note">{" ".join(notes)}</p>',
        f'<p class="note">{sentence(fit.convergence())}.</p>',
        *_published(fit, known),
        *_correlations(fit),
    ]


def _published(fit, known):
    """What the published parameters are worth on these runs; those of other data in a table of their own."""
    parts, law = [], fit.form
    if known:
        theirs = fit.objective_at(law.published[known.label])
        remark = law.remarks.get(known.label)
        parts.append(
            f"<p>These are {escape(known.title)}. The parameters published for them ({escape(known.label)}) reach "
            f"{theirs:.10g} on the same objective, against {fit.objective:.10g} here"
            + (f": {escape(remark)}" if remark else "")
            + ".</p>"
        )
    others = {label: values for label, values in law.published.items() if not (known and label == known.label)}
    if others:
        rows = [
            [
                f"<code>{escape(name)}</code>",
                f"{fit.parameters[name]:.5g}",
                *(f"{v[name]:.6g}" for v in others.values()),
            ]
            for name in fit.parameters
        ]
        reached = ["Objective here", f"{fit.objective:.6g}", *(f"{fit.objective_at(v):.6g}" for v in others.values())]
        header = ["Parameter", "Here", *map(escape, others)]
        content = table(header, [*rows, reached], range(1, len(header)))
        parts.append(folded("The same law as published for other data or other subsets", content))
    return parts


def _correlations(fit):
    found = fit.correlations()
    names = [name for name in fit.parameters if any(name in pair for pair in found)]
    if not 2 <= len(names) <= MOST_CORRELATED:
        return []
    rows = [
        [f"<code>{escape(one)}</code>", *("" if i <= j else f"{found.get((other, one), math.nan):.3f}" for j, other in
         enumerate(names[:-1]))]
        for i, one in enumerate(names) if i
    ]  # fmt: skip
    header = ["", *(f"<code>{escape(name)}</code>" for name in names[:-1])]
    content = table(header, rows, range(1, len(header)))
    return [folded("Correlations of the estimates (coefficients by their logarithm)", content)]
