"""Accelerated decoding of trained models: the same tokens where that is promised, in fewer calls."""

from functools import partial

import numpy as np
import pytest

from slmjax.check.training import run_config, train_and_load
from slmjax.data import markov, waiting_line
from slmjax.decoding import free_dave, ordered, prophet, threshold
from slmjax.denoiser import Counted
from slmjax.study import Run

MDM = {"objective.name": "masked_diffusion"}


@pytest.mark.slow
def test_free_dave_is_static_decoding_with_fewer_calls(tmp_path, seed):
    spec, T = f"markov:16:{seed % 1000}", 32
    model = train_and_load(Run(run_config(spec, T, 800, MDM)), tmp_path)
    tokens = markov.sampler(spec, "held_out", T + 1)(np.arange(64))[:, 1:].copy()
    tokens[:, 8:] = model.mask_id
    for settings in ({}, {"block": 8}):
        static_calls = fast_calls = 0
        for prompt in tokens:  # one prompt at a time, as it is used
            static, fast = Counted(model.denoiser()), Counted(model.denoiser())
            expected = ordered.static(static, prompt[None], mask_id=model.mask_id, **settings)
            found = free_dave.decode(fast, prompt[None], mask_id=model.mask_id, depth=4, **settings)
            np.testing.assert_array_equal(found.tokens_BT, expected.tokens_BT)
            static_calls, fast_calls = static_calls + static.num_calls, fast_calls + fast.num_calls
        print(f"{settings}: {static_calls} static calls, {fast_calls} of FreeDave: {static_calls / fast_calls:.2f}x")
        assert static_calls >= 1.3 * fast_calls


@pytest.mark.slow
def test_prophet_and_thresholds_answer_a_copy_task_as_static_decoding_does(tmp_path, seed):
    spec = f"line:copy:6:{seed % 1000}"
    line, _ = waiting_line.parse(spec)
    shown = MDM | {"objective.prompt": "shown", "objective.prompt_end": line.separator}
    model = train_and_load(Run(run_config(spec, line.row_len, 1000, shown)), tmp_path)
    tokens = waiting_line.sampler(spec, "held_out", line.row_len + 1)(np.arange(256))[:, 1:].copy()
    tokens[:, line.prompt_len :] = model.mask_id
    static = Counted(model.denoiser())
    expected = ordered.static(static, tokens, mask_id=model.mask_id)
    assert waiting_line.is_valid(line, expected.tokens_BT).mean() > 0.95
    for decode in (prophet.decode, partial(threshold.decode, threshold=0.9)):
        counted = Counted(model.denoiser())
        found = decode(counted, tokens, mask_id=model.mask_id)
        assert (found.tokens_BT == expected.tokens_BT).all(1).mean() > 0.99
        assert counted.num_calls <= 0.7 * static.num_calls
