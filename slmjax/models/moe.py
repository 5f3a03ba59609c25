"""Mixture of experts: the router, what it reports of itself, and how it is kept in balance.

Letters: E experts, A of them active per token, M layers with experts; N = B x T tokens. What depends on all tokens of a
batch, and not on each alone, is reported as sums over tokens (`Sums`): they add over micro-batches and devices, so that
balance is that of the whole batch (2501.11873) however it is split.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from slmjax import ladder
from slmjax.config import ConfigError, ModelConfig, MoeConfig
from slmjax.models import Auxiliary, dispatch
from slmjax.models.layers import Mlp, weight


class Sums(NamedTuple):
    """Of one layer, over tokens, float32; stacked over M layers on axis 0."""

    count_E: jax.Array  # tokens that chose each expert, dropped ones too; no gradient
    probability_E: jax.Array  # the router's probabilities
    squared_partition: jax.Array  # logsumexp of the router's logits, squared
    entropy: jax.Array  # of the router's probabilities, in nats
    dropped: jax.Array  # choices that found no place; with expert choice, tokens that no expert took
    tokens: jax.Array


class Routing(NamedTuple):
    expert_BTA: jax.Array  # int32
    weight_BTA: jax.Array  # what each chosen expert's output is multiplied by
    probability_BTE: jax.Array  # sums to 1 over the experts, whatever the gate
    score_BTE: jax.Array  # what experts are chosen by, without the bias


def route(logits_BTE, bias_E, moe: MoeConfig) -> Routing:
    """Top-k token choice from float32 logits. The bias moves the choice and never the weights (2408.15664)."""
    # Sigmoids of very negative logits are 0, and their shares 0 / 0; the shares are softmaxes of the logarithms.
    log_score_BTE = jax.nn.log_sigmoid(logits_BTE) if moe.gate == "sigmoid" else jax.nn.log_softmax(logits_BTE, -1)
    score_BTE = jnp.exp(log_score_BTE)
    _, expert_BTA = jax.lax.top_k(jax.lax.stop_gradient(score_BTE) + bias_E[None, None], moe.experts_per_token)
    # A sum with a one-hot, for the gradient of a gather is a scatter.
    chosen_BTAE = jax.nn.one_hot(expert_BTA, moe.num_experts, dtype=jnp.float32)
    log_weight_BTA = jnp.sum(chosen_BTAE * log_score_BTE[..., None, :], -1)
    summing = moe.renormalise or moe.gate == "topk_softmax"
    weight_BTA = jax.nn.softmax(log_weight_BTA, -1) if summing else jnp.exp(log_weight_BTA)
    probability_BTE = jax.nn.softmax(log_score_BTE, -1)
    return Routing(expert_BTA, moe.routed_scale * weight_BTA, probability_BTE, score_BTE)


class Moe(nn.Module):
    """Routed and shared experts in place of a feed-forward: BTD → BTD and Sums."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, attention: str):
        cfg, moe = self.cfg, self.cfg.moe
        D, E, F = cfg.width, moe.num_experts, ladder.expert_width(cfg)
        router_DE = weight(self, "router", (D, E), ("embed", "choice"), "router")
        bias_E = jax.lax.stop_gradient(weight(self, "balance", (E,), ("choice",), "balance"))
        kernels = {
            "up": weight(self, "up", (E, D, F), ("expert", "embed", "mlp")),
            "down": weight(self, "down", (E, F, D), ("expert", "mlp", "embed")),
        }
        if cfg.activation in ladder.GATED:
            kernels["gate"] = weight(self, "gate", (E, D, F), ("expert", "embed", "mlp"))
        logits_BTE = jnp.einsum("btd,de->bte", x_BTD.astype(jnp.float32), router_DE, precision="highest")
        routing = route(logits_BTE, bias_E, moe)
        y_BTD, count_E, dropped = _dispatch(cfg, x_BTD, routing, kernels, attention)
        if moe.num_shared_experts:
            y_BTD = y_BTD + Mlp(cfg, moe.num_shared_experts * F, name="shared")(x_BTD)
        p_BTE = routing.probability_BTE
        return y_BTD, Sums(
            count_E=jax.lax.stop_gradient(count_E),
            probability_E=jnp.sum(p_BTE, (0, 1)),
            squared_partition=jnp.sum(jnp.square(jax.nn.logsumexp(logits_BTE, -1))),
            entropy=-jnp.sum(jax.scipy.special.xlogy(p_BTE, p_BTE)),
            dropped=dropped,
            tokens=jnp.float32(x_BTD.shape[0] * x_BTD.shape[1]),
        )


def _dispatch(cfg: ModelConfig, x_BTD, routing: Routing, kernels, attention: str):
    """(y_BTD, count_E, dropped), as `Sums` has them."""
    moe = cfg.moe
    if moe.dispatch == "expert_choice":
        if attention != "full":
            raise ConfigError(
                f"model.moe.dispatch='expert_choice' under {attention} attention: whether an expert takes a token "
                "depends on the tokens after it, which leaks what is to be predicted; use 'dropless'"
            )
        share = moe.experts_per_token / moe.num_experts
        places = min(x_BTD.shape[1], max(1, round(moe.capacity_factor * share * x_BTD.shape[1])))
        score_BTE = moe.routed_scale * routing.score_BTE
        y_BTD, taken_BTE = dispatch.expert_choice(x_BTD, score_BTE, kernels, cfg.activation, places)
        missed_BT = ~jnp.any(taken_BTE, -1)
        return y_BTD, jnp.sum(taken_BTE, (0, 1), dtype=jnp.float32), jnp.sum(missed_BT, dtype=jnp.float32)
    chosen = (routing.expert_BTA, routing.weight_BTA)
    count_E = jnp.sum(jax.nn.one_hot(routing.expert_BTA, moe.num_experts, dtype=jnp.float32), (0, 1, 2))
    if moe.dispatch == "dropless":
        return dispatch.dropless(x_BTD, *chosen, kernels, cfg.activation), count_E, jnp.float32(0)
    y_BTD, kept_BTA = dispatch.capacity(x_BTD, *chosen, kernels, cfg.activation, moe.capacity_factor)
    return y_BTD, count_E, jnp.sum(~kept_BTA, dtype=jnp.float32)


def balance_loss(sums: Sums, whole: Sums):
    """E sum_i load_i P_i per layer [M]: 1 when even (Switch, 2101.03961; over all choices as in MiniCPM-MoE).

    Linear in `sums`, whose probabilities have the gradient; loads and tokens are those of the whole batch.
    """
    load_ME = whole.count_E / jnp.sum(whole.count_E, -1, keepdims=True)
    return load_ME.shape[-1] * jnp.sum(load_ME * sums.probability_E, -1) / whole.tokens


def max_violation(count_ME):
    """(largest load - mean) / mean per layer [M] (2408.15664)."""
    mean_M = jnp.mean(count_ME, -1)
    return (jnp.max(count_ME, -1) - mean_M) / mean_M


def next_bias(bias_ME, count_ME, rate, gate: str):
    """The loss-free bias after an update (2408.15664): up where the load is below its mean, centred on 0.

    By the sign of the error under a sigmoid gate, in proportion to it under a softmax.
    """
    error_ME = 1 - count_ME / jnp.mean(count_ME, -1, keepdims=True)
    moved_ME = bias_ME + rate * (jnp.sign(error_ME) if gate == "sigmoid" else error_ME)
    return moved_ME - jnp.mean(moved_ME, -1, keepdims=True)


def auxiliary(cfg: ModelConfig) -> Auxiliary:
    """What a model with `extras["sums"]` asks of the trainer: balance and z losses, the bias, and what logs show."""

    def loss(sums: Sums, whole: Sums, hyper):
        z_M = sums.squared_partition / whole.tokens
        return hyper.balance_weight * jnp.mean(balance_loss(sums, whole)) + hyper.z_weight * jnp.mean(z_M)

    def settle(params, whole: Sums, hyper):
        experts = params["blocks"]["moe"]
        bias_ME = next_bias(experts["balance"], whole.count_E, hyper.bias_rate, cfg.moe.gate)
        settled = jnp.where(hyper.bias_rate > 0, bias_ME, experts["balance"])
        return {**params, "blocks": {**params["blocks"], "moe": {**experts, "balance": settled}}}

    def metrics(whole: Sums):
        choices_M = whole.tokens * (1 if cfg.moe.dispatch == "expert_choice" else cfg.moe.experts_per_token)
        return {
            "load": whole.count_E / jnp.sum(whole.count_E, -1, keepdims=True),
            "max_vio": max_violation(whole.count_E),
            "entropy": whole.entropy / whole.tokens,
            "dropped": whole.dropped / choices_M,
            "balance_loss": balance_loss(whole, whole),
            "z_loss": whole.squared_partition / whole.tokens,
        }

    return Auxiliary(loss, settle, metrics)
