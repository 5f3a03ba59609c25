"""Learn2PD (2509.25188): a small learned filter decides, from a block's confidences, which guesses are final.

Not lossless: the filter errs. Three parts: `oracle` decodes knowing the outcome (the paper's EGP) and records what a
perfect filter would have done; `train_filter` fits a two-layer perceptron to that; `decode` reveals what the perceptron
accepts. The paper's early stop at an end token is `end_of_text.stopping`, around this decoder or any other.

P letters the positions of a block. The filter sees one number for each: the confidence of the best token where it is
masked, in (0, 1]; 1 where it is visible, whether given or revealed, since a denoiser is read at masked positions only;
0 where the row has no position: PAD, or past the end of a short last block. Its answers count at masked ones only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from slmjax.decoding import Decoded, Reveal, blocks, guess, loop
from slmjax.denoiser import PAD, Denoiser


class Example(NamedTuple):
    """One call's view of one row's active block, and what the oracle made of it."""

    confidence_P: np.ndarray  # float32, as the filter sees them
    masked_P: np.ndarray  # bool: where there was something to decide
    correct_P: np.ndarray  # bool: where the best token was the final one; False where nothing was masked


class Filter(NamedTuple):
    """Parameters: block → block → block, 2 * (block² + block) numbers."""

    in_PP: jax.Array
    in_P: jax.Array
    out_PP: jax.Array
    out_P: jax.Array


def window(masked_BT: np.ndarray, starts_B: np.ndarray, block: int) -> np.ndarray:
    """positions_BP of each row's active block; past the row's end in a short last one, and for a row without masks."""
    T = masked_BT.shape[1]
    first_B = blocks.starts(masked_BT)
    first_B = np.where(first_B < T, first_B - (first_B - starts_B) % block, T)
    return first_B[:, None] + np.arange(block)[None]


def taken(array_BT: np.ndarray, positions_BP: np.ndarray) -> np.ndarray:
    """The array at those positions, of its own type; 0 past its end."""
    T = array_BT.shape[1]
    array_BP = np.take_along_axis(array_BT, np.minimum(positions_BP, T - 1), axis=1)
    return np.where(positions_BP < T, array_BP, array_BT.dtype.type(0))


def shown(log_confidence_BT: np.ndarray, masked_BT: np.ndarray, tokens_BT: np.ndarray) -> np.ndarray:
    """float32 [B, T]: the numbers that the filter sees of each position."""
    return np.where(masked_BT, np.exp(log_confidence_BT), tokens_BT != PAD).astype(np.float32)


def oracle(
    denoiser: Denoiser, tokens_BT, reference_BT: np.ndarray, *, mask_id: int, block: int = 32
) -> tuple[Decoded, list[Example]]:
    """Fills in `reference_BT`, each call all of the active block whose best token is the reference's; its examples.

    Where none is, the surest position gets the reference's token, so that no row makes more calls than static decoding
    of one position a call. The reference is usually a decoding of the same denoiser, e.g. `ordered.static`'s.
    """
    tokens_BT, trace, examples = loop.checked(tokens_BT, mask_id), [], []
    _check_block(block)
    reference_BT = np.asarray(reference_BT, np.int32)
    if reference_BT.shape != tokens_BT.shape or (reference_BT == mask_id).any():
        raise ValueError(
            f"the reference has shape {reference_BT.shape} and {np.sum(reference_BT == mask_id)} masks; "
            f"it must have the tokens' shape, {tokens_BT.shape}, and no mask"
        )
    starts_B = blocks.starts(tokens_BT == mask_id)
    while (masked_BT := tokens_BT == mask_id).any():
        log_probs_BTV = loop.ask(denoiser, tokens_BT, mask_id)
        guesses = guess.guess(log_probs_BTV)
        loop.require_finite(guesses.log_confidence[masked_BT])
        active_BT = blocks.active(masked_BT, starts_B, block)
        correct_BT = active_BT & (guesses.values == reference_BT)
        positions_BP = window(masked_BT, starts_B, block)
        views = (shown(guesses.log_confidence, masked_BT, tokens_BT), active_BT, correct_BT)
        views_BP = (taken(view_BT, positions_BP) for view_BT in views)
        examples += [Example(*view) for view in zip(*views_BP, strict=True) if view[1].any()]

        surest_BT = blocks.best(guesses.log_confidence, active_BT, np.array([1]))
        rows_N, positions_N = at = np.nonzero(np.where(correct_BT.any(1, keepdims=True), correct_BT, surest_BT))
        values_N = reference_BT[at]
        log_confidence_N = guess.rows_at(log_probs_BTV, rows_N, positions_N)[np.arange(len(rows_N)), values_N]
        trace.append(Reveal(len(trace), rows_N, positions_N, values_N, log_confidence_N))
        tokens_BT = loop.filled(tokens_BT, trace[-1])
    return Decoded(tokens_BT, tuple(trace), deterministic=True), examples


def init_filter(key: jax.Array, block: int) -> Filter:
    """He-normal weights, zero biases."""
    in_key, out_key = jax.random.split(key)
    scale = (2 / block) ** 0.5
    zeros_P = jnp.zeros(block)
    return Filter(
        scale * jax.random.normal(in_key, (block, block)),
        zeros_P,
        scale * jax.random.normal(out_key, (block, block)),
        zeros_P,
    )


@jax.jit
def filter_logits(params: Filter, confidence_BP) -> jax.Array:
    """Logits [B, P] of a guess being final."""
    h_BP = jax.nn.relu(confidence_BP @ params.in_PP + params.in_P[None])
    return h_BP @ params.out_PP + params.out_P[None]


def train_filter(
    examples: Sequence[Example],
    block: int,
    *,
    num_steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Filter:
    """Adam on the binary cross-entropy of `correct_P`, a mean over the masked positions of each batch of examples."""
    _check_block(block)
    found = {len(example.confidence_P) for example in examples}
    if found != {block}:
        raise ValueError(f"examples are of blocks of {sorted(found)} positions, the filter is of {block}; use the same")
    data = Example(*map(jnp.asarray, map(np.stack, zip(*examples, strict=True))))
    key = jax.random.key(seed)
    optimizer = optax.adam(learning_rate)

    def loss(params, example):
        logits_BP = filter_logits(params, example.confidence_P)
        loss_BP = optax.sigmoid_binary_cross_entropy(logits_BP, example.correct_P.astype(jnp.float32))
        return jnp.sum(jnp.where(example.masked_P, loss_BP, 0.0)) / jnp.maximum(jnp.sum(example.masked_P), 1)

    def step(state, step):
        params, opt_state = state
        rows_B = jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, len(examples))
        grads = jax.grad(loss)(params, jax.tree.map(lambda array_NP: array_NP[rows_B], data))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    params = init_filter(jax.random.fold_in(key, num_steps), block)
    (params, _), _ = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(num_steps)))(
        (params, optimizer.init(params))
    )
    return params


def decode(denoiser: Denoiser, tokens_BT, *, mask_id: int, params: Filter, threshold: float = 0.9) -> Decoded:
    """Each call reveals, of the active block, what the filter accepts with a probability above `threshold`; and always
    the surest position. The block is the one that the filter was trained for.
    """
    block = len(params.in_P)
    tokens_BT = loop.checked(tokens_BT, mask_id)
    starts_B = blocks.starts(tokens_BT == mask_id)

    def choose(guesses, masked_BT, call):
        active_BT = blocks.active(masked_BT, starts_B, block)
        positions_BP = window(masked_BT, starts_B, block)
        confidence_BP = taken(shown(guesses.log_confidence, masked_BT, tokens_BT), positions_BP)
        final_BP = np.asarray(jax.nn.sigmoid(filter_logits(params, confidence_BP))) > threshold
        rows_N, p_N = np.nonzero(final_BP & taken(active_BT, positions_BP))
        chosen_BT = blocks.best(guesses.log_confidence, active_BT, np.array([1]))
        chosen_BT[rows_N, positions_BP[rows_N, p_N]] = True
        return chosen_BT

    return loop.by_choice(denoiser, tokens_BT, mask_id, choose)


def _check_block(block: int) -> None:
    if block < 1:
        raise ValueError(
            f"block={block} positions; the filter sees one block at a time, of 1 or more (32 in the paper)"
        )
