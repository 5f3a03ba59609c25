"""The report: complete, self-contained, the same bytes every time, and honest when there is nothing to fit."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from planted_study import planted_loss, write_study

from slmjax.scaling import allocation, families, forecast, leverage, show
from slmjax.scaling.fit import Fit, fit
from slmjax.scaling.points import load_points, load_runs
from slmjax.scaling.report import curve_plots, drawing, family_plots, write_report


class Page(HTMLParser):
    """Open tags must close; collects links, images and the text."""

    VOID = ("meta", "img", "br")

    def __init__(self, html):
        super().__init__()
        self.open, self.links, self.images, self.text = [], [], [], ""
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            self.images.append(attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def path(study):
    return write_report(study)


@pytest.fixture(scope="module")
def page(path):
    return Page(path.read_text())


def test_it_needs_nothing_from_outside(path, page):
    assert path.name == "report.html"
    assert len(page.images) == 6 and all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert not re.search(r"@import|url\(|<script", path.read_text())
    for image in page.images:
        svg = base64.b64decode(image["src"].split(",")[1]).decode()
        assert svg.count("<path") > 20 and image["alt"]


def test_the_answer_comes_first_and_is_the_forecast(path, page, study):
    fitted = Fit.from_json((path.parent / "fit.json").read_text())
    largest = max(p.C for p in load_points([study]).points)
    made = forecast.optimum(fitted, 10 * largest, "logged")
    answer = page.text[page.text.index("With 10× the compute") : page.text.index("Compute-optimal sizes")]
    for said in (
        f"{show.count(made['N'].value)} parameters",
        f"{show.count(made['D'].value)} tokens",
        f"{made['loss'].value:.3f}",
        "{:.3f} and {:.3f}".format(*made["loss"].intervals[0.95]),
        "Back-test:",
        "intervals held",
        "1 of 22 runs repeat data",
    ):
        assert said in answer, said
    # The planted law stands inside the interval that the page prints.
    low, high = made["loss"].intervals[0.95]
    assert low < planted_loss(made["N"].value, made["D"].value) < high


def test_every_run_is_on_the_page_once(study, path):
    html = path.read_text()
    html = html[html.index("<h2>Finished runs") :]
    for run in load_runs(study):
        assert html.count(f"<td><code>{run.run_id}</code></td>") == 1, run.run_id
    tables = html[html.index("Runs left out") :]
    for reason in ("diverged: loss is nan at step 200", "stable phase: a trunk, not annealed", "not started"):
        assert reason in tables


def test_default_budgets_are_multiples_of_the_largest_run_and_marked(page):
    table = page.text[page.text.index("Compute-optimal sizes") : page.text.index("Loss against compute")]
    for said in ("1×", "10×, extrapolation", "100×, extrapolation", "1,000×, extrapolation"):
        assert said in table
    assert "1×, extrapolation" not in table and "as the runs logged it" in table


def test_given_budgets_and_command_are_used_and_bad_budgets_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "save", lambda figure, path: '<svg xmlns="http://www.w3.org/2000/svg"/>')
    study = write_study(tmp_path / "study", widths=(64, 96, 128), ratios=(10, 20, 40), mishaps=False)
    page = Page(write_report(study, out=tmp_path, budgets=[3e17], command="slmjax study report X").read_text())
    assert "3.00×10" in page.text and "1,000×" not in page.text and "slmjax study report X" in page.text
    assert (tmp_path / "fit.json").exists()
    with pytest.raises(ValueError, match="budgets"):
        write_report(study, out=tmp_path, budgets=[-1.0])


def test_provenance(page):
    for said in ("3f2a9c1", "0.10.2", "write_report(", "model.width (5 values)", "learning_rate"):
        assert said in page.text, said


def test_same_records_same_bytes(study, path, tmp_path):
    again = write_report(study, out=tmp_path)
    names = ["report.html", "fit.json", *(f"figures/{figure.name}" for figure in (path.parent / "figures").iterdir())]
    assert len(names) == 2 + 2 * 6  # each figure as SVG and PDF
    for name in names:
        assert (again.parent / name).read_bytes() == (path.parent / name).read_bytes(), name


def test_without_enough_points_the_reason_stands_in_place_of_the_fit(tmp_path):
    folder = write_study(tmp_path / "small", widths=(64, 96), ratios=(10, 20), mishaps=False)
    (folder / "fit.json").write_text("left by an earlier report")
    page = Page(write_report(folder).read_text())
    assert "No law could be fitted. 4 points (2 runs were left out) are too few" in page.text
    assert "Best run so far: w0096r020" in page.text and "Compute-optimal sizes" not in page.text
    assert len(page.images) == 2 and "Back-test" not in page.text and not (folder / "fit.json").exists()


def test_a_study_that_has_not_started(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"name": "<b>new</b>", "runs": [{"run_id": "a", "tags": {}}]}))
    html = write_report(tmp_path).read_text()
    page = Page(html)
    assert "not started" in page.text and not page.images
    assert "<b>new</b>" not in html and "&lt;b&gt;new&lt;/b&gt;" in html


def test_a_branch_is_drawn_from_where_it_leaves_its_trunk(study):
    runs = {run.run_id: run for run in load_runs(study)}
    figure = curve_plots.loss_curves([runs["trunk0096"], runs["w0096r040"]])
    trunk, branch = (line for line in figure.axes[0].lines if len(line.get_xdata()) > 1 and line.get_alpha() is None)
    left_at = runs["w0096r040"].branch_step * 8192
    assert branch.get_xdata()[0] == left_at
    on_trunk = trunk.get_ydata()
    assert min(on_trunk) < branch.get_ydata()[0] < max(on_trunk)
    assert branch.get_linestyle() != trunk.get_linestyle() and branch.get_ydata()[-1] < branch.get_ydata()[0]


# --- several families ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A study of two families, its report, and the section on them."""
    folder = tmp_path_factory.mktemp("both")
    (folder / "fit-moe.json").write_text("left by an earlier report")
    write_study(folder, mixture=((64, 96, 128, 192), (10, 20, 40)), leverage=2.0)
    html = write_report(folder).read_text()
    begin = html.index("<h2>Families on one compute axis")
    return folder, html, html[begin : html.index("<h2>", begin + 4)]


def test_families_stand_on_one_compute_axis_with_the_leverage_of_their_fits(both):
    folder, html, section = both
    dense, moe = (Fit.from_json((folder / name).read_text()) for name in ("fit.json", "fit-moe.json"))
    assert (dense.conventions["family"], moe.conventions["family"]) == ("dense", "moe")
    for flops in leverage.inside_budgets(dense, moe):
        made = leverage.measured_leverage(dense, moe, flops)
        ends = show.interval(made.intervals[0.95], show.times)
        assert f">{show.power_of_ten(flops)}</td>" in section
        assert f">{show.times(made.value)}</td>" in section and f">{ends}</td>" in section
        assert made.intervals[0.95][0] < 2.0 * 1.1 and made.intervals[0.95][1] > 2.0 / 1.1
    for said in ("fit-moe.json", "by pairs of runs of equal size and tokens", "active non embedding", "<img alt="):
        assert said in section, said
    text = Page(html).text
    assert "families: dense, fitted here, and moe, compared" in text and "Loss curves: moe" in text
    for run in load_runs(folder):
        assert html[html.index("<h2>Finished runs") :].count(f"<td><code>{run.run_id}</code></td>") == 1, run.run_id
    assert {file.stem for file in (folder / "figures").glob("*.svg")} >= {"families", "loss_curves-moe"}


def test_answer_and_law_of_the_first_family_are_those_of_its_runs_alone(both, study, path):
    """The study without the mixture has the same dense runs."""
    one, fitted = (Fit.from_json((folder / "fit.json").read_text()) for folder in (study, both[0]))
    assert one.parameters == fitted.parameters and (one.draws == fitted.draws).all()
    assert {r["reason"] for r in fitted.left_out} >= {"family 'moe', not 'dense'"}

    def answer(html):
        return html[html.index('<p class="headline">') : html.index("<ul>")]

    assert answer(both[1]) == answer(path.read_text())


def test_every_run_is_a_point_of_its_family_in_the_figure(both):
    points = families.load([both[0]])
    made = families.fit_families(points, lambda of_family: fit(of_family, num_bootstrap=100))
    axes = family_plots.families_on_compute(made).axes[0]
    for container, (name, point_set) in zip(axes.containers, made.points.items(), strict=True):
        drawn = container.lines[0]
        assert container.get_label() == f"{name}: runs"
        assert sorted(zip(*drawn.get_data(), strict=True)) == sorted((p.C, p.loss) for p in point_set.points)
        line = next(line for line in axes.lines if line.get_label() == f"{name}: compute-optimal")
        cost = allocation.make_cost(made.fits[name], "logged")
        C_m = line.get_xdata()
        assert np.allclose(line.get_ydata(), allocation.frontier(made.fits[name], C_m, cost)[2])
        assert C_m.max() <= max(p.C for p in point_set.points)
    assert len({c.lines[0].get_marker() for c in axes.containers}) == 2, "told apart without colour"


def test_a_further_family_without_a_law_leaves_no_fit_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "save", lambda figure, path: '<svg xmlns="http://www.w3.org/2000/svg"/>')
    folder = write_study(
        tmp_path, widths=(64, 96, 128), ratios=(10, 20, 40), mishaps=False, mixture=((64, 96), (10, 20))
    )
    (folder / "fit-moe.json").write_text("left by an earlier report")
    text = Page(write_report(folder).read_text()).text
    assert not (folder / "fit-moe.json").exists() and (folder / "fit.json").exists()
    assert "moe has no law: 4 points" in text and "At equal size dense needs" in text


COUNTS = {950: "950", 999.7: "1k", 1.25e6: "1.25M", 7.4e10: "74B", 2.5e15: "2.5e+15", float("inf"): "unbounded"}


@pytest.mark.parametrize(("value", "text"), COUNTS.items())
def test_counts_read_well(value, text):
    assert show.count(value) == text
