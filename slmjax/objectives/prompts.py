"""Which tokens are a prompt, shown and not scored, and how the others are averaged."""

import jax
import jax.numpy as jnp

from slmjax.config import ObjectiveConfig


def in_prompt(cfg: ObjectiveConfig, tokens_BT, segments_BT):
    """bool [B, T]: tokens as far as the first `prompt_end` of their segment, it included; none where all is scored.

    A segment without one is all prompt: its response may lie in another window.
    """
    if cfg.prompt == "scored":
        return jnp.zeros(tokens_BT.shape, bool)
    ends_BT = (tokens_BT == cfg.prompt_end).astype(jnp.int32)
    before_BT = jnp.cumsum(ends_BT, axis=1) - ends_BT
    if segments_BT is not None:
        first_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        # What came before the segment, carried along it: counts only grow.
        before_BT -= jax.lax.cummax(jnp.where(first_BT, before_BT, 0), axis=1)
    return before_BT == 0


def normalised(cfg: ObjectiveConfig, weights_BT, scored_BT):
    """(weights_BT, count): the loss is their sum over count.

    token: a mean over all scored tokens of the batch (SMDM's SFT). sequence: over rows, of each one's mean (LLaDA's).
    """
    scored_BT = scored_BT.astype(jnp.float32)
    if cfg.normaliser == "token":
        return weights_BT, jnp.maximum(jnp.sum(scored_BT), 1.0)
    num_B1 = jnp.sum(scored_BT, -1, keepdims=True)
    return weights_BT / jnp.maximum(num_B1, 1.0), jnp.maximum(jnp.sum(num_B1 > 0), 1).astype(jnp.float32)
