"""What a model is to the rest of slmjax: pure functions and a description of its parameters.

A model family is a module with `build(cfg: ModelConfig) -> Model`; `model.build` names it, in this package or anywhere.
Only modules under `slmjax.models` import Linen; the trainer sees nested dicts of arrays, layers stacked on axis 0.
"""

import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slmjax.config import ModelConfig, exported
from slmjax.ladder import Counts
from slmjax.parametrization import Parametrization, Rule


class ParamSpec(NamedTuple):
    """One parameter: its shape, a logical axis per dimension, and the role that fixes its scale and rate."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    role: str
    fan_in: int

    @property
    def in_block(self) -> bool:
        return self.axes[0] == "layer"


class Auxiliary(NamedTuple):
    """What a model asks of the trainer beside the objective's loss.

    `sums` are extras["sums"]: totals over tokens, which add over micro-batches; `whole` are those of the whole batch,
    without a gradient. `hyper` is the step's optim.Hyper.

    loss: (sums, whole, hyper) → scalar added to the loss, linear in `sums`.
    settle: (params, whole, hyper) → params, after every update that is made.
    metrics: whole → {name: array}, which logs show.
    """

    loss: Callable
    settle: Callable
    metrics: Callable


class Model(NamedTuple):
    """A family's pure functions. `params` is a nested dict of float32 arrays laid out as `specs`.

    init: (key, init_std=None) → params. Each tensor's draw depends on the key and its own path alone.
    hidden: (params, tokens_BT, segments_BT or None, attention) → (x_BTD, extras). attention is one of those that
      `models.attention.attend` lists; of a model with mask_row="yes", a token may be -1, hidden.
      extras["activations"] holds mean absolute activations by name, scalars or one per layer, for the coordinate check;
      extras["sums"], of a model with `auxiliary`, what that reads.
    readout: params → what `unembed` reads of them, laid out for its product.
    unembed: (readout, x_...D) → float32 logits_...V. Apart from `hidden`, so that a loss may take it in chunks.
    specs: nested dict of ParamSpec.
    rules: ParamSpec → Rule.
    memory, extend: None, or what generation with a cache needs. memory: (B, S) → keys and values of no token yet.
      extend: (params, tokens_BT, positions_BT, memory, seen_BTS) → (x_BTD, memory): the tokens at these positions of
      rows of S, which see of the memory what `seen_BTS` says and put their own keys and values there; a position of S
      or more puts nothing there.
    auxiliary: None, or what beside the objective's loss is to be minimised, kept up and logged.
    """

    init: Callable
    hidden: Callable
    readout: Callable
    unembed: Callable
    specs: dict
    rules: Callable[[ParamSpec], Rule]
    auxiliary: Auxiliary | None = None
    memory: Callable | None = None
    extend: Callable | None = None

    def apply(self, params, tokens_BT, segments_BT=None, attention: str = "causal"):
        """float32 logits_BTV and extras."""
        x_BTD, extras = self.hidden(params, tokens_BT, segments_BT, attention)
        return self.unembed(self.readout(params), x_BTD), extras


def build(cfg: ModelConfig) -> Model:
    """The Model of a config whose vocab_size is resolved."""
    assert cfg.vocab_size > 0, "vocab_size is resolved before a model is built"
    name = cfg.build if "." in cfg.build else f"slmjax.models.{cfg.build}"
    return exported("model.build", name, "build")(cfg)


def is_spec(x) -> bool:
    return isinstance(x, ParamSpec)


def count_params(specs: dict, cfg: ModelConfig) -> Counts:
    """Parameters by group, of any family; of the transformer equal to the closed form, `ladder.count_params`.

    Experts are what has an axis of that name; of each, experts_per_token are active. A balance bias is state.
    """
    groups = {"embed": 0, "readout": 0, "experts": 0, "balance": 0, "other": 0}
    for spec in jax.tree.leaves(specs, is_leaf=is_spec):
        group = "experts" if "expert" in spec.axes else spec.role
        groups[group if group in groups else "other"] += math.prod(spec.shape)
    active = groups["experts"] * cfg.moe.experts_per_token // max(1, cfg.moe.num_experts)
    return Counts(groups["embed"], groups["readout"], groups["other"], groups["experts"], active)


def init_from_specs(specs: dict, cfg: ModelConfig) -> Callable:
    """`init(key, init_std=None) -> params`: normal draws at each role's scale; norm gains of one, biases of zero."""
    parametrization = Parametrization(cfg)

    def init(key, init_std=None):
        def draw(path, spec: ParamSpec):
            if spec.role in ("norm", "bias", "balance"):
                return jnp.full(spec.shape, 1.0 if spec.role == "norm" else 0.0, jnp.float32)
            std = parametrization.rule(spec.role, spec.fan_in, spec.in_block, init_std).init_std
            # The path, not a position in a list, picks the key: adding a tensor does not redraw the others.
            path_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
            return std * jax.random.normal(path_key, spec.shape, jnp.float32)

        return jax.tree_util.tree_map_with_path(draw, specs, is_leaf=is_spec)

    return init
