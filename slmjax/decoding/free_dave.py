"""FreeDave (2510.00294): draft the next transfers of static decoding from one call, verify them all in the next.

Lossless against `ordered.static` with the same `per_call` and `block`: a draft stands only if static decoding, with the
log-probabilities of the draft before it, would have made it. That needs a denoiser whose best tokens and order of
confidences do not depend on how many rows a call has; sums that round differently at another batch size can turn a near
tie. It makes fewer calls and never more, each of `depth` times the rows.
"""

import numpy as np

from slmjax.decoding import Decoded, Reveal, blocks, guess, loop
from slmjax.denoiser import Denoiser


def decode(
    denoiser: Denoiser, tokens_BT, *, mask_id: int, depth: int = 4, per_call: int = 1, block: int = 0
) -> Decoded:
    """Fills `per_call` positions a transfer, the last of a block perhaps fewer; verifies up to `depth` drafts a call.

    The first call has B rows, every later one B * depth: of each row the states 1, 2, .. depth transfers on, side by
    side. Drafts stop at the edge of the block; where it leaves no room, the last is repeated. The last transfer of a
    row needs no verifying, so no call is made for it.
    """
    if depth < 1 or per_call < 1 or block < 0:
        raise ValueError(
            f"depth={depth}, per_call={per_call} and block={block}; "
            "drafts and positions a transfer begin at 1, a block at 1 too or 0 for whole rows"
        )
    tokens_BT, trace = loop.checked(tokens_BT, mask_id), []
    B, T = tokens_BT.shape
    starts_B = blocks.starts(tokens_BT == mask_id)
    drafts_BJT = tokens_BT[:, None]
    while (tokens_BT == mask_id).any():
        J = drafts_BJT.shape[1]
        # One static transfer of every draft, from its own log-probabilities.
        drafts_NT = drafts_BJT.reshape(B * J, T)
        masked_NT = drafts_NT == mask_id
        guesses = guess.guess(loop.ask(denoiser, drafts_NT, mask_id))
        loop.require_finite(guesses.log_confidence[masked_NT])
        active_NT = blocks.active(masked_NT, np.repeat(starts_B, J), block)
        chosen_NT = blocks.best(guesses.log_confidence, active_NT, np.array([per_call]))
        static_BJT = np.where(chosen_NT, guesses.values, drafts_NT).reshape(B, J, T)

        last_B = accepted(static_BJT, drafts_BJT)
        kept_BJT = chosen_NT.reshape(B, J, T) & (np.arange(J)[None] <= last_B[:, None])[..., None]
        at = np.nonzero(kept_BJT)
        log_confidence_N = guesses.log_confidence.reshape(B, J, T)[at]
        trace.append(Reveal(len(trace), at[0], at[2], static_BJT[at], log_confidence_N))

        # From the last that stands: its static successor, which is exact, and drafts beyond from the same guesses.
        tokens_BT = static_BJT[np.arange(B), last_B]
        from_B = np.arange(B) * J + last_B
        ahead = [tokens_BT]
        for j in range(2, depth + 1):
            drafted_BT = blocks.best(guesses.log_confidence[from_B], active_NT[from_B], np.array([j * per_call]))
            ahead.append(np.where(drafted_BT, guesses.values[from_B], drafts_NT[from_B]))
        drafts_BJT = np.stack(ahead, axis=1)
    return Decoded(tokens_BT, tuple(trace), deterministic=True)


def accepted(static_BJT: np.ndarray, drafts_BJT: np.ndarray) -> np.ndarray:
    """Each row's last draft that stands: the first does; the others are what static decoding makes of the one before.

    static_BJT are the drafts' successors, each from its own log-probabilities.
    """
    stands_BJ = (static_BJT[:, :-1] == drafts_BJT[:, 1:]).all(2)
    return np.cumprod(stands_BJ, axis=1).sum(1)
