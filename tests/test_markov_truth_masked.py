"""Masked diffusion on a chain whose entropy is known: how near its bound comes, and what wrong objectives give away.

A constant predictor and a model whose causal mask was left on fail by a wide margin, because chains are drawn until
both floors lie well above the entropy.
"""

import math
import random
import sys
import types

import numpy as np
import pytest
import runs

from slmjax import trained
from slmjax.data import markov
from slmjax.likelihood.monte_carlo import monte_carlo
from slmjax.objectives import masked_diffusion

V, T = 4, 16
LEARNER = {
    "model.width": 48,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
    "model.head_dim": 12,
    "model.mlp_width": 128,
    "model.parametrization.base_width": 48,
    "model.vocab_size": V,
    "data.seq_len": T,
    "train.batch_size": 64,
    "train.steps": 1000,
    "train.eval_sequences": 16384,
    "schedule.warmup_steps": 50,
    "schedule.decay_fraction": 0.5,
    "schedule.decay_shape": "linear",
    "optim.lr": 3e-3,
    "optim.weight_decay": 0.0,
    "mesh.steps_per_dispatch": 50,
    "log.log_every": 100,
}
MDM = {"objective.name": "masked_diffusion", "objective.diffusion.eval_draws": 16}
ONE_OFF = (np.arange(T) + 1) % T
EXPERTS = {"model.moe.num_experts": 4, "model.moe.expert_width": 64}


def floors(law: markov.Chain) -> tuple[float, float, float]:
    """Nats per token of T tokens: (entropy, of a constant predictor, of masked diffusion under a causal mask).

    Causal: sum_i H(X_i) / (i + 1) + sum_{k <= i} H(X_i | X_{i-k}) / (k (k + 1)), i from 0: the nearest shown token
    before a hidden one is k away with that chance, and what comes after is not seen.
    """
    pi, P = law.stationary_S, law.transition_SS
    unigram = -(pi @ np.log(pi))
    given_k = [-(pi @ (p * np.log(p)).sum(1)) for p in (np.linalg.matrix_power(P, k) for k in range(1, T))]
    causal = sum(unigram / (i + 1) + sum(given_k[k - 1] / (k * (k + 1)) for k in range(1, i + 1)) for i in range(T))
    return (unigram + (T - 1) * given_k[0]) / T, unigram, causal / T


def draw_chain(rng: random.Random) -> tuple[str, float, float]:
    while True:
        spec = f"markov:{V}:{rng.randrange(10**6)}"
        entropy, unigram, causal = floors(markov.chain(*markov.parse(spec)))
        if unigram - entropy > 0.15 and causal - entropy > 0.1:
            return spec, entropy, causal


def learn(folder, spec: str, rng: random.Random, changes: dict):
    run = runs.make_run(LEARNER | {"data.sources": (spec,), "train.seed": rng.randrange(1000)} | changes)
    runs.train_here(folder, run)
    return folder / run.run_id, runs.load(folder, run)


def fork(monkeypatch, name: str, change) -> dict:
    """Settings of an objective that is masked diffusion with `change` made to it."""
    module = types.ModuleType(f"wrong.{name}")
    module.build = lambda cfg: change(masked_diffusion.build(cfg))
    monkeypatch.setitem(sys.modules, "wrong", types.ModuleType("wrong"))
    monkeypatch.setitem(sys.modules, f"wrong.{name}", module)
    return MDM | {"objective.name": f"wrong.{name}", "model.mask_row": "yes"}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["dense", "experts"])
def test_the_bound_comes_near_the_entropy_and_never_below_it(changes, tmp_path, seed):
    rng = random.Random(seed)
    spec, entropy, causal = draw_chain(rng)
    folder, logged = learn(tmp_path, spec, rng, MDM | changes)
    assert logged.start["entropy"] == pytest.approx(entropy) and logged.start["loss_kind"] == "bound"
    end = logged.end
    print(f"{spec}: bound {end['loss']:.4f} ± {end['loss_se']:.4f}, entropy {entropy:.4f}, causal floor {causal:.4f}")
    assert -3 * end["loss_se"] < end["loss"] - entropy < 0.03 + 3 * end["loss_se"]
    by_noise = [level for level in logged.train[-1]["loss_by_noise"] if level is not None]
    assert by_noise[-1] > by_noise[0]
    # By another estimator, on sequences of its own.
    model = trained.load(folder)
    x_NT = markov.sampler(spec, "held_out", T + 1)(np.arange(512))[:, 1:]
    found = monte_carlo(model.denoiser(), x_NT, mask_id=V, num_draws=16, estimator="antithetic", rows_per_call=512)
    law = markov.chain(*markov.parse(spec))
    truth_N = -np.log(law.stationary_S)[x_NT[:, 0]] - np.log(law.transition_SS)[x_NT[:, :-1], x_NT[:, 1:]].sum(1)
    gap_N = (found.nats_B - truth_N) / T  # paired with the truth of each sequence: no scatter of the data in it
    assert -3 * gap_N.std() / math.sqrt(512) < gap_N.mean() < 0.03


@pytest.mark.slow
def test_autoregression_on_the_same_chain_is_nearer_still(tmp_path, seed):
    rng = random.Random(seed)
    spec, _, _ = draw_chain(rng)
    _, logged = learn(tmp_path, spec, rng, {})
    rate = markov.chain(*markov.parse(spec)).entropy_rate
    assert -3 * logged.end["loss_se"] < logged.end["loss"] - rate < 0.01 + 3 * logged.end["loss_se"]


@pytest.mark.slow
def test_wrong_objectives_are_seen_by_their_loss(tmp_path, seed, monkeypatch):
    """A causal mask left on cannot go below its floor; labels one off are read where they are shown."""
    rng = random.Random(seed)
    spec, entropy, causal = draw_chain(rng)
    left_on = fork(monkeypatch, "causal", lambda o: o._replace(attention="causal", decoding="causal"))
    end = learn(tmp_path, spec, rng, left_on)[1].end
    assert end["loss"] > causal - 3 * end["loss_se"] and end["loss"] - entropy > 0.08

    def one_off(objective):
        def shift(view):
            return view._replace(targets_BT=view.targets_BT[:, ONE_OFF])

        return objective._replace(
            view=lambda *args: shift(objective.view(*args)), score=lambda *args: shift(objective.score(*args))
        )

    end = learn(tmp_path, spec, rng, fork(monkeypatch, "shift", one_off))[1].end
    assert abs(end["loss"] - entropy) > 0.1
