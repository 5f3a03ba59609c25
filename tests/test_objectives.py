"""The loss is the cross-entropy it says, chunked or not, and a chunked one never holds all the logits."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import assert_same, random_segments, random_tokens

from slmjax import config, objectives
from slmjax.objectives import View

V, D = 96, 8


def unembed(params, x):
    """Tied to nothing, with a soft-cap: the gradient passes through something that is not linear."""
    return 5 * jnp.tanh(jnp.einsum("...d,dv->...v", x, params["kernel"]) / 5)


def problem(seed: int, B: int = 4, T: int = 12):
    """(params, x_BTD, view) with uneven weights, some of them zero."""
    rng = np.random.default_rng(seed)
    params = {"kernel": rng.normal(size=(D, V)).astype(np.float32)}
    x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
    weights_BT = (rng.random((B, T)) * (rng.random((B, T)) < 0.7)).astype(np.float32)
    view = View(random_tokens(0, B, T), random_tokens(seed, B, T, vocab=V), weights_BT, None, np.float32(17.0))
    return params, x_BTD, view


def expected_loss(params, x_BTD, view, z_loss):
    """(loss, nll) in float64."""
    logits = 5 * np.tanh(x_BTD.astype(np.float64) @ params["kernel"] / 5)
    log_partition = np.log(np.exp(logits).sum(-1))
    nll = log_partition - np.take_along_axis(logits, view.targets_BT[..., None], -1)[..., 0]
    total = view.weights_BT * (nll + z_loss * log_partition**2)
    return total.sum() / view.count, (view.weights_BT * nll).sum() / view.count


@functools.partial(jax.jit, static_argnums=(4, 5))
def loss_and_gradients(params, x_BTD, view, z_loss, chunk, batch_shards=None):
    def loss(params, x_BTD):
        return objectives.weighted_loss(unembed, params, x_BTD, view, z_loss, chunk, batch_shards)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x_BTD)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [0, 1, 7, 16, 48, 1000])
def test_chunked_loss_is_the_full_loss_in_value_and_gradient(chunk, z_loss, seed):
    params, x_BTD, view = problem(seed)
    full = loss_and_gradients(params, x_BTD, view, z_loss, 0)
    chunked = loss_and_gradients(params, x_BTD, view, z_loss, chunk)
    assert_same(chunked, full, rtol=1e-4, atol=1e-6)
    (loss, nll_BT), _ = chunked
    nll = np.sum(view.weights_BT * nll_BT) / view.count
    assert (loss, nll) == pytest.approx(expected_loss(params, x_BTD, view, z_loss), rel=1e-5)


def test_gradients_are_those_of_finite_differences(seed):
    params, x_BTD, view = problem(seed)
    for chunk in (0, 16):
        _, (params_grad, x_grad) = loss_and_gradients(params, x_BTD, view, 0.3, chunk)
        rng = np.random.default_rng(seed)
        dk, dx = rng.normal(size=(D, V)), rng.normal(size=x_BTD.shape)
        ends = [
            expected_loss({"kernel": params["kernel"] + h * dk}, x_BTD + h * dx, view, 0.3)[0] for h in (1e-4, -1e-4)
        ]
        slope = np.vdot(params_grad["kernel"], dk) + np.vdot(x_grad, dx)
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3, abs=1e-4)


def test_the_chunked_gradient_scales_with_what_is_asked_of_it(seed):
    params, x_BTD, view = problem(seed)

    @functools.partial(jax.jit, static_argnums=0)
    def squared(chunk, params, x_BTD, view):
        return jax.grad(lambda p: objectives.weighted_loss(unembed, p, x_BTD, view, 0.0, chunk)[0] ** 2)(params)

    assert_same(squared(16, params, x_BTD, view), squared(0, params, x_BTD, view), rtol=1e-4, atol=1e-6)


def test_a_chunk_is_the_most_positions_of_every_sequence_that_fit():
    for chunk, expected in ((0, 12), (1, 1), (7, 1), (8, 2), (16, 4), (47, 6), (48, 12), (99, 12)):
        assert objectives._positions(4, 12, chunk) == expected


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("chunk", [0, 8, 1000])
def test_leaving_out_what_has_no_weight_changes_nothing(shards, chunk, seed):
    params, x_BTD, view = problem(seed)
    view.weights_BT[3] = 0

    ((value, nll), grads), ((expected, nll_all), expected_grads) = (
        loss_and_gradients(params, x_BTD, view, 0.3, chunk, s) for s in (shards, None)
    )
    assert value == pytest.approx(float(expected), rel=1e-5)
    assert_same(grads, expected_grads, rtol=1e-4, atol=1e-6)
    weighted_BT = view.weights_BT != 0
    np.testing.assert_allclose(np.asarray(nll)[weighted_BT], np.asarray(nll_all)[weighted_BT], rtol=1e-5)


def test_chunks_without_a_weight_are_not_computed(seed):
    """Of 48 tokens in chunks of 4, as many chunks as those with a weight fill."""
    params, x_BTD, view = problem(seed)
    made = []

    def counting(params, x):
        jax.debug.callback(lambda: made.append(1))
        return unembed(params, x)

    value, _ = jax.jit(lambda x: objectives.weighted_loss(counting, params, x, view, 0.0, 4, 1))(x_BTD)
    jax.block_until_ready(value)
    jax.effects_barrier()
    assert len(made) == -(-np.count_nonzero(view.weights_BT) // 4) < 12


@pytest.mark.parametrize("batch_shards", [None, 4], ids=["all", "weighted"])
def test_a_split_batch_stays_split_in_its_chunks(batch_shards):
    """The only thing devices tell each other is sums: no device sees another's activations."""
    params, x_BTD, view = problem(0, B=8, T=16)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    placed = View(rows, rows, rows, None, whole)

    def gradient(params, x_BTD, view):
        def loss(params, x_BTD):
            return objectives.weighted_loss(unembed, params, x_BTD, view, 1e-4, 32, batch_shards)[0]

        return jax.grad(loss, (0, 1))(params, x_BTD)

    split = jax.jit(gradient, in_shardings=(whole, rows, placed), out_shardings=(whole, rows))
    text = split.lower(params, x_BTD, view).compile().as_text()
    assert "all-reduce" in text
    assert not re.search("all-gather|all-to-all|collective-permute", text)


def largest_logits(jaxpr) -> int:
    """Elements of the largest array with a vocabulary axis that a jaxpr makes, at any depth."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [math.prod(v.aval.shape) for v in equation.outvars if 4096 in getattr(v.aval, "shape", ())]
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                sizes += [largest_logits(inner)] if hasattr(inner, "eqns") else []
    return max(sizes)


def test_a_chunked_loss_never_holds_all_the_logits():
    N, vocab, width, chunk = 512, 4096, 2, 32
    params = {"kernel": jax.ShapeDtypeStruct((width, vocab), jnp.float32)}
    x_BTD = jax.ShapeDtypeStruct((4, N // 4, width), jnp.float32)
    ints = jax.ShapeDtypeStruct((4, N // 4), jnp.int32)
    view = View(ints, ints, jax.ShapeDtypeStruct((4, N // 4), jnp.float32), None, jax.ShapeDtypeStruct((), jnp.float32))

    def gradient(chunk):
        def loss(params, x_BTD, view):
            return objectives.weighted_loss(unembed, params, x_BTD, view, 1e-4, chunk)[0]

        return jax.grad(loss, argnums=(0, 1))

    chunked, full = (jax.make_jaxpr(gradient(c))(params, x_BTD, view).jaxpr for c in (chunk, 0))
    assert largest_logits(full) == N * vocab
    assert largest_logits(chunked) == chunk * vocab
    # And XLA keeps to it: what the compiled function allocates beside its arguments is a few chunks of logits.
    chunked, full = (jax.jit(gradient(c)).lower(params, x_BTD, view).compile() for c in (chunk, 0))
    chunked, full = (compiled.memory_analysis().temp_size_in_bytes for compiled in (chunked, full))
    assert full >= 4 * N * vocab
    assert chunked < 4 * (4 * chunk * vocab) < full / 3


@pytest.mark.parametrize("chunk", [0, 5, 16])
def test_token_losses_are_the_cross_entropy_of_each_token(chunk, seed):
    params, x_BTD, view = problem(seed)
    token_losses = jax.jit(objectives.token_losses, static_argnums=(0, 4))
    nll_BT = token_losses(unembed, params, x_BTD, view.targets_BT, chunk)
    assert nll_BT.shape == view.targets_BT.shape
    weighted = np.sum(view.weights_BT * np.asarray(nll_BT, np.float64)) / view.count
    assert weighted == pytest.approx(expected_loss(params, x_BTD, view, 0.0)[1], rel=1e-5)


def test_cross_entropy_survives_large_logits():
    logits = jnp.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], jnp.float32)
    nll, log_partition = objectives.cross_entropy(logits, jnp.array([1, 2]))
    np.testing.assert_allclose(nll, [1e4, math.log(3)], rtol=1e-6)
    np.testing.assert_allclose(log_partition, [1e4, math.log(3)], rtol=1e-6)


def test_next_token_predicts_every_next_token():
    objective = objectives.build(config.ObjectiveConfig())
    tokens_BT1, segments_BT1 = random_tokens(0, 3, 17), random_segments(1, 3, 17)
    view = objective.view(tokens_BT1, segments_BT1, jax.random.key(0))
    np.testing.assert_array_equal(view.inputs_BT, tokens_BT1[:, :-1])
    np.testing.assert_array_equal(view.targets_BT, tokens_BT1[:, 1:])
    np.testing.assert_array_equal(view.segments_BT, segments_BT1[:, :-1])
    assert (view.weights_BT == 1).all() and view.count == 3 * 16
    assert objective.view(tokens_BT1, None, None).segments_BT is None
    assert (objective.attention, objective.kind) == ("causal", "exact")
