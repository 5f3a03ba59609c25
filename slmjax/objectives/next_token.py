"""Autoregression: every position predicts the next token, under a causal mask. Its loss is exact."""

import jax.numpy as jnp

from slmjax.config import ObjectiveConfig
from slmjax.objectives import Objective, View


def build(cfg: ObjectiveConfig) -> Objective:
    def view(tokens_BT1, segments_BT1, key) -> View:
        # The mark that opens the next document is also what ends this one, so it is predicted like any other token.
        targets_BT = tokens_BT1[:, 1:]
        return View(
            inputs_BT=tokens_BT1[:, :-1],
            targets_BT=targets_BT,
            weights_BT=jnp.ones(targets_BT.shape, jnp.float32),
            segments_BT=None if segments_BT1 is None else segments_BT1[:, :-1],
            count=jnp.float32(targets_BT.size),
        )

    return Objective(view, attention="causal", kind="exact")
