"""What one compiled Program can do: initialise, train and evaluate the members of a population.

A member is one run's state. Members are independent; runs that differ only in `Hyper`, seeds, schedules and data are
members of one Program, so a sweep over them compiles once. Every array carries the population as its first axis P, of
size 1 for a run on its own. On CPU the members are spread over host devices, a core each (`spread`); on accelerators
they are batched (`jax.vmap`) or, one at a time, take the whole mesh.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slmjax import ladder, models, objectives, optim, processes, sharding
from slmjax.config import RunConfig
from slmjax.models import Model, is_spec
from slmjax.objectives import Objective, View
from slmjax.optim import Hyper


class Skips(NamedTuple):
    """Updates left out because the gradient was not finite or spiked."""

    total: jax.Array  # int32
    consecutive: jax.Array  # int32
    mean_norm: jax.Array  # running mean gradient norm of the updates made; 0 before the first


class TrainState(NamedTuple):
    """No random key inside: keys are folded from the seed and the step."""

    step: jax.Array  # int32, steps completed
    params: Any
    opt_state: Any
    ema: Any  # as params, or () when off
    skips: Skips


class Metrics(NamedTuple):
    loss: jax.Array  # nats per token of the batch, before the update
    grad_norm: jax.Array
    skipped: jax.Array  # updates skipped so far
    consecutive: jax.Array  # of them, the last ones in a row
    auxiliary: dict[str, jax.Array]  # what `Model.auxiliary` shows of the batch; {} without one
    objective: dict[str, jax.Array]  # and `Objective.ratios`


class Program(NamedTuple):
    """Compiled functions over P members; K is mesh.steps_per_dispatch, B the batch, T the sequence length.

    init: (seeds_P uint32, init_std_P) → state.
    train: (state, tokens_PKBT1, segments_PKBT1, hyper with leaves [P, K], num_steps_P) → (state, Metrics of [P, K]).
      Member p makes its first num_steps_P[p] steps; metrics past them are 0. The state passed in is consumed.
    evaluate: (state, tokens_PBT1, segments_PBT1) → (summed nll_PB, weight_PB) per row, on noise that no seed changes.
    take: (state, index) → one member's state. put: (state, member, index) → state, consuming it.
    begin: (params, step) → one member's state that has these parameters after `step` steps, and nothing else behind it.
    """

    num_members: int
    mesh: Mesh
    model: Model
    objective: Objective
    abstract_member: TrainState
    init: Callable
    train: Callable
    evaluate: Callable
    take: Callable
    put: Callable
    begin: Callable


def init_member(model: Model, optimizer: optim.Optimizer, ema: bool, seed, init_std) -> TrainState:
    return begin_member(optimizer, ema, model.init(init_key(seed), init_std), jnp.int32(0))


def abstract_state(cfg: RunConfig) -> TrainState:
    """Shapes and types of one member's state, of a resolved config: what its checkpoints hold."""
    model = models.build(cfg.model)
    init = functools.partial(init_member, model, optim.build(cfg.optim, model), cfg.optim.ema_decay > 0)
    return jax.eval_shape(init, jnp.uint32(0), jnp.float32(1))


def begin_member(optimizer: optim.Optimizer, ema: bool, params, step) -> TrainState:
    skips = Skips(jnp.int32(0), jnp.int32(0), jnp.float32(0))
    return TrainState(step, params, optimizer.init(params), params if ema else (), skips)


def init_key(seed):
    """What a run's first parameters are drawn with."""
    return jax.random.fold_in(jax.random.key(seed), INIT)


# Streams of randomness, folded into a run's seed so that none depends on how many draws another makes.
INIT, VIEW, EVAL = 0, 1, 2


class Sums(NamedTuple):
    """Of a batch, adding up over its micro-batches."""

    nll: jax.Array  # weighted, per token
    model: Any  # what `Model.auxiliary` reads; () without one
    ratios: dict[str, tuple[jax.Array, jax.Array]]  # `Objective.ratios`


def make_gradient(cfg: RunConfig, model: Model, objective: Objective, batch_shards: int = 1) -> Callable:
    """(params, view, hyper) → (gradient, Sums), of a batch in the config's number of micro-batches."""
    chunk, num_micro = cfg.objective.loss_chunk, cfg.optim.micro_batches
    shards = batch_shards if objective.hides else None

    def sums_of(params, view: View):
        _, extras = model.hidden(params, view.inputs_BT, view.segments_BT, objective.attention)
        return jax.lax.stop_gradient(extras["sums"])

    def loss_of(params, view: View, hyper: Hyper, whole=None):
        """(loss, Sums) of these rows; `whole` are the model's sums of the whole batch where these are not all of it."""
        x_BTD, extras = model.hidden(params, view.inputs_BT, view.segments_BT, objective.attention)
        x_BTD = x_BTD[:, : view.targets_BT.shape[1]]
        loss, nll_BT = objectives.weighted_loss(
            model.unembed, model.readout(params), x_BTD, view, hyper.z_loss, chunk, shards
        )
        nll = jnp.sum(view.weights_BT * nll_BT) / view.count
        ratios = objective.ratios(view, nll_BT)
        if model.auxiliary is None:
            return loss, Sums(nll, (), ratios)
        sums = jax.lax.stop_gradient(extras["sums"])
        loss += model.auxiliary.loss(extras["sums"], sums if whole is None else whole, hyper)
        return loss, Sums(nll, sums, ratios)

    gradient = jax.grad(loss_of, has_aux=True)
    if num_micro == 1:
        return gradient

    def accumulated(params, view: View, hyper: Hyper):
        # Every num_micro-th row is a micro-batch's, so that each has its share of rows on every device. `count` stays
        # that of the whole batch: losses and gradients add up to the whole batch's.
        rows = view._replace(count=None)
        micro = jax.tree.map(
            lambda a: jnp.moveaxis(a.reshape(a.shape[0] // num_micro, num_micro, *a.shape[1:]), 1, 0), rows
        )

        def add_up(function, like):
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)

            def add(total, rows):
                return jax.tree.map(jnp.add, total, function(rows._replace(count=view.count))), None

            return jax.lax.scan(add, zeros, micro)[0]

        # The gradient of one micro-batch depends on the loads of all: these take a forward pass of their own.
        whole = None
        if model.auxiliary:
            whole = add_up(functools.partial(sums_of, params), jax.eval_shape(sums_of, params, view))
        return add_up(
            lambda rows: gradient(params, rows, hyper, whole), jax.eval_shape(gradient, params, view, hyper, whole)
        )

    return accumulated


def make_train_step(
    cfg: RunConfig, model: Model, objective: Objective, optimizer: optim.Optimizer, batch_shards: int = 1
) -> Callable:
    """(state, tokens_BT1, segments_BT1 or None, hyper) → (state, Metrics): one update of one member."""
    gradient = make_gradient(cfg, model, objective, batch_shards)

    def step(state: TrainState, tokens_BT1, segments_BT1, hyper: Hyper):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(hyper.seed), VIEW), state.step)
        grads, (loss, sums, ratios) = gradient(state.params, objective.view(tokens_BT1, segments_BT1, key), hyper)
        grads, norm = optim.clip(grads, hyper.clip_norm)
        params, opt_state = optimizer.update(grads, state.opt_state, state.params, hyper)
        if model.auxiliary:
            params = model.auxiliary.settle(params, sums, hyper)
        ema = (
            jax.tree.map(lambda e, p: hyper.ema_decay * e + (1 - hyper.ema_decay) * p, state.ema, params)
            if state.ema != ()
            else ()
        )
        mean = state.skips.mean_norm
        spike = (hyper.spike_factor > 0) & (mean > 0) & (norm > hyper.spike_factor * mean)
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & ~spike
        new, old = (params, opt_state, ema), (state.params, state.opt_state, state.ema)
        params, opt_state, ema = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
        skips = Skips(
            total=state.skips.total + ~good,
            consecutive=jnp.where(good, 0, state.skips.consecutive + 1),
            mean_norm=jnp.where(good, jnp.where(mean > 0, 0.98 * mean + 0.02 * norm, norm), mean),
        )
        state = TrainState(state.step + 1, params, opt_state, ema, skips)
        shown = model.auxiliary.metrics(sums) if model.auxiliary else {}
        levels = {name: total / count for name, (total, count) in ratios.items()}
        return state, Metrics(loss, norm, skips.total, skips.consecutive, shown, levels)

    return step


def make_evaluate(cfg: RunConfig, model: Model, objective: Objective) -> Callable:
    """(state, tokens_BT1, segments_BT1 or None) → (summed nll_B, weight_B), of the EMA when there is one."""
    key = jax.random.fold_in(
        jax.random.key(0), EVAL
    )  # one noise for all runs, so that they are compared on equal terms

    def evaluate(state: TrainState, tokens_BT1, segments_BT1):
        params = state.ema if state.ema != () else state.params
        readout = model.readout(params)

        def score(draw):
            if objective.score is None:
                view = objective.view(tokens_BT1, segments_BT1, key)
            else:
                view = objective.score(tokens_BT1, segments_BT1, key, draw)
            x_BTD, _ = model.hidden(params, view.inputs_BT, view.segments_BT, objective.attention)
            x_BTD = x_BTD[:, : view.targets_BT.shape[1]]
            nll_BT = objectives.token_losses(model.unembed, readout, x_BTD, view.targets_BT, cfg.objective.loss_chunk)
            if view.noise is None:
                return jnp.sum(view.weights_BT * nll_BT, -1), jnp.sum(view.weights_BT, -1)
            return jnp.sum(view.noise.bound_BT * nll_BT, -1), jnp.sum(view.noise.scored_BT, -1)

        if objective.num_draws == 1:
            return score(0)
        nll_KB, weight_KB = jax.lax.map(score, jnp.arange(objective.num_draws))
        return jnp.mean(nll_KB, 0), weight_KB[0]

    return evaluate


def build(cfg: RunConfig, num_members: int = 1, mesh: Mesh | None = None) -> Program:
    """The Program of a config, for `num_members` runs at a time.

    The mesh's population axis must be 1, or num_members to give each member its own devices.
    """
    mesh = mesh or sharding.make_mesh(cfg.mesh)
    cfg = ladder.resolved(cfg)
    model, objective = models.build(cfg.model), objectives.build(cfg.objective)
    optimizer = optim.build(cfg.optim, model)
    packed = cfg.data.packing == "segments"
    batch_shards = math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    step = make_train_step(cfg, model, objective, optimizer, batch_shards)
    init = functools.partial(init_member, model, optimizer, cfg.optim.ema_decay > 0)
    score = make_evaluate(cfg, model, objective)
    abstract = jax.eval_shape(init, jnp.uint32(0), jnp.float32(1))
    state = _state_shardings(mesh, model, abstract)
    members = _placed(mesh, "population")
    rows = _placed(mesh, "population", "batch")
    batches = _placed(mesh, "population", None, "batch")

    def spread(function):
        """Over members; and the model sees the mesh, for what it does by hand on it."""
        over_members = _over_members(mesh, num_members, function)

        def within(*args):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return over_members(*args)

        return within

    def train_member(state, tokens_KBT1, segments_KBT1, hyper_K, num_steps):
        return _many_steps(step, state, tokens_KBT1, segments_KBT1 if packed else None, hyper_K, num_steps)

    def evaluate_member(state, tokens_BT1, segments_BT1):
        return score(state, tokens_BT1, segments_BT1 if packed else None)

    several = mesh.is_multi_process
    train = jax.jit(
        spread(train_member),
        in_shardings=(state, batches, batches, members, members),
        out_shardings=(state, members),
        donate_argnums=0,
    )
    evaluate = jax.jit(
        spread(evaluate_member), in_shardings=(state, rows, rows), out_shardings=members if several else rows
    )
    return Program(
        num_members,
        mesh,
        model,
        objective,
        _placed_member(abstract, state) if several else abstract,
        init=jax.jit(spread(init), out_shardings=state),
        train=processes.from_host(train, (None, batches, batches, members, members)) if several else train,
        evaluate=processes.from_host(evaluate, (None, rows, rows)) if several else evaluate,
        take=jax.jit(lambda state, i: jax.tree.map(lambda a: a[i], state)),
        put=jax.jit(
            lambda state, member, i: jax.tree.map(lambda a, b: a.at[i].set(b), state, member),
            out_shardings=state,
            donate_argnums=0,
        ),
        begin=jax.jit(functools.partial(begin_member, optimizer, cfg.optim.ema_decay > 0)),
    )


def _many_steps(step, state, tokens_KBT1, segments_KBT1, hyper_K, num_steps):
    """`num_steps` <= K updates in one dispatch. The count is traced, so a shorter last stretch is the same program."""
    K = tokens_KBT1.shape[0]

    def step_k(state, k):
        segments_BT1 = None if segments_KBT1 is None else segments_KBT1[k]
        return step(state, tokens_KBT1[k], segments_BT1, jax.tree.map(lambda a: a[k], hyper_K))

    def body(k, carry):
        state, metrics_K = carry
        state, metrics = step_k(state, k)
        return state, jax.tree.map(lambda all_K, one: all_K.at[k].set(one), metrics_K, metrics)

    metrics = jax.eval_shape(step_k, state, 0)[1]
    metrics_K = jax.tree.map(lambda a: jnp.zeros((K, *a.shape), a.dtype), metrics)
    return jax.lax.fori_loop(0, num_steps, body, (state, metrics_K))


def _over_members(mesh: Mesh, num_members: int, function: Callable) -> Callable:
    """`function` of one member as a function of all of them, stacked on axis 0."""

    def alone(*args):
        return jax.tree.map(lambda a: a[None], function(*jax.tree.map(lambda a: a[0], args)))

    if num_members == 1:
        return alone
    if mesh.shape["population"] == 1:
        return jax.vmap(function)
    assert mesh.shape["population"] == num_members, (mesh.shape, num_members)
    members = PartitionSpec("population")
    return jax.shard_map(
        alone, mesh=mesh, in_specs=members, out_specs=members, axis_names={"population"}, check_vma=False
    )


def _placed(mesh: Mesh, *axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(axis and sharding.RULES[axis] for axis in axes)))


def _state_shardings(mesh: Mesh, model: Model, abstract: TrainState) -> TrainState:
    """Placements of a stacked state: whatever in it mirrors the parameters is laid out like them."""
    placed = {}
    for path, spec in jax.tree_util.tree_leaves_with_path(model.specs, is_leaf=is_spec):
        name = ".".join(str(entry.key) for entry in path)
        axes, shape = ("population", *spec.axes), (mesh.shape["population"], *spec.shape)
        placed[_keys(path)] = (spec.shape, sharding.sharding(mesh, axes, shape, name))
    scalar = _placed(mesh, "population")

    def place(path, leaf):
        keys = _keys(path)
        for start in range(len(keys)):
            shape, where = placed.get(keys[start:], (None, None))
            if shape == leaf.shape:
                return where
        return scalar

    return jax.tree_util.tree_map_with_path(place, abstract)


def _placed_member(abstract: TrainState, state: TrainState) -> TrainState:
    """One member's state with the placements of a stacked one, for each process to read only its part of it."""

    def place(leaf, where):
        member = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=member)

    return jax.tree.map(place, abstract, state)


def _keys(path) -> tuple[str, ...]:
    """The dictionary keys a path ends with."""
    keys = [entry.key if isinstance(entry, jax.tree_util.DictKey) else None for entry in path]
    return tuple(keys[max((i + 1 for i, key in enumerate(keys) if key is None), default=0) :])
