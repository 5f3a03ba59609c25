"""Three tiny runs that are trained once for all tests of a process: autoregression, masked and block diffusion.

The first and the last are of text, in bytes; the last in packed documents. `oracle` puts a model that knows a Markov
chain's exact posterior in the place of a trained one: what it is said to lose is known without training.
"""

import atexit
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import chains
import jax
import jax.numpy as jnp
import numpy as np
import runs

from slmjax import config, data, denoiser, ladder, objectives
from slmjax.data import markov
from slmjax.models import Model
from slmjax.models.attention import parse
from slmjax.trained import Trained

TEXT = {"data.tokenizer": "byte", "data.held_out": 0.3, "train.steps": 16, "log.checkpoint_every": 8}
RUNS = {
    "next_token": TEXT | {"optim.ema_decay": 0.9},
    "masked_diffusion": {"objective.name": "masked_diffusion"},
    "block_diffusion": TEXT
    | {"objective.name": "block_diffusion", "objective.diffusion.block": 4, "data.packing": "segments"},
}


@functools.cache
def out() -> Path:
    """A folder for this process, with the text, the cache of what is made of it, and the runs."""
    folder = Path(tempfile.mkdtemp(prefix="slmjax-finished-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    lines = (json.dumps({"text": f"{i} green bottles, {i % 7} on the wall"}) for i in range(200))
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def cache() -> dict[str, str]:
    return {"SLMJAX_CACHE": str(out() / "cache")}


@functools.cache
def run(name: str) -> runs.Run:
    """The run of that objective, trained."""
    changes = RUNS[name]
    if changes.get("data.tokenizer"):
        changes = changes | {"data.sources": (str(out() / "text.jsonl"),)}
    made = runs.make_run(changes)
    with mock.patch.dict(os.environ, cache()):
        assert runs.train_here(out(), made) == {made.run_id: "done"}
    return made


def folder(name: str) -> Path:
    return out() / run(name).run_id


def oracle(changes: dict, states: int = 4, seed: int = 0) -> Trained:
    """What is loaded of a run whose model has learnt all that can be known of the chain, at any objective."""
    law = markov.chain(states, seed)
    chain = chains.Chain(law.stationary_S, law.transition_SS)
    changes = {"data.sources": (f"markov:{states}:{seed}",), "data.seq_len": 6, "train.eval_sequences": 128} | changes
    cfg = ladder.resolved(runs.make_config(changes))
    objective = objectives.build(cfg.objective)
    model = _oracle_model(chain, objective.alignment == "shifted")
    asked = denoiser.of_model(model, {}, objective, states)
    known = functools.cache(lambda num=None: data.open_dataset(_with_windows(cfg, num)))
    return Trained(Path("oracle"), cfg, model, objective, {}, 0, lambda: None, lambda: asked, known, lambda: None)


def _with_windows(cfg, num):
    return cfg if num is None else config.override(cfg, {"train.eval_sequences": num})


def _oracle_model(chain: chains.Chain, shifted: bool) -> Model:
    V, posterior = len(chain.start_V), chains.posterior(chain)

    def in_blocks(noisy_BT, clean_BT, block):
        parts = []
        for start in range(0, noisy_BT.shape[1], block):
            shown_BT = np.full_like(noisy_BT, -1)
            shown_BT[:, :start], here = clean_BT[:, :start], slice(start, start + block)
            shown_BT[:, here] = noisy_BT[:, here]
            parts.append(posterior(shown_BT)[:, here])
        return np.concatenate(parts, axis=1)

    def log_probs(tokens_BT, attention):
        tokens_BT, (kind, block) = np.asarray(tokens_BT), parse(attention)
        half = tokens_BT.shape[1] // 2
        if kind == "causal":
            return np.log(chain.rows_VV)[tokens_BT]
        if kind == "block":
            first_BTV = in_blocks(tokens_BT[:, :half], tokens_BT[:, half:], block)
            return np.concatenate([first_BTV, np.zeros_like(first_BTV)], axis=1)
        log_probs_BTV = in_blocks(tokens_BT, tokens_BT, block) if kind == "block_causal" else posterior(tokens_BT)
        return np.roll(log_probs_BTV, -1, axis=1) if shifted else log_probs_BTV

    def hidden(params, tokens_BT, segments_BT, attention):
        def on_host(tokens_BT):
            return log_probs(tokens_BT, attention).astype(np.float32)

        shape = jax.ShapeDtypeStruct((*tokens_BT.shape, V), jnp.float32)
        return jax.pure_callback(on_host, shape, tokens_BT, vmap_method="sequential"), {}

    def unembed(readout, x):
        return x

    return Model(init=None, hidden=hidden, readout=lambda params: (), unembed=unembed, specs={}, rules=None)
