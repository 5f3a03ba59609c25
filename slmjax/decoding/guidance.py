"""Unsupervised classifier-free guidance: more of what the prompt adds (SMDM 2410.18514). A denoiser around a denoiser.

p ∝ p(x | prompt)^(1 + w) / p(x | the prompt masked)^w, in two calls where there was one. Changes the distribution on
purpose, so it is lossless only at w = 0, where the second call is not made.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.denoiser import PAD, Denoiser


def guided(denoiser: Denoiser, prompt_BT: np.ndarray, scale: float, mask_id: int) -> Denoiser:
    """`scale` is w: 0 changes nothing, -1 forgets the prompt. prompt_BT is true where a token is of the prompt.

    A prompt of one row, [1, T], is that of every row, for decoders that ask about several drafts of a row at once.
    """
    if scale < -1:
        raise ValueError(f"scale={scale} is below -1, which already forgets the prompt; use -1 or more")
    prompt_BT = np.asarray(prompt_BT, bool)

    def log_probs(tokens_BT):
        tokens_BT = np.asarray(tokens_BT)
        if prompt_BT.shape not in (tokens_BT.shape, (1, *tokens_BT.shape[1:])):
            raise ValueError(
                f"the prompt has shape {prompt_BT.shape}, the tokens {tokens_BT.shape}; "
                f"make them equal, or give one prompt for all rows, {(1, *tokens_BT.shape[1:])}"
            )
        without_BT = np.where(prompt_BT & (tokens_BT != PAD), np.int32(mask_id), tokens_BT)
        if scale in (0, -1):
            return denoiser(without_BT if scale else tokens_BT)
        conditional_BTV, unconditional_BTV = denoiser(tokens_BT), denoiser(without_BT)
        if isinstance(conditional_BTV, np.ndarray):
            return _combine(np, conditional_BTV, unconditional_BTV, scale)
        return _combine_jit(conditional_BTV, unconditional_BTV, scale)

    return log_probs


def _combine(xp, conditional_BTV, unconditional_BTV, scale):
    # (1 + w) c - w u. What is impossible given the prompt stays so; there it might be -inf + inf.
    impossible_BTV = conditional_BTV == -xp.inf
    logits_BTV = (1 + scale) * conditional_BTV - scale * xp.where(impossible_BTV, 0.0, unconditional_BTV)
    highest_BT1 = logits_BTV.max(-1, keepdims=True)
    return logits_BTV - highest_BT1 - xp.log(xp.exp(logits_BTV - highest_BT1).sum(-1, keepdims=True))


_combine_jit = jax.jit(partial(_combine, jnp))
