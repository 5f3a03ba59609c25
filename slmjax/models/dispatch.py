"""How tokens reach the experts a router chose for them, and come back: on one device or over a mesh.

Letters: B batch, T positions, N = B T tokens, A experts per token, R = N A token-expert pairs, D width,
F feed-forward, E experts, C tokens an expert takes from one sequence, P devices of the `expert` axis.
An expert id of E is nobody: such a pair adds 0. `kernels` are {"up": EDF, "down": EFD, "gate": EDF when gated}.
What the experts compute is in `slmjax.models.experts`, who is chosen in the router; neither lives here.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from slmjax.models.activation import activate
from slmjax.models.experts import run_experts
from slmjax.sharding import RULES

SPLIT = ("data", "fsdp", "tensor", "expert")  # mesh axes over which `dropless` divides its work
ROWS = RULES["batch"]  # `expert` is one of them: outside of the experts its devices work on different sequences


def dropless(x_BTD, expert_BTA, weight_BTA, kernels, activation):
    """Sum over A of weight times the expert's output, BTD; no pair is ever dropped.

    Under a mesh (`jax.set_mesh` around tracing) rows are exchanged by all-to-all over its `expert` axis, and each
    device runs E / P experts. The A experts of a token must differ: buffers hold the worst case of that.

    Raises:
      ValueError: rows, experts or feed-forward width that the mesh does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(mesh.shape[axis] == 1 for axis in SPLIT):
        return _local(x_BTD, expert_BTA, weight_BTA, kernels, activation)
    _check_divides(mesh.shape, x_BTD.shape[0], kernels["up"].shape)
    run = _exchanged if mesh.shape["expert"] > 1 else _local
    rows = PartitionSpec(ROWS)
    columns, across = PartitionSpec("expert", None, "tensor"), PartitionSpec("expert", "tensor")

    def on_each_device(x_BTD, expert_BTA, weight_BTA, kernels):
        return run(x_BTD, expert_BTA, weight_BTA, kernels, activation)[None]

    # By hand over all axes, the default: with one left Auto, XLA:CPU crashes on a bfloat16 sum over devices.
    y_BTD = jax.shard_map(
        on_each_device,
        in_specs=(rows, rows, rows, {name: across if name == "down" else columns for name in kernels}),
        out_specs=PartitionSpec("tensor", ROWS),
        check_vma=False,
    )(x_BTD, expert_BTA, weight_BTA, kernels)
    # Each tensor device has its columns' part. Added up out here: a psum in there would be repeated in the gradient.
    return y_BTD.sum(0)


def _check_divides(sizes: dict[str, int], B: int, up_shape: tuple[int, int, int]) -> None:
    E, _, F = up_shape
    for what, size, axes in (("batch rows", B, ROWS), ("experts", E, ("expert",)), ("expert width", F, ("tensor",))):
        shards = math.prod(sizes[axis] for axis in axes)
        if size % shards:
            raise ValueError(
                f"{what}={size} is not a multiple of mesh.{'*mesh.'.join(axes)}={shards}; "
                f"use a multiple of {shards}, or set mesh.{axes[-1]} to a divisor of {size}"
            )


def _local(x_BTD, expert_BTA, weight_BTA, kernels, activation):
    x_ND, expert_NA, weight_NA = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, expert_BTA, weight_BTA))
    return run_experts(x_ND, expert_NA, weight_NA, kernels, activation).reshape(x_BTD.shape)


def _exchanged(x_BTD, expert_BTA, weight_BTA, kernels, activation):
    """`_local` on one of P devices that hold E / P experts each: pairs travel to their expert and back."""
    P, e = jax.lax.axis_size("expert"), kernels["up"].shape[0]
    x_ND, expert_NA, weight_NA = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, expert_BTA, weight_BTA))
    N, A = expert_NA.shape
    D, M = x_ND.shape[1], N * min(A, e)
    route = _route(expert_NA, P, e, M)
    count_PE = jax.lax.all_to_all(route.count_PE, "expert", 0, 0)  # of each sender, for the experts here
    sent_P, received_P = route.count_PE.sum(1), count_PE.sum(1)

    x_SD = _take(x_ND, route.pair_S // A, route.slot_NA)
    x_SD = _exchange(x_SD, sent_P, received_P)
    y_SD = run_experts(x_SD, _expert_of_slots(count_PE, M), jnp.ones((P * M, 1), weight_NA.dtype), kernels, activation)
    y_SD = _exchange(y_SD, received_P, sent_P)
    y_NAD = _take(y_SD, route.slot_NA.reshape(-1), route.pair_S[:, None]).reshape(N, A, D)
    return jnp.sum(weight_NA[..., None] * y_NAD, 1).astype(x_BTD.dtype).reshape(x_BTD.shape)


class _Route(NamedTuple):
    """Slots S = P M of the buffer that leaves a device: M for each destination, its pairs first, by expert."""

    pair_S: jax.Array  # the pair in each slot; R in an empty one
    slot_NA: jax.Array  # the slot of each pair; P M for a pair with nobody
    count_PE: jax.Array  # pairs for each expert of each destination


def _route(expert_NA, P: int, e: int, M: int) -> _Route:
    R = expert_NA.size
    expert_R = expert_NA.reshape(R)
    order_R = jnp.argsort(expert_R)  # stable; pairs with nobody come last
    count_PE = jnp.bincount(expert_R, length=P * e + 1)[:-1].reshape(P, e).astype(jnp.int32)
    count_P = count_PE.sum(1)
    start_P = jnp.cumsum(count_P) - count_P
    index_M = jnp.arange(M)
    sorted_PM = start_P[:, None] + index_M[None]
    full_PM = index_M[None] < count_P[:, None]
    pair_S = jnp.where(full_PM, order_R[jnp.minimum(sorted_PM, R - 1)], R).reshape(P * M)
    to_R = expert_R[order_R] // e
    gap_P1 = jnp.append(jnp.arange(P) * M - start_P, 0)  # from a pair's place in the order to its slot
    slot_R = jnp.where(to_R < P, jnp.arange(R) + gap_P1[to_R], P * M)
    return _Route(pair_S, slot_R[_inverse(order_R)].reshape(expert_NA.shape), count_PE)


def _inverse(order_R):
    return jnp.zeros_like(order_R).at[order_R].set(jnp.arange(order_R.size), unique_indices=True)


def _expert_of_slots(count_PE, M: int):
    """The expert of each received row, S1: rows of one sender are by expert, so its counts tell; e when empty."""
    last_PE = jnp.cumsum(count_PE, 1)
    return jnp.sum(jnp.arange(M)[None, :, None] >= last_PE[:, None], -1).reshape(-1, 1)


@jax.custom_vjp
def _take(x_ID, from_J, back_IK):
    """Rows x[from_J], JD; zeros where from_J is I. Row i is taken to the rows back_IK[i]; J there is nowhere.

    Knowing where rows go makes the gradient a gather too, where JAX would make it a scatter.
    """
    return _rows_or_zeros(x_ID, from_J)


def _rows_or_zeros(x_ID, from_J):
    return x_ID.at[from_J].get(mode="fill", fill_value=0)


_take.defvjp(
    lambda x_ID, from_J, back_IK: (_rows_or_zeros(x_ID, from_J), back_IK),
    lambda back_IK, dy_JD: (_rows_or_zeros(dy_JD, back_IK).sum(1), None, None),
)


@jax.custom_vjp
def _exchange(x_SD, sent_P, received_P):
    """Of the M rows for device p, the first sent_P[p] go there; what p sends comes to its M rows here, zeros after."""
    P, (S, D) = sent_P.shape[0], x_SD.shape
    if not _sends_ragged():
        return jax.lax.all_to_all(x_SD.reshape(P, S // P, D), "expert", 0, 0).reshape(S, D)
    # Plus nothing of sent_P: under vmap JAX's rule for this collective takes offsets of all members, or of none.
    start_P = jnp.arange(P, dtype=jnp.int32) * (S // P) + 0 * sent_P
    mine_P = jax.lax.axis_index("expert") * (S // P) + 0 * sent_P
    return jax.lax.ragged_all_to_all(
        x_SD, jnp.zeros_like(x_SD), start_P, sent_P, mine_P, received_P, axis_name="expert"
    )


# What came goes back: the exchange is its own transpose, with senders and receivers changed over.
_exchange.defvjp(
    lambda x_SD, sent_P, received_P: (_exchange(x_SD, sent_P, received_P), (sent_P, received_P)),
    lambda sizes, dy_SD: (_exchange(dy_SD, sizes[1], sizes[0]), None, None),
)


def _sends_ragged() -> bool:
    """Whether only the rows in use travel. XLA's CPU backend has no such collective: there the whole buffer does."""
    return jax.default_backend() != "cpu"


def capacity(x_BTD, expert_BTA, weight_BTA, kernels, activation, factor: float):
    """The one-hot dispatch of GShard (2006.16668) and Switch (2101.03961): BTD and the pairs that got in, BTA.

    Every expert takes at most C = ceil(factor T A / E) tokens of each sequence: earlier positions first, and of one
    position its first choice first. The other pairs are dropped and add 0. GShard's own order, the first choices of the
    whole sequence before any second, lets a token's dropping depend on the tokens after it, which leaks the future.
    Documents packed into one sequence share its places.

    Raises:
      ValueError: a factor that is not a positive number.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"capacity factor={factor} is not a positive number; use 1.25, or dropless dispatch")
    (B, T, A), E = expert_BTA.shape, kernels["up"].shape[0]
    # No expert takes a position twice, so more than T places would stay empty.
    C = min(math.ceil(factor * T * A / E), T)
    chosen_BTAE = jax.nn.one_hot(expert_BTA, E, dtype=jnp.int32)
    queue_BRE = chosen_BTAE.reshape(B, T * A, E)
    before_BRE = jnp.cumsum(queue_BRE, 1) - queue_BRE
    place_BTA = jnp.sum(before_BRE * queue_BRE, -1).reshape(B, T, A)
    kept_BTA = (place_BTA < C) & (expert_BTA < E)
    dtype = x_BTD.dtype
    expert_BTAE = chosen_BTAE.astype(dtype) * kept_BTA[..., None].astype(dtype)
    place_BTAC = jax.nn.one_hot(place_BTA, C, dtype=dtype)
    dispatch_BTEC = jnp.einsum("btae,btac->btec", expert_BTAE, place_BTAC)
    combine_BTEC = jnp.einsum("bta,btae,btac->btec", weight_BTA.astype(dtype), expert_BTAE, place_BTAC)
    y_BECD = _feed_forward(jnp.einsum("btec,btd->becd", dispatch_BTEC, x_BTD), kernels, activation)
    return jnp.einsum("btec,becd->btd", combine_BTEC, y_BECD), kept_BTA


def expert_choice(x_BTD, score_BTE, kernels, activation, chosen_per_row: int):
    """Each expert takes its `chosen_per_row` best positions of every sequence (2202.09368), weighted by score.

    Returns BTD and which expert took which position, BTE. A choice looks at the whole sequence: not for causal models.

    Raises:
      ValueError: chosen_per_row that is not between 1 and T.
    """
    T = x_BTD.shape[1]
    if not 1 <= chosen_per_row <= T:
        raise ValueError(f"chosen_per_row={chosen_per_row} is not between 1 and the {T} positions; use one that is")
    score_BEC, position_BEC = jax.lax.top_k(score_BTE.swapaxes(1, 2), chosen_per_row)
    dispatch_BECT = jax.nn.one_hot(position_BEC, T, dtype=x_BTD.dtype)
    y_BECD = _feed_forward(jnp.einsum("bect,btd->becd", dispatch_BECT, x_BTD), kernels, activation)
    y_BTD = jnp.einsum("bec,bect,becd->btd", score_BEC.astype(x_BTD.dtype), dispatch_BECT, y_BECD)
    return y_BTD, dispatch_BECT.any(2).swapaxes(1, 2)


def _feed_forward(x_BECD, kernels, activation):
    """Every expert on its own C tokens of each sequence."""
    products = [jnp.einsum("becd,edf->becf", x_BECD, kernels[name]) for name in ("gate", "up") if name in kernels]
    return jnp.einsum("becf,efd->becd", activate(activation, *products), kernels["down"])
