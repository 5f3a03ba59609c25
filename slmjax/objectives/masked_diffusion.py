"""Masked diffusion: some tokens are hidden and predicted from all others, under full attention. Its loss is a bound.

The same transformer as autoregression without the causal mask, with one more input embedding and no time input (SMDM,
2410.18514; LLaDA, 2502.09992). Both objectives score the same tokens of a window: its last T.
"""

import jax
import jax.numpy as jnp

from slmjax.config import ObjectiveConfig
from slmjax.objectives import Objective, View, noise
from slmjax.objectives.prompts import in_prompt, normalised


def build(cfg: ObjectiveConfig) -> Objective:
    diffusion = cfg.diffusion
    shifted = diffusion.alignment == "shifted"

    def shown(tokens_BT1, segments_BT1):
        """The T tokens that are noised, and their segments: shifted, the first one has no position that predicts it."""
        span = slice(None, -1) if shifted else slice(1, None)
        return tokens_BT1[:, span], None if segments_BT1 is None else segments_BT1[:, span]

    def noised(tokens_BT, segments_BT, draws: noise.RowDraws, estimator: str) -> View:
        scorable_BT = ~in_prompt(cfg, tokens_BT, segments_BT)
        if shifted:
            scorable_BT = scorable_BT & (jnp.arange(tokens_BT.shape[1]) > 0)[None]
        if estimator == "bernoulli":
            hidden_BT, rate_BT, weight_BT = noise.by_rate(diffusion, *draws, scorable_BT)
        else:
            hidden_BT, rate_BT, weight_BT = noise.by_count(*draws, scorable_BT)
        arrays = (tokens_BT, scorable_BT, hidden_BT, rate_BT, weight_BT)
        if shifted:  # what a position predicts, and all that goes with it, is the next token's
            arrays = tuple(jnp.pad(a[:, 1:], ((0, 0), (0, 1))) for a in arrays)
        targets_BT, scored_BT, chosen_BT, rate_BT, weight_BT = arrays
        loss_BT, count = normalised(cfg, chosen_BT * noise.loss_weights(diffusion, weight_BT), scored_BT)
        return View(
            inputs_BT=jnp.where(hidden_BT, noise.HIDDEN, tokens_BT),
            targets_BT=targets_BT,
            weights_BT=loss_BT,
            segments_BT=segments_BT,
            count=count,
            noise=noise.Noise(rate_BT, chosen_BT * weight_BT, scored_BT.astype(jnp.float32)),
        )

    def view(tokens_BT1, segments_BT1, key) -> View:
        tokens_BT, segments_BT = shown(tokens_BT1, segments_BT1)
        if diffusion.random_length:
            segments_BT = _cut(tokens_BT, segments_BT, jax.random.fold_in(key, 3), diffusion.random_length)
        draws = noise.batch_draws(diffusion.time, key, tokens_BT.shape, groups=1)
        return noised(tokens_BT, segments_BT, draws, diffusion.estimator)

    def score(tokens_BT1, segments_BT1, key, draw) -> View:
        tokens_BT, segments_BT = shown(tokens_BT1, segments_BT1)
        draws = noise.row_draws(key, tokens_BT, 1, draw, diffusion.eval_draws)
        return noised(tokens_BT, segments_BT, draws, "l_uniform")

    return Objective(
        view,
        attention="full",
        kind="bound",
        hides=True,
        score=score,
        num_draws=diffusion.eval_draws,
        ratios=lambda view, nll_BT: noise.level_ratios(view.noise, nll_BT),
        alignment=diffusion.alignment,
    )


def _cut(tokens_BT, segments_BT, key, rate: float):
    """Segments with a share `rate` of the rows cut in two at a uniform place, so that short contexts are met in
    training.

    Both parts are trained on, so tokens, shapes and FLOPs stay what they are: the first is U{1..T} long.
    """
    B, T = tokens_BT.shape
    at_B1 = jnp.where(
        jax.random.bernoulli(jax.random.fold_in(key, 0), rate, (B, 1)),
        jax.random.randint(jax.random.fold_in(key, 1), (B, 1), 1, T + 1),
        T,
    )
    segments_BT = jnp.ones((B, T), jnp.int32) if segments_BT is None else segments_BT
    return 2 * segments_BT + (jnp.arange(T)[None] >= at_B1)
