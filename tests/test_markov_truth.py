"""On a chain whose entropy is known, training reaches it and never passes it: the truth an objective is tested against.

Significantly below the entropy means that the model saw what it was to predict.
"""

import random
import sys
import types

import runs

from slmjax.data import markov
from slmjax.objectives import next_token

LEARNER = {
    "model.width": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.head_dim": 16,
    "model.mlp_width": 64,
    "model.parametrization.base_width": 32,
    "data.seq_len": 32,
    "train.batch_size": 32,
    "train.steps": 800,
    "train.eval_sequences": 16384,
    "schedule.decay_fraction": 0.4,
    "schedule.warmup_steps": 20,
    "schedule.decay_shape": "linear",
    "optim.lr": 0.01,
    "optim.weight_decay": 0.0,
    "mesh.steps_per_dispatch": 32,
    "log.log_every": 100,
}


def train_on_a_chain(folder, seed: int, changes: dict) -> tuple[float, float, float]:
    """(held-out loss, its standard error, entropy) on a chain drawn from `seed`."""
    rng = random.Random(seed)
    states, chain_seed = rng.randrange(8, 25), rng.randrange(10**6)
    changes = (
        LEARNER
        | {
            "data.sources": (f"markov:{states}:{chain_seed}",),
            "model.vocab_size": 24,  # ids that never occur cost nothing in the end, and one program serves every chain
            "train.seed": rng.randrange(1000),
        }
        | changes
    )
    run = runs.make_run(changes)
    runs.train_here(folder, run)
    logged = runs.load(folder, run)
    entropy = markov.chain(states, chain_seed).entropy_rate
    assert logged.start["entropy"] == entropy
    end = logged.end
    print(f"{states} states, chain {chain_seed}: {end['loss']:.4f} ± {end['loss_se']:.4f}, entropy {entropy:.4f}")
    return end["loss"], end["loss_se"], entropy


def test_next_token_reaches_the_entropy_and_does_not_pass_it(tmp_path, seed):
    loss, se, entropy = train_on_a_chain(tmp_path, seed, {})
    assert 0 < se < 0.003, "too few held-out windows to tell"
    assert loss < entropy + 0.01
    assert loss + 3 * se > entropy


def test_a_model_that_sees_the_future_passes_the_entropy(tmp_path, seed, monkeypatch):
    """The negative control: the test above would catch it."""
    cheat = types.ModuleType("cheat.full_attention")
    cheat.build = lambda cfg: next_token.build(cfg)._replace(attention="full")
    monkeypatch.setitem(sys.modules, "cheat.full_attention", cheat)
    loss, se, entropy = train_on_a_chain(tmp_path, seed, {"objective.name": "cheat.full_attention"})
    assert loss + 10 * se < entropy
