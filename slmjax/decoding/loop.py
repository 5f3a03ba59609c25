"""What all decoders repeat: check the tokens, ask the denoiser, fill, until no mask is left.

`by_choice` is for decoders that decide from each call's guesses which of them to keep, `by_plan` for samplers whose
positions are chosen beforehand and only the values drawn. What is chosen, and why, is in the decoder's own module.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.decoding import Decoded, Reveal, guess
from slmjax.denoiser import PAD, Denoiser

Choose = Callable[[guess.Guess, np.ndarray, int], np.ndarray]


def checked(tokens_BT, mask_id: int) -> np.ndarray:
    """The tokens as int32, or a ValueError that says what is wrong with them."""
    tokens_BT = np.asarray(tokens_BT)
    if tokens_BT.ndim != 2 or not np.issubdtype(tokens_BT.dtype, np.integer):
        raise ValueError(
            f"tokens have shape {tokens_BT.shape} and type {tokens_BT.dtype}; give integers of [batch, positions]"
        )
    if mask_id < 0 or tokens_BT.min(initial=0) < PAD:
        raise ValueError(
            f"mask_id={mask_id} and the least token is {tokens_BT.min(initial=0)}; "
            f"both must be 0 or more, except PAD = {PAD} where a row has ended"
        )
    if not (tokens_BT == mask_id).any():
        raise ValueError(
            f"none of the {tokens_BT.size} tokens is mask_id={mask_id}, so there is nothing to fill; "
            "put the mask where tokens are wanted, or name the mask_id that is there"
        )
    resumed_B = ((tokens_BT[:, :-1] == PAD) & (tokens_BT[:, 1:] != PAD)).any(1)
    if resumed_B.any():
        raise ValueError(
            f"row {resumed_B.argmax()} goes on after PAD = {PAD}; start every row at position 0, PAD behind it"
        )
    return tokens_BT.astype(np.int32)


def ask(denoiser: Denoiser, tokens_BT: np.ndarray, mask_id: int):
    """log_probs_BTV in which the mask has probability 0, also where its id is one of the V (as in LLaDA)."""
    log_probs_BTV = denoiser(tokens_BT)
    V = log_probs_BTV.shape[-1]
    largest = np.max(tokens_BT, where=tokens_BT != mask_id, initial=PAD)
    if largest >= V:
        raise ValueError(
            f"token {largest} is not among the denoiser's {V}; mask_id={mask_id} is the only one that may be"
        )
    if mask_id >= V:
        return log_probs_BTV
    if isinstance(log_probs_BTV, np.ndarray):
        return _without(np, log_probs_BTV, mask_id)
    return _without_jit(log_probs_BTV, mask_id)


def _without(xp, log_probs_BTV, mask_id):
    log_probs_BTV = xp.where(xp.arange(log_probs_BTV.shape[-1])[None, None] == mask_id, -xp.inf, log_probs_BTV)
    highest_BT1 = log_probs_BTV.max(-1, keepdims=True)
    return log_probs_BTV - highest_BT1 - xp.log(xp.exp(log_probs_BTV - highest_BT1).sum(-1, keepdims=True))


_without_jit = jax.jit(partial(_without, jnp), static_argnums=1)


def require_finite(log_confidence: np.ndarray) -> None:
    """Refuses values whose log-probability is no number: no rule could choose among them."""
    bad = np.sum(~np.isfinite(log_confidence))
    if bad:
        raise ValueError(
            f"{bad} of {np.size(log_confidence)} values have log-probabilities that are infinite or NaN; "
            "the denoiser must give a distribution in every context that it is shown"
        )


def revealed(guesses: guess.Guess, chosen_BT: np.ndarray, call: int) -> Reveal:
    """The guesses at the chosen positions."""
    rows_N, positions_N = np.nonzero(chosen_BT)
    at = rows_N, positions_N
    return Reveal(call, rows_N, positions_N, guesses.values[at], guesses.log_confidence[at])


def filled(tokens_BT: np.ndarray, reveal: Reveal) -> np.ndarray:
    """A new array: what a denoiser was shown may still be read by it, and never changes."""
    tokens_BT = tokens_BT.copy()
    tokens_BT[reveal.rows_N, reveal.positions_N] = reveal.values_N
    return tokens_BT


def by_choice(
    denoiser: Denoiser, tokens_BT, mask_id: int, choose: Choose, temperature: float = 0.0, seed: int = 0
) -> Decoded:
    """Each call's guesses, kept where choose(guesses, masked_BT, call) → bool [B, T] says so, until no mask is left.

    The choice must lie within masked_BT and hold one position or more of every row that has any.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is below 0; use 0 for the most probable token, 1 for a draw")
    tokens_BT, trace = checked(tokens_BT, mask_id), []
    while (masked_BT := tokens_BT == mask_id).any():
        call = len(trace)
        key = jax.random.fold_in(jax.random.key(seed), call) if temperature else None
        guesses = guess.guess(ask(denoiser, tokens_BT, mask_id), temperature, key)
        require_finite(guesses.log_confidence[masked_BT])
        chosen_BT = choose(guesses, masked_BT, call)
        assert not (chosen_BT & ~masked_BT).any() and (chosen_BT.any(1) == masked_BT.any(1)).all()
        trace.append(revealed(guesses, chosen_BT, call))
        tokens_BT = filled(tokens_BT, trace[-1])
    return Decoded(tokens_BT, tuple(trace), deterministic=temperature == 0)


def by_plan(denoiser: Denoiser, tokens_BT, mask_id: int, step_BT: np.ndarray, rng: np.random.Generator) -> Decoded:
    """Draws each masked position at its own step, all of a step from one call; steps that fill nothing cost no call."""
    tokens_BT, trace = checked(tokens_BT, mask_id), []
    masked_BT = tokens_BT == mask_id
    for call, step in enumerate(np.unique(step_BT[masked_BT])):
        rows_N, positions_N = np.nonzero(masked_BT & (step_BT == step))
        log_probs_BTV = ask(denoiser, tokens_BT, mask_id)
        values_N, log_confidence_N = guess.draw(log_probs_BTV, rows_N, positions_N, rng)
        require_finite(log_confidence_N)
        trace.append(Reveal(call, rows_N, positions_N, values_N, log_confidence_N))
        tokens_BT = filled(tokens_BT, trace[-1])
    return Decoded(tokens_BT, tuple(trace), deterministic=False)
