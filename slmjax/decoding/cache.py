"""Keys and values kept from call to call: a denoiser that computes a block, recalling the rest (Fast-dLLM 2505.22618).

    dual     the active block is computed, everything before and after it is remembered; all of it anew for each block
    prefix   the active block and what follows it are computed, what came before is remembered
    hidden   of the active block only what is still hidden is computed, as ReCAP's local steps (2505.19089)
    blocks   of a block diffusion model: what is remembered cannot change, for no block sees a later one

The first three are approximate, for tokens under full attention change what others compute: their divergence is to be
measured. With refresh_every=1 they are the plain denoiser. `blocks` is lossless.
"""

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.decoding import blocks
from slmjax.denoiser import PAD
from slmjax.models import Model
from slmjax.models.attention import parse
from slmjax.objectives import Objective
from slmjax.objectives.noise import HIDDEN

KINDS = ("dual", "prefix", "hidden", "blocks")


class Cache:
    """A denoiser for one decoding at a time of any decoder that works in blocks of `block` from each row's first mask.

    Its log-probabilities are up to date where the decoder looks, in the active block, and stale elsewhere. `restart`
    before other rows are decoded. num_calls and num_positions count the work.

    Args:
      refresh_every: computes everything anew after so many calls within a block; 0: once a block.
    """

    def __init__(
        self,
        model: Model,
        params,
        objective: Objective,
        *,
        mask_id: int,
        block: int,
        kind: str = "dual",
        refresh_every: int = 0,
    ):
        self.kind, self.mask_id, self.block, self.refresh_every = kind, mask_id, block, refresh_every
        rule, length = parse(objective.decoding or objective.attention)
        _check(model, objective, kind, block, length)
        self.rule_block = length if rule == "block_causal" else 0
        readout = model.readout(params)

        def log_probs(params, readout, tokens_Bt, positions_Bt, memory, there_BS, kept_BSV):
            seen_BtS = there_BS[:, None, :]
            if self.rule_block:
                places_1S = jnp.arange(there_BS.shape[1])[None] // self.rule_block
                seen_BtS = seen_BtS & (places_1S[:, None] <= (positions_Bt // self.rule_block)[..., None])
            x_BtD, memory = model.extend(params, tokens_Bt, positions_Bt, memory, seen_BtS)
            fresh_BtV = jax.nn.log_softmax(model.unembed(readout, x_BtD), axis=-1)
            rows_B1 = jnp.arange(len(tokens_Bt))[:, None]
            return kept_BSV.at[rows_B1, positions_Bt].set(fresh_BtV, mode="drop"), memory

        compiled = jax.jit(log_probs, donate_argnums=(4, 6))
        self._compute = lambda *args: compiled(params, readout, *args)
        self._empty = lambda B, S: (model.memory(B, S), jnp.zeros((B, S, mask_id), jnp.float32))
        self.restart()

    def restart(self) -> None:
        self._starts_B = self._active_B = self._kept = None
        self._since = self.num_calls = self.num_positions = 0

    def __call__(self, tokens_BT):
        tokens_BT = np.asarray(tokens_BT, np.int32)
        hidden_BT = tokens_BT == self.mask_id
        if self._starts_B is None:
            self._starts_B = blocks.starts(hidden_BT)
            if self.kind == "blocks" and (bad := self._starts_B[hidden_BT.any(1)] % self.block).any():
                raise ValueError(
                    f"a row's first mask lies {bad.max()} past the edge of a block of {self.block}, and what is "
                    "remembered are whole blocks; make prompts multiples of it, or decode without a cache"
                )
        active_B = (np.where(hidden_BT.any(1), hidden_BT.argmax(1), self._starts_B) - self._starts_B) // self.block
        moved = self._kept is None or (active_B != self._active_B).any()
        due = self.refresh_every and self._since >= self.refresh_every
        if self._kept is None or due or (moved and self.kind != "blocks"):
            positions_Bt = np.broadcast_to(np.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
            memory, kept_BSV = self._empty(*tokens_BT.shape)
            self._since = 0
        else:
            positions_Bt = self._local(hidden_BT, active_B, moved)
            kept_BSV, memory = self._kept
        self._active_B = active_B
        self._since += 1
        self._kept = self._run(tokens_BT, positions_Bt, memory, kept_BSV)
        return self._kept[0].copy()  # the next call reuses the memory of this one

    def _run(self, tokens_BT, positions_Bt, memory, kept_BSV):
        T = tokens_BT.shape[1]
        here_Bt = (positions_Bt >= 0) & (positions_Bt < T)
        tokens_Bt = np.take_along_axis(tokens_BT, np.where(here_Bt, positions_Bt, 0), axis=1)
        here_Bt &= tokens_Bt != PAD
        shown_Bt = np.where(tokens_Bt == self.mask_id, HIDDEN, np.maximum(tokens_Bt, 0))
        self.num_calls += 1
        self.num_positions += int(here_Bt.sum())
        places_Bt = np.where(here_Bt, positions_Bt, T).astype(np.int32)  # T: nowhere
        return self._compute(shown_Bt, places_Bt, memory, tokens_BT != PAD, kept_BSV)

    def _local(self, hidden_BT, active_B, moved: bool) -> np.ndarray:
        """Positions [B, t] to compute; those outside of a row are to be left out."""
        T = hidden_BT.shape[1]
        first_B1 = (self._starts_B + active_B * self.block)[:, None]
        if self.kind == "prefix":
            return first_B1 + np.arange(T - first_B1.min())[None]
        if self.kind == "blocks" and moved:  # the block before is whole now, and was remembered when it was not
            return first_B1 + np.arange(-self.block, self.block)[None]
        positions_Bt = first_B1 + np.arange(self.block)[None]
        if self.kind == "hidden":
            wanted_Bt = np.take_along_axis(hidden_BT, np.minimum(positions_Bt, T - 1), axis=1)
            positions_Bt = np.where(wanted_Bt, positions_Bt, T)
        return positions_Bt


def _check(model: Model, objective: Objective, kind: str, block: int, rule_block: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is no cache; use one of {', '.join(KINDS)}")
    if model.extend is None:
        raise ValueError("this model family has no extend, so nothing of it can be remembered; decode without a cache")
    if objective.alignment == "shifted":
        raise ValueError("a shifted model's block is predicted from the position before it; decode without a cache")
    if block < 1:
        raise ValueError(f"block={block}; a cache works on blocks of at least 1 position")
    if (kind == "blocks") != bool(rule_block):
        raise ValueError(f"kind={kind!r} does not fit the objective; block diffusion has 'blocks', others have not")
    if kind == "blocks" and block != rule_block:
        raise ValueError(f"block={block} is not the {rule_block} that the model was trained with")
