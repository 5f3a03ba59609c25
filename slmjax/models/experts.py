"""Every token through the experts it was routed to: exact (dropless), by products grouped by expert (2211.15841).

Letters: N tokens, A experts per token, M = N A (token, expert) pairs, E experts, D width, F feed-forward of one expert,
b rows of a block. Off the CPU the groups go to `jax.lax.ragged_dot`, which XLA's CPU backend multiplies as E full
products; there `_blocked` walks the experts, block by block of their rows.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slmjax.models.activation import activate

CPU_BLOCK = 256  # rows of one product; with CPU_TAIL for what is left, measured on 1 and 2 cores at D 128 and 256
CPU_TAIL = 64


def run_experts(x_ND, expert_NA, weight_NA, kernels: dict, activation: str):
    """y_ND = sum over a of weight_NA[n, a] * mlp_{expert_NA[n, a]}(x_ND[n]), in the dtype of x_ND.

    `expert_NA` int32 in [0, E], where E is no expert and adds exactly 0; an expert may come twice. `weight_NA` is
    float32. `kernels` are "up" EDF, "down" EFD and, when gated, "gate" EDF; `activation` is a feed-forward's:
    swiglu | geglu | gelu | relu2. Gradients reach x_ND, weight_NA and the kernels.
    """
    run = _blocked if jax.default_backend() == "cpu" else _ragged
    return run(x_ND, expert_NA, weight_NA, kernels, activation)


class _Groups(NamedTuple):
    """The M pairs in the order of their experts; pairs of no expert come last, outside all groups."""

    position_NA: jax.Array  # row of a pair in that order
    start_E: jax.Array  # first row of an expert
    count_E: jax.Array  # rows of an expert


def _group(expert_NA, E: int) -> _Groups:
    """By counting: a pair's row is its expert's first row and how many pairs of that expert came before it.

    XLA's CPU backend sorts 8192 pairs in 0.9 ms, and counts them so in 0.2.
    """
    expert_M = expert_NA.reshape(-1)
    seen_Me = jnp.cumsum(expert_M[:, None] == jnp.arange(E + 1)[None], axis=0, dtype=jnp.int32)
    count_e = seen_Me[-1]  # e of E + 1: no expert is the last
    start_e = jnp.cumsum(count_e) - count_e
    position_M = start_e[expert_M] + jnp.take_along_axis(seen_Me, expert_M[:, None], 1)[:, 0] - 1
    return _Groups(position_M.reshape(expert_NA.shape), start_e[:E], count_e[:E])


def _ordered(values_M, position_NA, rows: int):
    """values_M in the order of the experts, then zeros to `rows`."""
    empty = jnp.zeros(rows, values_M.dtype)
    return empty.at[position_NA.reshape(-1)].set(values_M, unique_indices=True, mode="promise_in_bounds")


def _tokens(position_NA, rows: int):
    """The token of each row; 0 for rows beyond the pairs."""
    N, A = position_NA.shape
    return _ordered(jnp.repeat(jnp.arange(N, dtype=jnp.int32), A), position_NA, rows)


def _rows(a_RX, index):
    return a_RX.at[index].get(mode="promise_in_bounds")


def _sum_rows(a_RX, position_NA, dtype):
    """Each token's sum over its pairs' rows, in float32 on the way."""
    rows = (_rows(a_RX, position_N).astype(jnp.float32) for position_N in position_NA.T)
    return sum(rows).astype(dtype)


def _weigh(h_RF, weight_R):
    return (weight_R[:, None] * h_RF).astype(h_RF.dtype)


# Reading a token's row for each of its pairs and summing the rows of a token's pairs are each other's transpose: said
# so, both directions are gathers, where automatic differentiation would scatter-add.
@jax.custom_vjp
def _spread(x_ND, token_M, position_NA):
    return _rows(x_ND, token_M)


@jax.custom_vjp
def _collect(y_MD, token_M, position_NA):
    return _sum_rows(y_MD, position_NA, y_MD.dtype)


_spread.defvjp(
    lambda x_ND, token_M, position_NA: (_spread(x_ND, token_M, position_NA), (token_M, position_NA)),
    lambda kept, dx_MD: (_collect(dx_MD, *kept), None, None),
)
_collect.defvjp(
    lambda y_MD, token_M, position_NA: (_collect(y_MD, token_M, position_NA), (token_M, position_NA)),
    lambda kept, dy_ND: (_spread(dy_ND, *kept), None, None),
)


def _ragged(x_ND, expert_NA, weight_NA, kernels: dict, activation: str):
    """For accelerators: all pairs' rows, sorted by expert, in one grouped product per kernel."""
    E, M = len(kernels["up"]), expert_NA.size
    order_M = jnp.argsort(expert_NA.reshape(-1))
    position_NA = _ordered(jnp.arange(M, dtype=jnp.int32), order_M, M).reshape(expert_NA.shape)
    token_M = order_M.astype(jnp.int32) // expert_NA.shape[1]
    count_E = jnp.sum(expert_NA.reshape(-1)[:, None] == jnp.arange(E)[None], 0, dtype=jnp.int32)
    # What a grouped product leaves in rows outside all groups is not promised, forward or backward.
    grouped_M = jnp.arange(M) < jnp.sum(count_E)
    x_MD = jnp.where(grouped_M[:, None], _spread(x_ND, token_M, position_NA), 0)
    weight_M = jnp.where(grouped_M, weight_NA.reshape(-1)[order_M], 0)
    products = [jax.lax.ragged_dot(x_MD, kernels[name], count_E) for name in ("gate", "up") if name in kernels]
    h_MF = _weigh(activate(activation, *products), weight_M)
    y_MD = jax.lax.ragged_dot(h_MF, kernels["down"], count_E)
    return _collect(jnp.where(grouped_M[:, None], y_MD, 0), token_M, position_NA)


def _blocked(x_ND, expert_NA, weight_NA, kernels: dict, activation: str):
    """For CPU: a loop over the experts, and in it one over the blocks of rows an expert has, however many.

    A block's whole feed-forward is done while its rows are in cache. An expert's last block may run over into the
    next expert's rows, which that expert then writes anew.
    """
    into = [kernels[name] for name in ("gate", "up") if name in kernels]
    into_EDG = into[0] if len(into) == 1 else jnp.concatenate(into, axis=2)  # G = F, or 2F gated: one product for both
    return _experts(activation, *_vary_alike(x_ND, expert_NA, weight_NA, into_EDG, kernels["down"]))


def _vary_alike(*arrays):
    """Inside `shard_map`, all as varying as any: a loop's carry must not change its type, and gradients of what was
    the same on every device are summed over the devices."""
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))
    missing = [tuple(axes - jax.typeof(a).manual_axis_type.varying) for a in arrays]
    return [jax.lax.pcast(a, m, to="varying") if m else a for a, m in zip(arrays, missing, strict=True)]


def _walk(carry, start, count, do_block):
    """do_block(carry, first row, rows) over an expert's rows: whole blocks, then short ones for the rest."""
    whole = count // CPU_BLOCK
    rest = start + whole * CPU_BLOCK
    carry = jax.lax.fori_loop(0, whole, lambda i, c: do_block(c, start + i * CPU_BLOCK, CPU_BLOCK), carry)
    short = (count - whole * CPU_BLOCK + CPU_TAIL - 1) // CPU_TAIL
    return jax.lax.fori_loop(0, short, lambda i, c: do_block(c, rest + i * CPU_TAIL, CPU_TAIL), carry)


def _slice(a_R, row, rows: int):
    return jax.lax.dynamic_slice_in_dim(a_R, row, rows)


def _write(a_R, block, row):
    return jax.lax.dynamic_update_slice_in_dim(a_R, block.astype(a_R.dtype), row, 0)


def _split(activation: str, products_RG):
    gated = activation in ("swiglu", "geglu")
    return jnp.split(products_RG, 2, axis=-1) if gated else (products_RG,)


# The gradient is written out: a loop of unknown length has none. It keeps only the inputs and makes the products again,
# 2 of 11, because to write and read them (2 M F numbers) takes as long at width 256. Products are as in `attention`.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(activation: str, x_ND, expert_NA, weight_NA, into_EDG, down_EFD):
    return _experts_forward(activation, x_ND, expert_NA, weight_NA, into_EDG, down_EFD)[0]


def _experts_forward(activation: str, x_ND, expert_NA, weight_NA, into_EDG, down_EFD):
    inputs = (x_ND, expert_NA, weight_NA, into_EDG, down_EFD)
    # A loop that runs until the last member of a batch is done would select on every carry: members go one by one.
    return jax.custom_batching.sequential_vmap(partial(_outputs, activation))(*inputs), inputs


def _experts_backward(activation: str, inputs, dy_ND):
    dx_ND, dweight_NA, dinto_EDG, ddown_EFD = jax.custom_batching.sequential_vmap(partial(_gradients, activation))(
        *inputs, dy_ND
    )
    return dx_ND, None, dweight_NA, dinto_EDG, ddown_EFD


_experts.defvjp(_experts_forward, _experts_backward)


class _Plan(NamedTuple):
    """Rows in the order of the experts, and R - M more, into which the last expert's last block may run over."""

    token_R: jax.Array
    weight_R: jax.Array
    row_NA: jax.Array  # where a pair's result is read: R, which nobody writes, for pairs of no expert
    start_E: jax.Array
    count_E: jax.Array


def _plan(expert_NA, weight_NA, E: int) -> _Plan:
    groups, R = _group(expert_NA, E), max(expert_NA.size + CPU_TAIL, CPU_BLOCK)
    return _Plan(
        _tokens(groups.position_NA, R),
        _ordered(weight_NA.reshape(-1), groups.position_NA, R),
        jnp.where(expert_NA < E, groups.position_NA, R),
        groups.start_E,
        groups.count_E,
    )


def _empty(plan: _Plan, *shape, dtype=jnp.float32):
    """Zeros, as varying as the plan."""
    return jnp.zeros(shape, dtype) + jnp.zeros_like(plan.weight_R[0], dtype)


def _outputs(activation: str, x_ND, expert_NA, weight_NA, into_EDG, down_EFD):
    plan = _plan(expert_NA, weight_NA, len(down_EFD))

    def do_expert(y_RD, expert):
        into_DG, down_FD, start, count = expert

        def do_block(y_RD, row, rows):
            x_bD = _rows(x_ND, _slice(plan.token_R, row, rows))
            h_bF = activate(activation, *_split(activation, x_bD @ into_DG))
            return _write(y_RD, _weigh(h_bF, _slice(plan.weight_R, row, rows)) @ down_FD, row)

        return _walk(y_RD, start, count, do_block), None

    y_RD = _empty(plan, len(plan.token_R) + 1, x_ND.shape[1], dtype=x_ND.dtype)
    y_RD, _ = jax.lax.scan(do_expert, y_RD, (into_EDG, down_EFD, plan.start_E, plan.count_E))
    return _sum_rows(y_RD, plan.row_NA, x_ND.dtype)


def _gradients(activation: str, x_ND, expert_NA, weight_NA, into_EDG, down_EFD, dy_ND):
    """Of x, weight and both kernels. d weight is dh . h: no output row is needed again."""
    plan, (D, G), F = _plan(expert_NA, weight_NA, len(down_EFD)), into_EDG.shape[1:], down_EFD.shape[1]
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)

    def do_expert(rows_R, expert):
        into_DG, down_FD, start, count = expert

        def do_block(carry, row, rows):
            (dx_RD, dweight_R), (dinto_GD, ddown_FD) = carry
            mine_b = row + jnp.arange(rows) < start + count
            token_b = _slice(plan.token_R, row, rows)
            token_b = jnp.where(mine_b, token_b, token_b[:1])  # a token of this expert: no other's NaN comes in
            x_bD, dy_bD = _rows(x_ND, token_b), _rows(dy_ND, token_b)
            weight_b = jnp.where(mine_b, _slice(plan.weight_R, row, rows), 0)
            h_bF, pull = jax.vjp(lambda p_bG: activate(activation, *_split(activation, p_bG)), x_bD @ into_DG)
            dh_bF = dy_bD @ down_FD.T
            (dp_bG,) = pull(_weigh(dh_bF, weight_b))
            dweight_b = jnp.sum(dh_bF.astype(jnp.float32) * h_bF, -1)
            rows_R = _write(dx_RD, dp_bG @ into_DG.T, row), _write(dweight_R, dweight_b, row)
            return rows_R, (dinto_GD + product(dp_bG.T, x_bD), ddown_FD + product(_weigh(h_bF, weight_b).T, dy_bD))

        kernels = _empty(plan, G, D), _empty(plan, F, D)
        rows_R, (dinto_GD, ddown_FD) = _walk((rows_R, kernels), start, count, do_block)
        return rows_R, (dinto_GD.T.astype(into_DG.dtype), ddown_FD.astype(down_FD.dtype))

    R = len(plan.token_R) + 1
    rows_R = _empty(plan, R, D, dtype=x_ND.dtype), _empty(plan, R)
    xs = (into_EDG, down_EFD, plan.start_E, plan.count_E)
    (dx_RD, dweight_R), (dinto_EDG, ddown_EFD) = jax.lax.scan(do_expert, rows_R, xs)
    dweight_NA = _rows(dweight_R, plan.row_NA).astype(weight_NA.dtype)
    return _sum_rows(dx_RD, plan.row_NA, x_ND.dtype), dweight_NA, dinto_EDG, ddown_EFD
