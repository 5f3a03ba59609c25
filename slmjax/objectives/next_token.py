"""Autoregression: every position predicts the next token, under a causal mask. Its loss is exact."""

import dataclasses

from slmjax.config import ObjectiveConfig
from slmjax.objectives import Objective, View
from slmjax.objectives.prompts import in_prompt, normalised


def build(cfg: ObjectiveConfig) -> Objective:
    per_token = dataclasses.replace(cfg, normaliser="token")

    def seen(cfg, tokens_BT1, segments_BT1) -> View:
        # The mark that opens the next document is also what ends this one, so it is predicted like any other token.
        targets_BT = tokens_BT1[:, 1:]
        prompt_BT = in_prompt(cfg, targets_BT, None if segments_BT1 is None else segments_BT1[:, 1:])
        weights_BT, count = normalised(cfg, 1.0 - prompt_BT, ~prompt_BT)
        return View(
            inputs_BT=tokens_BT1[:, :-1],
            targets_BT=targets_BT,
            weights_BT=weights_BT,
            segments_BT=None if segments_BT1 is None else segments_BT1[:, :-1],
            count=count,
        )

    return Objective(
        view=lambda tokens_BT1, segments_BT1, key: seen(cfg, tokens_BT1, segments_BT1),
        attention="causal",
        kind="exact",
        score=lambda tokens_BT1, segments_BT1, key, draw: seen(per_token, tokens_BT1, segments_BT1),
    )
