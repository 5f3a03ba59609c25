"""Which form of law to trust: forms are fitted below a cut and scored on the larger runs above it, never on their fit.

Cuts hide the runs of most compute and, separately, those of most parameters. The winner has the least mean error over
all cuts; its margin over every other form comes with an interval from resampled runs; the regret of each form at each
cut says what a wrong choice would have cost there.

Letters: L laws, G cuts, K resamples, m hidden points.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from slmjax.scaling import design, estimate, fit, laws, show
from slmjax.scaling.fitted import Fit
from slmjax.scaling.points import Point, PointSet

AUTO = "auto"  # the form that is chosen, where a law may be named
INPUTS = ("N", "D")  # of the forms that are compared unless some are named
HIDE_BY = ("C", "N")
# Of the runs, in order of C or N, that lie below a cut. The form is wanted for a fit to all runs: a cut that hides half
# of them judges a fit to half, where forms of many parameters do worse than they will.
SHARES = (0.8, 0.85, 0.9, 0.95)
LEAST_HIDDEN = 3
NUM_RESAMPLES = 1000
SAME_ERROR = 1e-6  # forms whose errors agree this closely are one form in other parameters


class Cut(NamedTuple):
    """Runs with `by` at or above `value` are hidden; `reach`: the largest `by` over the largest fitted one."""

    by: str
    value: float
    num_fitted: int
    num_hidden: int
    reach: float


class Score(NamedTuple):
    """How a form forecast the hidden runs: mean absolute error [G] and bias [G] in log loss, mean over cuts, margin.

    `margin`: its error minus the winner's, and the 95% interval of that; `regret`: error [G] minus the least of any
    form at that cut; `in_sample`: mean absolute residual of its fits, which decides nothing.
    """

    law: str
    num_parameters: int
    error_G: tuple[float, ...]
    bias_G: tuple[float, ...]
    regret_G: tuple[float, ...]
    error: float
    margin: float
    margin_95: tuple[float, float]
    in_sample: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """Forms by held-out error, best first; `refused`: forms that could not be fitted below some cut, with the reason;
    `same_as`: forms that are another one in other parameters."""

    cuts: tuple[Cut, ...]
    scores: tuple[Score, ...]
    refused: dict[str, str]
    same_as: dict[str, str]

    @property
    def winner(self) -> str:
        return self.scores[0].law

    def clear(self) -> bool:
        """Whether the winner's margin over the second is above 0 in 95% of the resamples."""
        return len(self.scores) < 2 or self.scores[1].margin_95[0] > 0

    def sentence(self) -> str:
        first = self.scores[0]
        text = f"chosen by held-out error: {first.law}, mean absolute error {first.error:.4f} in log loss"
        if len(self.scores) < 2:
            return f"{text}; no other form could be compared"
        second = self.scores[1]
        ends = show.interval(second.margin_95, "{:+.4f}".format)
        doubt = "" if self.clear() else "; these runs do not tell the two apart"
        return f"{text}, {second.margin:.4f} less than {second.law} (95% {ends}){doubt}"

    def table(self) -> str:
        """Forms by cuts, regrets, and the winner."""
        names = [f"{c.by} < {c.value:.3g} ({c.num_fitted}+{c.num_hidden})" for c in self.cuts]
        rows = [["held-out error", "P", *names, "mean", "margin", "95%", "in sample"]]
        for s in self.scores:
            margin = show.interval(s.margin_95, "{:+.4f}".format) if s.margin or s.law != self.winner else ""
            errors = [f"{error:.4f}" for error in s.error_G]
            rows.append(
                [
                    s.law,
                    str(s.num_parameters),
                    *errors,
                    f"{s.error:.4f}",
                    f"{s.margin:.4f}",
                    margin,
                    f"{s.in_sample:.4f}",
                ]
            )
        regrets = [["regret", *names], *([s.law, *(f"{r:.4f}" for r in s.regret_G)] for s in self.scores)]
        lines = [*show.columns(rows), "", *show.columns(regrets), "", self.sentence()]
        lines += [f"{name} is {other} in other parameters" for name, other in self.same_as.items()]
        lines += [f"left out: {name}: {why}" for name, why in self.refused.items()]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        return {
            "winner": self.winner,
            "clear": self.clear(),
            "cuts": [cut._asdict() for cut in self.cuts],
            "scores": [score._asdict() for score in self.scores],
            "refused": self.refused,
            "same_as": self.same_as,
        }


def choose(
    points: PointSet | Sequence[Point],
    forms: Sequence[str] | None = None,
    by: Sequence[str] | None = None,
    delta: float = 1e-3,
    seed: int = 0,
) -> Choice:
    """Score forms by extrapolation to hidden larger runs.

    Args:
      points: with N, D, C and loss.
      forms: names of laws of the same inputs; all laws of N and D when None.
      by: what the cuts are made in: "C", "N" or "D"; None is C and N as far as all runs have them.
      seed: of the resampled runs that give the margins their intervals.
    Raises:
      ValueError: too few runs for a cut, or no form that can be fitted below every cut.
    """
    points = list(points.points if isinstance(points, PointSet) else points)
    forms = default_forms() if forms is None else list(forms)
    if not forms:
        raise ValueError("forms: name at least one law to score")
    if by is None:
        by = [name for name in HIDE_BY if all(p.value(name) is not None for p in points)]
        if not by:
            raise ValueError(
                "the runs have neither FLOPs nor N, so none can be hidden as larger; choose a form yourself"
            )
    cuts, hidden_Gn = make_cuts(points, by, max(len(laws.load_law(name).parameters) for name in forms))
    error_LGn, in_sample, refused = {}, {}, {}
    for name in forms:
        try:
            error_LGn[name], in_sample[name] = hidden_errors(points, hidden_Gn, name, delta)
        except ValueError as error:
            refused[name] = str(error)
    if not error_LGn:
        raise ValueError(f"no form can be fitted below every cut: {'; '.join(refused.values())}")
    same_as = _duplicates(error_LGn)
    kept = [name for name in error_LGn if name not in same_as]
    return _scored(cuts, hidden_Gn, {name: error_LGn[name] for name in kept}, in_sample, refused, same_as, points, seed)


def fit_chosen(
    points: PointSet | Sequence[Point],
    forms: Sequence[str] | None = None,
    delta: float = 1e-3,
    seed: int = 0,
    **options,
) -> tuple[Fit, Choice]:
    """The fit of the form that `choose` chooses, and the choice; the fit's notes say winner and margin.

    Args:
      options: as for `fit.fit`. Forms are compared with equal weights and all parameters free, whatever they say.
    """
    options.setdefault("residual", "log")
    if options["residual"] != "log" or options.get("fixed"):
        raise ValueError(
            "forms are compared in log loss with all parameters free; name a form to hold any, or for raw loss"
        )
    choice = choose(points, forms, delta=delta, seed=seed)
    found = fit.fit(points, choice.winner, delta, seed=seed, **options)
    return dataclasses.replace(found, notes=[*found.notes, choice.sentence()], choice=choice.to_dict()), choice


def default_forms() -> list[str]:
    """Every law of N and D here, those with fewer parameters first."""
    found = {name: laws.load_law(name) for name in laws.names()}
    of_N_D = [name for name, law in found.items() if law.inputs == INPUTS and law.residual == "log"]
    return sorted(of_N_D, key=lambda name: (len(found[name].parameters), name))


def make_cuts(points: Sequence[Point], by: Sequence[str], num_parameters: int) -> tuple[tuple[Cut, ...], np.ndarray]:
    """Cuts that leave enough runs to fit below and some to score above; hidden runs [G, n]."""
    cuts, hidden = [], []
    for name in by:
        if name not in ("C", "N", "D"):
            raise ValueError(f"by={name!r}: runs are hidden by C, N or D")
        x_n = np.array([p.value(name) for p in points], float)
        order_n = np.sort(x_n)
        n = len(order_n)
        gaps = [
            i
            for i in range(max(2 * num_parameters, 1), n - LEAST_HIDDEN + 1)
            if order_n[i] > order_n[i - 1] * (1 + design.SAME_VALUE)
        ]
        if not gaps:
            continue
        for i in sorted({min(gaps, key=lambda i: (abs(i - share * n), i)) for share in SHARES}):
            value = math.sqrt(order_n[i] * order_n[i - 1])
            cuts.append(Cut(name, float(value), i, n - i, float(order_n[-1] / order_n[i - 1])))
            hidden.append(x_n >= value)
    if not cuts:
        raise ValueError(
            f"{len(points)} points are too few to hide any: {2 * num_parameters} are needed below a cut in "
            f"{' or '.join(by)} and {LEAST_HIDDEN} above; add runs, or score forms with fewer parameters"
        )
    return tuple(cuts), np.array(hidden)


def hidden_errors(
    points: Sequence[Point], hidden_Gn: np.ndarray, law: str, delta: float = 1e-3
) -> tuple[np.ndarray, float]:
    """Observed minus predicted log loss [G, n] of one form, nan where fitted; mean absolute residual of its fits."""
    error_Gn, in_sample = np.full(hidden_Gn.shape, np.nan), []
    form = laws.load_law(law)
    for g, hidden_n in enumerate(hidden_Gn):
        below = [p for p, hide in zip(points, hidden_n, strict=True) if not hide]
        theta_P, centre_F, residual_n = _estimate(form, below, delta)
        above = np.flatnonzero(hidden_n)
        u_Fm = np.log([[points[i].value(name) for i in above] for name in form.inputs]) - centre_F[:, None]
        predicted_m = form.loss(theta_P[None], u_Fm)[0][0]
        error_Gn[g, above] = np.log([points[i].loss for i in above]) - np.log(predicted_m)
        in_sample.append(float(np.abs(residual_n).mean()))
    return error_Gn, float(np.mean(in_sample))


def _estimate(form, points, delta):
    """The point estimate alone: coordinates [P], centre [F], residuals [n]. Scores need no bootstrap."""
    log_x_Fn, loss_n = design.validated(PointSet(tuple(points)), form, "log", len(form.parameters))
    centre_F = form.centre(log_x_Fn)
    u_Fn = log_x_Fn - centre_F[:, None]
    held = estimate.hold(form, {}, form.starts(u_Fn, loss_n, 1)[0], centre_F)
    problem = estimate.Problem(form, u_Fn, loss_n, np.ones(len(loss_n)), "log", delta, held)
    theta_P = estimate.solve(problem).theta_Q
    return theta_P, centre_F, problem.residuals(theta_P)


def _duplicates(error_LGn):
    same_as, seen = {}, {}
    for name, error_Gn in error_LGn.items():
        other = next((o for o, e in seen.items() if np.nanmax(np.abs(e - error_Gn)) < SAME_ERROR), None)
        if other:
            same_as[name] = other
        else:
            seen[name] = error_Gn
    return same_as


def _scored(cuts, hidden_Gn, error_LGn, in_sample, refused, same_as, points, seed):
    names = list(error_LGn)
    size_LGn = np.abs(np.stack([error_LGn[name] for name in names]))
    error_LG = np.nanmean(size_LGn, axis=2)
    winner = int(np.argmin(error_LG.mean(axis=1)))  # forms come with fewer parameters first: they win a tie
    mean_LK = _resampled_means(size_LGn, hidden_Gn, [p.run_id for p in points], seed)
    scores = []
    for i, name in enumerate(names):
        margin_K = mean_LK[i] - mean_LK[winner]
        scores.append(
            Score(
                law=name,
                num_parameters=len(laws.load_law(name).parameters),
                error_G=tuple(error_LG[i].tolist()),
                bias_G=tuple(np.nanmean(error_LGn[name], axis=1).tolist()),
                regret_G=tuple((error_LG[i] - error_LG.min(axis=0)).tolist()),
                error=float(error_LG[i].mean()),
                margin=float(error_LG[i].mean() - error_LG[winner].mean()),
                margin_95=tuple(np.quantile(margin_K, [0.025, 0.975]).tolist()),
                in_sample=in_sample[name],
            )
        )
    scores.sort(key=lambda score: (score.error, score.num_parameters))
    return Choice(cuts, tuple(scores), refused, same_as)


def _resampled_means(size_LGn, hidden_Gn, run_ids, seed):
    """Mean error over cuts [L, K] when the runs are drawn with replacement: the forms see the same runs, so that their
    differences are paired."""
    index = {run_id: i for i, run_id in enumerate(dict.fromkeys(run_ids))}
    run_n = np.array([index[run_id] for run_id in run_ids])
    count_KR = np.random.default_rng(seed).multinomial(len(index), np.full(len(index), 1 / len(index)), NUM_RESAMPLES)
    weight_Kn = count_KR[:, run_n].astype(float)
    total_KG = weight_Kn @ hidden_Gn.T
    sum_LKG = np.einsum("kn,lgn->lkg", weight_Kn, np.nan_to_num(size_LGn), optimize=True)
    seen_KG = total_KG > 0  # a cut whose hidden runs were all missed says nothing; a resample without any cut, neither
    mean_LKG = sum_LKG / np.maximum(total_KG, 1)
    some_K = seen_KG.any(axis=1)
    return mean_LKG[:, some_K].sum(axis=2) / seen_KG[some_K].sum(axis=1)
