"""However tokens travel to their experts, the same sum comes back; what is dropped is what the rule says."""

import functools
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slmjax import sharding
from slmjax.config import MeshConfig
from slmjax.models import dispatch

B, T, D, F, E, A = 8, 6, 16, 12, 8, 3

MESHES = [{"expert": 4}, {"expert": 2, "tensor": 2}, {"fsdp": 2, "expert": 2}, {"data": 2, "fsdp": 2}, {"tensor": 4}]
ROUTINGS = ["random", "few", "one", "nobody"]


def mesh_of(population=1, **axes) -> Mesh:
    axes = {"data": 1, **axes}
    devices = jax.devices()[: population * math.prod(axes.values())]
    return sharding.make_mesh(MeshConfig(**axes), population, devices)


def routing(rng, kind: str, shape=(B, T), num_experts=E, num_chosen=A):
    """Experts BTA, those of a token all different."""
    experts_BTE = rng.permuted(np.broadcast_to(np.arange(num_experts), (*shape, num_experts)), axis=-1)
    experts_BTA = experts_BTE[..., :num_chosen].astype(np.int32)
    match kind:
        case "few":  # most experts are empty, and whole devices with them
            experts_BTA = experts_BTE[..., :1].astype(np.int32) % 2 * 5 + np.arange(num_chosen, dtype=np.int32)
        case "one":  # every token to the same experts: the worst case of the buffers
            experts_BTA = np.broadcast_to(np.arange(num_chosen, dtype=np.int32), experts_BTA.shape)
        case "nobody":
            experts_BTA = np.where(rng.random(experts_BTA.shape) < 0.3, num_experts, experts_BTA)
    return jnp.asarray(experts_BTA)


def inputs(rng, shape=(B, T), num_experts=E, num_chosen=A, gated=True):
    """x_BTD, weight_BTA, kernels, and a direction to differentiate along."""

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    kernels = {"up": normal(num_experts, D, F) / D**0.5, "down": normal(num_experts, F, D) / F**0.5}
    if gated:
        kernels["gate"] = normal(num_experts, D, F) / D**0.5
    return normal(*shape, D), jnp.abs(normal(*shape, num_chosen)), kernels, normal(*shape, D)


def outputs_and_gradients(apply):
    """Compiled (x, expert, weight, kernels, direction) → y and its gradients along `direction`."""

    @jax.jit
    def both(x_BTD, expert_BTA, weight_BTA, kernels, direction_BTD):
        y_BTD, pull = jax.vjp(lambda x, w, k: apply(x, expert_BTA, w, k), x_BTD, weight_BTA, kernels)
        return y_BTD, pull(direction_BTD)

    return both


# For apply that no test changes beneath its feet: compiled once.
without_a_mesh = functools.cache(outputs_and_gradients)


def swiglu(x_BTD, expert_BTA, weight_BTA, kernels):
    return dispatch.dropless(x_BTD, expert_BTA, weight_BTA, kernels, "swiglu")


def placed(mesh: Mesh, x, expert, weight, kernels, direction):
    def at(*axes):
        return NamedSharding(mesh, sharding.partition(axes))

    rows, columns, across = at("batch"), at("expert", "embed", "mlp"), at("expert", "mlp", "embed")
    kernels = {name: jax.device_put(a, across if name == "down" else columns) for name, a in kernels.items()}
    x, expert, weight, direction = (jax.device_put(a, rows) for a in (x, expert, weight, direction))
    return x, expert, weight, kernels, direction


def assert_close(a, b, tolerance=1e-5):
    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.any(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))

    jax.tree.map(check, a, b)


def check_equals_one_device(axes: dict, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight, kernels, direction = inputs(rng)
    alone, spread, mesh = outputs_and_gradients(swiglu), outputs_and_gradients(swiglu), mesh_of(**axes)
    for kind in ROUTINGS:
        expert = routing(rng, kind)
        expected = alone(x, expert, weight, kernels, direction)
        with jax.set_mesh(mesh):
            got = spread(*placed(mesh, x, expert, weight, kernels, direction))
        assert_close(got, expected)


def every_expert_on_every_token(x_BTD, expert_BTA, weight_BTA, kernels):
    """The definition."""
    up_BTEF, gate_BTEF = (jnp.einsum("btd,edf->btef", x_BTD, kernels[name]) for name in ("up", "gate"))
    y_BTED = jnp.einsum("btef,efd->bted", jax.nn.silu(gate_BTEF) * up_BTEF, kernels["down"])
    weight_BTE = jnp.einsum("bta,btae->bte", weight_BTA, jax.nn.one_hot(expert_BTA, kernels["up"].shape[0]))
    return jnp.einsum("bte,bted->btd", weight_BTE, y_BTED)


@pytest.mark.parametrize("kind", ROUTINGS)
def test_without_a_mesh_it_is_the_definition(kind, seed):
    rng = np.random.default_rng(seed)
    x, weight, kernels, direction = inputs(rng)
    args = x, routing(rng, kind), weight, kernels, direction
    assert_close(without_a_mesh(swiglu)(*args), without_a_mesh(every_expert_on_every_token)(*args))


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_a_mesh_equals_one_device(axes, seed):
    check_equals_one_device(axes, seed)


def test_eight_devices_equal_one(seed):
    code = (
        "import jax; jax.config.update('jax_platforms', 'cpu'); jax.config.update('jax_num_cpu_devices', 8)\n"
        "import test_dispatch\n"
        f"test_dispatch.check_equals_one_device({{'data': 2, 'fsdp': 2, 'expert': 2}}, {seed})"
    )
    here = pathlib.Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def lowered(mesh: Mesh, seed: int, apply=swiglu, **platforms):
    rng = np.random.default_rng(seed)
    x, weight, kernels, direction = inputs(rng)
    args = placed(mesh, x, routing(rng, "random"), weight, kernels, direction)
    with jax.set_mesh(mesh):
        return outputs_and_gradients(apply).trace(*args).lower(**platforms)


def collectives(text: str) -> list[tuple[str, list[tuple[int, ...]]]]:
    """(operation, shapes of its results) in a compiled program."""
    found = []
    for results, operation in re.findall(r"= (\(?[^=]*?\)?) (all-[a-z-]+?|reduce-scatter)(?:-start)?\(", text):
        shapes = re.findall(r"\w+\[([\d,]*)\]", results)
        found.append((operation, [tuple(int(n) for n in shape.split(",") if n) for shape in shapes]))
    return found


@pytest.mark.parametrize("axes", [{"expert": 4}, {"fsdp": 2, "expert": 2}], ids=str)
def test_tokens_travel_by_all_to_all_alone(axes, seed):
    found = collectives(lowered(mesh_of(**axes), seed).compile().as_text())
    travelled = [shapes for operation, shapes in found if operation == "all-to-all"]
    assert len(travelled) == 5  # the counts; to the experts and back; the same for the gradient
    gathered = [shape for operation, shapes in found if operation == "all-gather" for shape in shapes]
    # A kernel's fsdp parts, and never tokens.
    assert all(sorted(shape) == sorted((E // axes["expert"], D, F)) for shape in gathered)
    assert bool(gathered) == ("fsdp" in axes)


def test_without_an_expert_axis_nothing_travels(seed):
    found = collectives(lowered(mesh_of(data=4), seed).compile().as_text())
    assert {operation for operation, _ in found} <= {"all-reduce"}


def layers(x_BTD, expert_BTA, weight_BTA, kernels, num_layers=2):
    """As a trainer has it: blocks under remat in a scan."""

    @jax.checkpoint
    def block(x_BTD, _):
        return x_BTD + swiglu(x_BTD, expert_BTA, weight_BTA, kernels), None

    return jax.lax.scan(block, x_BTD, length=num_layers)[0]


def population(rng, num_members: int):
    members = []
    for _ in range(num_members):
        x, weight, kernels, direction = inputs(rng, (4, T))
        members.append((x, routing(rng, "random", (4, T)), weight, kernels, direction))
    return members, jax.tree.map(lambda *a: jnp.stack(a), *members)


def test_a_population_of_layers_on_a_mesh_equals_its_members_alone(seed):
    members, stacked = population(np.random.default_rng(seed), 2)
    both = outputs_and_gradients(layers)
    alone = [both(*member) for member in members]
    with jax.set_mesh(mesh_of(expert=2, tensor=2)):
        got = jax.jit(jax.vmap(both))(*stacked)
    assert_close(got, jax.tree.map(lambda *a: jnp.stack(a), *alone))


@pytest.mark.parametrize("axes", [{}, {"expert": 2}], ids=str)
def test_members_on_their_own_devices_equal_members_alone(axes, seed):
    num_members = 4 // math.prod(axes.values())
    members, stacked = population(np.random.default_rng(seed), num_members)
    both, mesh = outputs_and_gradients(layers), mesh_of(population=num_members, **axes)

    def one(*args):
        return jax.tree.map(lambda a: a[None], both(*jax.tree.map(lambda a: a[0], args)))

    alone = [both(*member) for member in members]
    by_member = P("population")
    with jax.set_mesh(mesh):
        spread = jax.shard_map(one, in_specs=by_member, out_specs=by_member, axis_names={"population"}, check_vma=False)
        got = jax.jit(spread)(*stacked)
        text = jax.jit(spread).lower(*stacked).compile().as_text()
    assert_close(got, jax.tree.map(lambda *a: jnp.stack(a), *alone))
    assert bool(collectives(text)) == bool(axes)  # a member with one device exchanges nothing


@pytest.mark.parametrize("axes", [{"expert": 2, "tensor": 2}, {"fsdp": 2, "expert": 2}], ids=str)
def test_half_precision_stays_half_precision_on_a_mesh(axes, seed):
    rng = np.random.default_rng(seed)
    x, weight, kernels, direction = inputs(rng)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (x, kernels, direction))
    expert, mesh, both = routing(rng, "random"), mesh_of(**axes), outputs_and_gradients(swiglu)
    with jax.set_mesh(mesh):
        got = both(*placed(mesh, half[0], expert, weight, *half[1:]))
    expected = both(x, expert, weight, kernels, direction)
    assert_close(got, expected, tolerance=0.05)
    types = jax.tree.map(lambda a: a.dtype, got)
    assert types == jax.tree.map(lambda a: a.dtype, (half[0], (half[0], weight, half[1])))


def ragged_as_documented(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name, axis_index_groups=None
):
    """jax.lax.ragged_all_to_all by its documentation, of collectives that every backend has; NaN if sizes disagree."""
    me, i = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
    for sender in range(jax.lax.axis_size(axis_name)):
        here = [jax.lax.all_gather(a, axis_name)[sender] for a in (operand, input_offsets, send_sizes, output_offsets)]
        theirs, start, size, to = here[0], *(a[me] for a in here[1:])
        rows = jnp.where((size == recv_sizes[sender]), theirs[(i - to + start) % len(theirs)], jnp.nan)
        output = jnp.where(((i >= to) & (i < to + size))[:, None], rows, output)
    return output


@pytest.mark.parametrize("axes", [{"expert": 4}, {"expert": 2, "tensor": 2}], ids=str)
def test_sending_only_rows_in_use_equals_one_device(axes, seed, monkeypatch):
    monkeypatch.setattr(dispatch, "_sends_ragged", lambda: True)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_as_documented)
    check_equals_one_device(axes, seed)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_send_only_rows_in_use(platform, seed, monkeypatch):
    monkeypatch.setattr(dispatch, "_sends_ragged", lambda: True)
    mesh = mesh_of(fsdp=2, expert=2)
    text = lowered(mesh, seed, lowering_platforms=(platform,)).as_text()
    assert text.count("@ragged_all_to_all") == 4  # there and back, and the gradient's
    assert text.count("stablehlo.all_to_all") == 1  # the counts
    _, stacked = population(np.random.default_rng(seed), 2)
    with jax.set_mesh(mesh):
        lower = jax.jit(jax.vmap(outputs_and_gradients(layers))).trace(*stacked).lower
        assert "@ragged_all_to_all" in lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    "axes, rows, message",
    [
        (
            {"expert": 4},
            6,
            r"batch rows=6 is not a multiple of mesh.data\*mesh.fsdp\*mesh.expert=4; use a multiple of 4",
        ),
        ({"expert": 3}, 6, r"experts=8 is not a multiple of mesh.expert=3"),
        ({"tensor": 5}, 6, r"expert width=12 is not a multiple of mesh.tensor=5; .*set mesh.tensor to a divisor of 12"),
    ],
)
def test_what_the_mesh_does_not_divide_is_refused(axes, rows, message, seed):
    x, weight, kernels, _ = inputs(np.random.default_rng(seed), (rows, T))
    sizes = {"population": 1, "data": 1, "fsdp": 1, "tensor": 1, "expert": 1, **axes}
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    expert = jax.ShapeDtypeStruct((rows, T, A), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=message):
        jax.eval_shape(swiglu, x, expert, weight, kernels)


def kept_by_the_rule(expert_BTA, num_experts: int, places: int):
    """Earlier positions first, of one position its first choice first, while an expert has places in the sequence."""
    kept_BTA = np.zeros(expert_BTA.shape, bool)
    for b, expert_TA in enumerate(expert_BTA):
        free = [places] * num_experts
        for t, a in np.ndindex(expert_TA.shape):
            expert = expert_TA[t, a]
            if expert < num_experts and free[expert]:
                free[expert] -= 1
                kept_BTA[b, t, a] = True
    return kept_BTA


@functools.partial(jax.jit, static_argnames=("factor", "activation"))
def with_capacity(x_BTD, expert_BTA, weight_BTA, kernels, factor, activation="swiglu"):
    return dispatch.capacity(x_BTD, expert_BTA, weight_BTA, kernels, activation, factor)


@functools.cache
def capped(factor):
    return lambda *args: with_capacity(*args, factor)[0]


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, 8.0])
def test_capacity_drops_what_the_rule_drops_and_nothing_else(kind, factor, seed):
    rng = np.random.default_rng(seed)
    x, weight, kernels, direction = inputs(rng)
    expert = routing(rng, kind)
    _, kept = with_capacity(x, expert, weight, kernels, factor)
    expected = kept_by_the_rule(np.asarray(expert), E, math.ceil(factor * T * A / E))
    np.testing.assert_array_equal(kept, expected)
    if factor == 8.0:
        assert np.all(kept == (expert < E))
    # What is kept is all that counts: the others are as good as sent to nobody.
    found = without_a_mesh(capped(factor))(x, expert, weight, kernels, direction)
    assert_close(found, without_a_mesh(swiglu)(x, jnp.where(kept, expert, E), weight, kernels, direction))


def test_later_positions_are_dropped_more(seed):
    rng = np.random.default_rng(seed)
    x, weight, kernels, _ = inputs(rng, (32, 32), num_chosen=2)
    _, kept = with_capacity(x, routing(rng, "random", (32, 32), num_chosen=2), weight, kernels, 0.75)
    dropped_TA = 1 - np.mean(kept, 0)
    assert np.all(dropped_TA[16:].mean(0) > dropped_TA[:16].mean(0))


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_a_capacity_factor_that_is_no_positive_number_is_refused(factor, seed):
    x, weight, kernels, _ = inputs(np.random.default_rng(seed))
    with pytest.raises(ValueError, match=r"capacity factor=.* is not a positive number; use"):
        with_capacity(x, jnp.zeros((B, T, A), jnp.int32), weight, kernels, factor)


def chosen_by_the_rule(score_BTE, places: int):
    taken_BTE = np.zeros(score_BTE.shape, bool)
    for b, e in np.ndindex(score_BTE.shape[0], score_BTE.shape[2]):
        for t in sorted(range(score_BTE.shape[1]), key=lambda t: -score_BTE[b, t, e])[:places]:
            taken_BTE[b, t, e] = True
    return taken_BTE


@pytest.mark.parametrize("places", [1, 4, T])
def test_every_expert_takes_its_number_of_best_positions(places, seed):
    rng = np.random.default_rng(seed)
    x, _, kernels, direction = inputs(rng)
    score = jnp.asarray(rng.random((B, T, E)), jnp.float32)
    taken = chosen_by_the_rule(np.asarray(score), places)

    def by_the_rule(x, _, score, kernels):
        everyone = jnp.broadcast_to(jnp.arange(E), score.shape)
        return every_expert_on_every_token(x, everyone, jnp.where(taken, score, 0), kernels)

    def by_choice(x, _, score, kernels):
        return dispatch.expert_choice(x, score, kernels, "swiglu", places)[0]

    found = dispatch.expert_choice(x, score, kernels, "swiglu", places)[1]
    np.testing.assert_array_equal(found, taken)
    assert np.all(found.sum(1) == places)
    args = x, None, score, kernels, direction
    assert_close(outputs_and_gradients(by_choice)(*args), outputs_and_gradients(by_the_rule)(*args))


@pytest.mark.parametrize("places", [0, T + 1])
def test_more_places_than_positions_are_refused(places, seed):
    x, weight, kernels, _ = inputs(np.random.default_rng(seed), num_chosen=E)
    with pytest.raises(ValueError, match=f"chosen_per_row={places} is not between 1 and the {T} positions"):
        dispatch.expert_choice(x, weight, kernels, "swiglu", places)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu2"])
def test_one_hot_forms_know_every_activation(activation, seed):
    rng = np.random.default_rng(seed)
    x, weight, kernels, _ = inputs(rng, gated="glu" in activation)
    expert = routing(rng, "random")
    y, _ = with_capacity(x, expert, weight, kernels, 8.0, activation)
    assert_close(y, dispatch.dropless(x, expert, weight, kernels, activation))


@pytest.mark.parametrize("form", ["capacity", "expert_choice"])
def test_one_hot_forms_on_a_mesh_equal_one_device(form, seed):
    rng = np.random.default_rng(seed)
    x, weight, kernels, direction = inputs(rng, num_chosen=E if form == "expert_choice" else A)

    def apply(x, expert, weight, kernels):
        if form == "capacity":
            return with_capacity(x, expert, weight, kernels, 1.0)[0]
        return dispatch.expert_choice(x, weight, kernels, "swiglu", 2)[0]

    both, mesh = outputs_and_gradients(apply), mesh_of(fsdp=2, expert=2)
    args = x, routing(rng, "random"), weight, kernels, direction
    with jax.set_mesh(mesh):
        got = both(*placed(mesh, *args))
    assert_close(got, both(*args))
