"""Synthetic sources of whole rows: what their rows are, that they are pure functions of their number, their entropy."""

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from slmjax import data as slm_data
from slmjax import ladder
from slmjax.config import ConfigError, resolve
from slmjax.data import markov, pairs, synthetic, waiting_line
from slmjax.data.waiting_line import TASKS, Line

SPECS = ("pairs:30:2:5", "pairs:30:2:5:reverse", *(f"line:{task}:4:3" for task in TASKS))


def row_len(spec: str) -> int:
    parsed = synthetic.module_of(spec).parse(spec)
    return (parsed if spec.startswith("pairs") else parsed[0]).row_len


def read(spec: str, split: str = "train", windows=(0,)) -> np.ndarray:
    """Rows with their start token."""
    return synthetic.module_of(spec).sampler(spec, split, row_len(spec) + 1)(np.asarray(windows))


def config(*sources, **changes):
    data = {"sources": sources, "weights": (1.0,) * len(sources), "tokenizer": "none", "seq_len": row_len(sources[0])}
    return resolve({"data": data | changes, "train": {"steps": 10, "batch_size": 8, "eval_sequences": 24}})


# ---------------------------------------------------------------------------------------------------- waiting lines


def edited(edit: str, items: list, new: int | None, place: int) -> list:
    return {
        "replace": [*items[:place], new, *items[place + 1 :]],
        "insert": [*items[:place], new, *items[place:]],
        "remove": [*items[:place], *items[place + 1 :]],
    }[edit]


def fitting(task: str, row: list) -> list:
    """Which choices make the response of a row of 4 items, written out by hand; none if it is no valid one."""
    items, response = row[:4], row[row.index(8) + 1 :]
    if task in ("copy", "reverse", "sort"):
        return [None] * (response == {"copy": items, "reverse": items[::-1], "sort": sorted(items)}[task])
    if task == "shuffle":
        return [tuple(items.index(item) for item in response)] if sorted(response) == sorted(items) else []
    edit, which = task.split("_")
    new, last = None if edit == "remove" else row[4], row[row.index(8) - 1]
    places = [last] if which == "index" else range(4 + (edit == "insert"))
    return [place for place in places if edited(edit, items, new, place) == response]


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_what_the_task_says(task):
    line, chosen = Line(task, 4), Counter()
    for row in read(f"line:{task}:4:3", windows=range(600)).tolist():
        assert row[0] == line.start == 9 and row.count(9) == 1 and row.count(line.separator) == 1
        prompt, response = row[1 : row.index(8)], row[row.index(8) + 1 :]
        assert len(prompt) + 1 == line.prompt_len and len(response) == line.response_len
        assert len(set(prompt[: 4 + line.brings_item])) == 4 + line.brings_item and max(prompt) < 8
        (choice,) = fitting(task, row[1:])
        chosen[choice] += 1
    assert len(chosen) == {"shuffle": 24, "insert_index": 5, "insert_random": 5}.get(task, 4 if "_" in task else 1)
    assert len(chosen) == 1 or stats.chisquare(list(chosen.values())).pvalue > 1e-6


@pytest.mark.parametrize("task", TASKS)
def test_the_check_agrees_with_the_definition_near_valid_rows(task, seed):
    line, rng = Line(task, 4), np.random.default_rng(seed)
    rows_NT = read(f"line:{task}:4:3", windows=range(2000))[:, 1:]
    assert waiting_line.is_valid(line, rows_NT).all()
    # A third with another item somewhere in the response, a third with two tokens of it exchanged, a third shuffled.
    response_NR = rows_NT[:, line.prompt_len :].copy()
    third_N = np.arange(2000) % 3
    at_N, other_N = rng.integers(line.response_len, size=(2, 2000))
    for row_R, kind, at, other in zip(response_NR, third_N, at_N, other_N, strict=True):
        if kind == 0:
            row_R[at] = rng.integers(8)
        elif kind == 1:
            row_R[[at, other]] = row_R[[other, at]]
        else:
            rng.shuffle(row_R)
    changed_NT = np.concatenate([rows_NT[:, : line.prompt_len], response_NR], axis=1)
    valid_N = waiting_line.is_valid(line, changed_NT)
    assert valid_N.tolist() == [len(fitting(task, row)) > 0 for row in changed_NT.tolist()]
    assert 100 < valid_N.sum() < 1900


def test_items_of_a_line_are_any_in_any_order_whatever_the_line_before():
    items_NI = read("line:copy:3:1", windows=range(12000))[:, 1:4]
    _, counts = np.unique(items_NI, axis=0, return_counts=True)
    assert len(counts) == 6 * 5 * 4 and stats.chisquare(counts).pvalue > 1e-6
    follows_66 = np.zeros((6, 6))
    np.add.at(follows_66, (items_NI[:-1, 0], items_NI[1:, 0]), 1)
    assert stats.chi2_contingency(follows_66).pvalue > 1e-6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("line:copy:4", "line:TASK:N:SEED"),
        ("line:copy:4:x", "line:TASK:N:SEED"),
        ("line:copy:-4:0", "line:TASK:N:SEED"),
        ("line:shufle:4:0", "there is no task 'shufle'"),
        ("line:copy:1:0", "has 1 items; use 2 to"),
        ("pairs:4:2", "pairs:COUNT:LENGTH:SEED"),
        ("pairs:4:2:0:backward", "pairs:COUNT:LENGTH:SEED"),
        ("pairs:4:0:0", "codes of 0 tokens; use 1 to"),
        ("pairs:257:2:0", "has 257 pairs; use 1 to 256"),
        ("pairs:0:2:0", "has 0 pairs"),
    ],
)
def test_malformed_specs_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        synthetic.module_of(spec).parse(spec)


# ------------------------------------------------------------------------------------------------------------ pairs


def test_pairs_are_fixed_and_distinct_and_either_code_determines_the_other():
    rows_NT = read("pairs:200:3:5", "held_out", range(200))
    assert (rows_NT[:, 0] == 33).all() and (rows_NT[:, 4] == 32).all() and rows_NT.shape == (200, 8)
    a_NL, b_NL = rows_NT[:, 1:4], rows_NT[:, 5:]
    assert a_NL.min() == 0 and a_NL.max() == 15 and b_NL.min() == 16 and b_NL.max() == 31
    assert len(np.unique(a_NL, axis=0)) == len(np.unique(b_NL, axis=0)) == 200
    # Nothing but memory relates the codes, and they use all symbols at all places alike.
    assert np.mean(a_NL == b_NL - 16) < 0.12
    assert stats.chisquare(np.bincount(rows_NT[:, [1, 2, 3, 5, 6, 7]].ravel(), minlength=33)[:32]).pvalue > 1e-6
    reverse_NT = read("pairs:200:3:5:reverse", "held_out", range(200))
    assert np.array_equal(reverse_NT[:, 1:4], b_NL) and np.array_equal(reverse_NT[:, 5:], a_NL)
    assert np.array_equal(rows_NT, read("pairs:200:3:5:forward", "held_out", range(200)))
    assert not np.array_equal(rows_NT, read("pairs:200:3:6", "held_out", range(200)))


def test_training_draws_the_pairs_of_the_held_out_rows_uniformly():
    held_out = {row.tobytes() for row in read("pairs:30:2:5", "held_out", range(30))}
    drawn = Counter(row.tobytes() for row in read("pairs:30:2:5", "train", range(9000)))
    assert set(drawn) == held_out and len(held_out) == 30
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-6
    assert np.array_equal(read("pairs:30:2:5", "held_out", [3, 30]), read("pairs:30:2:5", "held_out", [33, 0]))


def test_all_codes_of_a_length_can_be_used():
    assert len({row.tobytes() for row in read("pairs:256:2:1", "held_out", range(256))}) == 256


# ------------------------------------------------------------------------------------------------------ as sources


@pytest.mark.parametrize("spec", SPECS)
def test_windows_do_not_depend_on_how_they_are_asked_for(spec):
    windows = [0, 5, 3, 5, 10**6, 1, 20000]
    together_NT = read(spec, "train", windows)
    assert together_NT.dtype == np.int32 and together_NT.shape == (7, row_len(spec) + 1)
    for i, window in enumerate(windows):
        assert np.array_equal(read(spec, "train", [window]), together_NT[i : i + 1])
    assert len(np.unique(read(spec, "train", range(1000)), axis=0)) > 25


@pytest.mark.parametrize("spec", SPECS)
def test_splits_and_seeds_are_different_draws(spec):
    other = spec.replace(":5", ":6").replace(":4:3", ":4:2")
    draws = [read(spec, "train", range(64)), read(spec, "held_out", range(64)), read(other, "train", range(64))]
    assert len({draw.tobytes() for draw in draws}) == 3


@pytest.mark.parametrize("spec", [*SPECS, "markov:17:3", "line:shuffle:11:0"])
def test_planning_knows_the_vocabulary_of_the_source(spec):
    module = synthetic.module_of(spec)
    known = ladder.vocab_size(resolve({"data": {"sources": (spec,), "tokenizer": "none"}}))
    assert known == module.vocab_size(spec)
    if spec.startswith("markov"):
        return
    tokens = read(spec, "train", range(2000))
    assert tokens.min() == 0 and tokens.max() == known - 1
    with pytest.raises(ConfigError, match=f"seq_len={row_len(spec) + 1} does not fit.*use {row_len(spec)}"):
        module.sampler(spec, "train", row_len(spec) + 2)


def test_the_largest_vocabulary_of_a_mixture_is_the_models():
    cfg = resolve({"data": {"sources": ("markov:8:0", "markov:16:1"), "weights": (1.0, 1.0), "tokenizer": "none"}})
    assert ladder.vocab_size(cfg) == 16


@pytest.mark.parametrize("sources", [("line:copy:4:0", "stdlib"), ("stdlib", "pairs:4:2:0")])
def test_synthetic_sources_are_not_mixed_with_text(sources):
    with pytest.raises(ConfigError, match=r"synthetic sources.*data.tokenizer='none'"):
        resolve({"data": {"sources": sources, "weights": (1.0, 1.0), "tokenizer": "none"}})
    with pytest.raises(ConfigError, match=r"synthetic sources.*data.tokenizer='none'"):
        resolve({"data": {"sources": [source for source in sources if ":" in source], "tokenizer": "byte"}})


@pytest.mark.parametrize("spec", SPECS)
def test_a_dataset_of_one_source_has_whole_rows(spec):
    dataset = slm_data.open_dataset(config(spec))
    assert np.array_equal(dataset.batch_at(2).tokens_BT1, read(spec, "train", range(16, 24)))
    assert np.array_equal(dataset.held_out.tokens_BT1, read(spec, "held_out", range(24)))
    assert (dataset.batch_at(0).segments_BT1 == 1).all()
    assert dataset.vocab_size == synthetic.module_of(spec).vocab_size(spec)


def test_both_directions_of_pairs_can_be_mixed():
    cfg = config("pairs:30:2:5:forward", "pairs:30:2:5:reverse")
    rows_BT = slm_data.open_dataset(cfg).batch_at(0).tokens_BT1
    assert np.sum(rows_BT[:, 1] < 16) == 4 and slm_data.open_dataset(cfg).entropy is None


@pytest.mark.parametrize("spec", ["pairs:30:2:5", *(f"line:{task}:2:3" for task in TASKS)])
def test_the_entropy_is_that_of_the_rows(spec):
    """Of two items all rows are seen; all are equally likely, so the entropy is the logarithm of how many there are."""
    _, counts = np.unique(read(spec, "train", range(20000)), axis=0, return_counts=True)
    if "remove_random" not in spec:
        assert stats.chisquare(counts).pvalue > 1e-6
    dataset = slm_data.open_dataset(config(spec))
    assert dataset.entropy * row_len(spec) == pytest.approx(math.log(len(counts)), abs=1e-12)
    for context in (True, False):  # the start token tells nothing
        assert dataset.entropy == synthetic.module_of(spec).entropy(spec, row_len(spec), context)


def test_entropy_is_not_claimed_where_prompts_are_not_scored():
    cfg = resolve({
        "data": {"sources": ("line:copy:4:3",), "tokenizer": "none", "seq_len": 9},
        "objective": {"prompt": "shown", "prompt_end": 8}, "train": {"steps": 2, "batch_size": 2},
    })  # fmt: skip
    assert slm_data.open_dataset(cfg).entropy is None


def test_draws_are_frozen():
    # Not a property but a promise: if this changes, every run recorded on these sources becomes unrepeatable.
    assert read("line:replace_random:4:0", "train", [7]).tolist() == [[9, 3, 2, 7, 5, 0, 8, 3, 2, 7, 0]]
    assert read("line:shuffle:4:0", "train", [7]).tolist() == [[9, 7, 4, 5, 1, 8, 7, 4, 5, 1]]
    assert read("pairs:1000:4:0", "train", [7]).tolist() == [[33, 9, 3, 13, 5, 32, 21, 19, 17, 26]]
    assert markov.entropy("markov:16:3", 8, context=True) == markov.chain(16, 3).entropy_rate
    assert pairs.entropy("pairs:16:2:0", 5, context=True) == math.log(16) / 5
