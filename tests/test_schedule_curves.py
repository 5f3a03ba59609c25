"""The Multi-Power Law: its derivatives, its knots, planted fits, its readers, and the published metrics."""

import csv

import numpy as np
import pytest

from slmjax.scaling.curves import curve_objective, multi_power, schedule_curves
from slmjax.scaling.curves.curve_tables import Curve, load_curves
from slmjax.scaling.curves.decay_share import DecayForecast, best_decay, decayed
from slmjax.scaling.curves.schedule_curves import ScheduleFit, fit_curves, leave_one_out, score
from slmjax.scaling.verify import multi_power as verify_multi_power

PEAK, WARMUP, T = 1e-3, 100, 2000
TRUTH = np.array([2.5, 0.5, 0.45, 150.0, 2.0, 0.6, 0.6])


def schedule(kind):
    if kind == "constant":
        return decayed(T, PEAK, "linear", 0.5, WARMUP, 1.0)
    if kind == "two_stage":
        lr_T = schedule("constant")
        lr_T[T // 3 :] = 0.3 * PEAK
        return lr_T
    shape, share, final = {
        "cosine": ("cosine", 1 - WARMUP / T, 0.1),
        "wsd": ("linear", 0.2, 0.1),
        "sqrt": ("1-sqrt", 0.3, 0.05),
    }[kind]
    return decayed(T, PEAK, shape, share, WARMUP, final)


def planted(kinds, noise=0.0, rng=None, values_P=TRUTH, every=20):
    """Curves of the law itself, every step counted, with relative noise."""
    steps_n = np.arange(WARMUP + every, T, every)
    curves = []
    for kind in kinds:
        loss_n = multi_power.loss(values_P, multi_power.knots(schedule(kind), steps_n))
        if noise:
            loss_n = loss_n * np.exp(noise * rng.standard_normal(len(loss_n)))
        curves.append(Curve(kind, "", schedule(kind), steps_n, loss_n))
    return curves


def by_definition(values_P, lr_T, t):
    """The formula, term by term, without any array."""
    L0, A, alpha, B, C, beta, gamma = values_P
    total = 0.0
    for k in range(1, t + 1):
        change = lr_T[k] - lr_T[k - 1]
        if change:
            total += change * (1 - (1 + C * lr_T[k] ** -gamma * lr_T[k : t + 1].sum()) ** -beta)
    return L0 + A * lr_T[: t + 1].sum() ** -alpha + B * total


@pytest.mark.parametrize("kind", ["constant", "cosine", "two_stage", "sqrt"])
def test_the_law_is_its_formula(kind):
    lr_T, steps_n = schedule(kind), np.array([1, WARMUP - 1, WARMUP, T // 3 - 1, T // 3, T])
    expected = [by_definition(TRUTH, lr_T, t) for t in steps_n]
    np.testing.assert_allclose(multi_power.loss(TRUTH, multi_power.knots(lr_T, steps_n)), expected, rtol=1e-12)


def test_steps_may_come_in_any_order(seed):
    lr_T, rng = schedule("cosine"), np.random.default_rng(seed)
    steps_n = rng.permutation(np.arange(WARMUP, T))[:50]
    shuffled = multi_power.loss(TRUTH, multi_power.knots(lr_T, steps_n))
    ordered = multi_power.loss(TRUTH, multi_power.knots(lr_T, np.sort(steps_n)))
    np.testing.assert_allclose(shuffled[np.argsort(steps_n)], ordered, rtol=1e-12)


def test_jacobian_is_the_derivative(seed):
    rng = np.random.default_rng(seed)
    values_P = TRUTH * np.exp(0.3 * rng.standard_normal(7))
    knots = multi_power.knots(schedule("sqrt"), np.arange(WARMUP, T, 37), 8)
    loss_n, jacobian_nP = multi_power.loss_and_jacobian(values_P, knots)
    np.testing.assert_allclose(loss_n, multi_power.loss(values_P, knots), rtol=1e-13)
    for i, name in enumerate(multi_power.PARAMETERS):
        ends = []
        for h in (1e-5, -1e-5):
            moved_P = values_P.copy()
            moved_P[i] = moved_P[i] + h if name in ("alpha", "gamma") else moved_P[i] * np.exp(h)
            ends.append(multi_power.loss(moved_P, knots))
        np.testing.assert_allclose(jacobian_nP[:, i], (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-8)


def test_units_of_rate_and_steps_change_no_loss(seed):
    rate, total = np.exp(np.random.default_rng(seed).normal(size=2))
    steps_n = np.arange(WARMUP, T, 50)
    scaled = multi_power.loss(TRUTH, multi_power.knots(schedule("wsd"), steps_n, 1, rate, total))
    values_P = multi_power.natural(TRUTH, rate, total)
    np.testing.assert_allclose(
        multi_power.loss(values_P, multi_power.knots(schedule("wsd"), steps_n)), scaled, rtol=1e-12
    )


def test_groups_of_adjacent_changes_move_little_and_never_bridge_a_gap_or_a_jump():
    steps_n = np.arange(WARMUP, T, 20)
    for kind in ("cosine", "wsd", "two_stage", "sqrt"):
        exact = multi_power.knots(schedule(kind), steps_n)
        grouped = multi_power.knots(schedule(kind), steps_n, 16)
        assert len(grouped.change_G) < 0.2 * len(exact.change_G) or kind == "two_stage"
        assert grouped.change_G.sum() == pytest.approx(exact.change_G.sum())
        error_n = multi_power.loss(TRUTH, grouped) - multi_power.loss(TRUTH, exact)
        assert np.abs(error_n).max() < 2e-3, kind
    # Two drops with a stretch between them, no logged step near: one group would lie halfway.
    lr_T = np.full(T, PEAK)
    lr_T[1000:] *= 0.5
    lr_T[1004:] *= 0.5
    assert len(multi_power.knots(lr_T, np.array([T - 1]), 16).change_G) == 2


def test_fit_gives_back_a_planted_law_and_its_losses_under_other_schedules(seed):
    rng = np.random.default_rng(seed)
    truth_P = TRUTH * np.exp(0.1 * rng.standard_normal(7))
    fit = fit_curves(planted(["constant", "cosine", "two_stage", "wsd"], values_P=truth_P), num_bootstrap=40)
    # Groups of 16 in the fit against single steps in the planted curves: 1e-4, not rounding.
    for curve in planted(["sqrt"], values_P=truth_P):
        assert fit.scores([curve])["sqrt"].worst_relative < 1e-3
    assert fit.num_agreeing >= 2 and fit.stop == "minimum"


def test_the_minimum_is_exact_where_curves_and_fit_share_their_knots(seed, monkeypatch):
    monkeypatch.setattr(curve_objective, "GROUP_WIDTH", 1)
    truth_P = TRUTH * np.exp(0.1 * np.random.default_rng(seed).standard_normal(7))
    fit = fit_curves(planted(["constant", "cosine", "two_stage"], values_P=truth_P, every=40), num_bootstrap=40)
    np.testing.assert_allclose(fit.values, truth_P, rtol=1e-3)
    assert fit.objective < 1e-10


def test_intervals_hold_most_planted_parameters(seed):
    curves = planted(["constant", "cosine", "two_stage", "wsd"], 1e-3, np.random.default_rng(seed))
    fit = fit_curves(curves, num_bootstrap=60, num_starts=2)
    held = [low <= value <= high for value, (low, high) in zip(TRUTH, fit.intervals(0.95).values(), strict=True)]
    assert sum(held) >= 4  # five of seven is the typical least; parameters err together


def test_early_stops_say_so_and_lie_above_the_minimum(seed):
    curves = planted(["constant", "cosine", "two_stage"], 1e-3, np.random.default_rng(seed))
    full, early = fit_curves(curves, num_bootstrap=40), fit_curves(curves, num_bootstrap=40, early_steps=2)
    assert early.stop == "early" and early.num_steps == 2 and early.objective > full.objective
    assert "not a minimum" in early.table() and "not a minimum" not in full.table()


def test_published_response_holds_its_three_parameters():
    fit = fit_curves(planted(["constant", "cosine"]), num_bootstrap=40, response="published")
    np.testing.assert_allclose(fit.values[4:], multi_power.PUBLISHED["400M"][4:], rtol=1e-9)
    assert "not fitted" in fit.table()


def test_leaving_a_schedule_out_scores_each(seed):
    curves = planted(["constant", "cosine", "two_stage", "wsd"], 1e-3, np.random.default_rng(seed))
    scores = leave_one_out(curves, fit_curves(curves, num_bootstrap=40, num_starts=2))
    assert list(scores) == ["constant", "cosine", "two_stage", "wsd"]
    assert scores["cosine"].mean_relative < 0.02


def response_of(fit):
    """How far C, beta and gamma lie from the published ones, in the coordinates of the fit."""
    published_P, values_P = np.array(multi_power.PUBLISHED["400M"]), fit.values
    reach = np.log(values_P[4] / published_P[4]) - np.log(PEAK) * (values_P[6] - published_P[6])
    return np.array([reach, np.log(values_P[5] / published_P[5]), values_P[6] - published_P[6]])


def test_a_pull_lies_between_the_fitted_and_the_published_response(seed, monkeypatch):
    curves = planted(["constant", "cosine", "two_stage"], 1e-3, np.random.default_rng(seed))
    distance = []
    for pull in (0.0, 1.0, 100.0, 1e6):
        monkeypatch.setattr(schedule_curves, "PULLS", (pull,))
        fit = fit_curves(curves, num_bootstrap=40, num_starts=2, response="shrunk")
        assert fit.pull == pull
        distance.append((np.linalg.norm(response_of(fit)), fit.objective))
    away, misfit = zip(*distance, strict=True)
    assert list(away) == sorted(away, reverse=True) and away[-1] < 1e-3  # a ridge path is monotone in both
    assert list(misfit) == sorted(misfit)


def test_the_objective_is_the_misfit_without_the_pull(seed, monkeypatch):
    monkeypatch.setattr(curve_objective, "GROUP_WIDTH", 1)
    monkeypatch.setattr(schedule_curves, "PULLS", (100.0,))
    curves = planted(["constant", "cosine", "two_stage"], 1e-3, np.random.default_rng(seed), every=50)
    fit = fit_curves(curves, num_bootstrap=40, num_starts=1, response="shrunk")
    predicted_n = np.concatenate([fit.predict(curve.lr_T, curve.steps_n) for curve in curves])
    size_n = np.abs(np.log(predicted_n / np.concatenate([curve.loss_n for curve in curves])))
    huber_n = np.where(size_n <= fit.delta, size_n**2 / 2, fit.delta * (size_n - fit.delta / 2))
    assert fit.objective == pytest.approx(huber_n.sum(), rel=1e-9)


def test_the_pull_is_the_one_that_predicts_best_a_curve_left_out(seed, monkeypatch):
    curves = planted(["constant", "cosine", "two_stage"], 1e-3, np.random.default_rng(seed))
    monkeypatch.setattr(schedule_curves, "PULLS", (1.0, 1e3))
    shrunk = fit_curves(curves, num_bootstrap=40, num_starts=2, response="shrunk")
    error = {}
    for pull in (1.0, 1e3):
        monkeypatch.setattr(schedule_curves, "PULLS", (pull,))
        fit = fit_curves(curves, num_bootstrap=40, num_starts=2, response="shrunk")
        error[pull] = np.mean([found.mean_relative for found in leave_one_out(curves, fit).values()])
    assert shrunk.pull == min(error, key=error.get)
    assert "shrunk" in shrunk.table()


def test_a_curve_is_left_out_where_the_others_determine_a_law(seed):
    curves = planted(["constant", "cosine"], 1e-3, np.random.default_rng(seed))
    fit = fit_curves(curves, num_bootstrap=40, num_starts=1)
    assert fit.without["cosine"] is None  # a constant rate alone tells nothing of a decay
    assert list(leave_one_out(curves, fit)) == ["constant"]
    with pytest.raises(ValueError, match="response='published'"):
        fit_curves(planted(["cosine"]), num_bootstrap=40, response="shrunk")


def test_same_curves_same_bytes_and_json_round_trip():
    curves = planted(["constant", "cosine", "wsd"], 1e-3, np.random.default_rng(0))
    first, second = (fit_curves(curves, num_bootstrap=40, num_starts=2) for _ in range(2))
    assert first.to_json() == second.to_json() == ScheduleFit.from_json(first.to_json()).to_json()
    with pytest.raises(ValueError, match="slmjax-schedule-fit-2"):
        ScheduleFit.from_json("{}")


def test_score_by_hand():
    found = score(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
    assert found == pytest.approx((0.5, 1 / 3, np.sqrt(1 / 3), 1 / 9, 1 / 3))


def test_decay_share_is_the_least_of_its_losses():
    fit = verify_multi_power.with_values(multi_power.PUBLISHED["25M"])
    for shape, final_ratio, loss in (("1-sqrt", 1e-4, 3.2583), ("exponential", 0.1, 3.2638)):
        forecast = best_decay(fit, 24_000, 3e-4, shape, final_ratio=final_ratio)
        assert forecast.best == 0.1
        assert forecast.losses.min() == pytest.approx(loss, abs=1e-4)  # as an independent computation found
    with pytest.raises(ValueError, match="behind"):
        best_decay(fit, 3000, 3e-4, shares=(0.5,))
    with pytest.raises(ValueError, match="1e-4"):
        best_decay(fit, 24_000, 3e-4, final_ratio=0.0)


def test_the_best_share_comes_with_what_the_curves_leave_open(seed):
    rng = np.random.default_rng(seed)
    curves = planted(["constant", "cosine", "two_stage", "wsd"], 1e-3, rng)
    forecast = best_decay(fit_curves(curves, num_bootstrap=40, num_starts=2), T, PEAK, warmup_steps=WARMUP)
    low, high = forecast.interval(0.95)
    assert low <= forecast.optimum <= high
    least, most = forecast.range_without()
    assert least <= forecast.optimum <= most and len(forecast.optimum_without) == 4
    from_low, to_high = forecast.near()
    assert from_low < forecast.optimum < to_high
    for share, loss in zip(forecast.shares, forecast.losses, strict=True):
        assert (from_low <= share <= to_high) == (loss <= 1.001 * forecast.losses.min())
        cost, (cost_low, cost_high) = forecast.above(share)
        assert cost >= 0 and 0 <= cost_low <= cost_high
    assert forecast.above(forecast.best)[0] == 0
    assert "without cosine" in forecast.table() and "95% of draws" in forecast.table()


def test_an_optimum_between_shares_is_the_vertex_and_an_edge_is_unbounded():
    shares = (0.05, 0.1, 0.2, 0.4)
    losses = 3 + 0.01 * (np.log(shares) - np.log(0.13)) ** 2
    forecast = DecayForecast(shares, losses, np.empty((0, 4)), {"falling": -np.log(shares)})
    assert forecast.best == 0.1 and forecast.optimum == pytest.approx(0.13, rel=1e-9)
    assert forecast.optimum_without == {"falling": np.inf} and forecast.range_without() == (forecast.optimum, np.inf)
    assert "95% of draws" not in forecast.table() and "outside the shares tried" in forecast.table()


def write(path, rows, header=("model", "schedule", "step", "lr", "loss")):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def test_reader_fills_the_rates_between_logged_steps(tmp_path):
    rows = [("a", "x", 10, 1.0, 4.0), ("a", "x", 20, 0.5, 3.5), ("a", "x", 30, 0.5, 3.2), ("b", "x", 10, 1.0, 4.1)]
    path = write(tmp_path / "curves.csv", rows)
    line, _ = load_curves(path, warmup_steps=5)
    held, other = load_curves(path, between="hold")
    assert line.lr_T[4] == 1.0 and line.lr_T[2] == 0.5 and line.lr_T[15] == 0.75
    assert held.lr_T[0] == 1.0 and held.lr_T[19] == 1.0 and held.lr_T[20] == 0.5
    assert (held.model, other.model, other.steps_n.tolist()) == ("a", "b", [10])
    renamed = write(tmp_path / "renamed.csv", [r[1:] for r in rows[:3]], ("run", "s", "rate", "nll"))
    (curve,) = load_curves(renamed, {"schedule": "run", "step": "s", "lr": "rate", "loss": "nll"})
    assert curve.loss_n.tolist() == [4.0, 3.5, 3.2]


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([("a", "x", 10, 1.0, "bad")], {}, "row 1: loss is 'bad'"),
        ([("a", "x", 10, 1.0, -1.0)], {}, "not a positive finite number"),
        ([("a", "x", 10, 1.0, 3.0), ("a", "x", 10, 1.0, 3.0)], {}, "must increase"),
        ([("a", "x", 10, 1.0, 3.0)], {"warmup_steps": 11}, "is logged already"),
        ([("a", "x", 10, 1.0, 3.0)], {"between": "guess"}, "linear, hold"),
        ([("a", "x", 10, 1.0, 3.0)], {"columns": {"loss": "nll"}}, "no column 'nll'"),
        ([("a", "x", 10, 1.0, 3.0)], {"columns": {"los": "loss"}}, "'los' is not one of"),
        ([], {}, "no rows"),
    ],
)
def test_bad_tables_are_refused(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        load_curves(write(tmp_path / "curves.csv", rows), **options)


def test_degenerate_designs_are_refused():
    constant = planted(["constant"])
    with pytest.raises(ValueError, match="add a curve with a decay"):
        fit_curves(constant)
    with pytest.raises(ValueError, match="too few for 7 parameters"):
        fit_curves(planted(["cosine"], every=100))
    with pytest.raises(ValueError, match="resample='blocks'"):
        fit_curves(planted(["cosine", "wsd"]), resample="curves")
    with pytest.raises(ValueError, match="finite and not negative"):
        verify_multi_power.with_values(TRUTH).predict(np.array([1e-3, np.nan]))
    with pytest.raises(ValueError, match="within 0 to 9"):
        verify_multi_power.with_values(TRUTH).predict(np.full(10, 1e-3), np.array([10]))


def test_starts_are_near_before_any_step():
    curves = planted(["constant", "cosine", "two_stage"])
    start = fit_curves(curves, num_bootstrap=40, num_starts=1, early_steps=0)
    assert max(found.mean_relative for found in start.scores(curves).values()) < 0.01
    assert min(abs(start.parameters["beta"] - cell[0]) for cell in curve_objective.SHAPES) < 1e-9


@pytest.mark.slow
def test_published_metrics(scaling_data):
    """All that the source prints; what its full minimum says of the decay is another matter, see the check's name."""
    checks = [check for check in verify_multi_power.checks(scaling_data) if check.judged]
    share = "best decay share, 1-sqrt"
    assert [check.what for check in checks if not check.holds] == [
        f"25M own fit: {share}",
        f"100M own fit: {share}",
        f"100M own fit, shrunk response: {share}",
    ]


def test_published_parameters_on_the_public_curves(scaling_data):
    curves = load_curves(scaling_data / verify_multi_power.TABLE, {"model": "model_m"}, verify_multi_power.WARMUP_STEPS)
    exact = [verify_multi_power._exact(curve) for curve in curves]
    for model, printed in verify_multi_power.PRINTED.items():
        fit = verify_multi_power.with_values(multi_power.PUBLISHED[f"{model}M"])
        for ours, text in zip(verify_multi_power._means(fit, exact, model), printed, strict=True):
            assert f"{ours:.{len(text) - 2}f}" == text
