"""The reversal curse: a model that has read "A, B" is asked for A given B (2309.12288; SMDM, 2410.18514, section 6.3).

Three models of one size read the same rows of fixed pairs, both codes at fixed places (`data.pairs`). Autoregression
never predicts A from B. Masked diffusion that hides the whole row does, at every mask that shows B; with the prompt A
always shown, as in common fine-tuning, it does not either. Recall is of whole codes, greedily decoded.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slmjax.check.training import run_config, train_and_load
from slmjax.data import pairs
from slmjax.decoding import left_to_right, ordered
from slmjax.study import Run
from slmjax.trained import Trained

MODELS = {
    "autoregression": {"objective.name": "next_token"},
    "masked diffusion": {"objective.name": "masked_diffusion"},
    "masked diffusion, prompt shown": {
        "objective.name": "masked_diffusion",
        "objective.prompt": "shown",
        "objective.prompt_end": pairs.SEPARATOR,
    },
}


class Recall(NamedTuple):
    """Shares of all pairs whose other code comes back whole; `chance` of guessing one of the codes that there are."""

    model: str
    forward: float
    reverse: float
    chance: float

    @property
    def at_chance(self) -> bool:
        """Whether the reverse direction is within four standard errors of guessing, or below it."""
        num = round(1 / self.chance)
        return self.reverse <= self.chance + 4 * math.sqrt(self.chance * (1 - self.chance) / num)


def holds(rows: list[Recall]) -> bool:
    """Whether masked diffusion recalls more than 95% in reverse, and autoregression knows forward and guesses back."""
    by_model = {row.model: row for row in rows}
    causal, masked = by_model["autoregression"], by_model["masked diffusion"]
    return causal.forward > 0.95 and causal.at_chance and masked.forward > 0.95 and masked.reverse > 0.95


def measure(spec: str, steps: int, folder: Path, seed: int = 0) -> list[Recall]:
    """Trains each of MODELS on `spec`, a source pairs:COUNT:LENGTH:SEED, in `folder`, and asks it for every pair."""
    return [_measure(name, changes, spec, steps, folder, seed) for name, changes in MODELS.items()]


def _measure(name: str, changes: dict, spec: str, steps: int, folder: Path, seed: int) -> Recall:
    source = pairs.parse(spec)
    run = Run(run_config(spec, source.row_len, steps, changes | {"train.seed": seed}))
    model = train_and_load(run, folder)
    rows_NT = pairs.rows(source)[:, 1:]
    first_T = np.arange(source.row_len) < source.length
    last_T = np.arange(source.row_len) > source.length
    if name == "autoregression":
        turned_NT = np.concatenate([rows_NT[:, last_T], rows_NT[:, [source.length]], rows_NT[:, first_T]], axis=1)
        forward, reverse = (_continued(model, asked_NT, source) for asked_NT in (rows_NT, turned_NT))
    else:
        forward, reverse = (_filled(model, rows_NT, hidden_T) for hidden_T in (last_T, first_T))
    return Recall(name, forward, reverse, 1 / source.count)


def _filled(model: Trained, rows_NT: np.ndarray, hidden_T: np.ndarray) -> float:
    asked_NT = np.where(hidden_T[None], model.mask_id, rows_NT)
    found_NT = ordered.static(model.denoiser(), asked_NT, mask_id=model.mask_id).tokens_BT
    return float((found_NT == rows_NT).all(1).mean())


def _continued(model: Trained, rows_NT: np.ndarray, source: pairs.Pairs) -> float:
    """Given the start, the first code of the row and the separator, is the second what follows?"""
    rows_NT1 = np.concatenate([np.full((len(rows_NT), 1), pairs.START), rows_NT], axis=1).astype(np.int32)
    asked_NT1 = rows_NT1.copy()
    asked_NT1[:, -source.length :] = model.mask_id
    next_token = left_to_right.NextToken(model.model, model.params)
    found_NT1 = left_to_right.decode(next_token, asked_NT1, mask_id=model.mask_id, temperature=0.0).tokens_BT
    return float((found_NT1 == rows_NT1).all(1).mean())
