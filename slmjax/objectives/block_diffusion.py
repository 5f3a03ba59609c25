"""Block diffusion: blocks come one after another, tokens within a block by masked diffusion (BD3-LM, 2503.09573).

The model sees a noisy copy of the row and, after it, a clean one: a noisy block reads itself and the clean blocks
before it, so one pass trains all blocks. Blocks of 1 at rate 1 are a left-to-right likelihood, one block of T is masked
diffusion.
"""

import jax.numpy as jnp

from slmjax.config import ObjectiveConfig
from slmjax.objectives import Objective, View, noise
from slmjax.objectives.prompts import in_prompt, normalised


def build(cfg: ObjectiveConfig) -> Objective:
    diffusion = cfg.diffusion

    def noised(tokens_BT1, segments_BT1, draws_of, estimator: str) -> View:
        tokens_BT = tokens_BT1[:, 1:]
        segments_BT = None if segments_BT1 is None else segments_BT1[:, 1:]
        scorable_BT = ~in_prompt(cfg, tokens_BT, segments_BT)
        scorable_GS = scorable_BT.reshape(-1, diffusion.block)
        draws = draws_of(tokens_BT, tokens_BT.shape[1] // diffusion.block)
        if estimator == "bernoulli":
            of_groups = noise.by_rate(diffusion, *draws, scorable_GS)
        else:
            of_groups = noise.by_count(*draws, scorable_GS)
        hidden_BT, rate_BT, weight_BT = (a.reshape(tokens_BT.shape) for a in of_groups)
        loss_BT, count = normalised(cfg, hidden_BT * noise.loss_weights(diffusion, weight_BT), scorable_BT)
        return View(
            inputs_BT=jnp.concatenate([jnp.where(hidden_BT, noise.HIDDEN, tokens_BT), tokens_BT], axis=1),
            targets_BT=tokens_BT,
            weights_BT=loss_BT,
            segments_BT=None if segments_BT is None else jnp.concatenate([segments_BT, segments_BT], axis=1),
            count=count,
            noise=noise.Noise(rate_BT, hidden_BT * weight_BT, scorable_BT.astype(jnp.float32)),
        )

    def view(tokens_BT1, segments_BT1, key) -> View:
        def draws_of(tokens_BT, groups):
            return noise.batch_draws(diffusion.time, key, tokens_BT.shape, groups)

        return noised(tokens_BT1, segments_BT1, draws_of, diffusion.estimator)

    def score(tokens_BT1, segments_BT1, key, draw) -> View:
        def draws_of(tokens_BT, groups):
            return noise.row_draws(key, tokens_BT, groups, draw, diffusion.eval_draws)

        return noised(tokens_BT1, segments_BT1, draws_of, "l_uniform")

    return Objective(
        view,
        attention=f"block:{diffusion.block}",
        kind="bound",
        hides=True,
        score=score,
        num_draws=diffusion.eval_draws,
        ratios=lambda view, nll_BT: noise.level_ratios(view.noise, nll_BT),
        decoding=f"block_causal:{diffusion.block}",
    )
