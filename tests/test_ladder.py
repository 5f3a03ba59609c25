"""Closed-form counts equal the published ones, the model's own specs, and XLA's count where XLA can count."""

import dataclasses
import math

import jax
import pytest
from tiny import random_tokens, subsets, tiny

from slmjax import config, ladder, models, objectives, optim, program
from slmjax.config import ConfigError, ModelConfig, RunConfig
from slmjax.models import is_spec

# MiniCPM (2404.06395), tables 2 and 8; N without embeddings: three exact, the others to four digits.
EXACT = {"9m": 9_426_240, "1.2b": 1_247_442_432, "2.4b": 2_442_057_984}
PRINTED = {"30m": 36.19, "70m": 65.97, "0.1b": 108.55, "0.17b": 166.2, "0.2b": 241.2, "0.5b": 498.6}


def minicpm(size: str, vocab: int = 122_753) -> ModelConfig:
    return config.override(RunConfig(), {**ladder.minicpm(size), "model.vocab_size": vocab}).model


def groups_of_specs(model: ModelConfig) -> dict[str, int]:
    """Parameters of the real model, by shape evaluation alone, grouped as `Counts` groups them."""
    built = models.build(model)
    shapes = jax.eval_shape(built.init, jax.random.key(0))
    counts = {"embedding": 0, "head": 0, "dense": 0, "experts": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        group = {"embed": "embedding", "head": "head"}.get(path[0].key, "dense")
        if path[-2].key == "moe" and path[-1].key in ("up", "gate", "down"):
            group = "experts"
        if path[-1].key != "balance":  # state, which no gradient trains
            counts[group] += math.prod(leaf.shape)
    assert models.count_params(built.specs, model) == ladder.count_params(model, model.vocab_size)
    return counts


@pytest.mark.parametrize("size", ladder.MINICPM)
def test_minicpm_counts_are_the_published_ones_in_closed_form_and_in_the_model(size):
    model = minicpm(size)
    counts = ladder.count_params(model, model.vocab_size)
    if size in EXACT:
        assert counts.non_embedding == EXACT[size]
    else:
        assert counts.non_embedding / 1e6 == pytest.approx(PRINTED[size], rel=2e-4)
    assert groups_of_specs(model)["dense"] == counts.non_embedding


def test_minicpm_embeddings():
    assert ladder.count_params(minicpm("2.4b"), 122_753).embedding == 122_753 * 2304  # 0.28B


SHAPES = subsets(
    {
        "model.num_kv_heads": [1, 2, 4],
        "model.tied_embeddings": [True, False],
        "model.qk_norm": [True, False],
        "model.activation": ["swiglu", "geglu", "gelu", "relu2"],
    }
)


@pytest.mark.parametrize("changes", SHAPES, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_groups_equal_the_specs(changes):
    model = tiny({**changes, "model.num_layers": 3, "model.head_dim": 6, "model.mlp_width": 20}).model
    counts = ladder.count_params(model, 32)
    groups = groups_of_specs(model)
    assert groups == {"embedding": counts.embedding, "head": counts.head, "dense": counts.dense, "experts": 0}
    assert counts.total == sum(groups.values()) == counts.active
    assert counts.non_embedding == counts.dense
    assert counts.to_dict()["total"] == counts.total


# Mixtures as their authors print them: (shape, vocabulary, untied, total, active), embeddings and head included.
# OLMoE normalises queries and keys over all heads together, where we do each head: 16 x (4096 - 256) gains fewer.
MIXTURES = {
    "mixtral-8x7b": (ladder.shape(4096, 32, 128, 3.5, 8) | {"model.moe.num_experts": 8}, 32_000, 46_702_792_704, 12.88),
    "olmoe-1b-7b": (
        ladder.shape(2048, 16, 128, 0.5) | {"model.moe.num_experts": 64, "model.moe.experts_per_token": 8,
                                            "model.qk_norm": True},
        50_304, 6_919_161_856 - 16 * (4096 - 256), 1.282),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_counts_of_published_mixtures(name):
    shape, vocab, total, active_billion = MIXTURES[name]
    changes = {**shape, "model.vocab_size": vocab, "model.tied_embeddings": False}
    model = config.override(RunConfig(), changes).model
    counts = ladder.count_params(model, vocab)
    assert counts.total == total == sum(groups_of_specs(model).values())
    assert counts.active / 1e9 == pytest.approx(active_billion, abs=5e-3)


def test_counts_of_minicpm_moe():
    """2404.06395, section 6: eight copies of every feed-forward of the 2.4B model, two of them active."""
    model = config.override(RunConfig(), {**ladder.minicpm("2.4b"), "model.moe.num_experts": 8}).model
    counts = ladder.count_params(model, 122_753)
    assert (counts.non_embedding, counts.active_non_embedding) == (13_590_468_864, 4_035_320_064)


MOE_SHAPES = subsets(
    {
        "model.moe.num_shared_experts": [0, 2],
        "model.moe.leading_dense_layers": [0, 1],
        "model.moe.every": [1, 2],
        "model.activation": ["swiglu", "gelu"],
    }
)


@pytest.mark.parametrize("changes", MOE_SHAPES, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_groups_of_a_mixture_equal_the_specs(changes):
    model = tiny({**changes, **ladder.mixture(24, 6, 2, changes["model.moe.num_shared_experts"]),
                  "model.num_layers": 5}).model  # fmt: skip
    counts, groups = ladder.count_params(model, 32), groups_of_specs(model)
    assert (counts.dense, counts.experts) == (groups["dense"], groups["experts"])
    assert 3 * counts.active_experts == counts.experts > 0
    # As many active weights as the dense model of the same mlp_width, and the routers.
    routers = 16 * 6 * model.feed_forwards.count("moe")
    dense = dataclasses.replace(model, moe=config.MoeConfig())
    assert counts.active_non_embedding == ladder.count_params(dense, 32).non_embedding + routers
    ours, theirs = (ladder.flops_per_token(m, 32, 16)["without_head"] for m in (model, dense))
    assert ours == theirs + 6 * routers


def test_a_mixture_that_does_not_split_is_refused():
    with pytest.raises(ConfigError, match=r"model.mlp_width=25 does not split into 2"):
        ladder.mixture(25, 8, 2)


def test_flops_of_deepseek():
    # DeepSeek (2401.02954): M = 72 L d² + 12 L d T. Ungated with F = 4 d, the feed-forward has the 8 d² of that 72.
    L, D, T = 8, 512, 4096
    shape = {**ladder.shape(D, L, mlp_ratio=4), "model.activation": "gelu", "model.vocab_size": 1000}
    flops = ladder.flops_per_token(config.override(RunConfig(), shape).model, 1000, T)
    assert flops["without_head"] == 72 * L * D**2 + 12 * L * D * T == 352_321_536
    assert flops["with_head"] - flops["without_head"] == 6 * 1000 * D


def test_window_layers_count_only_the_keys_they_see():
    model = tiny({"model.attention_pattern": ("window", "global"), "model.window": 4}).model
    plain = tiny().model
    D_out = model.num_heads * model.head_dim

    def scores(m, T):
        return ladder.flops_per_token(m, 32, T)["without_head"] - ladder.flops_per_token(m, 32, 0)["without_head"]

    assert scores(plain, 16) == 2 * 12 * D_out * 16
    assert scores(model, 16) == 12 * D_out * (4 + 16)
    assert scores(model, 3) == scores(plain, 3)  # a window longer than the sequence is the sequence


@pytest.mark.parametrize("activation, gated", [("swiglu", True), ("gelu", False)])
def test_flops_equal_xla_on_one_unrolled_layer(activation, gated):
    """Forward and backward of one layer without remat or scan: XLA's count is ours and a few percent more.

    XLA also counts norms, rotary embeddings, activations, softmax, the loss and the scores that the backward pass makes
    again, which the closed form leaves out. Both
    count attention scores without the causal mask: this T is one block of queries on CPU, where more blocks skip some.
    """
    D, T, V, B = 256, 96, 512, 1
    shape = {**ladder.shape(D, 1, head_dim=64), "model.activation": activation, "model.vocab_size": V}
    model = models.build(config.override(RunConfig(), shape).model)
    view = objectives.build(config.ObjectiveConfig()).view(random_tokens(0, B, T + 1, vocab=V), None, None)

    def loss(params):
        x_BTD, _ = model.hidden(params, view.inputs_BT)
        return objectives.weighted_loss(model.unembed, model.readout(params), x_BTD, view, 0.0)[0]

    params = jax.eval_shape(model.init, jax.random.key(0))
    ours = ladder.flops_per_token(config.override(RunConfig(), shape).model, V, T)["with_head"] * B * T
    forward, both = (jax.jit(f).lower(params).cost_analysis()["flops"] for f in (loss, jax.grad(loss)))
    assert 1 <= both / ours < 1.02
    assert 1 <= 3 * forward / ours < 1.02


def test_tokens_and_steps():
    cfg = tiny({"train.steps": 7})
    assert ladder.num_tokens(cfg) == 7 * 4 * 16
    assert ladder.train_flops(cfg) == ladder.num_tokens(cfg) * ladder.flops_per_token(cfg.model, 32, 16)["with_head"]
    for tokens in (1, 63, 64, 65, 1e6):
        steps = ladder.steps_for(tokens, 4, 16)
        assert steps * 64 >= tokens > (steps - 1) * 64


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"model.vocab_size": 99}, 99),
        ({"data.tokenizer": "bpe", "data.vocab_size": 777}, 777),
        ({"data.tokenizer": "byte"}, 257),
        ({"data.tokenizer": "none", "data.sources": ("markov:17:3",)}, 17),
    ],
)
def test_vocabulary_is_known_before_data_is_read(changes, expected):
    assert ladder.vocab_size(config.override(RunConfig(), changes)) == expected


def test_vocabulary_that_cannot_be_known_is_refused():
    with pytest.raises(ConfigError, match=r"model.vocab_size=0.*none"):
        ladder.vocab_size(config.override(RunConfig(), {"data.tokenizer": "none", "data.sources": ("shards/",)}))


def test_shape_refuses_a_width_its_heads_do_not_divide():
    with pytest.raises(ConfigError, match=r"model.width=100.*head_dim=64"):
        ladder.shape(100, 2)


@pytest.mark.parametrize(
    "changes", [{}, {"optim.name": "muon"}, {"optim.ema_decay": 0.9}], ids=["adamw", "muon", "ema"]
)
@pytest.mark.parametrize("experts", [{}, ladder.mixture(24, 6, 2, 1)], ids=["dense", "experts"])
def test_bytes_of_a_run_are_those_of_its_state(changes, experts):
    cfg = tiny({**changes, **experts, "model.tied_embeddings": False})
    model = models.build(cfg.model)
    optimizer = optim.build(cfg.optim, model)
    state = jax.eval_shape(lambda: program.init_member(model, optimizer, cfg.optim.ema_decay > 0, 0, 1.0))
    balance = sum(4 * math.prod(s.shape) for s in jax.tree.leaves(model.specs, is_leaf=is_spec) if s.role == "balance")

    shapes = {leaf.shape for leaf in jax.tree.leaves(state.params)}

    def size(tree):  # of what mirrors the parameters; Muon also keeps its three coefficients
        return sum(4 * leaf.size for leaf in jax.tree.leaves(tree) if leaf.shape in shapes)

    ours = ladder.state_bytes(cfg)
    assert ours["params"] == ours["gradients"] == size(state.params) - balance
    assert ours["moments"] == size(state.opt_state) - 2 * balance
    assert ours["ema"] == (size(state.ema) - balance if cfg.optim.ema_decay else 0)
    assert ours["total"] == sum(size for name, size in ours.items() if name != "total")
