"""Optimizers over ParamSpecs: each tensor gets its role's learning-rate, decay and epsilon factors.

Every number that a sweep varies is in `Hyper`, an input of the compiled step; the optax chain is built around the
traced values when the step is traced, so its state layout is fixed and its numbers are free.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from slmjax.config import OptimConfig, RunConfig, exported
from slmjax.models import Model, ParamSpec, is_spec


class Hyper(NamedTuple):
    """A step's scalars, float32 but for the seed. `lr` and `decay` already carry the schedule.

    z_loss is the objective's; balance_weight, z_weight and bias_rate are those of `config.MoeConfig`.
    """

    lr: jax.Array
    decay: jax.Array  # share of a weight that a step removes
    b1: jax.Array
    b2: jax.Array
    eps: jax.Array
    momentum: jax.Array
    clip_norm: jax.Array
    ema_decay: jax.Array
    spike_factor: jax.Array
    z_loss: jax.Array
    balance_weight: jax.Array
    z_weight: jax.Array
    bias_rate: jax.Array
    seed: jax.Array  # uint32


class Optimizer(NamedTuple):
    """init: params → state. update: (grads, state, params, hyper) → (new params, new state)."""

    init: Callable
    update: Callable


def build(cfg: OptimConfig, model: Model) -> Optimizer:
    """AdamW or Muon over the model's specs, decay decoupled from every group's rate.

    A tensor w moves by -(lr x rule.lr x direction + decay x rule.decay x w), `direction` being the optimizer's.
    """
    rules = jax.tree.map(model.rules, model.specs, is_leaf=is_spec)
    directions = _DIRECTIONS.get(cfg.name) or exported("optim.name", cfg.name, "direction")

    def init(params):
        return directions(model.specs, rules, _PLACEHOLDER).init(params)

    def update(grads, state, params, hyper: Hyper):
        steps, state = directions(model.specs, rules, hyper).update(grads, state, params)

        def move(w, direction, spec, rule):
            rate = rule.orthogonal_lr if cfg.name == "muon" and _is_matrix(spec) else rule.lr
            return w - hyper.lr * rate * direction - hyper.decay * rule.decay * w

        return jax.tree.map(move, params, steps, model.specs, rules), state

    return Optimizer(init, update)


_PLACEHOLDER = Hyper(*(1.0 for _ in Hyper._fields))  # an optax chain's state does not depend on its numbers


def _adam(specs, rules, hyper: Hyper) -> optax.GradientTransformation:
    # eps x f on a gradient g is eps on g / f, and Adam's direction is otherwise blind to a gradient's scale.
    scale = optax.stateless(
        lambda grads, params: jax.tree.map(lambda g, rule: g if rule.eps == 1.0 else g / rule.eps, grads, rules)
    )
    return optax.chain(scale, optax.scale_by_adam(hyper.b1, hyper.b2, hyper.eps))


def _muon(specs, rules, hyper: Hyper) -> optax.GradientTransformation:
    """Muon (Moonlight, 2502.16982, section 2.2) on the matrices of the blocks, Adam on embedding, head and norms.

    Updates are scaled to a root mean square of 0.2, AdamW's, so that AdamW's rate and decay carry over.
    """
    numbers = jax.tree.map(lambda s: _matrix_axes(s) if _is_matrix(s) else optax.MaskedNode(), specs, is_leaf=is_spec)
    labels = jax.tree.map(lambda s: "muon" if _is_matrix(s) else "adam", specs, is_leaf=is_spec)
    others = jax.tree.map(lambda s, r: optax.MaskedNode() if _is_matrix(s) else r, specs, rules, is_leaf=is_spec)
    muon = optax.chain(
        scale_by_muon(beta=hyper.momentum, weight_dimension_numbers=numbers),
        optax.stateless(lambda updates, params: jax.tree.map(_to_adam_size, updates, numbers)),
    )
    return optax.partition({"muon": muon, "adam": _adam(None, others, hyper)}, labels)


_DIRECTIONS = {"adamw": _adam, "muon": _muon}


def _is_matrix(spec: ParamSpec) -> bool:
    return spec.role == "hidden" and spec.in_block


def _to_adam_size(update, axes: MuonDimensionNumbers):
    """An orthogonal matrix of A x B has a root mean square of 1 / sqrt(max(A, B)); scaled to 0.2."""
    A, B = (math.prod(update.shape[i] for i in group) for group in (axes.reduction_axis, axes.output_axis))
    return 0.2 * math.sqrt(max(A, B)) * update


def _matrix_axes(spec: ParamSpec) -> MuonDimensionNumbers:
    """Which axes of a stacked weight sum and which are outputs; layers and experts are separate matrices."""
    first = sum(axis in ("layer", "expert") for axis in spec.axes)
    last, size = first, 1
    while size < spec.fan_in:
        size, last = size * spec.shape[last], last + 1
    return MuonDimensionNumbers(tuple(range(first, last)), tuple(range(last, len(spec.shape))))


def hyper_at(cfg: RunConfig, multiplier) -> Hyper:
    """The Hyper of a run's step (numpy scalars), given the schedule's multiplier there."""
    optim = cfg.optim
    rate = multiplier * optim.lr
    decay = (rate if optim.decay_rule == "lr" else multiplier) * optim.weight_decay
    values = (
        rate,
        decay,
        optim.b1,
        optim.b2,
        optim.eps,
        optim.momentum,
        optim.clip_norm,
        optim.ema_decay,
        optim.spike_factor,
        cfg.objective.z_loss,
        cfg.model.moe.balance_weight,
        cfg.model.moe.z_weight,
        cfg.model.moe.bias_rate,
    )
    return Hyper(*(np.float32(v) for v in values), seed=np.uint32(cfg.train.seed))


def clip(grads, max_norm):
    """(grads scaled to a global norm of at most max_norm, the norm before); a max_norm of 0 leaves them alone."""
    norm = optax.tree.norm(grads)
    scale = jnp.where((max_norm > 0) & (norm > max_norm), max_norm / norm, 1.0)
    return jax.tree.map(lambda g: g * scale, grads), norm
