"""Masked diffusion beside autoregression: a planted compute multiplier comes back, and a bound is called one."""

import contextlib
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from planted_study import write_study
from test_leverage import RATIOS, fitted, points_of, surface, worth
from test_report import Page

from slmjax import cli
from slmjax.scaling import families
from slmjax.scaling.fit import Fit, fit
from slmjax.scaling.leverage import bound_said, inside_budgets, measured_leverage
from slmjax.scaling.points import PointSet, load_points
from slmjax.scaling.report import drawing, family_plots, plots, write_report

BOUND = {"loss_kind": "bound"}


def both_kinds(rng, multiplier, noise=0.0, **more):
    """A dense family, and one whose bound needs `multiplier` times the compute for the same number."""
    loss = surface(rng)
    masked = points_of("mdm", worth(loss, 1 / multiplier), rng, noise, **BOUND, **more)
    return PointSet((*masked, *points_of("dense", loss, rng, noise)))


def compared(points):
    found = families.fit_families(points, lambda of_family: fit(of_family, num_bootstrap=100))
    (comparison,) = found.comparisons
    return found, comparison


def test_a_planted_multiplier_comes_back_anchored_at_autoregressive_compute(seed):
    rng = np.random.default_rng(seed)
    multiplier = rng.uniform(2, 20)
    found, comparison = compared(both_kinds(rng, multiplier))
    assert comparison.names == ("mdm", "dense") and comparison.kinds == ("bound", "exact")
    assert {name: of.conventions["loss_kind"] for name, of in found.fits.items()} == found.loss_kinds
    masked, dense = found.fits["mdm"], found.fits["dense"]
    largest = max(p["C"] for p in masked.points)
    for one, flops in zip(comparison.leverages, inside_budgets(masked, dense), strict=True):
        low, high = one.intervals[0.95]
        assert one.flops == flops and one.value == pytest.approx(multiplier, rel=0.02) and low <= one.value <= high
        assert one.extrapolated == (one.value * flops > largest), "beyond the largest run that has the bound"
    assert comparison.chosen() == max(
        (one for one in comparison.leverages if not one.extrapolated), key=lambda one: one.flops
    )


def test_anchors_begin_where_the_autoregressive_runs_do():
    """What a family needs many times over need not have been spent on it from the smallest budget on."""
    rng = np.random.default_rng(0)
    loss = surface(rng)
    masked = fitted(points_of("mdm", worth(loss, 1 / 16), ratios=RATIOS[3:], **BOUND))
    dense = fitted(points_of("dense", loss))
    (low, *_, high), smallest = inside_budgets(masked, dense), min(p["C"] for p in masked.points)
    assert low == pytest.approx(min(p["C"] for p in dense.points)) and low < smallest < 16 * low
    assert high == pytest.approx(max(p["C"] for p in dense.points))
    one = measured_leverage(masked, dense, low, mixed=("loss_kind",))
    assert one.value == pytest.approx(16, rel=0.02) and not one.extrapolated
    below = measured_leverage(masked, dense, low / 20, mixed=("loss_kind",))
    assert below.extrapolated and below.sought_reach < 1, "compute that neither family was trained with"


def test_intervals_hold_a_planted_multiplier(seed):
    """Of twelve studies: that 95% intervals hold it in fewer than 7 has odds of 1 in 1,000 even if they hold 90%, see
    test_leverage."""
    rng = np.random.default_rng(seed)
    held, inside = 0, 0
    for _ in range(12):
        multiplier = rng.uniform(3, 20)
        _, comparison = compared(both_kinds(rng, multiplier, noise=0.003, ratios=RATIOS[1:]))
        one = comparison.chosen()
        low, high = one.intervals[0.95]
        held += low <= multiplier <= high
        inside += one.intervals[0.8][0] >= low and one.intervals[0.8][1] <= high and low < one.value < high
    assert held >= 7 and inside == 12, (held, inside)


def test_kinds_are_compared_knowingly_or_not_at_all():
    loss = surface(np.random.default_rng(2))
    masked, dense = fitted(points_of("mdm", loss, **BOUND)), fitted(points_of("dense", loss))
    with pytest.raises(ValueError, match="differ in loss kind: bound and exact"):
        measured_leverage(masked, dense, 1e16)
    assert measured_leverage(masked, dense, 1e16, mixed=("loss_kind",)).value == pytest.approx(1, rel=1e-3)
    other = fitted(points_of("mdm", loss, corpus="b", **BOUND))
    with pytest.raises(ValueError, match="differ in corpus: b and None"):
        measured_leverage(other, dense, 1e16, mixed=("loss_kind",))


READINGS = {
    ("bound", "exact"): "an upper bound on the ratio at equal true loss, because the loss of mdm",
    ("exact", "bound"): "a lower bound on the ratio at equal true loss, because the loss of dense",
    ("bound", "bound"): "of the upper bounds of mdm and dense",
    ("exact", "exact"): "",
}


@pytest.mark.parametrize("kinds", READINGS)
def test_what_a_ratio_of_bounds_says(kinds):
    said = bound_said(("mdm", "dense"), kinds)
    assert said.startswith(READINGS[kinds]) and bool(said) == bool(READINGS[kinds])


def test_the_sought_family_is_the_bound_and_else_the_first():
    rng = np.random.default_rng(3)
    loss = surface(rng)
    runs = [points_of("dense", loss), points_of("moe", worth(loss, 2)), points_of("mdm", worth(loss, 0.2), **BOUND)]
    runs.append(points_of("mdm-moe", worth(loss, 0.4), **BOUND))
    found = families.fit_families(PointSet(tuple(p for of in runs for p in of)), lambda of: fit(of, num_bootstrap=100))
    titles = [comparison.title for comparison in found.comparisons]
    assert titles == [
        "leverage of moe over dense",
        "compute multiplier of mdm (bound) over dense",
        "compute multiplier of mdm-moe (bound) over dense",
    ]
    assert [c.leverages[0].value for c in found.comparisons] == pytest.approx([2, 5, 2.5], rel=0.02)
    assert found.comparisons[0].reading == "" and "bound" not in found.comparisons[0].table().replace("unbounded", "")
    of_bounds = PointSet(tuple(p for of in runs[2:] for p in of))
    (last,) = families.fit_families(of_bounds, lambda of: fit(of, num_bootstrap=100)).comparisons
    assert last.title == "leverage of mdm-moe (bound) over mdm (bound)"
    assert last.leverages[0].value == pytest.approx(2, rel=0.02) and "of the upper bounds of mdm" in last.table()


def test_a_family_of_two_kinds_has_no_law_unless_its_user_says_so():
    rng = np.random.default_rng(4)
    points = both_kinds(rng, 4.0)
    first = points.points[0]
    odd = dataclasses.replace(points, points=(first._replace(loss_kind="exact"), *points.points[1:]))
    found, comparison = compared(odd)
    assert "exact losses and bounds: bound, exact" in found.refusals["mdm"] and set(found.fits) == {"dense"}
    assert comparison.leverages.startswith("mdm has no law: the points mix exact losses and bounds")
    assert isinstance(comparison.pairs, str) and "exact losses and bounds" in comparison.pairs
    found, comparison = compared(odd.mix(["loss_kind"]))
    assert found.loss_kinds == {"dense": "exact", "mdm": "mixed: bound, exact"}
    assert comparison.title == "compute multiplier of mdm (mixed: bound, exact) over dense"
    assert comparison.reading == "across kinds of loss (mdm: mixed: bound, exact; dense: exact)"


# --- a study of both -------------------------------------------------------------------------------------------------

WIDTHS, MASKED_RATIOS = (64, 96, 128, 192, 256), (20, 40, 80)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    return write_study(folder, masked=(WIDTHS, MASKED_RATIOS), multiplier=8.0, noise=0.001, mishaps=False)


def fit_command(*line):
    return cli.main(["fit", *map(str, line), "--bootstrap=100"])


def test_fit_keeps_the_kinds_apart_and_prints_the_multiplier(study, tmp_path, capsys):
    assert fit_command(study, f"--json={tmp_path}/fit.json") == 0
    said = capsys.readouterr().out
    for part in (
        "family dense\n",
        "family mdm (bound)\n",
        "loss_kind: bound",
        "loss_kind: exact",
        "compute multiplier of mdm (bound) over dense",
        "compute multiplier: compute mdm (bound) needs, over C, for the loss that dense reaches with C",
        "an upper bound on the ratio",
        "C of dense",
    ):
        assert part in said, part
    dense, masked = (Fit.from_json((tmp_path / name).read_text()) for name in ("fit.json", "fit-mdm.json"))
    assert (dense.conventions["loss_kind"], masked.conventions["loss_kind"]) == ("exact", "bound")
    assert {p["run_id"][0] for p in masked.points} == {"d"} and {p["run_id"][0] for p in dense.points} == {"w"}
    kept = json.loads((tmp_path / "fit.comparisons.json").read_text())
    assert kept["loss_kinds"] == {"dense": "exact", "mdm": "bound"}
    (comparison,) = kept["comparisons"]
    assert (comparison["sought"], comparison["given"]) == ("mdm", "dense") and "upper bound" in comparison["bound"]
    inside = [one for one in comparison["by_laws"] if not one["extrapolated"]]
    assert inside and all(one["multiplier"] == pytest.approx(8, rel=0.2) for one in inside)
    assert all(low <= one["multiplier"] <= high for one in inside for low, high in one["intervals"].values())
    assert comparison["by_pairs"][-1]["num_extrapolated"] > 0 and comparison["by_pairs"][-1]["loss_difference"] < 0
    assert fit_command(study, "--json=-") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["comparisons"] == kept["comparisons"]
    assert {name: of["conventions"]["loss_kind"] for name, of in printed["fits"].items()} == kept["loss_kinds"]


def test_kinds_are_mixed_in_one_law_only_when_both_flags_say_so(study, capsys):
    assert fit_command(study, "--n=active_non_embedding", "--mix=family") == 2
    assert "--mix=loss_kind" in capsys.readouterr().err
    assert fit_command(study, "--n=active_non_embedding", "--mix=family,loss_kind") == 0
    said = capsys.readouterr().out
    assert "loss_kind: mixed: bound, exact" in said and "differ in loss_kind: bound, exact (--mix=loss_kind)" in said


@pytest.fixture(scope="module")
def report(study):
    """The page, its section on families, and what the command printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["study", "report", f"--study={study}", "--json"]) == 0
    html = (study / "report.html").read_text()
    begin = html.index("<h2>Families on one compute axis")
    return html, html[begin : html.index("<h2>", begin + 4)], json.loads(printed.getvalue())


def test_the_report_calls_a_bound_a_bound_wherever_its_loss_stands(report, study):
    html, section, printed = report
    text = Page(html).text
    assert "loss: exact or an upper bound, nats per token" in text
    assert "families: dense, fitted here, and mdm (bound), compared" in text and "Loss curves: mdm (bound)" in text
    for said in (
        "Compute multiplier of mdm (bound) over dense, by their laws",
        "Compute multiplier of mdm (bound) over dense, by pairs",
        "C of dense (FLOPs)",
        "an upper bound on the ratio at equal true loss",
        "The loss of mdm is an upper bound.",
        "15 outside them",
    ):
        assert said in section, said
    needs = re.search(r"mdm \(bound\) needs <b>([\d.]+)×</b> the compute for it", section)
    assert float(needs.group(1)) == pytest.approx(8, rel=0.15) and "This is extrapolated" not in section
    rows = html[html.index("<h2>Finished runs") : html.index("<h2>Runs left out")]
    kinds = {p.run_id: p.loss_kind for p in load_points([study]).points}
    assert len({*kinds.values()}) == 2
    for row in rows.split("<tr>")[2:]:
        run_id = re.search(r"<code>(\w+)</code>", row).group(1)
        assert row.count("≤ ") == (2 if kinds[run_id] == "bound" else 0), row
    assert "≤: an upper bound." in rows
    assert printed["loss_kinds"] == {"dense": "exact", "mdm": "bound"}
    assert printed["further_fits"] == [str(study / "fit-mdm.json")]
    assert printed["comparisons"][0]["title"] == "compute multiplier of mdm (bound) over dense"


def test_figures_name_the_bound(study):
    points = families.load([study])
    found, _ = compared(points)
    axes = family_plots.families_on_compute(found).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert {"dense: runs", "mdm (bound): runs", "mdm (bound): compute-optimal"} <= set(labels)
    assert axes.get_ylabel() == "held-out loss (of mdm its upper bound), nats per token"
    for name, said in (("dense", "held-out loss, nats"), ("mdm", "held-out loss (upper bound), nats")):
        alone = plots.loss_against_compute(points.only(name), found.fits[name])
        assert alone.axes[0].get_ylabel().startswith(said)


def test_a_page_of_bounds_alone_never_calls_one_a_loss(study, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "save", lambda figure, path: '<svg xmlns="http://www.w3.org/2000/svg"/>')
    alone = tmp_path / "alone"
    listing = json.loads((study / "study.json").read_text())
    runs = [run for run in listing["runs"] if run["tags"].get("family") == "mdm"]
    alone.mkdir()
    for run in runs:
        (alone / run["run_id"]).symlink_to(study / run["run_id"])
    (alone / "study.json").write_text(json.dumps({**listing, "runs": runs}))
    (alone / "fit.comparisons.json").write_text("left by an earlier report")
    text = Page(write_report(alone).read_text()).text
    assert "expect a held-out loss (upper bound) of" in text and "Loss (upper bound), nats per token" in text
    assert "loss: an upper bound, nats per token" in text and not (alone / "fit.comparisons.json").exists()
    assert "expect a held-out loss of" not in text
