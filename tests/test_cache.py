"""Keys and values remembered between calls: exact where they can be, close where they cannot, and less work in both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import draw, random_tokens, tiny

from slmjax import ladder, models, objectives
from slmjax.decoding import ordered, threshold
from slmjax.decoding.cache import Cache
from slmjax.denoiser import PAD, Counted, of_model

V, T = 32, 24
FORMS = {
    "masked": {"objective.name": "masked_diffusion"},
    "window": {
        "objective.name": "masked_diffusion",
        "model.attention_pattern": ("window", "global"),
        "model.window": 7,
    },
    "experts": {"objective.name": "masked_diffusion", "model.moe.num_experts": 4, "model.qk_norm": True},
    "block": {"objective.name": "block_diffusion", "objective.diffusion.block": 4},
    "scanned": {"objective.name": "block_diffusion", "objective.diffusion.block": 8, "model.scan_layers": True},
}


@functools.cache
def network(form: str):
    """(model, params, objective, plain denoiser)."""
    cfg = ladder.resolved(tiny(FORMS[form]))
    model, objective = models.build(cfg.model), objectives.build(cfg.objective)
    params = jax.tree.map(jnp.asarray, draw(model))
    return model, params, objective, of_model(model, params, objective, V)


def problem(seed: int, B: int = 3):
    """Prompts of 8 tokens and 16 masks; the last row ends 4 positions early."""
    tokens = random_tokens(seed, B, T)
    tokens[:, 8:] = V
    tokens[-1, T - 4 :] = PAD
    return tokens


@pytest.mark.parametrize("form", ["masked", "window", "experts"])
@pytest.mark.parametrize("kind", ["dual", "prefix", "hidden"])
def test_refreshed_at_every_call_a_cache_is_the_plain_denoiser(form, kind, seed):
    model, params, objective, plain = network(form)
    tokens = problem(seed)
    cached = Cache(model, params, objective, mask_id=V, block=4, kind=kind, refresh_every=1)
    for decode in (ordered.static, functools.partial(threshold.decode, threshold=0.2)):
        cached.restart()
        a, b = (decode(denoiser, tokens, mask_id=V, block=4) for denoiser in (plain, cached))
        np.testing.assert_array_equal(a.tokens_BT, b.tokens_BT)
        for x, y in zip(a.trace, b.trace, strict=True):
            np.testing.assert_allclose(x.log_confidence_N, y.log_confidence_N, atol=1e-5)


@pytest.mark.parametrize("form, block", [("block", 4), ("scanned", 8)])
@pytest.mark.parametrize("per_call", [1, 3])
def test_of_block_diffusion_what_is_remembered_is_exact(form, block, per_call, seed):
    model, params, objective, plain = network(form)
    tokens = problem(seed)
    counted, cached = Counted(plain), Cache(model, params, objective, mask_id=V, block=block, kind="blocks")
    a, b = (ordered.static(d, tokens, mask_id=V, block=block, per_call=per_call) for d in (counted, cached))
    np.testing.assert_array_equal(a.tokens_BT, b.tokens_BT)
    for x, y in zip(a.trace, b.trace, strict=True):
        np.testing.assert_allclose(x.log_confidence_N, y.log_confidence_N, atol=1e-5)
    assert cached.num_calls == counted.num_calls
    assert cached.num_positions < 0.6 * counted.num_positions


def test_of_full_attention_it_is_close_and_saves_work(seed):
    model, params, objective, plain = network("masked")
    tokens = problem(seed)
    counted = Counted(plain)
    exact = ordered.static(counted, tokens, mask_id=V, block=8)
    work = {"none": counted.num_positions}
    for kind in ("prefix", "dual", "hidden"):
        cached = Cache(model, params, objective, mask_id=V, block=8, kind=kind)
        decoded = ordered.static(cached, tokens, mask_id=V, block=8)
        np.testing.assert_array_equal(decoded.tokens_BT[:, :8], tokens[:, :8])
        work[kind] = cached.num_positions
        # The first call of a block computes everything: there it is the plain denoiser, on the same tokens.
        first, other = decoded.trace[0], exact.trace[0]
        np.testing.assert_array_equal(first.values_N, other.values_N)
        np.testing.assert_allclose(first.log_confidence_N, other.log_confidence_N, atol=1e-5)
    assert work["none"] > work["prefix"] > work["dual"] > work["hidden"]


def test_a_batch_is_its_rows(seed):
    model, params, objective, _ = network("block")
    tokens = problem(seed)
    cached = Cache(model, params, objective, mask_id=V, block=4, kind="blocks")
    together = ordered.static(cached, tokens, mask_id=V, block=4).tokens_BT
    for row in range(len(tokens)):
        cached.restart()
        np.testing.assert_array_equal(
            ordered.static(cached, tokens[[row]], mask_id=V, block=4).tokens_BT[0], together[row]
        )


@pytest.mark.parametrize(
    "form, settings, words",
    [
        ("masked", {"kind": "suffix"}, "dual, prefix"),
        ("masked", {"kind": "blocks"}, "does not fit"),
        ("block", {"kind": "dual"}, "does not fit"),
        ("block", {"kind": "blocks", "block": 8}, "not the 4"),
        ("masked", {"block": 0}, "block=0"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(form, settings, words):
    model, params, objective, _ = network(form)
    with pytest.raises(ValueError, match=words):
        Cache(model, params, objective, mask_id=V, **{"block": 4, **settings})


def test_prompts_that_end_within_a_block_are_refused_where_whole_blocks_are_remembered():
    model, params, objective, _ = network("block")
    tokens = random_tokens(0, 1, T)
    tokens[:, 6:] = V
    with pytest.raises(ValueError, match="2 past the edge of a block of 4"):
        Cache(model, params, objective, mask_id=V, block=4, kind="blocks")(tokens)
