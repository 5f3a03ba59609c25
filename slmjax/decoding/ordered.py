"""The surest positions first, a fixed number a call: low-confidence remasking (MaskGIT 2202.04200, LLaDA 2502.09992),
top-k margin (2502.06768), lowest entropy, or a random order; blocks of it left to right are semi-autoregressive.

Not lossless as a sampler: even at temperature 1 only the random order with one position a call samples the model, and
at temperature 0 this is one best guess. `static` is the greedy decoding that accelerators are compared with.
"""

import numpy as np

from slmjax.decoding import Decoded, blocks, loop
from slmjax.denoiser import Denoiser

ORDERS = ("confidence", "margin", "entropy", "random")


def decode(
    denoiser: Denoiser,
    tokens_BT,
    *,
    mask_id: int,
    order: str = "confidence",
    num_steps: int | None = None,
    per_call: int | None = None,
    block: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
) -> Decoded:
    """Fills `per_call` positions of each row a call, or as many as finish every row within `num_steps` calls.

    With `block` a row's blocks are finished one after another, and no call reaches into the next. num_steps are shared
    out over a row's blocks in proportion to their masks, each block getting one or more, and a block's masks over its
    steps, the remainder one each to the first; a block with fewer masks than steps leaves the rest of them unused.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not an order of positions; use one of {', '.join(ORDERS)}")
    if (num_steps is None) == (per_call is None):
        raise ValueError(f"num_steps={num_steps} and per_call={per_call}; give exactly one of them")
    if min(number for number in (num_steps, per_call) if number is not None) < 1 or block < 0:
        raise ValueError(
            f"num_steps={num_steps}, per_call={per_call} and block={block}; "
            "steps and positions a call begin at 1, a block at 1 too or 0 for whole rows"
        )
    tokens_BT = loop.checked(tokens_BT, mask_id)
    masked_BT = tokens_BT == mask_id
    starts_B = blocks.starts(masked_BT)
    plans = None if num_steps is None else [plan(row_T, block, num_steps) for row_T in masked_BT]
    rng = np.random.default_rng(seed)

    def choose(guesses, masked_BT, call):
        score_BT = {
            "confidence": guesses.log_confidence,
            "margin": guesses.margin,
            "entropy": -guesses.entropy,
            "random": rng.random(masked_BT.shape) if order == "random" else None,
        }[order]
        counts_B = np.array([row[call] if call < len(row) else 0 for row in plans] if plans else [per_call])
        return blocks.best(score_BT, blocks.active(masked_BT, starts_B, block), counts_B)

    return loop.by_choice(denoiser, tokens_BT, mask_id, choose, temperature, seed)


def static(denoiser: Denoiser, tokens_BT, *, mask_id: int, per_call: int = 1, block: int = 0) -> Decoded:
    """Static(k): greedy, each call reveals the `per_call` most confident masked positions of the active block."""
    return decode(denoiser, tokens_BT, mask_id=mask_id, per_call=per_call, block=block)


def plan(masked_T: np.ndarray, block: int, num_steps: int) -> list[int]:
    """How many positions of one row each call fills; steps that would fill none are left out."""
    positions = np.flatnonzero(masked_T)
    if not len(positions):
        return []
    sizes = np.bincount((positions - positions[0]) // block) if block else np.array([len(positions)])
    sizes = sizes[sizes > 0]
    if num_steps < len(sizes):
        raise ValueError(
            f"num_steps={num_steps} is fewer than a row's {len(sizes)} blocks of {block}; "
            "use as many steps, or larger blocks"
        )
    counts, steps, masks = [], num_steps, len(positions)
    for i, size in enumerate(sizes.tolist()):
        share = min(-(-steps * size // masks), steps - (len(sizes) - 1 - i))
        counts += [count for count in blocks.schedule(size, share) if count]
        steps, masks = steps - share, masks - size
    return counts
