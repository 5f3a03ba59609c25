"""Each scheme is its paper's table, exactly; at the base size mup and completep are sp."""

import math

import jax
import numpy as np
import pytest
from tiny import tiny

from slmjax import config, ladder, models
from slmjax.config import RunConfig
from slmjax.models import is_spec
from slmjax.parametrization import ROLES, Parametrization

SCHEMES = ("sp", "mup", "minicpm", "completep", "umup")


def scheme(name: str, width: int = 64, layers: int = 8, **fields) -> Parametrization:
    """m_N = 4 and m_L = 4 unless told otherwise: base width 16, base depth 2."""
    values = {"name": name, "base_width": 16, "base_layers": 2, "init_std": 0.02, **fields}
    changes = {f"model.parametrization.{key}": value for key, value in values.items()}
    return Parametrization(tiny({**changes, "model.width": width, "model.num_layers": layers}).model)


def rules(p: Parametrization, fan_in: int = 64) -> dict:
    """The rule of every kind of tensor a decoder has."""
    return {
        "embed": p.rule("embed", 1000, in_block=False),
        "hidden": p.rule("hidden", fan_in, in_block=True),
        "block_norm": p.rule("norm", fan_in, in_block=True),
        "bias": p.rule("bias", fan_in, in_block=True),
        "final_norm": p.rule("norm", fan_in, in_block=False),
        "readout": p.rule("readout", fan_in, in_block=False),
    }


def test_minicpm_multipliers_at_2_4b():
    changes = {
        **ladder.minicpm("2.4b"),
        "model.vocab_size": 122_753,
        "model.parametrization.name": "minicpm",
        "model.parametrization.base_width": 256,
        "model.parametrization.init_std": 0.1,
        "model.parametrization.embed_multiplier": 12.0,
        "model.parametrization.residual_multiplier": 1.4,
        "optim.lr": 0.01,
    }
    cfg = config.override(RunConfig(), changes)
    p = Parametrization(cfg.model)
    hidden, embed = p.rule("hidden", 2304, True), p.rule("embed", 122_753, False)
    assert p.width_ratio == 9
    assert hidden.init_std == pytest.approx(0.03333, abs=5e-6)
    assert cfg.optim.lr * hidden.lr == pytest.approx(1.1111e-3, abs=5e-8)
    assert p.residual(0) == p.residual(79) == (1.0, pytest.approx(0.221359, abs=5e-7))
    assert p.logits_multiplier == pytest.approx(1 / 9)
    assert (embed.init_std, embed.lr, p.embed_multiplier) == (0.1, 1.0, 12.0)
    assert p.attention_scale == 1 / 8  # 1 / sqrt(64): not muP's 1 / head_dim
    # Decay is on all tensors and is not multiplied back: it shrinks with the rate.
    assert hidden.decay == pytest.approx(1 / 9) and p.rule("norm", 2304, True).decay == 1.0


@pytest.mark.parametrize(
    "size, std, lr, residual", [("1.2b", 0.040825, 1.6667e-3, 0.194145), ("9m", None, None, 0.494975)]
)
def test_minicpm_multipliers_at_other_sizes(size, std, lr, residual):
    values = {"name": "minicpm", "base_width": 256, "init_std": 0.1, "residual_multiplier": 1.4}
    changes = {**ladder.minicpm(size), **{f"model.parametrization.{key}": value for key, value in values.items()}}
    p = Parametrization(config.override(RunConfig(), changes).model)
    assert p.residual(0)[1] == pytest.approx(residual, abs=5e-7)
    if std:
        assert p.rule("hidden", 1, True).init_std == pytest.approx(std, abs=5e-7)
        assert 0.01 * p.rule("hidden", 1, True).lr == pytest.approx(lr, abs=5e-8)


def test_sp_is_one_scale_and_one_rate():
    p = scheme("sp")
    for name, rule in rules(p).items():
        assert rule == (0.02, 1.0, 0.0 if "norm" in name or name == "bias" else 1.0, 1.0, 1.0, 1.0)
    assert p.residual(3) == (1.0, 1.0) and p.logits_multiplier == 1.0


# (init std / s, lr, decay, eps) at m_N = m_L = 4, from CompleteP (2505.01618), table 1.
# Its coupled decay lam x m_N at a rate of eta / m_N is decay 1 here: a rule's decay is apart from its rate.
MUP = {
    "embed": (1, 1, 1, 1),
    "hidden": (1 / 2, 1 / 4, 1, 1 / 4),
    "block_norm": (1, 1, 0, 1 / 4),
    "bias": (1, 1, 0, 1 / 4),
    "final_norm": (1, 1, 0, 1),
    "readout": (1, 1, 1, 1),
}


@pytest.mark.parametrize("name", MUP)
def test_mup_at_four_times_the_width(name):
    rule = rules(scheme("mup"))[name]
    assert (rule.init_std / 0.02, *rule[1:4]) == MUP[name]
    assert rule.forward == 1


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("name", MUP)
def test_completep_at_four_times_the_width_and_depth(name, alpha):
    rule = rules(scheme("completep", depth_alpha=alpha))[name]
    std, lr, decay, eps = MUP[name]
    if name in ("hidden", "block_norm", "bias"):
        lr, eps = lr * 4 ** (alpha - 1), eps * 4**-alpha
    assert (rule.init_std / 0.02, *rule[1:4]) == (std, lr, decay, eps)


def test_forward_multipliers_at_four_times_the_width_and_depth():
    assert scheme("mup").logits_multiplier == scheme("completep").logits_multiplier == 1 / 4
    assert scheme("mup").residual(5) == (1, 1)
    assert scheme("completep").residual(5) == (1, 1 / 4)
    assert scheme("completep", depth_alpha=0.5).residual(5) == (1, 1 / 2)
    assert scheme("completep", residual_multiplier=3.0).residual(5) == (1, 3 / 4)


def test_umup_table():
    # u-muP (2407.17465), table 2, with depth = 2 x 8 residual branches: fan_in 64 → 1/8, width 64 → 1/8.
    p = scheme("umup")
    table = {
        "embed": (1, 1 / 8, 1, 1, 1),
        "hidden": (1, 1 / 8 / 4, 1, 1, 1 / 8),
        "block_norm": (1, 1 / 4, 0, 1, 1),
        "bias": (1, 1 / 4, 0, 1, 1),
        "final_norm": (1, 1, 0, 1, 1),
        "readout": (1, 1, 1, 1, 1),
    }
    assert {name: rule[:5] for name, rule in rules(p).items()} == table
    assert p.logits_multiplier == 1 / 64
    assert scheme("umup", init_std=0.5).rule("hidden", 64, True).init_std == 1  # nothing but unit variance


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_umup_residual_stream_keeps_unit_scale_and_gives_every_branch_its_share(multiplier):
    L = 8
    p = scheme("umup", layers=L, residual_multiplier=multiplier)
    variances = [1.0]  # of the embedding, then of each branch, in the stream's variance
    for branch in range(2 * L):
        skip, scale = p.residual(branch)
        assert skip**2 + scale**2 == pytest.approx(1)
        variances = [v * skip**2 for v in variances] + [scale**2]
    embedding, attention, mlp = variances[0], sum(variances[1::2]), sum(variances[2::2])
    assert attention == pytest.approx(mlp) and attention == pytest.approx(multiplier**2 * embedding)
    assert variances[1:] == pytest.approx([variances[1]] * 2 * L)


@pytest.mark.parametrize("name", ["mup", "completep"])
def test_at_the_base_size_mup_and_completep_are_sp(name):
    base, sp = scheme(name, width=16, layers=2), scheme("sp", width=16, layers=2)
    assert rules(base) == rules(sp)
    assert base.logits_multiplier == sp.logits_multiplier
    assert base.residual(3) == sp.residual(3)


def test_completep_at_the_base_depth_is_mup():
    assert rules(scheme("completep", layers=2)) == rules(scheme("mup", layers=2))


@pytest.mark.parametrize("name", SCHEMES)
def test_multipliers_of_the_config_scale_what_they_name(name):
    plain, scaled = scheme(name), scheme(name, embed_multiplier=3.0, logits_multiplier=5.0)
    assert scaled.embed_multiplier == 3 * plain.embed_multiplier
    assert scaled.logits_multiplier == pytest.approx(5 * plain.logits_multiplier)


def test_attention_scale():
    assert scheme("mup").attention_scale == 1 / math.sqrt(8)
    # TP-V's 1 / head_dim, equal to 1 / sqrt(head_dim) at the base head width.
    assert scheme("mup", base_head_dim=8).attention_scale == pytest.approx(1 / math.sqrt(8))
    assert scheme("mup", base_head_dim=2).attention_scale == pytest.approx(math.sqrt(2) / 8)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("role", ROLES)
def test_every_role_but_the_balance_bias_has_a_positive_rate(name, role):
    for in_block in (True, False):
        rule = scheme(name).rule(role, 64, in_block)
        if role == "balance":  # moved by the trainer's own rule, from 0
            assert (rule.init_std, rule.lr, rule.decay) == (0, 0, 0)
            continue
        assert min(rule.init_std, rule.lr, rule.eps, rule.forward, rule.orthogonal_lr) > 0 and rule.decay >= 0


@pytest.mark.parametrize("name", SCHEMES)
def test_tensors_are_drawn_at_their_roles_scale(name):
    values = {"name": name, "base_width": 16, "init_std": 0.3}
    changes = {f"model.parametrization.{key}": value for key, value in values.items()}
    cfg = tiny({**changes, "model.width": 64, "model.mlp_width": 128, "model.tied_embeddings": False}).model
    model = models.build(cfg)
    params, other = (jax.jit(model.init)(jax.random.key(0), std) for std in (None, 0.6))
    paths = jax.tree_util.tree_leaves_with_path(model.specs, is_leaf=is_spec)
    for (path, spec), w, w_other in zip(paths, jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        where = jax.tree_util.keystr(path)
        if spec.role == "norm":
            assert (w == 1).all(), where
            continue
        assert np.std(w) == pytest.approx(model.rules(spec).init_std, rel=0.08), where
        assert abs(np.mean(w)) < 5 * np.std(w) / math.sqrt(w.size), where
        # init_std may be an argument, so that a sweep over it compiles once; umup has no such number.
        np.testing.assert_allclose(w_other, w * (1 if name == "umup" else 2), rtol=1e-6, err_msg=where)
