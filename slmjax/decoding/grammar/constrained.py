"""Decoding under a context-free grammar, after 2508.10111 but at a fixed length.

Guarantee: every row's string is one of the grammar, whatever the denoiser says. A mask is a wildcard of exactly one
token; a token is a candidate at a mask only if some string of the grammar has it there and agrees with all that is
visible. That such a string exists is checked before the first call and kept true by every fill, so that nothing is ever
rejected, redrawn or undone. (The paper's holes have any length: its check is weaker, as a hole may have too few masks
to be finished in, and it redraws.)

The target law changes. The result is neither lossless against a decoder without a grammar nor, at any temperature, a
sample of the model or of the model conditioned on the grammar: the denoiser's probabilities know nothing of which
choices leave many ways to finish. Only when the greedy output of the same order is a string of the grammar by itself,
it comes out unchanged.
"""

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.decoding import Decoded, Reveal, blocks, loop
from slmjax.decoding.grammar.chart import BOOLEAN, LOGS, inside, log_sum, outside_leaves
from slmjax.decoding.grammar.counts import nearest_lengths
from slmjax.decoding.grammar.rules import Grammar
from slmjax.decoding.guess import Guess, guess, rows_at
from slmjax.denoiser import PAD, Denoiser

ORDERS = ("confidence", "random", "left_to_right")
LAWS = ("allowed", "completions")
# The least log-probability of an allowed token: what the denoiser calls impossible is taken if nothing else is allowed.
_FLOOR = -1e4
_ORDER = 1  # names the stream of random orders


def decode(
    denoiser: Denoiser,
    tokens_BT,
    *,
    mask_id: int,
    grammar: Grammar,
    first=0,
    order: str = "confidence",
    law: str = "allowed",
    temperature: float = 0.0,
    seed: int = 0,
) -> Decoded:
    """Fills one mask of every row per call, so that each row's string is one of the grammar.

    Args:
      first: where the strings begin, an int or one per row; before it is a prompt without masks, of which the grammar
        does not speak. A string ends with its row, or at the PADs that end it.
      order: which mask: the one whose best candidate the denoiser finds most probable, a random one, or the leftmost.
      law: what candidates weigh. allowed: as the denoiser says. completions: that times the probability that the other
        masks, drawn each for itself as the denoiser says, complete the string; at temperature 1 and of an unambiguous
        grammar this makes all strings equally likely to a denoiser that knows nothing.
      temperature: 0 takes the best candidate.

    Raises:
      ValueError: a row that no string of the grammar fits.
    """
    if order not in ORDERS or law not in LAWS:
        raise ValueError(f"order={order!r}, law={law!r}: use one of {ORDERS} and one of {LAWS}")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is below 0; use 0 for the best candidate, 1 for a draw")
    tokens_BT, trace = loop.checked(tokens_BT, mask_id), []
    starts_B, lengths_B = _strings(tokens_BT, mask_id, grammar, first)
    allowed_BTV = _allowed(grammar, tokens_BT, mask_id, starts_B, lengths_B)
    _check_feasible(grammar, starts_B, lengths_B, allowed_BTV)
    rng = np.random.default_rng((seed, _ORDER))
    while (masked_BT := tokens_BT == mask_id).any():
        log_probs_BTV = loop.ask(denoiser, tokens_BT, mask_id)
        open_B = masked_BT.any(1)
        here = tokens_BT[open_B], mask_id, starts_B[open_B], lengths_B[open_B]
        allowed_BTV[open_B] = _allowed(grammar, *here)
        offered_BTV = log_probs_BTV
        if law == "completions":
            offered_BTV = np.array(log_probs_BTV, np.float64)
            offered_BTV[open_B] = _with_completions(grammar, offered_BTV[open_B], *here)
        key = jax.random.fold_in(jax.random.key(seed), len(trace))
        choice = guess(_only(allowed_BTV, offered_BTV), temperature, key)
        loop.require_finite(choice.log_confidence[masked_BT])
        chosen_BT = blocks.best(_score(order, choice, rng), masked_BT, np.ones(len(tokens_BT), int))
        rows_N, positions_N = np.nonzero(chosen_BT)
        values_N = choice.values[chosen_BT]
        log_confidence_N = rows_at(log_probs_BTV, rows_N, positions_N)[np.arange(len(rows_N)), values_N]
        trace.append(Reveal(len(trace), rows_N, positions_N, values_N, log_confidence_N))
        tokens_BT = loop.filled(tokens_BT, trace[-1])
    return Decoded(tokens_BT, tuple(trace), deterministic=temperature == 0)


def allowed(grammar: Grammar, tokens_BT, *, mask_id: int, first=0) -> np.ndarray:
    """bool [B, T, V]: whether some string of the grammar has the token there and agrees with all that is visible.

    At a visible position the token itself, or none; all False in a row that no string fits.
    """
    tokens_BT = np.asarray(tokens_BT, np.int32)
    return _allowed(grammar, tokens_BT, mask_id, *_strings(tokens_BT, mask_id, grammar, first))


def _score(order: str, choice: Guess, rng: np.random.Generator) -> np.ndarray:
    if order == "confidence":
        return choice.log_confidence
    if order == "random":
        return rng.random(choice.values.shape)
    return np.broadcast_to(-np.arange(choice.values.shape[1]), choice.values.shape)


def _strings(tokens_BT, mask_id, grammar, first) -> tuple[np.ndarray, np.ndarray]:
    """(starts_B, lengths_B) of the rows' strings, checked to be in one piece."""
    B, T = tokens_BT.shape
    V = grammar.emits_AV.shape[1]
    if 0 <= mask_id < V and grammar.emits_AV[:, mask_id].any():
        raise ValueError(f"mask_id={mask_id} is a token of the grammar; it must be none")
    starts_B = np.broadcast_to(np.asarray(first, np.int64), (B,))
    after_BT = np.arange(T)[None] >= starts_B[:, None]
    lengths_B = (after_BT & (tokens_BT != PAD)).sum(1)
    within_BT = after_BT & (np.arange(T)[None] < (starts_B + lengths_B)[:, None])
    for row in range(B):
        if not lengths_B[row] or (tokens_BT[row][within_BT[row]] == PAD).any():
            raise ValueError(f"row {row} has no string, or PAD inside it, from position first={starts_B[row]} on")
        if (tokens_BT[row, : starts_B[row]] == mask_id).any():
            raise ValueError(f"row {row} has masks before its string, which begins at first={starts_B[row]}")
    return starts_B, lengths_B


def _allowed(grammar, tokens_BT, mask_id, starts_B, lengths_B) -> np.ndarray:
    wildcard_A11 = grammar.emits_AV.any(1)[:, None, None]
    leaves_ABT = np.where(tokens_BT == mask_id, wildcard_A11, _emitted(grammar, tokens_BT))
    spans = inside(grammar, leaves_ABT, BOOLEAN)
    around_ABT = outside_leaves(grammar, spans, starts_B, lengths_B, BOOLEAN)
    # float32 counts of at most A nonterminals: exact, and BLAS does the work.
    reached_BTV = np.einsum("abt,av->btv", around_ABT.astype(np.float32), grammar.emits_AV.astype(np.float32)) > 0
    visible_BT1 = (tokens_BT != mask_id)[:, :, None]
    return reached_BTV & (~visible_BT1 | (tokens_BT[:, :, None] == np.arange(reached_BTV.shape[2])))


def _with_completions(grammar, log_probs_BTV, tokens_BT, mask_id, starts_B, lengths_B) -> np.ndarray:
    """log_probs_BTV of each mask when all are drawn independently and only strings of the grammar are kept."""
    V = grammar.emits_AV.shape[1]
    floored_BTV = np.maximum(log_probs_BTV, _FLOOR)
    leaves_ABT = np.where(_emitted(grammar, tokens_BT), 0.0, -np.inf)
    for a, emits_V in enumerate(grammar.emits_AV):
        drawn_BT = log_sum(floored_BTV[:, :, :V][:, :, emits_V], -1)
        leaves_ABT[a] = np.where(tokens_BT == mask_id, drawn_BT, leaves_ABT[a])
    around_ABT = outside_leaves(grammar, inside(grammar, leaves_ABT, LOGS), starts_B, lengths_B, LOGS)
    weights_BTV = np.full_like(floored_BTV, -np.inf)
    for a, emits_V in enumerate(grammar.emits_AV):
        tokens_E = np.flatnonzero(emits_V)
        weights_BTV[:, :, tokens_E] = np.logaddexp(weights_BTV[:, :, tokens_E], around_ABT[a, :, :, None])
    weights_BTV += floored_BTV
    total_BT1 = log_sum(weights_BTV, -1)[..., None]
    return weights_BTV - np.where(np.isfinite(total_BT1), total_BT1, 0.0)


def _emitted(grammar, tokens_BT) -> np.ndarray:
    """bool [A, B, T]: whether a nonterminal can be the visible token; no nonterminal is one outside the grammar."""
    V = grammar.emits_AV.shape[1]
    inside_BT = (tokens_BT >= 0) & (tokens_BT < V)
    return grammar.emits_AV[:, np.where(inside_BT, tokens_BT, 0)] & inside_BT


def _only(allowed_BTV, log_probs_BTV):
    """log_probs_BTV of what is allowed, not below the floor and not renormalised; -inf elsewhere.

    Not renormalised, for confidence is the denoiser's: with the grammar's, positions would come in another order than
    without it also where it forbids nothing that is wanted.
    """
    extra = log_probs_BTV.shape[-1] - allowed_BTV.shape[-1]
    if extra < 0:
        raise ValueError(
            f"the grammar has token {allowed_BTV.shape[-1] - 1}, the denoiser only {log_probs_BTV.shape[-1]} tokens"
        )
    allowed_BTV = np.pad(allowed_BTV, ((0, 0), (0, 0), (0, extra)))
    floored_BTV = jnp.maximum(jnp.asarray(log_probs_BTV, jnp.float32), _FLOOR)
    return jnp.where(allowed_BTV, floored_BTV, -jnp.inf)


def _check_feasible(grammar, starts_B, lengths_B, allowed_BTV) -> None:
    for row, (start, length) in enumerate(zip(starts_B, lengths_B, strict=True)):
        if allowed_BTV[row, start : start + length].any(1).all():
            continue
        near = nearest_lengths(grammar, int(length))
        if length in near:
            raise ValueError(f"row {row}: no string of length {length} of the grammar agrees with its visible tokens")
        lengths = " and ".join(map(str, near)) or "none that is near"
        raise ValueError(
            f"row {row}: the grammar has no string of length {length}; the nearest lengths are {lengths}. Give as many "
            "masks, or pad the grammar"
        )
