"""The report of a fit: nothing disappears, nothing is guessed, the figures show the law, the same bytes every time."""

import hashlib
import math

import numpy as np
import pytest
from test_report import Page

from slmjax.scaling import allocation
from slmjax.scaling.fit import fit
from slmjax.scaling.points import Excluded, Point, PointSet, load_points
from slmjax.scaling.report import drawing, evidence, plots, sources, write_fit_report

SECTIONS = (
    "Compute-optimal sizes",
    "Loss against compute",
    "Loss over parameters and tokens",
    "Back-test",
    "Choice of form",
    "The law",
    "Residuals of the fit",
    "What the fit hangs on",
    "IsoFLOP",
    "Agreement of the methods",
    "Conventions",
    "Runs left out",
    "Points",
    "Provenance",
)


def write_table(path, rng, num_budgets=6, num_sizes=7, E=1.7):
    """Planted IsoFLOP runs as CSV."""
    lines = ["params,tokens,flops,loss"]
    for C in np.geomspace(1e17, 1e20, num_budgets):
        best = 0.1 * math.sqrt(C)
        for N in (best * np.geomspace(0.2, 5, num_sizes)).tolist():
            D = float(C) / (6 * N)
            loss = (E + 60 * N**-0.3 + 280 * D**-0.34) * math.exp(rng.normal(0, 0.001))
            lines.append(f"{N!r},{D!r},{float(C)!r},{loss!r}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(points, fit, page path) of planted runs; one left out."""
    folder = tmp_path_factory.mktemp("fit")
    read = load_points([write_table(folder / "runs.csv", np.random.default_rng(0))])
    point_set = PointSet(read.points, (Excluded("broken<1>", "diverged: loss is nan"),), ("a remark to read",))
    found = fit(point_set, num_bootstrap=100)
    return point_set, found, write_fit_report(point_set, found, folder / "page.html", "slmjax fit 'runs.csv' <x>")


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made but not rendered, which is most of a page's cost: for tests that look at none."""
    monkeypatch.setattr(drawing, "save", lambda figure, path: '<svg xmlns="http://www.w3.org/2000/svg"/>')


def sections_of(html):
    """{title: HTML up to the next}."""
    return {part.split("</h2>")[0]: part.split("</h2>")[1] for part in html.split("<h2>")[1:]}


def test_every_section_is_there_with_its_evidence(made):
    html = made[2].read_text()
    found = sections_of(html)
    assert tuple(found) == SECTIONS
    assert "Not here" not in html
    page = Page(html)
    assert len(page.images) == 6 and all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    for name in ("contours", "loss_against_compute", "residuals", "isoflop", "back_test", "choice_of_form"):
        for suffix in (".svg", ".pdf"):
            assert (made[2].parent / "figures" / name).with_suffix(suffix).stat().st_size > 1000, name
    assert (
        "diverged: loss is nan" in page.text and "broken<1>" in page.text and "slmjax fit 'runs.csv' <x>" in page.text
    )
    assert "A remark to read." in page.text
    assert html.index('<section class="answer">') < html.index("<h2>")


def test_the_page_names_the_bytes_it_was_made_from(made):
    data = (made[2].parent / "runs.csv").read_bytes()
    assert hashlib.sha256(data).hexdigest() in made[2].read_text()


def test_estimates_and_intervals_on_the_page_are_those_of_the_fit(made):
    _, found, path = made
    law = sections_of(path.read_text())["The law"]
    for name, value in found.parameters.items():
        low, high = found.intervals(0.95)[name]
        assert f"<code>{name}</code></td><td" in law and f">{value:.5g}<" in law and f">{low:.4g} to {high:.4g}<" in law


def test_same_input_same_bytes(made, tmp_path):
    point_set, _, path = made
    again = write_fit_report(
        point_set, fit(point_set, num_bootstrap=100), tmp_path / "b.html", "slmjax fit 'runs.csv' <x>"
    )
    assert again.read_bytes() == path.read_bytes()
    for figure in (path.parent / "figures").iterdir():
        assert (tmp_path / "figures" / figure.name).read_bytes() == figure.read_bytes(), figure.name


def test_published_values_stand_beside_ours_only_for_the_bytes_and_the_runs_they_describe(
    made, monkeypatch, undrawn, tmp_path
):
    point_set, found, path = made
    assert "Published (" not in path.read_text()
    digest = hashlib.sha256((path.parent / "runs.csv").read_bytes()).hexdigest()
    known = sources.Known(digest, "planted runs", "chinchilla", "besiroglu2024", len(found.points))
    here = sources.sources(point_set)
    monkeypatch.setattr(sources, "KNOWN", (known,))
    assert sources.known(here, found) == known
    monkeypatch.setattr(sources, "KNOWN", (known._replace(num_points=known.num_points - 1),))
    assert sources.known(here, found) is None
    monkeypatch.setattr(sources, "KNOWN", (known._replace(law="kaplan"),))
    assert sources.known(here, found) is None
    monkeypatch.setattr(sources, "KNOWN", (known,))
    html = write_fit_report(point_set, found, tmp_path / "a.html", "c").read_text()
    theirs = found.objective_at(found.form.published["besiroglu2024"])
    assert "Published (besiroglu2024)" in html and ">2085.43<" in html and f"{theirs:.10g}" in html
    assert "sum of absolute deviations" in html  # the difference is explained


def test_no_split_of_the_same_compute_beats_the_frontier_that_is_drawn(made):
    found = made[1]
    cost = allocation.Cost("6ND")
    axes = plots.contours(found, cost).axes[0]
    line = next(line for line in axes.lines if line.get_label().startswith("compute-optimal"))
    N_m, D_m = (np.asarray(data, float) for data in line.get_data())
    assert len(N_m) > 10
    for factor in (0.8, 1.25):
        for N, D in zip(N_m, D_m, strict=True):
            assert found.predict(N=N, D=D) < found.predict(N=N * factor, D=D / factor)


def test_the_band_of_the_compute_figure_is_the_interval_of_the_forecast(made):
    point_set, found, _ = made
    largest = max(p.C for p in point_set.points)
    e = evidence.gather(point_set, found, [10 * largest])
    axes = plots.loss_against_compute(point_set, found, e.cost, [10 * largest]).axes[0]
    low, high = e.forecasts[0]["loss"].intervals[0.95]
    band = next(c for c in axes.collections if c.get_label().startswith("95%"))
    end = band.get_paths()[0].vertices
    at_budget = end[np.isclose(end[:, 0], 10 * largest), 1]
    assert np.isclose(at_budget.min(), low, rtol=1e-6) and np.isclose(at_budget.max(), high, rtol=1e-6)


def test_outliers_are_ringed(made):
    point_set, _, _ = made
    spoilt = point_set.points[10]._replace(loss=point_set.points[10].loss * 1.01)
    points = PointSet((*point_set.points[:10], spoilt, *point_set.points[11:]))
    found = fit(points, num_bootstrap=100)
    for axes in plots.residuals(found).axes:
        ringed = axes.collections[-1].get_offsets()
        assert len(ringed) == 1 and math.isclose(ringed[0][1], 100 * math.expm1(found.residuals()[10]))


@pytest.mark.parametrize("law", ["power_law", "kaplan_size"])
def test_what_a_law_cannot_show_is_said_in_its_place(law, made, undrawn, tmp_path):
    point_set, _, _ = made
    (tmp_path / "figures").mkdir()
    stale = tmp_path / "figures" / "contours.svg"
    stale.write_text("of an earlier report")
    path = write_fit_report(point_set, fit(point_set, law, num_bootstrap=100), tmp_path / "a.html", "c")
    found = sections_of(path.read_text())
    assert tuple(found) == SECTIONS and not stale.exists()
    for title in ("Compute-optimal sizes", "Loss over parameters and tokens", "Agreement of the methods"):
        assert f"Not here: {law} " in found[title] and "<img" not in found[title]
    assert ("expect a held-out loss" in path.read_text()) == (law == "power_law")


def test_a_floor_that_the_runs_do_not_bound_is_called_so_in_the_answer(undrawn, tmp_path):
    points = load_points([write_table(tmp_path / "runs.csv", np.random.default_rng(2), num_budgets=4, E=0.0)])
    found = fit(points, num_bootstrap=100)
    assert "E" in found.weakly_identified()
    html = write_fit_report(points, found, tmp_path / "a.html", "c").read_text()
    answer = html[html.index('<section class="answer">') : html.index("</section>")]
    assert "Weakly identified: E" in answer and "unbounded" in sections_of(html)["The law"]


def test_points_without_flops_or_files(undrawn, tmp_path):
    rng = np.random.default_rng(1)
    points = [
        Point(f"r{i}", N, N * ratio, None, 1.7 + 60 * N**-0.3 + 280 * (N * ratio) ** -0.34 + rng.normal(0, 1e-3))
        for i, (N, ratio) in enumerate((N, ratio) for N in np.geomspace(1e6, 1e8, 4) for ratio in (5, 10, 20, 40))
    ]
    path = write_fit_report(PointSet(tuple(points)), fit(points, num_bootstrap=100), tmp_path / "a.html", "c")
    found = sections_of(path.read_text())
    assert tuple(found) == SECTIONS
    for title in ("Compute-optimal sizes", "Loss against compute", "IsoFLOP", "Back-test"):
        assert "Not here" in found[title], title
    assert "no source file" in found["Provenance"]


def test_round_places_are_round_and_inside(seed):
    rng = np.random.default_rng(seed)
    for _ in range(300):
        low = 10 ** rng.uniform(-6, 24)
        high = low * 10 ** rng.uniform(0.1, 12)
        places = drawing.round_places(low, high)
        assert 2 <= len(places) <= drawing.MAX_TICKS and low <= places[0] and places[-1] <= high
        assert all(
            f"{place:.1e}" == f"{float(f'{place:.1e}'):.1e}" and float(f"{place:.1e}") == place for place in places
        )


def test_bad_budgets_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match="budgets"):
        write_fit_report(made[0], made[1], tmp_path / "a.html", "c", budgets=[math.inf])


def test_the_chinchilla_runs_are_known_by_their_bytes(scaling_data, tmp_path):
    points = load_points([scaling_data / "chinchilla_epoch.csv"]).drop_highest(5)
    found = fit(points, num_bootstrap=100)
    here = sources.sources(points)
    assert sources.known(here, found).label == "besiroglu2024"
    all_runs = load_points([scaling_data / "chinchilla_epoch.csv"])
    assert sources.known(here, fit(all_runs, num_bootstrap=100)) is None
