"""Schedules are exactly the published curves, pure in the step, and end where they say."""

import math
import sys

import numpy as np
import pytest
from tiny import tiny

from slmjax import config, schedules
from slmjax.config import ConfigError, ScheduleConfig

SHAPES = ("linear", "1-sqrt", "cosine", "inverse", "exponential", "half_life")


def scheduled(steps: int, **schedule):
    return tiny({"train.steps": steps, **{f"schedule.{key}": value for key, value in schedule.items()}})


def curve(cfg):
    return [schedules.multiplier(cfg, step) for step in range(cfg.train.steps)]


def test_minicpm_half_life():
    # MiniCPM (2404.06395), section 4: 0.5 ** (steps / 5000), so .5, .1 and .03125 at these steps of the decay.
    cfg = scheduled(1_000_000, name="wsd", decay_steps=30_000, decay_shape="half_life", half_life_steps=5000)
    start = config.decay_start(cfg)
    assert start == 970_000
    assert schedules.multiplier(cfg, start + 5000) == 0.5
    assert schedules.multiplier(cfg, start + 25_000) == 0.03125
    for steps, expected in ((5000, 0.5), (16_609.6, 0.1), (25_000, 0.03125)):
        value = schedules.decay_multiplier(cfg.schedule, steps / 30_000, 30_000)
        assert value == pytest.approx(expected, abs=1e-6)


def test_half_life_is_not_the_length_of_the_decay():
    short, long = (
        scheduled(400, name="wsd", decay_steps=n, decay_shape="half_life", half_life_steps=50) for n in (100, 200)
    )
    assert schedules.multiplier(short, 300 + 50) == schedules.multiplier(long, 200 + 50) == 0.5


@pytest.mark.parametrize("x, expected", [(0, 1), (0.25, 0.5), (0.5, 0.292893), (1, 0)])
def test_one_minus_sqrt(x, expected):
    assert schedules.decay_multiplier(ScheduleConfig(decay_shape="1-sqrt"), x, 100) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_starts_at_the_peak_ends_at_its_floor_and_falls_between(shape, seed):
    rng = np.random.default_rng(seed)
    for floor in (0.1, 0.5, 1.0, *rng.uniform(1e-4, 1, 200)):
        cfg = ScheduleConfig(decay_shape=shape, final_ratio=float(floor), half_life_steps=30)
        end = 0.5 ** (100 / 30) if shape == "half_life" else floor
        assert schedules.decay_multiplier(cfg, 0.0, 100) == 1.0
        assert schedules.decay_multiplier(cfg, 1.0, 100) == end  # exactly, in float64
        values = [schedules.decay_multiplier(cfg, x, 100) for x in np.linspace(0, 1, 101)]
        assert (np.diff(values) <= 1e-15).all()


@pytest.mark.parametrize("shape", ["linear", "1-sqrt", "cosine"])
def test_a_decay_to_zero_ends_at_exactly_zero(shape):
    assert schedules.decay_multiplier(ScheduleConfig(decay_shape=shape), 1.0, 10) == 0.0


def test_inverse_and_exponential_closed_forms():
    for x in (0.2, 0.7):
        inverse = ScheduleConfig(decay_shape="inverse", final_ratio=0.1)
        # WSD-S (2410.05192): 1 / lr is linear in the step.
        assert 1 / schedules.decay_multiplier(inverse, x, 9) == pytest.approx(10 * x + (1 - x), rel=1e-12)
        exponential = ScheduleConfig(decay_shape="exponential", final_ratio=0.1)
        assert math.log10(schedules.decay_multiplier(exponential, x, 9)) == pytest.approx(-x, abs=1e-12)


def test_wsd_warms_up_stays_and_decays():
    cfg = scheduled(100, name="wsd", warmup_steps=10, decay_steps=20, decay_shape="linear")
    values = curve(cfg)
    assert values[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert values[10:81] == [1.0] * 71  # the decay's first step is at x = 0, still the peak
    assert values[80:] == pytest.approx([1 - k / 20 for k in range(20)])
    assert [schedules.phase(cfg, s) for s in (0, 9, 10, 79, 80, 99)] == ["warmup"] * 2 + ["stable"] * 2 + ["decay"] * 2


def test_no_update_of_any_schedule_is_made_at_a_rate_of_zero():
    for name in ("constant", "cosine", "linear", "wsd"):
        assert min(curve(scheduled(50, name=name, warmup_steps=5))) > 0


def test_decay_fraction_is_of_the_run():
    assert config.decay_steps(scheduled(1000, name="wsd", decay_fraction=0.1)) == 100
    assert config.decay_steps(scheduled(1000, name="wsd", decay_fraction=0.1, decay_steps=7)) == 7
    assert config.decay_steps(scheduled(3, name="wsd", decay_fraction=0.1)) == 1
    assert config.decay_start(scheduled(1000, name="constant")) == 1000


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_and_linear_go_from_the_peak_to_their_floor(floor):
    for name, middle in (("cosine", 0.5), ("linear", 0.5)):
        cfg = scheduled(110, name=name, warmup_steps=10, final_ratio=floor, after_end="hold")
        assert schedules.multiplier(cfg, 10) == 1.0
        assert schedules.multiplier(cfg, 60) == pytest.approx(floor + (1 - floor) * middle)
        assert schedules.multiplier(cfg, 110) == floor
        assert schedules.phase(cfg, 60) == "decay"
    quarter = schedules.multiplier(scheduled(100, name="cosine"), 25)
    assert quarter == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_wsd_s_decays_to_each_period_end_and_resumes_at_the_peak():
    schedule = {"name": "wsd_s", "warmup_steps": 4, "decay_steps": 5, "decay_shape": "linear", "period_ends": (20, 50)}
    cfg = scheduled(50, **schedule)
    values = curve(cfg)
    falling = [1 - k / 5 for k in range(5)]
    assert values[15:20] == pytest.approx(falling)
    assert values[20:46] == [1.0] * 26
    assert values[45:] == pytest.approx(falling)
    phases = [schedules.phase(cfg, s) for s in (3, 4, 14, 15, 19, 20, 44, 45, 49)]
    assert phases == ["warmup", "stable", "stable", "decay", "decay", "stable", "stable", "decay", "decay"]


@pytest.mark.parametrize("ends", [(), (20, 40), (40, 20, 50), (47, 50), (3, 50), (-5, 50)])
def test_wsd_s_refuses_periods_that_do_not_fit(ends):
    with pytest.raises(ConfigError, match=r"schedule.period_ends"):
        scheduled(50, name="wsd_s", decay_steps=5, warmup_steps=2, period_ends=ends)


@pytest.mark.parametrize("warmup, decay", [(0, 101), (50, 51), (100, 1)])
def test_a_decay_longer_than_the_run_is_refused(warmup, decay):
    with pytest.raises(ConfigError, match=rf"schedule.decay_steps={decay}.*train.steps=100"):
        scheduled(100, name="wsd", warmup_steps=warmup, decay_steps=decay)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match=r"schedule.warmup_steps=101.*train.steps=100"):
        scheduled(100, name="cosine", warmup_steps=101)


@pytest.mark.parametrize("shape", ["inverse", "exponential"])
def test_shapes_that_never_reach_zero_need_a_floor(shape):
    with pytest.raises(ConfigError, match=r"schedule.final_ratio=0.0"):
        scheduled(100, name="wsd", decay_shape=shape)


SCHEDULES = [
    {"name": "constant"},
    {"name": "cosine", "final_ratio": 0.1},
    {"name": "linear"},
    {"name": "wsd_s", "period_ends": (20, 40), "decay_steps": 4},
    *({"name": "wsd", "decay_shape": shape, "final_ratio": 0.1, "half_life_steps": 3} for shape in SHAPES),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(map(str, s.values())))
def test_past_the_end_a_schedule_refuses_or_holds(schedule):
    refusing = scheduled(40, **schedule)
    with pytest.raises(ValueError, match=r"step 40 is past the end .*train.steps=40.*hold"):
        schedules.multiplier(refusing, 40)
    holding = scheduled(40, **schedule, after_end="hold")
    held = [schedules.multiplier(holding, step) for step in (40, 41, 10_000)]
    assert held[0] == held[1] == held[2] <= schedules.multiplier(holding, 39)
    if schedule["name"] != "constant" and schedule.get("decay_shape") != "half_life":
        assert held[0] == pytest.approx(schedule.get("final_ratio", 0.0), abs=1e-12)
    assert schedules.phase(holding, 40) == schedules.phase(holding, 39)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(map(str, s.values())))
def test_the_step_alone_decides(schedule, seed):
    cfg = scheduled(40, **schedule, warmup_steps=5)
    forward = schedules.multipliers(cfg, 0, 40)
    assert forward.dtype == np.float32 and forward.shape == (40,)
    for step in np.random.default_rng(seed).permutation(40):
        assert np.float32(schedules.multiplier(cfg, int(step))) == forward[step]
    np.testing.assert_array_equal(schedules.multipliers(cfg, 13, 29), forward[13:29])
    assert ((forward > 0) & (forward <= 1)).all()


def test_branches_follow_their_trunk_until_they_decay():
    trunk = scheduled(300, name="constant", warmup_steps=10)
    for steps in (100, 200, 300):
        branch = scheduled(steps, name="wsd", warmup_steps=10, decay_fraction=0.1)
        start = config.decay_start(branch)
        np.testing.assert_array_equal(schedules.multipliers(branch, 0, start), schedules.multipliers(trunk, 0, start))
        assert config.shared_steps(trunk, branch) == start


def test_a_schedule_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_schedule.py").write_text("def multiplier(schedule, steps, step):\n    return step / steps\n")
    (tmp_path / "lab").mkdir()
    (tmp_path / "my_schedule.py").rename(tmp_path / "lab" / "my_schedule.py")
    monkeypatch.syspath_prepend(tmp_path)
    cfg = scheduled(50, name="lab.my_schedule")
    assert schedules.multiplier(cfg, 10) == 0.2
    with pytest.raises(ValueError, match="past the end"):
        schedules.multiplier(cfg, 50)
    sys.modules.pop("lab.my_schedule")
