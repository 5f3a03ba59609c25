"""`slmjax sample`: flags name the decoder that runs, prompts stay, rows keep apart, and no flag is ignored."""

import json

import finished
import numpy as np
import pytest
import runs

from slmjax import cli, environment, sample, trained
from slmjax.config import ConfigError
from slmjax.decoding import ancestral, end_of_text, first_hitting, free_dave, guidance, local_leap, ordered, prophet
from slmjax.decoding import threshold as by_threshold
from slmjax.decoding.cache import Cache
from slmjax.denoiser import PAD
from slmjax.sample import Settings, generate


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(environment, "prepare", lambda *_, **__: None)
    for name, value in finished.cache().items():
        monkeypatch.setenv(name, value)


_loaded = {}


@pytest.fixture
def load(in_this_process):
    """load(name): once, so that a denoiser is compiled once."""

    def load(name: str) -> trained.Trained:
        if name not in _loaded:
            _loaded[name] = trained.load(finished.folder(name))
        return _loaded[name]

    return load


def said(capsys, name: str, *args) -> dict:
    assert cli.main(["sample", str(finished.folder(name)), *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_autoregression_continues_text(capsys):
    before = runs.snapshot(finished.folder("next_token"))
    made = said(capsys, "next_token", "--prompt=3 grün", "--length=6", "--num=3", "--seed=1")
    assert made["decoder"] == "left_to_right" and made["told"] == {"temperature": 1.0, "seed": 1}
    assert (made["deterministic"], made["lossless"], made["num_calls"]) == (False, "the model", 6)
    ids = [256, *"3 grün".encode()]
    assert [row["prompt"] for row in made["samples"]] == [ids] * 3 and made["num_positions"] == 3 * (len(ids) + 5)
    assert len({tuple(row["tokens"]) for row in made["samples"]}) == 3
    assert all(len(row["tokens"]) == 6 for row in made["samples"])
    again = ("--prompt=3 grün", "--length=6", "--num=3")
    assert said(capsys, "next_token", *again, "--seed=1") == made != said(capsys, "next_token", *again, "--seed=2")
    greedy = said(capsys, "next_token", "--prompt=3 grün", "--length=6", "--temperature=0")
    assert greedy["deterministic"] and greedy["lossless"] is None and greedy["told"] == {"temperature": 0.0}
    assert runs.snapshot(finished.folder("next_token")) == before


def test_masked_diffusion_speaks_in_ids_where_it_has_no_text(capsys):
    made = said(capsys, "masked_diffusion", "--tokens=1,2", "--length=8", "--steps=4")
    assert made["decoder"] == "ordered" and made["told"] == {"num_steps": 4} and made["deterministic"]
    assert (made["num_calls"], made["num_positions"], made["lossless"]) == (4, 40, None)
    (row,) = made["samples"]
    assert row["prompt"] == [1, 2] and len(row["tokens"]) == 8 and row["text"] is None
    assert all(0 <= token < 16 for token in row["tokens"])
    unprompted = said(capsys, "masked_diffusion")["samples"][0]
    assert unprompted["prompt"] == [] and len(unprompted["tokens"]) == 16, "as long as its rows were"
    assert said(capsys, "masked_diffusion", "--cache=none", "--accelerate=none")["samples"][0] == unprompted


def test_block_diffusion_continues_prompts_of_a_file(capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("0 green\n17 gr\n1\n")
    made = said(capsys, "block_diffusion", f"--prompts={tmp_path}/prompts.txt", "--length=6", "--cache=blocks")
    assert [bytes(row["prompt"][1:]).decode() for row in made["samples"]] == ["0 green", "17 gr", "1"]
    assert made["told"] == {"per_call": 1, "cache": "blocks"} and made["deterministic"]
    alone = said(capsys, "block_diffusion", "--prompt=17 gr", "--length=6")
    assert alone["samples"] == made["samples"][1:2] and alone["num_positions"] > 6


def test_the_trace_tells_of_every_token_once(capsys):
    args = ("--tokens=5", "--length=6", "--order=ancestral", "--steps=3", "--num=2")
    made = said(capsys, "masked_diffusion", *args, "--trace")
    rows = [row["prompt"] + row["tokens"] for row in made["samples"]]
    assert sorted((line["row"], line["position"]) for line in made["trace"]) == [
        (b, t) for b in (0, 1) for t in range(1, 7)
    ]
    assert all(rows[line["row"]][line["position"]] == line["value"] for line in made["trace"])
    assert all(0 < line["confidence"] <= 1 and 0 <= line["call"] < made["num_calls"] for line in made["trace"])
    assert cli.main(["sample", str(finished.folder("masked_diffusion")), *args, "--trace"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    for part in ("masked_diffusion", "ancestral (num_steps=3, seed=0)", "calls", "positions computed", "another seed",
                 "not lossless"):  # fmt: skip
        assert part in head, head
    assert [list(map(int, line.split())) for line in lines[:2]] == rows
    assert [json.loads(line) for line in lines[2:]] == made["trace"]


MISTAKES = {
    ("next_token", "--prompt=a --order=margin"): ("order='margin'", "no effect", "next_token", "temperature"),
    ("next_token", "--prompt=a --cache=dual"): ("cache='dual'", "no effect"),
    ("next_token", "--prompt=a --threshold=0.9"): ("threshold=0.9", "no effect"),
    ("next_token", "--prompt=a --temperature=0 --num=2"): ("num=2", "equal rows"),
    ("next_token", "--prompt=a --temperature=0 --seed=3"): ("seed=3", "no effect"),
    ("next_token", "--prompt=a --length=16"): ("length=16", "the 17", "at most 15"),
    ("next_token", "--prompt=a --tokens=1"): ("--prompt", "--tokens"),
    ("next_token", "--tokens=1,x"): ("--tokens=1,x", "1,2,3"),
    ("next_token", "--tokens=257"): ("token 257", "0 to 256"),
    ("next_token", "--prompts=no.txt"): ("no.txt", "No such file"),
    ("masked_diffusion", "--prompt=a"): ("'none'", "--tokens"),
    ("masked_diffusion", "--num=2"): ("num=2", "temperature"),
    ("masked_diffusion", "--order=surest"): ("order='surest'", "first_hitting"),
    ("masked_diffusion", "--accelerate=dave"): ("accelerate='dave'", "free_dave"),
    ("masked_diffusion", "--accelerate=free_dave --threshold=0.9"): ("threshold=0.9", "free_dave"),
    ("masked_diffusion", "--accelerate=free_dave --order=margin"): ("order='margin'", "free_dave"),
    ("masked_diffusion", "--threshold=0.9 --temperature=1"): ("temperature=1.0", "threshold"),
    ("masked_diffusion", "--order=ancestral --temperature=0.5"): ("temperature=0.5", "ancestral"),
    ("masked_diffusion", "--order=first_hitting --steps=4"): ("steps=4", "first_hitting"),
    ("masked_diffusion", "--steps=2 --per_call=2"): ("num_steps=2", "per_call=2", "exactly one"),
    ("masked_diffusion", "--cache=dual"): ("cache='dual'", "block"),
    ("masked_diffusion", "--cache=blocks --block=4"): ("'blocks'", "does not fit"),
    ("masked_diffusion", "--accelerate=prophet --cache=dual --block=4"): ("cache='dual'", "prophet"),
    ("masked_diffusion", "--guidance=1 --tokens=1 --cache=dual --block=4"): ("guidance=1", "cache"),
    ("masked_diffusion", "--guidance=1"): ("guidance=1", "without a prompt"),
    ("masked_diffusion", "--end_id=16"): ("end_id=16", "16 tokens"),
    ("masked_diffusion", "--length=0"): ("length=0", ">= 1"),
    ("block_diffusion", "--prompt=a --block=8"): ("block=8", "blocks of 4"),
    ("block_diffusion", "--prompt=a --accelerate=free_dave --cache=blocks"): ("cache='blocks'", "free_dave"),
}


@pytest.mark.parametrize("name, line", MISTAKES, ids=str)
def test_what_has_no_effect_is_refused_in_a_line(name, line, capsys):
    assert cli.main(["sample", str(finished.folder(name)), *line.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    for part in MISTAKES[name, line]:
        assert part in err, err


# ---- which decoder --------------------------------------------------------------------------------------------------

P = np.array([1, 2, 3], np.int32)
BY_HAND = {
    Settings(): ("ordered", lambda d, t, m: ordered.static(d, t, mask_id=m)),
    Settings(order="margin", steps=5, block=4): (
        "ordered", lambda d, t, m: ordered.decode(d, t, mask_id=m, order="margin", num_steps=5, block=4)),
    Settings(order="random", temperature=1.0, seed=4): (
        "ordered", lambda d, t, m: ordered.decode(d, t, mask_id=m, order="random", per_call=1, temperature=1, seed=4)),
    Settings(order="entropy", per_call=3): (
        "ordered", lambda d, t, m: ordered.decode(d, t, mask_id=m, order="entropy", per_call=3)),
    Settings(threshold=0.3, block=4): (
        "threshold", lambda d, t, m: by_threshold.decode(d, t, mask_id=m, threshold=0.3, block=4)),
    Settings(order="ancestral", steps=3, seed=7): (
        "ancestral", lambda d, t, m: ancestral.sample(d, t, mask_id=m, num_steps=3, seed=7)),
    Settings(order="ancestral"): ("ancestral", lambda d, t, m: ancestral.sample(d, t, mask_id=m, num_steps=9)),
    Settings(order="first_hitting", seed=2): (
        "first_hitting", lambda d, t, m: first_hitting.sample(d, t, mask_id=m, seed=2)),
    Settings(accelerate="free_dave", per_call=2): (
        "free_dave", lambda d, t, m: free_dave.decode(d, t, mask_id=m, per_call=2)),
    Settings(accelerate="prophet", block=3): ("prophet", lambda d, t, m: prophet.decode(d, t, mask_id=m, block=3)),
    Settings(accelerate="local_leap", threshold=0.8, block=5): (
        "local_leap", lambda d, t, m: local_leap.decode(d, t, mask_id=m, threshold=0.8, block=5)),
    Settings(end_id=10): ("ordered", lambda d, t, m: end_of_text.stopping(ordered.static, 10)(d, t, mask_id=m)),
    Settings(guidance=1.5): (
        "ordered", lambda d, t, m: ordered.static(guidance.guided(d, t != m, 1.5, m), t, mask_id=m)),
    Settings(guidance=1.5, accelerate="free_dave"): (
        "free_dave", lambda d, t, m: free_dave.decode(guidance.guided(d, t != m, 1.5, m), t, mask_id=m)),
}  # fmt: skip


@pytest.mark.parametrize("settings", BY_HAND, ids=lambda s: " ".join(f"{k}={v}" for k, v in s._asdict().items() if v))
def test_settings_run_the_decoder_that_they_name(settings, load):
    run, (name, decode) = load("masked_diffusion"), BY_HAND[settings]
    made = generate(run, [P], settings._replace(length=9))
    assert made.decoder == name
    by_hand = decode(run.denoiser(), np.array([[*P, *[16] * 9]], np.int32), 16)
    assert np.array_equal(made.decoded.tokens_BT, by_hand.tokens_BT)
    assert len(made.decoded.trace) == len(by_hand.trace)
    assert made.deterministic == (settings.order not in ("random", "ancestral", "first_hitting"))


def test_what_is_lossless_says_so_and_nothing_else(load):
    claims = {
        Settings(): None,
        Settings(threshold=0.5): None,
        Settings(order="ancestral"): None,
        Settings(order="random", temperature=1.0): "the model",
        Settings(order="random", temperature=1.0, per_call=2): None,
        Settings(order="confidence", temperature=1.0): None,
        Settings(order="first_hitting"): "the model",
        Settings(order="first_hitting", guidance=1.0): None,
        Settings(order="first_hitting", end_id=3): None,
        Settings(accelerate="free_dave"): "static decoding",
    }
    for settings, claim in claims.items():
        assert generate(load("masked_diffusion"), [P], settings._replace(length=9)).lossless == claim, settings


def test_work_is_counted_at_the_network(load):
    run = load("masked_diffusion")
    made = generate(run, [P, P[:1]], Settings(length=9))
    assert (made.num_calls, made.num_positions) == (9, 9 * (12 + 10)), "PAD is no work"
    assert generate(run, [P], Settings(length=9, guidance=1.0)).num_calls == 18
    cached = generate(run, [P], Settings(length=9, block=3, cache="dual"))
    assert cached.num_calls == 9 and cached.num_positions == 3 * (12 + 2 * 3)
    by_hand = Cache(run.model, run.params, run.objective, mask_id=16, block=3)
    tokens_BT = ordered.static(by_hand, np.array([[*P, *[16] * 9]], np.int32), mask_id=16, block=3).tokens_BT
    assert np.array_equal(cached.decoded.tokens_BT, tokens_BT) and cached.lossless is None
    drafted = generate(run, [P], Settings(length=9, accelerate="free_dave"))
    assert np.array_equal(drafted.decoded.tokens_BT, generate(run, [P], Settings(length=9)).decoded.tokens_BT)
    assert drafted.num_calls < 9 and drafted.num_positions > drafted.num_calls * 12


# ---- rows -----------------------------------------------------------------------------------------------------------

SETTINGS = {
    "next_token": Settings(length=5, temperature=0.0),
    "masked_diffusion": Settings(length=5, per_call=2),
    "block_diffusion": Settings(length=5),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_prompts_of_unequal_length_come_out_as_they_would_alone(name, load):
    run, settings = load(name), SETTINGS[name]
    prompts = [np.array(ids, np.int32) for ids in ([1, 2, 3, 4, 5, 6, 7], [9, 8], [3, 1, 4, 1])]
    together = generate(run, prompts, settings)
    for b, prompt in enumerate(prompts):
        row_T = together.decoded.tokens_BT[b]
        assert np.array_equal(row_T[: len(prompt)], prompt) and len(together.completions[b]) == 5
        assert (row_T[len(prompt) + 5 :] == PAD).all() and (row_T[: len(prompt) + 5] < run.mask_id).all()
        alone = generate(run, [prompt], settings)
        assert np.array_equal(alone.completions[0], together.completions[b])


def test_copies_of_a_prompt_stand_together(load):
    made = generate(load("masked_diffusion"), [P, P[:1]], Settings(length=9, num=3, order="first_hitting"))
    assert [len(prompt) for prompt in made.prompts] == [3, 3, 3, 1, 1, 1]
    assert len({tuple(row) for row in made.completions}) > 3


def test_a_completion_ends_with_its_end_token(load):
    for name in ("next_token", "masked_diffusion", "block_diffusion"):
        settings = SETTINGS[name]._replace(length=9)
        free = generate(load(name), [P], settings)
        end_id = int(free.completions[0][3])
        (row,) = generate(load(name), [P], settings._replace(end_id=end_id)).completions
        assert row[-1] == end_id and end_id not in row[:-1] and len(row) <= 9


# ---- blocks ---------------------------------------------------------------------------------------------------------


def test_blocks_are_filled_one_after_another_at_the_models_edges(load):
    run = load("block_diffusion")
    prompts = [np.array(ids, np.int32) for ids in ([256, 5, 6], [256, 7, 8, 9], [256])]
    made = generate(run, prompts, Settings(length=8, order="random", temperature=1.0))
    for b, prompt in enumerate(prompts):
        filled = [int(t) for reveal in made.decoded.trace for row, t in zip(*reveal[1:3], strict=True) if row == b]
        assert sorted(filled) == list(range(len(prompt), len(prompt) + 8))
        in_blocks = [t // 4 for t in filled]
        assert in_blocks == sorted(in_blocks) and filled != sorted(filled)
    calls = [reveal.call for reveal in made.decoded.trace]
    assert calls == list(range(made.num_calls))


def test_a_block_depends_on_nothing_behind_it(load):
    run, prompt = load("block_diffusion"), np.array([256, 49], np.int32)
    short, long = (generate(run, [prompt], Settings(length=n)).completions[0] for n in (6, 10))
    assert np.array_equal(short, long[:6])


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(threshold=0.02),
        Settings(order="first_hitting", seed=3),
        Settings(accelerate="prophet"),
        Settings(order="ancestral", steps=2),
    ],
    ids=lambda settings: sample.decoder_of("block_causal", settings),
)
def test_a_cache_of_blocks_changes_nothing_but_the_work(settings, load):
    run = load("block_diffusion")
    prompts = [np.array(ids, np.int32) for ids in ([256, 5, 6], [256, 7, 8, 9], [256])]
    plain = generate(run, prompts, settings._replace(length=8))
    cached = generate(run, prompts, settings._replace(length=8, cache="blocks"))
    assert np.array_equal(cached.decoded.tokens_BT, plain.decoded.tokens_BT)
    assert cached.num_calls == plain.num_calls and cached.num_positions < plain.num_positions
    assert cached.lossless == plain.lossless == (None if settings.order != "first_hitting" else "the model")


def test_every_block_has_noise_of_its_own():
    def flat(tokens_BT):
        return np.full((*tokens_BT.shape, 50), -np.log(50))

    tokens_BT = np.full((1, 16), 50)
    decode = sample.blockwise(first_hitting.sample, 4)
    made = decode(flat, tokens_BT, mask_id=50, seed=1)
    drawn = [[int(v) for r in made.trace[i : i + 4] for v in r.values_N] for i in (0, 4, 8, 12)]
    assert len({tuple(values) for values in drawn}) == 4
    assert np.array_equal(decode(flat, tokens_BT, mask_id=50, seed=1).tokens_BT, made.tokens_BT)


def test_ended_rows_of_block_diffusion_cost_no_call():
    asked = []

    def denoiser(tokens_BT):
        asked.append(np.array(tokens_BT))
        log_probs_BTV = np.full((*tokens_BT.shape, 5), -20.0)
        log_probs_BTV[0, :, 3], log_probs_BTV[1:, :, 1] = 0.0, 0.0  # row 0 ends at once, row 1 never
        return log_probs_BTV

    made = sample.blockwise(ordered.static, 4, end_id=3)(denoiser, np.full((2, 12), 5), mask_id=5)
    assert (made.tokens_BT[0] == 3).all() and (made.tokens_BT[1] == 1).all()
    assert all((tokens_BT[0] != 5).all() for tokens_BT in asked[4:]) and len(asked) == 12
    alone = sample.blockwise(ordered.static, 4, end_id=3)(denoiser, np.full((1, 12), 5), mask_id=5)
    assert len(asked) == 16 and len(alone.trace) == 4


# ---- refusals that no flag alone brings about ------------------------------------------------------------------------


def test_drafts_are_guided_one_row_at_a_time(load):
    with pytest.raises(ConfigError, match=r"guidance=1.0.*takes one row, not 2"):
        generate(load("masked_diffusion"), [P, P], Settings(length=9, guidance=1.0, accelerate="free_dave"))


def test_a_shifted_model_needs_a_first_token():
    run = finished.oracle({"objective.name": "masked_diffusion", "objective.diffusion.alignment": "shifted"})
    with pytest.raises(ConfigError, match=r"shifted.*give a prompt"):
        generate(run, [P[:0]], Settings(length=3))
    made = generate(run, [P[:1]], Settings(length=3, order="first_hitting"))
    assert len(made.completions[0]) == 3


def test_experts_that_choose_among_all_tokens_have_no_memory(load):
    run = load("next_token")
    moe = {"model.moe.num_experts": 4, "model.moe.dispatch": "capacity"}
    with pytest.raises(ConfigError, match=r"'capacity'.*'dropless'"):
        generate(run._replace(cfg=runs.config.override(run.cfg, moe)), [P], Settings(length=3))
