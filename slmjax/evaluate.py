"""Held-out loss with its standard error, in nats per token and bits per byte; of a trained run, by a named estimator.

    run                estimators
    next_token         exact
    masked_diffusion   l_uniform, the bound that training reports, at more draws; and all others of `slmjax.likelihood`
    block_diffusion    l_uniform, within each block; left_to_right

What an estimator is, and that their numbers are different ones, `slmjax.likelihood` says.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from slmjax import objectives
from slmjax.config import ConfigError
from slmjax.data import Batch
from slmjax.likelihood import Likelihood
from slmjax.likelihood.chains import chain
from slmjax.likelihood.exact import MOST, exact
from slmjax.likelihood.monte_carlo import monte_carlo
from slmjax.objectives.prompts import in_prompt
from slmjax.program import TrainState, make_evaluate
from slmjax.trained import Trained

DRAWS = 128  # noise levels a row is scored at, unless said otherwise
DRAWN = ("l_uniform", "bernoulli", "antithetic")
ENUMERATED = ("exact_bound", "random_order")
OF_OBJECTIVE = {
    "masked_diffusion": (*DRAWN, "left_to_right", "confidence", *ENUMERATED),
    "block_diffusion": ("l_uniform", "left_to_right"),  # another order would show it later blocks before earlier ones
}


def summary(nll_M: np.ndarray, weight_M: np.ndarray, bytes_per_token: float | None) -> dict:
    """Loss over M rows from each row's summed loss (nats) and weight (tokens).

    The standard error treats rows as independent draws: the spread of row totals about loss x weight, over the square
    root of their number; of one row it is None. bits_per_byte is None where there is no text behind the tokens.
    """
    nll_M, weight_M = np.asarray(nll_M, np.float64), np.asarray(weight_M, np.float64)
    M, weight = len(nll_M), weight_M.sum()
    loss = nll_M.sum() / weight
    residual_M = nll_M - loss * weight_M
    se = math.sqrt(np.square(residual_M).sum() / (M - 1) / M) / (weight / M) if M > 1 else math.nan
    return {
        "loss": _json(loss),
        "loss_se": _json(se),
        "bits_per_byte": _json(loss / math.log(2) / bytes_per_token) if bytes_per_token else None,
        "num_tokens": int(weight),
    }


def _json(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# --- of a trained run ------------------------------------------------------------------------------------------------


def held_out(
    trained: Trained,
    estimator: str | None = None,
    num_draws: int | None = None,
    num_sequences: int | None = None,
    batch_size: int | None = None,
) -> dict:
    """`summary` of a run's held-out windows, with what the number is: estimator, kind, num_draws, entropy, ...

    Args:
      estimator: None is the first that the module's table has for the run's objective.
      num_draws: of an estimator that draws, noise levels a row is scored at; None: DRAWS.
      num_sequences: windows; None: those that training evaluated on, so that losses compare.
      batch_size: rows of a call of the network; None: as in training. It changes no number but by rounding.

    Raises:
      ConfigError: an estimator that the run has not, or data that it cannot take.
    """
    name, cfg = trained.cfg.objective.name, trained.cfg
    known = OF_OBJECTIVE.get(name, (trained.objective.kind,))
    estimator = known[0] if estimator is None else estimator
    if estimator not in known:
        raise ConfigError(
            f"estimator={estimator!r} is none for a run of objective.name={name!r}; use {', '.join(known)}"
        )
    if estimator in DRAWN:
        num_draws = DRAWS if num_draws is None else num_draws
    elif num_draws is not None:
        raise ConfigError(f"draws={num_draws} has no effect with estimator={estimator!r}, which draws nothing")
    for key, value in (("draws", num_draws), ("sequences", num_sequences), ("batch", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value} must be >= 1")
    dataset = trained.dataset(num_sequences)
    batch_size = min(batch_size or cfg.train.batch_size, len(dataset.held_out.tokens_BT1))
    if estimator == "l_uniform" or name not in OF_OBJECTIVE:
        kind, rows = trained.objective.kind, _as_in_training(trained, dataset.held_out, num_draws, batch_size)
    else:
        kind, rows = _by_denoiser(trained, dataset.held_out, estimator, num_draws, batch_size)
    return {
        "run": str(trained.folder),
        "step": trained.step,
        "objective": name,
        "estimator": f"block {estimator}" if estimator == "l_uniform" and name == "block_diffusion" else estimator,
        "kind": kind,
        "num_draws": num_draws or 0,
        **summary(*rows, dataset.bytes_per_token),
        "num_sequences": len(dataset.held_out.tokens_BT1),
        "entropy": dataset.entropy,
    }


def _as_in_training(trained: Trained, held_out: Batch, num_draws: int | None, batch_size: int):
    """(nll_M, weight_M) by the function that evaluates while training."""
    cfg = trained.cfg
    if num_draws is not None:
        diffusion = dataclasses.replace(cfg.objective.diffusion, eval_draws=num_draws)
        cfg = dataclasses.replace(cfg, objective=dataclasses.replace(cfg.objective, diffusion=diffusion))
    evaluate = jax.jit(make_evaluate(cfg, trained.model, objectives.build(cfg.objective)))
    state = TrainState(jnp.int32(trained.step), trained.params, opt_state=(), ema=(), skips=())
    packed = cfg.data.packing == "segments"
    parts = []
    for tokens_BT1, segments_BT1, num in _batches(held_out, batch_size):
        nll_B, weight_B = jax.device_get(evaluate(state, tokens_BT1, segments_BT1 if packed else None))
        parts.append((nll_B[:num], weight_B[:num]))
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def _batches(held_out: Batch, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """(tokens_BT1, segments_BT1, how many of the B rows count): the last batch is filled up, for one compiled shape."""
    for start in range(0, len(held_out.tokens_BT1), batch_size):
        rows = [array[start : start + batch_size] for array in held_out]
        num = len(rows[0])
        yield *(np.pad(array, ((0, batch_size - num), (0, 0))) for array in rows), num


def _by_denoiser(trained: Trained, held_out: Batch, estimator: str, num_draws: int | None, batch_size: int):
    """(kind, (nll_M, weight_M)) by `slmjax.likelihood`, which knows rows of one document alone."""
    shifted = trained.objective.alignment == "shifted"
    tokens_MT, segments_MT = (a[:, :-1] if shifted else a[:, 1:] for a in held_out)
    mixed = (segments_MT != segments_MT[:, :1]).any(1)
    if mixed.any():
        raise ConfigError(
            f"estimator={estimator!r} takes rows of one document, and {mixed.sum()} of {len(mixed)} held-out windows "
            "hold several, which data.packing='segments' keeps apart; use estimator l_uniform, or a run trained with "
            "data.packing='concat'"
        )
    scored_MT = ~np.asarray(in_prompt(trained.cfg.objective, jnp.asarray(tokens_MT), None))
    if shifted:
        scored_MT[:, 0] = False  # nothing speaks of the first token
    most = int(scored_MT.sum(1).max())
    if estimator in ENUMERATED and most > MOST:
        raise ConfigError(
            f"estimator={estimator!r} enumerates all 2^n masks of n scored tokens, and data.seq_len="
            f"{trained.cfg.data.seq_len} has {most} of them, more than {MOST}; use l_uniform"
        )
    # Drawn row by row, each with its own seed: so a row's noise is the same in whatever batch it lies.
    size = 1 if estimator in DRAWN else batch_size
    found = [
        _likelihood(trained, estimator, num_draws, batch_size, first, tokens_MT[rows], scored_MT[rows])
        for first in range(0, len(tokens_MT), size)
        for rows in [slice(first, first + size)]
    ]
    nats_M, num_M = (np.concatenate([getattr(each, field) for each in found]) for field in ("nats_B", "num_scored_B"))
    return found[0].kind, (nats_M, num_M)


def _likelihood(trained, estimator, num_draws, batch_size, seed, tokens_BT, scored_BT) -> Likelihood:
    rows = {"tokens_BT": tokens_BT, "scored_BT": scored_BT, "mask_id": trained.mask_id}
    if estimator in DRAWN:
        noise = {"num_draws": num_draws, "rows_per_call": batch_size, "seed": seed}
        return monte_carlo(trained.denoiser(), **rows, estimator=estimator, **noise)
    if estimator in ENUMERATED:
        return exact(trained.denoiser(), **rows, estimator=estimator)
    return chain(trained.denoiser(), **rows, order=estimator)
