"""`slmjax eval`: every number has its name, and is what training recorded or what is known exactly."""

import json

import chains
import finished
import numpy as np
import pytest
import runs

from slmjax import cli, data, environment, evaluate, trained
from slmjax.config import ConfigError
from slmjax.data import markov, pairs, waiting_line


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(environment, "prepare", lambda *_, **__: None)
    for name, value in finished.cache().items():
        monkeypatch.setenv(name, value)


def said(capsys, *args) -> dict:
    assert cli.main(["eval", *map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- of trained runs ------------------------------------------------------------------------------------------------


def test_an_autoregressive_run_has_the_loss_it_recorded(capsys):
    folder, end = finished.folder("next_token"), runs.load(finished.out(), finished.run("next_token")).end
    before = runs.snapshot(folder)
    for batch in ((), ("--batch=3",)):
        found = said(capsys, folder, *batch)
        for key in ("loss", "loss_se", "bits_per_byte"):
            assert found[key] == pytest.approx(end[key], rel=1e-6), key
        assert (found["estimator"], found["kind"], found["num_draws"], found["step"]) == ("exact", "exact", 0, 16)
        assert found["num_sequences"] == 20 and found["num_tokens"] == 20 * 16
    assert said(capsys, folder, "--step=8")["loss"] > found["loss"] + 0.01
    assert said(capsys, folder, "--sequences=10")["num_tokens"] == 160
    assert runs.snapshot(folder) == before


def test_a_masked_runs_bound_is_that_of_training_with_more_draws(capsys):
    folder, logged = finished.folder("masked_diffusion"), runs.load(finished.out(), finished.run("masked_diffusion"))
    assert said(capsys, folder, "--draws=1")["loss"] == pytest.approx(logged.end["loss"], rel=1e-6)
    found = said(capsys, folder)
    assert (found["estimator"], found["kind"], found["num_draws"]) == ("l_uniform", "bound", 128)
    assert found["entropy"] == logged.start["entropy"] and found["bits_per_byte"] is None
    assert found["loss"] == pytest.approx(said(capsys, folder, "--batch=5")["loss"], rel=1e-5)


@pytest.mark.parametrize("estimator", [*evaluate.OF_OBJECTIVE["masked_diffusion"][:5]])
def test_no_estimate_of_a_masked_run_is_below_the_entropy(estimator, capsys):
    found = said(capsys, finished.folder("masked_diffusion"), f"--estimator={estimator}")
    assert found["estimator"] == estimator
    assert found["loss"] > found["entropy"] - 3 * found["loss_se"] and found["loss_se"] > 0


def test_a_block_diffusion_run_says_whose_bound_it_is(capsys):
    folder, end = finished.folder("block_diffusion"), runs.load(finished.out(), finished.run("block_diffusion")).end
    found = said(capsys, folder, "--draws=1")
    assert found["loss"] == pytest.approx(end["loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(end["bits_per_byte"], rel=1e-6)
    assert (found["estimator"], found["kind"]) == ("block l_uniform", "bound")


def test_words_say_what_the_number_is(capsys):
    assert cli.main(["eval", str(finished.folder("masked_diffusion")), "--draws=4"]) == 0
    text = capsys.readouterr().out
    for part in ("masked_diffusion", "step 24", "l_uniform", "an upper bound, 4 draws", " ± ", "nats per token",
                 "320 tokens of 20 windows", "the source's entropy"):  # fmt: skip
        assert part in text, part
    assert cli.main(["eval", str(finished.folder("next_token"))]) == 0
    text = capsys.readouterr().out
    assert "exact" in text and "bits per byte" in text and "bound" not in text


MISTAKES = {
    ("next_token", "--estimator=l_uniform"): ("'l_uniform'", "next_token", "use exact"),
    ("next_token", "--draws=3"): ("draws=3", "no effect", "'exact'"),
    ("masked_diffusion", "--estimator=exact"): ("'exact'", "l_uniform, bernoulli"),
    ("masked_diffusion", "--estimator=confidence --draws=3"): ("draws=3", "no effect"),
    ("masked_diffusion", "--estimator=antithetic --draws=3"): ("num_draws=3 is odd", "4"),
    ("masked_diffusion", "--draws=0"): ("draws=0", ">= 1"),
    ("block_diffusion", "--estimator=confidence"): ("'confidence'", "l_uniform, left_to_right"),
    ("block_diffusion", "--estimator=left_to_right"): ("hold several", "data.packing"),
    ("masked_diffusion", "--step=5"): ("step=5", "there are: 24"),
}


@pytest.mark.parametrize("name, line", MISTAKES, ids=str)
def test_a_mistake_is_one_line(name, line, capsys):
    assert cli.main(["eval", str(finished.folder(name)), *line.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    for part in MISTAKES[name, line]:
        assert part in err, err


# ---- of a model that knows the truth --------------------------------------------------------------------------------

MASKED, BLOCK = {"objective.name": "masked_diffusion"}, {"objective.name": "block_diffusion"}
ORACLES = {
    "next_token": {},
    "masked_diffusion": MASKED,
    "shifted": MASKED | {"objective.diffusion.alignment": "shifted"},
    "prompts": MASKED | {"objective.prompt": "shown", "objective.prompt_end": 0},
    "one block": BLOCK | {"objective.diffusion.block": 6},
    "blocks of 2": BLOCK | {"objective.diffusion.block": 2},
    "blocks of 1": BLOCK | {"objective.diffusion.block": 1},
}
CASES = [
    (name, estimator)
    for name, changes in ORACLES.items()
    for estimator in evaluate.OF_OBJECTIVE.get(changes.get("objective.name"), ("exact",))
    if name == "masked_diffusion" or estimator not in ("bernoulli", "confidence", "random_order")
]


def truth(run: trained.Trained) -> tuple[np.ndarray, np.ndarray]:
    """(-log p in nats, scored tokens) of each held-out window, written out anew from the chain."""
    law, tokens_MT1 = markov.chain(4, 0), run.dataset().held_out.tokens_BT1
    pairs_MT = -np.log(law.transition_SS)[tokens_MT1[:, :-1], tokens_MT1[:, 1:]]
    first_M = -np.log(law.stationary_S)[tokens_MT1[:, 1]]
    scored_MT = np.ones(pairs_MT.shape, bool)
    if run.objective.alignment == "shifted":
        scored_MT[:, -1] = False
    elif run.cfg.objective.prompt == "shown":
        scored_MT = np.cumsum(tokens_MT1[:, :-1] == 0, 1) - (tokens_MT1[:, :1] == 0) > 0
    elif run.cfg.objective.name != "next_token":
        pairs_MT[:, 0] = first_M
    return (scored_MT * pairs_MT).sum(1), scored_MT.sum(1)


@pytest.mark.parametrize("name, estimator", CASES, ids=lambda part: part.replace(" ", "_"))
def test_of_the_exact_posterior_every_estimator_finds_the_truth(name, estimator):
    run = finished.oracle(ORACLES[name])
    nats_M, num_M = truth(run)
    found = evaluate.held_out(run, estimator, num_draws=32 if estimator in evaluate.DRAWN else None, batch_size=128)
    assert found["num_tokens"] == num_M.sum() and found["num_sequences"] == 128
    loss, entropy = nats_M.sum() / num_M.sum(), found["entropy"]
    if estimator in evaluate.DRAWN and name != "blocks of 1":
        assert found["kind"] == "bound" and found["num_draws"] == 32
        # Paired with the windows' own truth, which leaves the noise of the draws alone: a few times smaller.
        assert abs(found["loss"] - loss) < (0.08 if estimator == "bernoulli" else 0.025), (found["loss"], loss)
    else:  # whatever the order, it is the same product of conditionals
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
    if name == "prompts":
        assert entropy is None
    else:
        assert abs(found["loss"] - entropy) < 3 * found["loss_se"] < 0.15
        assert found["loss"] > entropy - 3 * found["loss_se"]


def test_a_window_of_many_tokens_is_not_enumerated():
    run = finished.oracle(MASKED | {"data.seq_len": 17})
    with pytest.raises(ConfigError, match=r"'exact_bound'.*seq_len=17 has 17.*more than 16; use l_uniform"):
        evaluate.held_out(run, "exact_bound")


def test_a_rows_noise_does_not_depend_on_its_batch():
    run = finished.oracle(MASKED | {"train.eval_sequences": 7})
    losses = {evaluate.held_out(run, "bernoulli", num_draws=8, batch_size=size)["loss"] for size in (2, 7)}
    assert max(losses) - min(losses) < 1e-6
    rows = run.dataset().held_out.tokens_BT1
    same = run._replace(dataset=lambda num: run.dataset()._replace(held_out=data.Batch(rows[[0, 0]], rows[[0, 0]] * 0)))
    again = evaluate.held_out(same, "bernoulli", num_draws=8)
    assert again["loss_se"] > 0, "two rows have one noise"


# ---- the floor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states, seed, T", [(3, 7, 4), (2, 0, 9), (5, 1, 3)])
def test_the_entropy_is_that_of_the_tokens_that_are_scored(states, seed, T):
    law = markov.chain(states, seed)
    log_prob = {
        n: chains.log_prob(chains.Chain(law.stationary_S, law.transition_SS), chains.all_sequences(states, n))
        for n in (1, T, T + 1)
    }
    H = {n: -np.exp(log_p_N) @ log_p_N for n, log_p_N in log_prob.items()}
    source = {"data.sources": (f"markov:{states}:{seed}",), "data.seq_len": T}
    floors = {
        "next_token": (H[T + 1] - H[1]) / T,
        "masked_diffusion": H[T] / T,
        "block_diffusion": H[T] / T,
        "shifted": (H[T] - H[1]) / (T - 1),
    }
    for name, floor in floors.items():
        changes = (
            MASKED | {"objective.diffusion.alignment": "shifted"} if name == "shifted" else {"objective.name": name}
        )
        if name == "block_diffusion":
            changes["objective.diffusion.block"] = 1
        assert data.open_dataset(runs.make_config(source | changes)).entropy == pytest.approx(floor, abs=1e-12), name


ROWS = {
    "pairs:37:2:5": lambda: pairs.rows(pairs.parse("pairs:37:2:5")),
    **{
        f"line:{task}:2:1": lambda task=task: waiting_line.sampler(f"line:{task}:2:1", "train", rows_of(task) + 1)(
            np.arange(60_000)
        )
        for task in waiting_line.TASKS
    },
}


def rows_of(task: str) -> int:
    return waiting_line.parse(f"line:{task}:2:1")[0].row_len


@pytest.mark.parametrize("spec", ROWS)
def test_rows_that_are_whole_have_the_entropy_of_a_row(spec):
    rows_NT1 = ROWS[spec]()
    T = rows_NT1.shape[1] - 1
    _, counts = np.unique(rows_NT1, axis=0, return_counts=True)
    chance = counts / counts.sum()
    changes = MASKED | {"data.sources": (spec,), "data.seq_len": T}
    entropy = data.open_dataset(runs.make_config(changes)).entropy
    assert len(counts) < 200 and entropy * T == pytest.approx(-(chance * np.log(chance)).sum(), abs=2e-3)


@pytest.mark.parametrize("changes", [{"objective.prompt": "shown"}, {"data.sources": ("markov:4:1", "markov:4:2"),
                                     "data.weights": (0.5, 0.5)}])  # fmt: skip
def test_where_the_floor_is_not_known_it_is_not_said(changes):
    assert data.open_dataset(runs.make_config(MASKED | changes)).entropy is None
