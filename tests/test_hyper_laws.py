"""Learning-rate and batch laws: published examples, and planted sweeps read back."""

import csv
import math

import numpy as np
import pytest

from slmjax.scaling import leverage, moe_cost
from slmjax.scaling.rates import hyper_fit, hyper_laws
from slmjax.scaling.rates.batch_size import Tradeoff, fit_batch_law, fit_tradeoff
from slmjax.scaling.rates.hyper_fit import HyperFit, fit_sweep, load_sweep, read_optimum
from slmjax.scaling.rates.hyper_laws import deepseek, load_hyper_law, power_lines
from slmjax.scaling.verify import hyper_laws as verify_hyper_laws
from slmjax.scaling.verify import step_law as verify_step_law
from slmjax.scaling.verify import unit_rows

LAW = {"lr": (20.0, -0.7, 0.25), "batch": (3.0, 0.5)}  # coefficient, exponents of N and D; of D


def planted(rng, noise=0.0, jitter=0.0, num_cells=9, width=0.05):
    """A sweep whose cells are bowls in log lr and log batch around the planted law; jitter moves whole bowls."""
    sweep = {}
    for N in np.geomspace(1e8, 1e9, 3):
        for D in N * np.array([5.0, 30.0, 200.0]):
            shift = jitter * rng.standard_normal(2)
            lr = LAW["lr"][0] * N ** LAW["lr"][1] * D ** LAW["lr"][2] * math.exp(shift[0])
            batch = LAW["batch"][0] * D ** LAW["batch"][1] * math.exp(shift[1])
            x, y = np.meshgrid(np.linspace(-1.7, 1.9, 11), np.linspace(-1.6, 2.0, 9))
            x, y = x.ravel(), y.ravel()
            loss = 2.5 * (1 + width * (x * x - 0.6 * x * y + 0.8 * y * y) + noise * rng.standard_normal(len(x)))
            sweep[N, D] = np.stack([lr * np.exp(x), batch * np.exp(y), loss], axis=1)
            if len(sweep) == num_cells:
                return sweep
    return sweep


def test_every_law_is_found_and_states_its_source():
    assert {"deepseek", "step_law", "minicpm_batch", "critical_batch"} <= set(hyper_laws.names())
    for name in hyper_laws.names():
        law = load_hyper_law(name)
        assert law.name == name and "arXiv" in law.source and law.setting
        found = law.recommend(**dict.fromkeys(law.inputs, 2.0))
        assert set(found) == set(law.outputs) and all(value > 0 for value in found.values())
        doubled = law.recommend(**dict.fromkeys(law.inputs, 4.0))
        for output, value in doubled.items():
            power = sum(law.outputs[output].exponents.values())
            assert value / found[output] == pytest.approx(2.0**power)


def test_a_fork_adds_a_law_as_one_file(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "lr.py").write_text(
        "from slmjax.scaling.rates.hyper_laws import HyperLaw, PowerProduct\n"
        "law = HyperLaw('mine.lr', {'lr': PowerProduct('', 2.0, {'N': -1.0})}, 'arXiv none', 'any')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_hyper_law("mine.lr").recommend(N=4.0) == {"lr": pytest.approx(0.5)}


def test_bad_questions_are_refused():
    with pytest.raises(ValueError, match="did you mean 'step_law'"):
        load_hyper_law("step_laws")
    with pytest.raises(ValueError, match="does not depend on C"):
        load_hyper_law("step_law").recommend(C=1e20)
    with pytest.raises(ValueError, match="N=-1 is not a positive"):
        load_hyper_law("step_law").recommend(N=-1, D=1e9)
    with pytest.raises(ValueError, match="needs N, D; given: nothing"):
        load_hyper_law("step_law").recommend()
    assert set(load_hyper_law("step_law").recommend(D=1e10)) == {"batch"}


def test_reach_counts_from_the_ends_of_the_source():
    law = load_hyper_law("deepseek")
    assert law.reach(C=1e18) == {"C": 1.0}
    assert law.reach(C=2e22) == {"C": pytest.approx(1000.0)}
    assert law.reach(C=1e16) == {"C": pytest.approx(10.0)}


def test_published_examples_and_unit_rows_hold():
    checks = [*unit_rows.checks(None), *verify_hyper_laws.checks(None)]
    rows = {check.what.split(":")[0] for check in checks if check.what.startswith("row ")}
    assert rows == {f"row {n}" for n in (7, 8, 12, 13, 14, 15, 16, 17, 19, 20, 21)}
    assert [check.what for check in checks if not check.holds] == []


def test_deepseek_flops_count_weights_and_attention():
    # 12 d^2 weights a block, 6 FLOPs each; scores and values 2 * 2 * l * d forward, thrice for training.
    assert deepseek.non_embedding_flops_per_token(3, 64, 128) == 6 * 3 * 12 * 64**2 + 3 * 3 * 4 * 128 * 64


def test_weight_decay_keeps_the_time_scale():
    weight_decay = power_lines.weight_decay(tau=0.2, batch=1e6, lr=1e-3, tokens=2e10)
    assert 1e6 / (1e-3 * weight_decay * 2e10) == pytest.approx(0.2)


def test_leverage_is_largest_at_the_best_granularity(seed):
    rng = np.random.default_rng(seed)
    ratio, flops = rng.uniform(0.01, 0.5), 10 ** rng.uniform(18, 24)
    best = leverage.best_granularity()
    top = leverage.efficiency_leverage(ratio, best, flops)
    for factor in (0.8, 1.25):
        assert leverage.efficiency_leverage(ratio, best * factor, flops) < top
    assert leverage.efficiency_leverage(ratio / 2, best, flops) > top
    with pytest.raises(ValueError, match="active_ratio=2"):
        leverage.efficiency_leverage(2, best, flops)


def test_granular_counts():
    blocks = moe_cost.num_blocks(12 * 256**2 * 4)  # width 256, four blocks
    assert blocks == pytest.approx(4.0)
    assert moe_cost.total_params(blocks, 1) == pytest.approx(12 * 256**2 * 4)  # one expert: the dense model
    assert moe_cost.training_flops(blocks, 0, 1, 10) == pytest.approx(6 * 12 * 256**2 * 4 * 10)


@pytest.mark.parametrize("reading", ["quadratic", "quadratic_near"])
def test_a_quadratic_bowl_gives_back_its_law(seed, reading):
    fit = fit_sweep(planted(np.random.default_rng(seed), width=5e-3), reading, num_bootstrap=100, seed=seed)
    assert fit.exponents == pytest.approx({"lr_N": -0.7, "lr_D": 0.25, "batch_D": 0.5}, abs=1e-8)
    assert math.exp(fit.coefficients["lr"][0]) == pytest.approx(20.0, rel=1e-6)
    assert [optimum.loss for optimum in fit.optima] == pytest.approx([2.5] * len(fit.optima), rel=1e-9)
    found = fit.recommend(3e9, 6e10)
    assert found.lr == pytest.approx(20.0 * 3e9**-0.7 * 6e10**0.25, rel=1e-6)
    assert found.reach == {"N": pytest.approx(3.0), "D": 1.0}


@pytest.mark.parametrize("reading", hyper_fit.READINGS)
def test_every_reading_finds_a_noisy_bowl(seed, reading):
    sweep = planted(np.random.default_rng(seed), noise=2e-4, width=0.01)
    fit = fit_sweep(sweep, reading, num_bootstrap=100)
    for name, value in {"lr_N": -0.7, "lr_D": 0.25, "batch_D": 0.5}.items():
        assert fit.exponents[name] == pytest.approx(value, abs=0.35)
    low, high = fit.spans()["lr_N"]
    assert low <= fit.exponents["lr_N"] <= high


def test_intervals_cover_the_planted_exponents(seed):
    rng, held = np.random.default_rng(seed), []
    for _ in range(30):
        fit = fit_sweep(planted(rng, jitter=0.2, width=5e-3), "quadratic", num_bootstrap=200)
        low, high = fit.intervals(0.95)["batch_D"]
        held.append(low <= 0.5 <= high)
    assert np.mean(held) > 0.6  # nine cells: percentile intervals run short of .95, and must not collapse


def test_edges_and_flat_cells_are_left_out_with_their_reason():
    lr, batch = (a.ravel() for a in np.meshgrid(np.geomspace(1, 16, 5), np.geomspace(1, 16, 5)))
    downhill = np.stack([lr, batch, 2.0 - 1e-3 * np.log(lr)], axis=1)
    assert "first or last" in read_optimum(downhill, "profile")
    assert isinstance(read_optimum(downhill, "quadratic"), str)
    assert "too few" in read_optimum(downhill[:3], "quadratic")
    assert read_optimum(downhill, "argmin")[0] == 16.0


def test_refusals_of_a_sweep(seed):
    sweep = planted(np.random.default_rng(seed))
    with pytest.raises(ValueError, match="argmin, basin"):
        fit_sweep(sweep, "best")
    with pytest.raises(ValueError, match="4 cells"):
        fit_sweep(dict(list(sweep.items())[:4]))
    line = {
        (N, 20 * N): rows for (N, _), rows in zip([(10.0**k, 0) for k in range(6, 12)], sweep.values(), strict=False)
    }
    with pytest.raises(ValueError, match="D follows N"):
        fit_sweep(line)
    with pytest.raises(ValueError, match="N=nan"):
        fit_sweep(sweep, num_bootstrap=100).recommend(math.nan, 1e9)


def test_sweep_tables_by_column_map(tmp_path):
    path = tmp_path / "sweep.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["size", "D", "lr", "bs", "final"])
        writer.writerows([[1e8, 1e9, 1e-3, 8, 3.0], [1e8, 1e9, 2e-3, 8, 2.9], [2e8, 1e9, 1e-3, 8, 2.8]])
    columns = {"N": "size", "batch": "bs", "loss": "final"}
    sweep = load_sweep(path, columns, batch_unit=2048)
    assert sorted(sweep) == [(1e8, 1e9), (2e8, 1e9)]
    assert sweep[1e8, 1e9].tolist() == [[1e-3, 8 * 2048, 3.0], [2e-3, 8 * 2048, 2.9]]
    with pytest.raises(ValueError, match="no column 'N'"):
        load_sweep(path)
    path.write_text(path.read_text().replace("2.8", "nan"))
    with pytest.raises(ValueError, match="row 3: loss is 'nan'"):
        load_sweep(path, columns)


def test_same_sweep_same_bytes_and_json_round_trip():
    sweep = planted(np.random.default_rng(0), noise=1e-3)
    first, second = (fit_sweep(sweep, num_bootstrap=100) for _ in range(2))
    assert first.to_json() == second.to_json() == HyperFit.from_json(first.to_json()).to_json()
    assert "span of the readings" in first.table()
    with pytest.raises(ValueError, match="slmjax-hyper-fit-1"):
        HyperFit.from_json("[]")


def test_tradeoff_of_steps_and_tokens(seed):
    rng = np.random.default_rng(seed)
    truth = Tradeoff(min_steps=10 ** rng.uniform(2, 5), min_tokens=10 ** rng.uniform(7, 10))
    batch_n = truth.critical_batch * np.geomspace(0.1, 10, 6)
    tokens_n = np.array([truth.tokens(batch) for batch in batch_n])
    steps_n = tokens_n / batch_n
    assert [truth.steps(batch) for batch in batch_n] == pytest.approx(steps_n.tolist())
    np.testing.assert_allclose((steps_n / truth.min_steps - 1) * (tokens_n / truth.min_tokens - 1), 1.0)
    assert fit_tradeoff(batch_n, tokens_n) == pytest.approx(truth, rel=1e-8)
    with pytest.raises(ValueError, match="do not follow a trade-off"):
        fit_tradeoff([1.0, 2.0, 4.0], [4.0, 2.0, 1.0])


def test_batch_law_gives_back_minicpms(seed):
    rng, law = np.random.default_rng(seed), load_hyper_law("minicpm_batch")
    levels = []
    for loss in (2.6, 3.0, 3.6, 4.2):
        best = law.recommend(L=loss)["batch"]
        batch_n = best * np.geomspace(0.25, 3.0, 6) * math.exp(rng.uniform(-0.5, 0.5))
        levels.append((loss, batch_n, 1e9 * np.exp(0.1 * np.log(batch_n / best) ** 2)))
    falling = (5.0, [1e4, 2e4, 4e4, 8e4], [4.0, 3.0, 2.0, 1.0])
    found = fit_batch_law([*levels, falling])
    assert (found.coefficient, found.exponent) == (pytest.approx(1.21e9, rel=1e-6), pytest.approx(6.24, rel=1e-8))
    assert found.num_left_out == 1 and found(3.0) == pytest.approx(1.275e6, rel=1e-3)


def test_step_law_sweep(scaling_data):
    checks = list(verify_step_law.checks(scaling_data))
    assert len(checks) == 6 and all(check.holds for check in checks)
