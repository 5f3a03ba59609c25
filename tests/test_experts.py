"""Experts: both implementations against the dense oracle, every expert on every token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from slmjax.models import experts

WAYS = {"blocked": experts._blocked, "ragged": experts._ragged}
ROUTINGS = ["random", "twice", "one", "one_takes_all", "none", "some_none"]
N, A, E, D, F = 150, 2, 5, 12, 10


@pytest.fixture(params=WAYS)
def run(request):
    return WAYS[request.param]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    # So that experts here have whole blocks, short ones, and short ones that run over into other experts' rows.
    monkeypatch.setattr(experts, "CPU_BLOCK", 32)
    monkeypatch.setattr(experts, "CPU_TAIL", 8)


def drawn(seed: int, activation: str = "swiglu", routing: str = "random", dtype=jnp.float32):
    """x, expert, weight, kernels, and a direction dy."""
    rng = np.random.default_rng(seed)
    expert_NA = {
        "random": np.argsort(rng.random((N, E)), 1)[:, :A],
        "twice": np.repeat(rng.integers(0, E, (N, 1)), A, 1),
        "one": np.stack([np.full(N, 3), rng.integers(0, 2, N)], 1),  # 3 has N rows, 2 and 4 none
        "one_takes_all": np.full((N, A), rng.integers(0, E)),
        "none": np.full((N, A), E),
        "some_none": rng.integers(0, E + 1, (N, A)),
    }[routing].astype(np.int32)
    shapes = {"up": (E, D, F), "down": (E, F, D)} | ({"gate": (E, D, F)} if activation.endswith("glu") else {})
    kernels = {k: jnp.asarray(rng.normal(size=s) * s[1] ** -0.5, dtype) for k, s in shapes.items()}
    x_ND, dy_ND = (jnp.asarray(rng.normal(size=(N, D)), dtype) for _ in "xy")
    return x_ND, jnp.asarray(expert_NA), jnp.asarray(rng.random((N, A)), jnp.float32), kernels, dy_ND


def oracle(x_ND, expert_NA, weight_NA, kernels, activation):
    h_NEF = jnp.einsum("nd,edf->nef", x_ND, kernels["up"])
    gate_NEF = jnp.einsum("nd,edf->nef", x_ND, kernels["gate"]) if "gate" in kernels else None
    match activation:
        case "swiglu":
            h_NEF = jax.nn.silu(gate_NEF) * h_NEF
        case "geglu":
            h_NEF = jax.nn.gelu(gate_NEF, approximate=True) * h_NEF
        case "gelu":
            h_NEF = jax.nn.gelu(h_NEF, approximate=True)
        case "relu2":
            h_NEF = jnp.maximum(h_NEF, 0) ** 2
    mixed_NE = jnp.sum(jax.nn.one_hot(expert_NA, len(kernels["up"])) * weight_NA[..., None], 1)
    return jnp.einsum("nef,efd,ne->nd", h_NEF, kernels["down"], mixed_NE)


@partial(jax.jit, static_argnames=("run", "activation"))
def value_and_gradients(run, x_ND, expert_NA, weight_NA, kernels, dy_ND, activation="swiglu"):
    y_ND, pull = jax.vjp(lambda x, w, k: run(x, expert_NA, w, k, activation), x_ND, weight_NA, kernels)
    return y_ND, pull(dy_ND)


def assert_close(got, want, tolerance=1e-5):
    """To `tolerance` of each array's largest number, or of 1."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_outputs_and_gradients_are_the_oracles(run, routing, seed):
    arrays = drawn(seed, routing=routing)
    got = value_and_gradients(run, *arrays)
    assert_close(got, value_and_gradients(oracle, *arrays))


def test_fewer_tokens_than_a_block_has_rows(run, monkeypatch, seed):
    monkeypatch.setattr(experts, "CPU_BLOCK", 512)
    x_ND, expert_NA, weight_NA, kernels, dy_ND = drawn(seed)
    arrays = x_ND[:2], expert_NA[:2], weight_NA[:2], kernels, dy_ND[:2]
    assert_close(value_and_gradients(run, *arrays), value_and_gradients(oracle, *arrays))


@pytest.mark.parametrize("activation", ["geglu", "gelu", "relu2"])
def test_every_activation(run, activation, seed):
    arrays = drawn(seed, activation)
    got = value_and_gradients(run, *arrays, activation=activation)
    assert_close(got, value_and_gradients(oracle, *arrays, activation=activation))


def test_no_expert_adds_exactly_nothing_even_beside_broken_tokens(run, seed):
    x_ND, expert_NA, weight_NA, kernels, dy_ND = drawn(seed, routing="some_none")
    expert_NA = expert_NA.at[:20].set(E)
    x_ND, dy_ND = x_ND.at[:20].set(jnp.nan), dy_ND.at[:20].set(0.0)
    y_ND, (dx_ND, dweight_NA, dkernels) = value_and_gradients(run, x_ND, expert_NA, weight_NA, kernels, dy_ND)
    assert not np.any(y_ND[:20]) and not np.any(dx_ND[:20])
    assert not np.any(np.asarray(dweight_NA)[np.asarray(expert_NA) == E])
    rest = value_and_gradients(oracle, x_ND[20:], expert_NA[20:], weight_NA[20:], kernels, dy_ND[20:])
    assert_close((y_ND[20:], (dx_ND[20:], dweight_NA[20:], dkernels)), rest)


def test_bfloat16_rounds_as_its_products_do(run, seed):
    arrays = drawn(seed, dtype=jnp.bfloat16)
    exact = value_and_gradients(
        oracle, *jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, arrays)
    )
    got = value_and_gradients(run, *arrays)
    want = (jnp.bfloat16, (jnp.bfloat16, jnp.float32, dict.fromkeys(arrays[3], jnp.dtype(jnp.bfloat16))))
    assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(jnp.dtype, want)
    assert_close(got, exact, 8 * 2.0**-8)  # some roundings of 2^-9 each, of numbers larger than their sum


def test_a_population_is_its_members(run, seed):
    members = [drawn(seed + i, routing=routing) for i, routing in enumerate(["random", "one_takes_all", "some_none"])]
    got = jax.jit(jax.vmap(partial(value_and_gradients, run)))(*jax.tree.map(lambda *a: jnp.stack(a), *members))
    for i, member in enumerate(members):
        assert_close(jax.tree.map(lambda a, i=i: a[i], got), value_and_gradients(oracle, *member))


def test_a_population_may_share_its_tokens(seed):
    # Not for `ragged_dot`, which jax 0.10 to 0.12 maps only over all its operands at once, as a population does.
    x_ND, expert_NA, weight_NA, kernels, dy_ND = drawn(seed)
    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), kernels)
    got = jax.vmap(lambda k: value_and_gradients(experts._blocked, x_ND, expert_NA, weight_NA, k, dy_ND))(stacked)
    for i in range(2):
        member = jax.tree.map(lambda a, i=i: a[i], stacked)
        want = value_and_gradients(oracle, x_ND, expert_NA, weight_NA, member, dy_ND)
        assert_close(jax.tree.map(lambda a, i=i: a[i], got), want)


def test_under_remat_in_a_scan(run, seed):
    x_ND, expert_NA, weight_NA, kernels, dy_ND = drawn(seed)
    layers = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), kernels)

    def stack(run):
        def loss(x_ND, weight_NA, layers, expert_NA, dy_ND):
            block = jax.checkpoint(lambda x, k: (x + run(x, expert_NA, weight_NA, k, "swiglu"), None))
            return jnp.sum(jax.lax.scan(block, x_ND, layers)[0] * dy_ND)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(x_ND, weight_NA, layers, expert_NA, dy_ND)

    assert_close(stack(run), stack(oracle))


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(run, check_vma, seed):
    x_ND, expert_NA, weight_NA, kernels, dy_ND = drawn(seed)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        partial(run, activation="swiglu"),
        mesh=mesh,
        in_specs=(P("data"), P("data"), P("data"), P()),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    got = value_and_gradients(lambda *a: mapped(*a[:4]), x_ND, expert_NA, weight_NA, kernels, dy_ND)
    assert_close(got, value_and_gradients(oracle, x_ND, expert_NA, weight_NA, kernels, dy_ND))


def test_here_the_blocks_run(seed):
    x_ND, expert_NA, weight_NA, kernels, _ = drawn(seed)
    text = str(jax.make_jaxpr(partial(experts.run_experts, activation="swiglu"))(x_ND, expert_NA, weight_NA, kernels))
    assert ("ragged_dot" in text) == (jax.default_backend() != "cpu")


def test_an_unknown_activation_is_refused(run, seed):
    x_ND, expert_NA, weight_NA, kernels, _ = drawn(seed)
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        run(x_ND, expert_NA, weight_NA, kernels, "tanh")
