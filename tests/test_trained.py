"""A run is read back as it was trained, from its folder alone and without a trace; what is not it is refused."""

import json
import re
import shutil

import finished
import jax
import numpy as np
import pytest
import runs

from slmjax import program, trained
from slmjax.checkpoint import Checkpointer
from slmjax.config import ConfigError
from slmjax.tokenizer import byte_tokenizer


@pytest.fixture(autouse=True)
def cache_of_this_process(monkeypatch):
    for name, value in finished.cache().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def copied(tmp_path):
    """copied(name): a copy of the run's folder, to spoil."""
    return lambda name: shutil.copytree(finished.folder(name), tmp_path / "out" / finished.run(name).run_id)


def refused(folder, *words: str, step: int | None = None, use=lambda run: run) -> None:
    with pytest.raises(ConfigError) as error:
        use(trained.load(folder, step))
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said


def test_parameters_are_the_running_mean_of_those_trained():
    run = trained.load(finished.folder("next_token"))
    with Checkpointer(run.folder / "checkpoints") as checkpoints:
        _, state, _ = checkpoints.restore(program.abstract_state(run.cfg), 16)
    same = jax.tree.map(np.array_equal, run.params, state.ema)
    assert all(jax.tree.leaves(same)) and len(jax.tree.leaves(same)) > 5
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, run.params, state.params)))
    assert (run.step, run.cfg.model.vocab_size, run.cfg.model.mask_row) == (16, 257, "no")


def test_a_step_can_be_named():
    folder = finished.folder("next_token")
    early, late = trained.load(folder, 8), trained.load(str(folder), 16)
    assert (early.step, late.step) == (8, 16) and trained.load(folder).step == 16
    assert not np.array_equal(early.params["embed"]["table"], late.params["embed"]["table"])
    refused(folder, "step=5", "8, 16", step=5)


def test_reading_leaves_no_trace(copied):
    folder = copied("block_diffusion")
    before = runs.snapshot(folder)
    run = trained.load(folder)
    assert run.denoiser() is run.denoiser() and run.dataset() is run.dataset()
    assert run.tokenizer().hash == byte_tokenizer().hash
    log_probs_BTV = np.asarray(run.denoiser()(np.full((1, 8), run.mask_id)))
    assert log_probs_BTV.shape == (1, 8, 257) and np.allclose(np.exp(log_probs_BTV).sum(-1), 1, atol=1e-5)
    assert len(run.dataset(3).held_out.tokens_BT1) == 3
    assert runs.snapshot(folder) == before


def test_a_folder_of_one_run_stands_for_it(copied, tmp_path):
    folder = copied("masked_diffusion")
    assert trained.load(tmp_path).folder == trained.load(tmp_path / "out").folder == folder
    other = copied("next_token")
    refused(tmp_path, "2 runs", str(folder), str(other))


def test_what_is_no_run_is_refused(copied, tmp_path):
    refused(tmp_path / "nothing", "no folder", "nothing")
    refused(tmp_path, "not the folder of a run", "config.json")
    folder = copied("masked_diffusion")
    shutil.rmtree(folder / "checkpoints")
    refused(folder, "no checkpoint", "train it")


def test_a_damaged_checkpoint_is_refused_and_left_where_it_is(copied):
    folder = copied("next_token")
    largest = max(
        (p for p in (folder / "checkpoints/step-00000016").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    before = runs.snapshot(folder)
    refused(folder, "damaged", "other checkpoints: 8")
    assert runs.snapshot(folder) == before and trained.load(folder, 8).step == 8


def test_data_that_are_not_those_of_training_are_refused(copied):
    folder = copied("next_token")
    said = json.loads((folder / "provenance.json").read_text())
    for what, others in (("corpus", ("tokenizer",)), ("tokenizer", ())):
        spoiled = said | {"data": said["data"] | {what: "0123456789abcdef"}}
        (folder / "provenance.json").write_text(json.dumps(spoiled))
        refused(folder, what, "0123456789abcdef", said["data"][what], use=lambda run: run.dataset())
        if "tokenizer" in others:
            assert trained.load(folder).tokenizer().hash == said["data"]["tokenizer"]
        else:
            refused(folder, what, "0123456789abcdef", use=lambda run: run.tokenizer())
    (folder / "provenance.json").unlink()
    refused(folder, "tokenizer None", use=lambda run: run.dataset())


def test_a_model_that_hides_nothing_is_no_denoiser():
    refused(finished.folder("next_token"), "next_token", "no denoiser", use=lambda run: run.denoiser())
    assert trained.load(finished.folder("masked_diffusion")).tokenizer() is None
    assert re.fullmatch(r"[0-9a-f]{10}", finished.folder("masked_diffusion").name)
