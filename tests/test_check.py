"""The coordinate check: parametrizations that transfer keep activations flat, and the check sees those that do not."""

import dataclasses

import numpy as np
import pytest

from slmjax import config, ladder
from slmjax.check import coord as check


def small(name: str):
    """Two layers on a Markov chain: the size at which all schemes agree."""
    return config.override(
        config.RunConfig(),
        {
            **ladder.shape(64, 2, 32),
            "model.parametrization.name": name,
            "model.parametrization.init_std": 0.1,
            "model.parametrization.embed_multiplier": 10.0,
            "data.sources": ("markov:64:3",),
            "data.tokenizer": "none",
            "data.packing": "concat",
            "data.seq_len": 32,
            "train.batch_size": 4,
            "optim.lr": 3e-3,
        },
    )


@pytest.fixture(scope="module")
def against_width():
    return {name: check.coordinates(small(name), "width", (64, 256), num_seeds=2) for name in ("completep", "sp")}


def test_activations_do_not_depend_on_width(against_width):
    assert against_width["completep"].failures() == {}


def test_experts_and_their_router_do_not_depend_on_width_either():
    cfg = config.override(small("completep"), ladder.mixture(160, 4, 2))
    found = check.coordinates(cfg, "width", (64, 512), num_seeds=2)
    assert found.failures() == {}


def test_the_standard_parametrization_is_caught(against_width):
    slopes = against_width["sp"].slopes()
    assert min(slopes[name] for name in slopes if name.startswith(("attention", "mlp", "residual"))) > 0.8
    assert {"mlp.0", "mlp.1", "logits"} <= against_width["sp"].failures().keys()


def test_activations_do_not_depend_on_depth_under_completep_alone():
    slopes = {}
    for name in ("completep", "mup"):
        cfg = config.override(small(name), {"model.scan_layers": True})  # traced once, not eight times
        slopes[name] = check.coordinates(cfg, "depth", (2, 8), num_seeds=2).slopes()
    assert all(abs(slope) <= check.TOLERANCE for slope in slopes["completep"].values())
    assert slopes["mup"]["residual"] > 3 * check.TOLERANCE


def test_slopes_are_exponents():
    sizes = (64, 128, 256)
    rows = np.stack([np.ones(3), np.array(sizes, float) ** 0.7, np.array(sizes, float) ** -0.05])
    found = check.Coordinates("width", sizes, {"grown": rows[:2], "flat": rows[[0, 2]]})
    assert found.slopes() == pytest.approx({"grown": 0.7, "flat": -0.05})
    assert set(found.failures()) == {"grown"} and "outside" in found.table()
    fallen = dataclasses.replace(found, activations={"logits": 1 / rows[:2], "mlp.0": 1 / rows[:2]})
    assert set(fallen.failures()) == {"mlp.0"}  # logits may fall, nothing else may


def test_the_plot_is_written(against_width, tmp_path):
    few = [
        dataclasses.replace(found, activations={name: found.activations[name] for name in ("mlp.0", "logits")})
        for found in against_width.values()
    ]
    check.plot(few, tmp_path / "coordinates.png", "both")
    assert (tmp_path / "coordinates.png").read_bytes().startswith(b"\x89PNG")
