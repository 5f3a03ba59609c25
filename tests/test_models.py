"""The dense decoder: what it may see, what it computes written out by hand, and that its switches do not change it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_same, built, draw, random_segments, random_tokens, tiny

from slmjax import config, models, objectives
from slmjax.config import ConfigError
from slmjax.models.attention import attend
from slmjax.models.layers import Attention, Mlp, RMSNorm, rotate
from slmjax.parametrization import Parametrization

WINDOW = {"model.attention_pattern": ("window",), "model.window": 4}
MIXED = {"model.attention_pattern": ("window", "global"), "model.window": 4}
DEEP = {**MIXED, "model.num_layers": 4, "model.qk_norm": True}
PATTERNS = pytest.mark.parametrize("pattern", [{}, WINDOW, MIXED], ids=["global", "window", "mixed"])


def changed(tokens_BT, *positions):
    """The tokens with those positions replaced by others."""
    out = tokens_BT.copy()
    out[:, positions] = (out[:, positions] + 1) % 32
    return out


def seen(built_model, a_BT, b_BT, segments_BT=None) -> np.ndarray:
    """bool [T]: where the logits of two inputs differ at all."""
    a, b = (np.asarray(built_model.apply(built_model.params, tokens, segments_BT)) for tokens in (a_BT, b_BT))
    return (a != b).any(axis=(0, 2))


@PATTERNS
def test_future_tokens_do_not_leak_and_past_ones_matter(pattern, seed):
    m, tokens_BT = built(pattern), random_tokens(seed, 2, 16)
    for position in (0, 5, 15):
        differs_T = seen(m, tokens_BT, changed(tokens_BT, position))
        assert not differs_T[:position].any()
        assert differs_T[position : position + 4].all()


def test_a_global_layer_sees_the_whole_past(seed):
    tokens_BT = random_tokens(seed, 2, 16)
    assert seen(built(), tokens_BT, changed(tokens_BT, 0)).all()


def test_a_window_limits_what_a_layer_sees_to_that_many_keys(seed):
    tokens_BT = random_tokens(seed, 2, 16)
    differs_T = seen(built(WINDOW), tokens_BT, changed(tokens_BT, 2))
    # Two layers that see 4 keys, themselves included: a token reaches 2 x 3 positions on and no further.
    assert np.flatnonzero(differs_T).tolist() == list(range(2, 2 + 7))
    mixed_T = seen(built(MIXED), tokens_BT, changed(tokens_BT, 2))
    assert mixed_T[2:].all()


@pytest.mark.parametrize("attention", ["causal", "full"])
@PATTERNS
def test_packed_documents_do_not_see_each_other(pattern, attention, seed):
    m, tokens_BT = built(pattern, attention), random_tokens(seed, 2, 16)
    segments_BT = np.repeat([[1] * 7 + [2] * 9], 2, axis=0).astype(np.int32)
    first, last = (seen(m, tokens_BT, changed(tokens_BT, p), segments_BT) for p in (4, 11))
    assert first[4:7].all() and not first[7:].any()
    assert last[11:].any() and not last[:7].any()
    if attention == "full":
        assert first[:7].any() and last[8:].all()


def test_a_packed_document_is_read_as_it_is_alone(seed):
    m, tokens_BT = built(), random_tokens(seed, 2, 16)
    segments_BT = np.repeat([[3] * 7 + [1] * 9], 2, axis=0).astype(np.int32)
    packed = m.apply(m.params, tokens_BT, segments_BT)
    # Rotary embeddings are relative, so where a document starts does not matter.
    for span in (slice(0, 7), slice(7, 16)):
        np.testing.assert_allclose(packed[:, span], m.apply(m.params, tokens_BT[:, span]), atol=2e-5)
    assert np.abs(packed - m.apply(m.params, tokens_BT))[:, 7:].max() > 1e-3


def test_full_attention_sees_both_ways(seed):
    m, tokens_BT = built(attention="full"), random_tokens(seed, 2, 16)
    assert seen(m, tokens_BT, changed(tokens_BT, 15)).all() and seen(m, tokens_BT, changed(tokens_BT, 0)).all()


def test_rows_of_a_batch_do_not_meet(seed):
    m, tokens_BT = built(), random_tokens(seed, 4, 16)
    logits, order = np.asarray(m.apply(m.params, tokens_BT)), [2, 0, 3, 1]
    np.testing.assert_allclose(m.apply(m.params, tokens_BT[order]), logits[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", ["sp", "mup", "minicpm", "completep", "umup"])
@pytest.mark.parametrize("tied", [True, False])
def test_zero_weights_give_ln_v(scheme, tied):
    m = built({"model.parametrization.name": scheme, "model.tied_embeddings": tied, "model.logit_softcap": 5.0})
    logits = m.apply(jax.tree.map(jnp.zeros_like, m.params), random_tokens(0, 2, 16))
    nll, _ = objectives.cross_entropy(logits.reshape(-1, 32), jnp.arange(32))
    assert (nll == np.float32(math.log(32))).all()


def by_hand(cfg, params, tokens_BT):
    """Logits of the blocks applied one after another, the parametrization's multipliers written out in place."""
    p = Parametrization(cfg)

    def part(module, weights, *inputs):
        return module.apply({"params": weights}, *inputs)

    x = params["embed"]["table"][tokens_BT] * p.embed_multiplier
    for layer in range(cfg.num_layers):
        weights = jax.tree.map(lambda a: a[layer], params["blocks"])  # noqa: B023
        kind = cfg.attention_pattern[layer % len(cfg.attention_pattern)]
        (skip, branch), (mlp_skip, mlp_branch) = p.residual(2 * layer), p.residual(2 * layer + 1)
        y = part(RMSNorm(cfg), weights["attention_norm"], x)
        x = skip * x + branch * part(Attention(cfg, kind), weights["attention"], y, None, "causal")[0]
        y = part(RMSNorm(cfg), weights["mlp_norm"], x)
        x = mlp_skip * x + mlp_branch * part(Mlp(cfg, cfg.mlp_width), weights["mlp"], y)
    x = part(RMSNorm(cfg), params["final_norm"], x)
    readout = params["embed"]["table"].T if cfg.tied_embeddings else params["head"]["kernel"]
    return x @ readout * p.logits_multiplier


@pytest.mark.parametrize("scheme", ["sp", "mup", "minicpm", "completep", "umup"])
@pytest.mark.parametrize("scan", [True, False])
def test_blocks_are_composed_as_the_parametrization_says(scheme, scan, seed):
    values = {
        "name": scheme, "base_width": 8, "base_layers": 1, "embed_multiplier": 3.0, "residual_multiplier": 1.4,
        "logits_multiplier": 2.0,
    }  # fmt: skip
    m = built({
        **{f"model.parametrization.{key}": value for key, value in values.items()},
        **MIXED, "model.num_layers": 4, "model.scan_layers": scan, "model.tied_embeddings": scheme != "mup",
    })  # fmt: skip
    tokens_BT = random_tokens(seed, 2, 16)
    expected = jax.jit(functools.partial(by_hand, m.cfg.model))(m.params, tokens_BT)
    np.testing.assert_allclose(m.apply(m.params, tokens_BT), expected, rtol=1e-4, atol=1e-5)


@functools.cache
def loss_and_gradient(**switch):
    """(params, tokens, segments) → (loss, gradient), compiled, of one shape with `switch` set."""
    cfg = tiny({**DEEP, **{f"model.{key}": value for key, value in switch.items()}})
    model, objective = models.build(cfg.model), objectives.build(cfg.objective)

    def loss(params, tokens_BT1, segments_BT1):
        view = objective.view(tokens_BT1, segments_BT1, None)
        x_BTD, _ = model.hidden(params, view.inputs_BT, view.segments_BT)
        return objectives.weighted_loss(model.unembed, model.readout(params), x_BTD, view, 0.0)[0]

    return jax.jit(jax.value_and_grad(loss))


SWITCHES = [{"scan_layers": True}, {"remat": "full"}, {"remat": "dots"}, {"scan_layers": True, "remat": "full"}]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_scan_and_remat_change_neither_loss_nor_gradient(switch, seed):
    params = draw(models.build(tiny(DEEP).model), seed)
    data = random_tokens(seed, 2, 17), random_segments(seed, 2, 17)
    plain, switched = (loss_and_gradient(**s)(params, *data) for s in ({}, switch))
    assert_same(switched, plain, rtol=1e-4, atol=1e-6)


def test_grouped_queries_are_multi_head_attention_with_repeated_keys_and_values(seed):
    grouped, full = built({"model.num_kv_heads": 2}), built({"model.num_kv_heads": 4})
    attention = dict(grouped.params["blocks"]["attention"])
    for name in ("key", "value"):
        attention[name] = jnp.repeat(attention[name], 2, axis=-2)  # [L, D, K, C]
    params = {**grouped.params, "blocks": {**grouped.params["blocks"], "attention": attention}}
    tokens_BT = random_tokens(seed, 2, 16)
    np.testing.assert_allclose(full.apply(params, tokens_BT), grouped.apply(grouped.params, tokens_BT), atol=1e-5)


def test_a_tied_matrix_is_both_ends(seed):
    tied, untied = built({"model.tied_embeddings": True}), built({"model.tied_embeddings": False})
    params = {**tied.params, "head": {"kernel": tied.params["embed"]["table"].T}}
    tokens_BT = random_tokens(seed, 2, 16)
    np.testing.assert_allclose(untied.apply(params, tokens_BT), tied.apply(tied.params, tokens_BT), atol=1e-6)
    assert "head" not in tied.params and "head" in untied.params


def test_soft_cap_bounds_the_logits(seed):
    plain, capped = built(), built({"model.logit_softcap": 0.5})
    tokens_BT = random_tokens(seed, 2, 16)
    logits = plain.apply(plain.params, tokens_BT)
    assert np.abs(logits).max() > 0.5
    np.testing.assert_allclose(capped.apply(plain.params, tokens_BT), 0.5 * np.tanh(logits / 0.5), atol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_bfloat16_computes_what_float32_does_roughly(scan, seed):
    half, single = built({"model.dtype": "bfloat16", "model.scan_layers": scan}), built()
    tokens_BT = random_tokens(seed, 2, 16)
    a, b = half.apply(half.params, tokens_BT), single.apply(single.params, tokens_BT)
    assert a.dtype == jnp.float32 and {w.dtype for w in jax.tree.leaves(half.params)} == {jnp.dtype("float32")}
    assert 0 < np.abs(a - b).max() < 0.05 * np.abs(b).max()
    x_BTD, _ = jax.eval_shape(half.model.hidden, half.params, tokens_BT)
    assert x_BTD.dtype == jnp.bfloat16


def numpy_attention(q, k, v, allowed_TS, scale):
    """Softmax attention of one head in float64."""
    scores = np.where(allowed_TS, scale * (q @ k.T), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def allowed(attention: str, T: int) -> tuple[np.ndarray, np.ndarray]:
    """(who sees whom, pair by pair, bool [T, T]; place of each input in its row)."""
    kind, _, block = attention.partition(":")
    half = T // 2 if kind == "block" else T
    place_T, clean_T = np.arange(T) % half, np.arange(T) >= half

    def sees(t, s):
        if kind in ("causal", "full"):
            return t >= s or kind == "full"
        of_t, of_s = place_T[t] // int(block), place_T[s] // int(block)
        if kind == "block_causal":
            return of_s <= of_t
        if clean_T[t]:
            return bool(clean_T[s]) and of_s <= of_t
        return of_s < of_t if clean_T[s] else of_s == of_t

    return np.array([[sees(t, s) for s in range(T)] for t in range(T)]), place_T


@pytest.mark.parametrize("block, count", [(1, 72), (2, 80), (4, 96), (8, 128)])
def test_block_attention_allows_as_many_pairs_as_published(block, count):
    """L L + L b of a row of L = 8 (BD3-LM, 2503.09573)."""
    assert allowed(f"block:{block}", 16)[0].sum() == 8 * 8 + 8 * block == count


WINDOWS = [(attention, *sizes) for attention in ("causal", "full") for sizes in ((0, 12), (1, 12), (0, 128), (70, 128))]
BLOCKS = [("block:2", 3, 12), ("block:3", 0, 128), ("block:32", 70, 128), ("block_causal:4", 0, 12)]


@pytest.mark.parametrize("attention, window, T", WINDOWS + BLOCKS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "tpu"])  # what is done there, not where; blocks of 64 queries on CPU
def test_attention_is_softmax_over_what_may_be_seen(attention, window, T, packed, backend, seed, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(seed)
    B, H, K, C = 2, 4, 2, 8
    q, k, v = (rng.normal(size=(B, T, heads, C)).astype(np.float32) for heads in (H, K, K))
    segments_BT = random_segments(seed, B, T) if packed else None
    ours = jax.jit(functools.partial(attend, attention=attention, window=window, scale=0.3))(q, k, v, segments_BT)
    allowed_TS, place_T = allowed(attention, T)
    if window:
        allowed_TS = allowed_TS & (np.abs(place_T[:, None] - place_T[None]) < window)
    for b in range(B):
        same = segments_BT[b][:, None] == segments_BT[b][None] if packed else True
        for h in range(H):
            expected = numpy_attention(q[b, :, h], k[b, :, h // 2], v[b, :, h // 2], allowed_TS & same, 0.3)
            np.testing.assert_allclose(ours[b, :, h], expected, atol=1e-5)


@pytest.mark.parametrize("attention, window", [("causal", 0), ("full", 70), ("causal", 70), ("block:16", 0)])
@pytest.mark.parametrize("packed", [True, False])
def test_the_written_gradient_of_blocked_attention_is_the_derived_one(attention, window, packed, seed, monkeypatch):
    rng = np.random.default_rng(seed)
    B, T, H, K, C = 2, 128, 4, 2, 8
    q, k, v, dy = (rng.normal(size=(B, T, heads, C)).astype(np.float32) for heads in (H, K, K, H))
    segments_BT = random_segments(seed, B, T) if packed else None
    found = {}
    for backend in ("cpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)

        @jax.jit
        def gradient(dy, segments_BT, *qkv):
            def attended(*qkv):
                return attend(*qkv, segments_BT, attention=attention, window=window, scale=0.3)

            return jax.vjp(attended, *qkv)[1](dy)

        found[backend] = gradient(dy, segments_BT, q, k, v)
    for ours, derived in zip(found["cpu"], found["tpu"], strict=True):
        assert np.abs(derived).max() > 0.1
        np.testing.assert_allclose(ours, derived, atol=2e-5)


def test_rotary_embedding_turns_pairs_by_the_position(seed):
    x = np.random.default_rng(seed).normal(size=(1, 12, 1, 8)).astype(np.float32)
    y = np.asarray(rotate(x, jnp.arange(12)[None], 100.0))[0, :, 0]
    z = x[0, :, 0, :4] + 1j * x[0, :, 0, 4:]
    turned = z * np.exp(1j * np.outer(np.arange(12), 100.0 ** (-np.arange(4) / 4)))
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


def test_norm_is_taken_in_float32(seed):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(5, 512)) * 100, jnp.bfloat16)
    gain = np.random.default_rng(seed + 1).normal(size=512).astype(np.float32)
    cfg = tiny({"model.dtype": "bfloat16"}).model
    ours = RMSNorm(cfg).apply({"params": {"gain": gain}}, x)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt(np.square(exact).mean(-1, keepdims=True) + cfg.norm_eps) * gain
    assert ours.dtype == jnp.bfloat16
    # Half a unit in the last of bfloat16's 8 bits: only the result was rounded.
    np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=2**-8)


ACTIVATIONS = {
    "swiglu": lambda up, gate: gate / (1 + np.exp(-gate)) * up,
    "geglu": lambda up, gate: gelu(gate) * up,
    "gelu": lambda up, gate: gelu(up),
    "relu2": lambda up, gate: np.maximum(up, 0) ** 2,
}


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_activations(activation, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 3, 16)).astype(np.float32)
    weights = {name: rng.normal(size=(16, 24)).astype(np.float32) / 4 for name in ("up", "gate")}
    weights["down"] = rng.normal(size=(24, 16)).astype(np.float32) / 5
    hidden = ACTIVATIONS[activation](x @ weights["up"], x @ weights["gate"])
    if activation in ("gelu", "relu2"):
        del weights["gate"]
    ours = Mlp(tiny({"model.activation": activation}).model, 24).apply({"params": weights}, x)
    np.testing.assert_allclose(ours, hidden @ weights["down"], atol=5e-3)  # GELU's tanh form is good to 1e-3
    if activation in ("swiglu", "relu2"):
        np.testing.assert_allclose(ours, hidden @ weights["down"], atol=1e-5)


def test_query_and_key_norms_make_attention_blind_to_their_scale(seed):
    tokens_BT = random_tokens(seed, 2, 16)
    for qk_norm in (True, False):
        m = built({"model.qk_norm": qk_norm, "model.norm_eps": 1e-12})
        attention = {**m.params["blocks"]["attention"], "query": 3 * m.params["blocks"]["attention"]["query"]}
        params = {**m.params, "blocks": {**m.params["blocks"], "attention": attention}}
        gap = np.abs(m.apply(params, tokens_BT) - m.apply(m.params, tokens_BT)).max()
        assert gap < 1e-4 if qk_norm else gap > 1e-2


def test_activations_are_reported_by_layer(seed):
    m, tokens_BT = built({"model.num_layers": 4, **MIXED}), random_tokens(seed, 2, 16)
    scanned = built({"model.num_layers": 4, **MIXED, "model.scan_layers": True})
    activations, by_scan = (jax.jit(b.model.hidden)(m.params, tokens_BT)[1]["activations"] for b in (m, scanned))
    assert activations["embed"] == pytest.approx(np.abs(m.params["embed"]["table"][tokens_BT]).mean())
    assert {k: v.shape for k, v in activations.items()} == {
        "embed": (), "attention": (4,), "mlp": (4,), "residual": (4,)
    }  # fmt: skip
    assert_same(activations, by_scan, rtol=1e-5)


def test_an_unknown_family_is_refused():
    with pytest.raises(ConfigError, match=r"model.build='transfomer'.*did you mean 'transformer'"):
        tiny({"model.build": "transfomer"})
    with pytest.raises(AssertionError, match="vocab_size"):
        models.build(config.ModelConfig())
