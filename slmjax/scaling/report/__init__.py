"""The reports: of a study and of a fit to any points. One self-contained HTML file each, the answer first.

What will a bigger run reach, with which N and D, how sure; then the evidence: loss against compute, contours,
back-test, choice of form, coefficients, residuals, what the fit hangs on, IsoFLOP, agreement of the methods, every run,
every run left out, provenance. When no law can be fitted to a study the reason stands in its place, and what needs a
law is gone. Of several model families the first, dense where it is one of them, has the page, and a section sets the
others beside it on one compute axis.
"""

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slmjax import records
from slmjax.scaling import choose, families, laws
from slmjax.scaling.families import Families
from slmjax.scaling.fit import Fit, fit
from slmjax.scaling.points import PointSet, Run, load_runs
from slmjax.scaling.report import (
    curve_plots,
    drawing,
    evidence_plots,
    evidence_sections,
    family_plots,
    family_sections,
    fit_sections,
    plots,
    sections,
    sources,
    study_sections,
)
from slmjax.scaling.report import evidence as evidences
from slmjax.scaling.report.evidence import Evidence, Refusal
from slmjax.scaling.report.page import page

LAW_OF_C = "Every run and the law; shaded: what one run will show."
FRONTIER = (
    "Every run, coloured by size, with its standard error where it has one, and the compute-optimal frontier of the "
    "law; shaded: what one run on it will show."
)
AT_EACH_SIZE = " Thin lines: the law at each size."
RUNS_ALONE = "Every finished run, coloured by size."
CONTOURS = (
    "Loss of the law over parameters and tokens; dots are the runs, coloured by the loss they had. On the frontier no "
    "other split of the same compute has a lower loss."
)
RESIDUALS = (
    "Observed minus predicted loss. Shaded: one root-mean-square residual; ringed: outliers. Structure is what the law "
    "misses."
)
CURVES = "Held-out loss; training loss faint behind it. A branch (dashed) leaves its trunk where the decay begins."


def write_report(
    study_dir: str | Path,
    out: str | Path | None = None,
    budgets: Sequence[float] | None = None,
    law: str = "chinchilla",
    command: str | None = None,
) -> Path:
    """Write a study's `report.html`, with `fit.json` and `figures/*.svg, *.pdf` beside it; returns its path.

    The fit of a further model family goes to `fit-<family>.json`, and how families compare to `fit.comparisons.json`.

    Args:
      study_dir: the folder with study.json.
      out: folder to write to; the study folder when None.
      budgets: FLOPs to forecast for; 1, 10, 100 and 1000 times the largest run's when None.
      law: a law's name, or "auto" for the one that forecasts best the runs it has not seen.
      command: what reproduces the page, printed at its end.
    """
    study_dir, out = Path(study_dir), Path(out or study_dir)
    evidences.require_budgets(budgets)
    reads = choose.INPUTS if law == choose.AUTO else laws.load_law(law).inputs
    runs, point_set = load_runs(study_dir), families.load([study_dir], reads=reads)
    name = records.read_json(study_dir / "study.json")["name"]
    call = f"from slmjax.scaling.report import write_report; write_report({json.dumps(str(study_dir))})"
    command = command or f"python -c {shlex.quote(call)}"
    shown, figures = _subject(runs, point_set, law), out / "figures"
    files = _keep_fits(out, shown)
    body = study_sections.header(name, runs, point_set)
    beside = _families_section(figures, shown.compared, files) + _curves_section(figures, shown.runs)
    if shown.fit is None:
        body += study_sections.no_law(shown.refusal, shown.points)
        if shown.points.points:
            body += _compute_section(figures, shown.points, None)
        body += beside
    else:
        e = evidences.gather(shown.points, shown.fit, budgets)
        body += sections.answer(e) + sections.optimum_table(e, study_sections.bytes_per_token(runs))
        body += _compute_section(figures, shown.points, e) + beside + _evidence_sections(figures, e, None)
    for family in shown.further:
        body += _curves_section(figures, _of_family(runs, family), family, shown.compared.labels[family])
    kept = [files[family] for family in shown.further if family in files]
    body += study_sections.run_tables(runs, point_set) + study_sections.provenance(runs, shown.fit, command, kept)
    return _replace(out / "report.html", page(f"{name}: scaling report", body))


def write_fit_report(
    point_set: PointSet,
    fitted: Fit,
    path: str | Path,
    command: str,
    budgets: Sequence[float] | None = None,
    compared: Families | None = None,
) -> Path:
    """Write the report of a fit to `path`, with `figures/*.svg, *.pdf` beside it; returns the path.

    Args:
      point_set: what was fitted, with the runs left out of it.
      command: what reproduces the page, printed at its end.
      budgets: FLOPs to forecast for; 1, 10, 100 and 1000 times the largest run's when None.
      compared: this family and others, to be set beside each other.
    """
    path = Path(path)
    e, found = evidences.gather(point_set, fitted, budgets), sources.sources(point_set)
    figures = path.parent / "figures"
    body = [
        *fit_sections.header(e, found),
        *sections.answer(e),
        *sections.optimum_table(e),
        *_compute_section(figures, point_set, e),
        *_families_section(figures, compared, {}),
        *_evidence_sections(figures, e, sources.known(found, fitted)),
        *fit_sections.conventions(e),
        *fit_sections.exclusions(e),
        *fit_sections.all_points(e),
        *fit_sections.provenance(e, found, command),
    ]
    return _replace(path, page(f"{fitted.law}: scaling-law fit", body))


def _fit(point_set, law) -> Fit:
    return choose.fit_chosen(point_set)[0] if law == choose.AUTO else fit(point_set, law)


def _try_fit(point_set, law) -> tuple[Fit | None, str]:
    try:
        return _fit(point_set, law), ""
    except ValueError as error:
        return None, str(error)


def _of_family(runs, name):
    return [run for run in runs if run.start.get("family") == name]


class _Subject(NamedTuple):
    """What a study's page is of: the points, runs and fit of one family, and how the others compare, if there are."""

    points: PointSet
    runs: list[Run]
    fit: Fit | None
    refusal: str
    compared: Families | None

    @property
    def further(self) -> list[str]:
        return [] if self.compared is None else [*self.compared.points][1:]


def _subject(runs, point_set, law) -> _Subject:
    """The whole study, or its first family."""
    names = point_set.families()
    if len(names) < 2:
        return _Subject(point_set, runs, *_try_fit(point_set, law), None)
    compared = families.fit_families(point_set, lambda of_family: _fit(of_family, law))
    fitted, refusal = compared.fits.get(names[0]), compared.refusals.get(names[0], "")
    return _Subject(compared.points[names[0]], _of_family(runs, names[0]), fitted, refusal, compared)


def _keep_fits(out: Path, shown: _Subject) -> dict[str | None, str]:
    """Writes fit.json, fit-<family>.json, and how families compare; the fits' names by family, None for a study that
    has but one."""
    first = None if shown.compared is None else next(iter(shown.compared.points))
    fits, files = {first: shown.fit} | {name: shown.compared.fits.get(name) for name in shown.further}, {}
    for name, fitted in fits.items():
        path = out / "fit.json" if name == first else families.family_file(out / "fit.json", name)
        if fitted is None:  # one left by an earlier report would contradict this page
            path.unlink(missing_ok=True)
        else:
            files[name] = _replace(path, fitted.to_json()).name
    comparisons = families.comparisons_file(out / "fit.json")
    if shown.compared is None:
        comparisons.unlink(missing_ok=True)
    else:
        _replace(comparisons, json.dumps(shown.compared.to_json(), indent=1, allow_nan=False) + "\n")
    return files


def _replace(path, text):
    """Write as a whole or not at all: a report may be read while it is made again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".writing")
    unfinished.write_text(text)
    os.replace(unfinished, path)
    return path


# --- sections with a figure ------------------------------------------------------------------------------------------


def _drawn(folder: Path, name: str, draw: Callable[[], Any], *needs: Any) -> str | Refusal:
    """The figure as SVG, saved in the folder; a refusal where it, or something it needs, could not be made.

    A figure left by an earlier report would contradict a page that has none.
    """
    try:
        refused = next((need for need in needs if isinstance(need, Refusal)), None)
        if refused is None:
            return drawing.save(draw(), folder / name)
    except ValueError as error:
        refused = Refusal(str(error))
    for suffix in (".svg", ".pdf"):
        (folder / name).with_suffix(suffix).unlink(missing_ok=True)
    return refused


def _compute_section(folder, point_set, e: Evidence | None):
    title, budgets = "Loss against compute", []
    if e is None:
        made = _drawn(folder, "loss_against_compute", lambda: plots.loss_against_compute(point_set, None))
        return sections.figure(title, made, RUNS_ALONE)
    if not isinstance(e.forecasts, Refusal):
        budgets = [f.target["flops"] for f in e.forecasts]
    elif not isinstance(e.losses, Refusal):
        budgets = list(e.losses)
    made = _drawn(folder, "loss_against_compute", lambda: plots.loss_against_compute(point_set, e.fit, e.cost, budgets))
    if e.cost is None:
        return sections.figure(title, made, LAW_OF_C if budgets else RUNS_ALONE)
    few = len({p.N for p in point_set.points}) <= plots.MOST_LINES
    return sections.figure(title, made, FRONTIER + (AT_EACH_SIZE if few else ""))


def _families_section(folder, compared: Families | None, files):
    if compared is None:
        return []
    made = _drawn(folder, "families", lambda: family_plots.families_on_compute(compared))
    return family_sections.families(compared, made, files)


def _curves_section(folder, runs, family: str | None = None, label: str = ""):
    """family, label: a further one of the study, whose sizes are its active parameters."""
    if not any(run.start and (run.train or run.evals) for run in runs):
        return []
    if family is None:
        title, name, n = "Loss curves", "loss_curves", "non_embedding"
    else:
        title, name, n = f"Loss curves: {label}", f"loss_curves-{family}", families.ACTIVE
    return sections.figure(title, _drawn(folder, name, lambda: curve_plots.loss_curves(runs, n)), CURVES)


def _evidence_sections(folder, e: Evidence, known):
    fitted, optimum = e.fit, [] if isinstance(e.forecasts, Refusal) else [evidences.shown(e.forecasts)]
    untested = () if e.tested.outcomes else (Refusal(e.tested.sentence()),)
    contours = _drawn(folder, "contours", lambda: plots.contours(fitted, e.cost, optimum), e.forecasts)
    residuals = _drawn(folder, "residuals", lambda: plots.residuals(fitted))
    isoflop = _drawn(folder, "isoflop", lambda: evidence_plots.isoflop(e.isoflop, fitted, e.cost, fitted.loss_kind),
                    e.isoflop)  # fmt: skip
    tested = _drawn(folder, "back_test", lambda: evidence_plots.back_test(e.tested, e.cuts, fitted.residual), *untested)
    choice = _drawn(folder, "choice_of_form", lambda: evidence_plots.choice(e.choice), e.choice)
    return [
        *sections.figure("Loss over parameters and tokens", contours, CONTOURS),
        *evidence_sections.back_test(e, tested),
        *evidence_sections.choice(e, choice),
        *sections.coefficients(e, known),
        *sections.figure("Residuals of the fit", residuals, RESIDUALS),
        *evidence_sections.diagnosis(e),
        *evidence_sections.isoflop(e, isoflop),
        *evidence_sections.agreement(e),
    ]
