"""What a report says of model families beside each other, as HTML: their laws, and the leverage with its interval."""

from slmjax.scaling import show
from slmjax.scaling.families import Comparison, Families
from slmjax.scaling.leverage import times
from slmjax.scaling.prediction import LEVELS
from slmjax.scaling.report.evidence import Refusal
from slmjax.scaling.report.page import escape, picture, table
from slmjax.scaling.report.sections import sentence

TITLE = "Families on one compute axis"
CAPTION = (
    "Every run by family, and each family's law, where it has one, at its own compute-optimal sizes, dashed beyond its "
    "largest run; shaded: what one run will show."
)


def families(found: Families, made: str | Refusal, files: dict[str, str]) -> list[str]:
    """Figure, laws side by side, and the leverage of every further family over the first.

    Args:
      made: the figure.
      files: where the fit of each family is kept; {} when it is not.
    """
    parts = [f"<h2>{TITLE}</h2>"]
    parts += [_headline(comparison) for comparison in found.comparisons]
    if isinstance(made, Refusal):
        parts.append(f'<p class="note">No figure: {escape(made.why)}.</p>')
    else:
        parts.append(picture(made, TITLE, CAPTION))
    for comparison in found.comparisons:
        parts += [*_by_law(comparison), *_by_pairs(comparison)]
    return [*parts, *_laws(found, files)]


def _headline(comparison: Comparison) -> str:
    """The leverage at the largest compute that both families had, else over the pairs, else why there is neither."""
    first, second = map(escape, comparison.names)
    if not isinstance(comparison.leverages, str):
        one = comparison.leverages[-1]
        low, high = (_end(end) for end in one.intervals[0.95])
        far = (
            f' <span class="flag">This takes the law of {first} to {show.times(one.dense_reach)} the compute of its '
            "largest run.</span>"
            if one.dense_reach > 1
            else ""
        )
        return (
            f"<p>With {show.power_of_ten(one.flops)} FLOPs {second} reaches a loss of {one.loss:.3f}; {first} needs "
            f"<b>{times(one.value)}</b> the compute for it, 95% between <b>{low} and {high}</b>.{far}</p>"
        )
    if not isinstance(comparison.pairs, str):
        mean = comparison.pairs.means[-1]
        low, high = (_end(end) for end in mean.intervals[0.95])
        sure = f"95% between <b>{low} and {high}</b>" if mean.num_sizes > 1 else "of one size, so with no interval"
        return (
            f"<p>At equal size {first} needs <b>{times(mean.value)}</b> the compute for the loss of {second}, "
            f"{sure}.</p>"
        )
    return f'<p class="note">No leverage of {second} over {first}.</p>'


def _end(value):
    return show.interval((value, value), times).split(" to ")[0]


def _title(comparison, how):
    first, second = map(escape, comparison.names)
    return f"<p><b>Leverage of {second} over {first}, {how}</b></p>"


def _by_law(comparison: Comparison) -> list[str]:
    first, second = map(escape, comparison.names)
    title = _title(comparison, "by their laws")
    if isinstance(comparison.leverages, str):
        return [title, f'<p class="note">Not here: {escape(comparison.leverages)}.</p>']
    rows = [
        [
            show.power_of_ten(one.flops),
            f"{one.loss:.4f}",
            times(one.value),
            *(show.interval(one.intervals[level], times) for level in LEVELS),
            f'<span class="flag">{times(one.dense_reach)}, extrapolation</span>'
            if one.dense_reach > 1
            else times(one.dense_reach),
        ]
        for one in comparison.leverages
    ]
    header = [f"C of {second} (FLOPs)", "Loss", "Leverage", "80% interval", "95% interval", f"Of {first}'s largest run"]
    return [
        title,
        table(header, rows, range(len(header))),
        f'<p class="note">Compute {first} needs, over C, for the loss that {second} reaches with C, both at their own '
        "best sizes. Intervals: bootstraps of both laws; an error of their form is not in them.</p>",
    ]


def _by_pairs(comparison: Comparison) -> list[str]:
    title = _title(comparison, "by pairs of runs of equal size and tokens")
    if isinstance(comparison.pairs, str):
        return [title, f'<p class="note">Not here: {escape(comparison.pairs)}.</p>']
    rows = [
        [
            "all" if mean.D is None else show.count(mean.D),
            show.power_of_ten(mean.flops),
            str(mean.num_sizes),
            f"{mean.difference:+.4f}",
            times(mean.value),
            *(show.interval(mean.intervals[level], times) for level in LEVELS),
        ]
        for mean in comparison.pairs.means
    ]
    header = ["Tokens D", "Mean C (FLOPs)", "Sizes", "Loss difference", "Leverage", "80% interval", "95% interval"]
    notes = [comparison.pairs.reading(), *comparison.pairs.notes]
    return [
        title,
        table(header, rows, range(len(header))),
        f'<p class="note">No law is fitted here. {" ".join(sentence(note) + "." for note in notes)} '
        "Intervals: Student's, over sizes.</p>",
    ]


def _laws(found: Families, files: dict[str, str]) -> list[str]:
    rows, weak = [], []
    for name, point_set in found.points.items():
        if name not in found.fits:
            rows.append([escape(name), str(len(point_set)), f"no law: {escape(found.refusals[name])}", ""])
            continue
        fit = found.fits[name]
        ends = fit.intervals(0.95)
        said = "; ".join(
            f"{escape(parameter)} {value:.4g} ({show.interval(ends[parameter])})"
            for parameter, value in fit.parameters.items()
        )
        weak += [f"{escape(name)}: {escape(parameter)}" for parameter in fit.weakly_identified()]
        kept = f"<code>{escape(files[name])}</code>" if name in files else ""
        rows.append([escape(name), str(len(fit.points)), f"<code>{escape(fit.law)}</code>: {said}", kept])
    told = next(iter(found.points.values())).points[0]
    note = (
        f"In parentheses 95% intervals. N: {escape(told.n_convention.replace('_', ' '))} parameters of every family. "
        f"C: training FLOPs, {escape(told.flops_convention.replace('_', ' '))}."
    )
    if weak:
        note += f' <span class="flag">Weakly identified: {", ".join(weak)}.</span>'
    header = ["Family", "Runs", "Law", "Fit" if files else ""]
    return [table(header, rows, numeric=(1,), wrap=(2,)), f'<p class="note">{note}</p>']
