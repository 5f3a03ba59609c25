"""What a report says of model families beside each other, as HTML: their laws, and the compute that one needs for the
other's loss, with its interval. Wherever a bound stands beside a loss it is called one.
"""

from slmjax.scaling import show
from slmjax.scaling.families import Comparison, Families
from slmjax.scaling.leverage import ratio_said, times
from slmjax.scaling.prediction import LEVELS
from slmjax.scaling.report import sections
from slmjax.scaling.report.evidence import Refusal
from slmjax.scaling.report.page import escape, picture, table
from slmjax.scaling.report.sections import sentence

TITLE = "Families on one compute axis"
CAPTION = (
    "Every run by family, and each family's law, where it has one, at its own compute-optimal sizes, dashed outside "
    "its runs; shaded: what one run will show."
)


def families(found: Families, made: str | Refusal, files: dict[str, str]) -> list[str]:
    """Figure, laws side by side, and the compute ratio of every further family to the first.

    Args:
      made: the figure.
      files: where the fit of each family is kept; {} when it is not.
    """
    parts = [f"<h2>{TITLE}</h2>"]
    parts += [_headline(comparison) for comparison in found.comparisons]
    if isinstance(made, Refusal):
        parts.append(f'<p class="note">No figure: {escape(made.why)}.</p>')
    else:
        bounds = [name for name, kind in found.loss_kinds.items() if kind == "bound"]
        told = f" The loss of {', '.join(bounds)} is an upper bound." if bounds else ""
        parts.append(picture(made, TITLE, CAPTION + told))
    for comparison in found.comparisons:
        parts += [*_by_law(comparison), *_by_pairs(comparison)]
    return [*parts, *_laws(found, files)]


def _headline(comparison: Comparison) -> str:
    """The ratio that is to be quoted, else over the pairs, else why there is neither."""
    sought, given = map(escape, comparison.labels)
    one, bound = comparison.chosen(), f" This is {escape(comparison.reading)}." if comparison.reading else ""
    if one is not None:
        low, high = (_end(end) for end in one.intervals[0.95])
        far = (
            f' <span class="flag">This is extrapolated: compute {show.times(one.sought_reach)} that of the largest run '
            f"of {sought}.</span>"
            if one.extrapolated
            else ""
        )
        return (
            f"<p>With {show.power_of_ten(one.flops)} FLOPs {given} reaches a loss of "
            f"{show.at_most(f'{one.loss:.3f}', comparison.kinds[1])}; {sought} needs <b>{times(one.value)}</b> the "
            f"compute for it, 95% between <b>{low} and {high}</b>.{bound}{far}</p>"
        )
    if not isinstance(comparison.pairs, str):
        mean = comparison.pairs.means[-1]
        low, high = (_end(end) for end in mean.intervals[0.95])
        sure = f"95% between <b>{low} and {high}</b>" if mean.num_sizes > 1 else "of one size, so with no interval"
        far = f' <span class="flag">{_beyond(comparison.pairs)}.</span>' if mean.num_beyond else ""
        return (
            f"<p>At equal size {sought} needs <b>{times(mean.value)}</b> the compute for the loss of {given}, "
            f"{sure}.{bound}{far}</p>"
        )
    return f'<p class="note">No {escape(comparison.title)}.</p>'


def _beyond(pairs):
    outside = sum(pair.beyond for pair in pairs.pairs)
    return f"{outside} of {len(pairs.pairs)} pairs are extrapolated"


def _end(value):
    return show.interval((value, value), times).split(" to ")[0]


def _title(comparison, how):
    return f"<p><b>{escape(sections.capital(comparison.title))}, {how}</b></p>"


def _by_law(comparison: Comparison) -> list[str]:
    sought, given = map(escape, comparison.labels)
    title = _title(comparison, "by their laws")
    if isinstance(comparison.leverages, str):
        return [title, f'<p class="note">Not here: {escape(comparison.leverages)}.</p>']
    rows = [
        [
            show.power_of_ten(one.flops),
            show.at_most(f"{one.loss:.4f}", comparison.kinds[1]),
            times(one.value),
            *(show.interval(one.intervals[level], times) for level in LEVELS),
            f'<span class="flag">{times(one.sought_reach)}, extrapolation</span>'
            if one.extrapolated
            else times(one.sought_reach),
        ]
        for one in comparison.leverages
    ]
    word = sections.capital(comparison.word)
    header = [f"C of {given} (FLOPs)", "Loss", word, "80% interval", "95% interval", f"Of {sought}'s largest run"]
    bound = f" {sentence(comparison.reading)}." if comparison.reading else ""
    return [
        title,
        table(header, rows, range(len(header))),
        f'<p class="note">{sentence(ratio_said(comparison.labels))}, both at their own best sizes.{bound} Intervals: '
        "bootstraps of both laws; an error of their form is not in them.</p>",
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
            times(mean.value)
            + (f'<small class="flag">{mean.num_beyond} extrapolated</small>' if mean.num_beyond else ""),
            *(show.interval(mean.intervals[level], times) for level in LEVELS),
        ]
        for mean in comparison.pairs.means
    ]
    sought, given = map(escape, comparison.labels)
    word, difference = sections.capital(comparison.word), f"Loss {given} − {sought}"
    header = ["Tokens D", "Mean C (FLOPs)", "Sizes", difference, word, "80% interval", "95% interval"]
    notes = [comparison.pairs.reading(), comparison.reading, *comparison.pairs.notes]
    return [
        title,
        table(header, rows, range(len(header))),
        f'<p class="note">No law is fitted here. {" ".join(sentence(note) + "." for note in notes if note)} '
        "Intervals: Student's, over sizes.</p>",
    ]


def _laws(found: Families, files: dict[str, str]) -> list[str]:
    rows, weak = [], []
    for name, point_set in found.points.items():
        kind = escape(show.kind_of_loss(point_set.loss_kind))
        if name not in found.fits:
            rows.append([escape(name), kind, str(len(point_set)), f"no law: {escape(found.refusals[name])}", ""])
            continue
        fit = found.fits[name]
        ends = fit.intervals(0.95)
        said = "; ".join(
            f"{escape(parameter)} {value:.4g} ({show.interval(ends[parameter])})"
            for parameter, value in fit.parameters.items()
        )
        weak += [f"{escape(name)}: {escape(parameter)}" for parameter in fit.weakly_identified()]
        kept = f"<code>{escape(files[name])}</code>" if name in files else ""
        rows.append([escape(name), kind, str(len(fit.points)), f"<code>{escape(fit.law)}</code>: {said}", kept])
    told = next(iter(found.points.values())).points[0]
    note = (
        f"In parentheses 95% intervals. N: {escape(told.n_convention.replace('_', ' '))} parameters of every family. "
        f"C: training FLOPs, {escape(told.flops_convention.replace('_', ' '))}."
    )
    # The first family's remarks stand with its answer.
    note += "".join(f" {escape(found.labels[name])}: {escape(said)}." for name in [*found.fits][1:]
                    for said in found.fits[name].notes)  # fmt: skip
    if weak:
        note += f' <span class="flag">Weakly identified: {", ".join(weak)}.</span>'
    header = ["Family", "Loss", "Runs", "Law", "Fit" if files else ""]
    return [table(header, rows, numeric=(2,), wrap=(3,)), f'<p class="note">{note}</p>']
