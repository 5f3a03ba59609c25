"""Data order: pure, complete, independent of who asks; documents and splits never mix."""

import json
import math
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax import data as slm_data
from slmjax import tokenizer as tokenizers
from slmjax.config import ConfigError, decay_start, override, resolve
from slmjax.data import cache, embedded, markov, order
from slmjax.data.corpus import is_held_out

T = 16


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLMJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def write_corpus(path, num_documents=150, seed=0):
    """Each document is one character of its own, repeated: whatever mixes documents is seen at once."""
    rng = random.Random(seed)
    with open(path, "w") as file:
        for i in range(num_documents):
            file.write(json.dumps({"text": chr(0x100 + 500 * seed + i) * rng.choice((1, 2, 3, 5, 20))}) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return [write_corpus(folder / f"{i}.jsonl", 150 * (i + 1), seed=i) for i in range(3)]


def config(sources, *, weights=None, decay_weights=(), steps=100, batch=8, **data):
    data = {"tokenizer": "byte", "seq_len": T, "held_out": 0.2, **data}
    weights = weights or (1.0,) * len(sources)
    return resolve({
        "data": {"sources": sources, "weights": weights, "decay_weights": decay_weights, **data},
        "train": {"steps": steps, "batch_size": batch, "eval_sequences": 24},
        "schedule": {"decay_steps": 30},
    })  # fmt: skip


def rows_of(batches):
    return np.concatenate([b.tokens_BT1 for b in batches])


# ------------------------------------------------------------------------------------------------- permutations


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, seed):
    out = order.permute(np.arange(size), size, np.uint64(seed))
    assert np.array_equal(np.sort(out), np.arange(size))


def test_permute_of_a_part_is_part_of_the_permutation_and_sizes_are_unlimited():
    seed = order.key("x")
    assert np.array_equal(
        order.permute(np.array([999, 3]), 1000, seed), order.permute(np.arange(1000), 1000, seed)[[999, 3]]
    )
    huge = 10**12
    out = order.permute(np.arange(huge - 1000, huge), huge, seed)
    assert len(np.unique(out)) == 1000 and out.min() >= 0 and out.max() < huge


def test_permutations_are_uniform():
    # Every index to every place equally often, and neighbours sent apart independently, over many seeds.
    size, trials = 12, 12000
    outs = np.array([order.permute(np.arange(size), size, order.key(i)) for i in range(trials)])
    for i in range(size):
        counts = np.bincount(outs[:, i], minlength=size)
        chi2 = ((counts - trials / size) ** 2 / (trials / size)).sum()
        assert chi2 < 45, (i, counts)  # 11 degrees of freedom: p about 5e-6
    gaps = np.bincount((outs[:, 1] - outs[:, 0]) % size, minlength=size)[1:]
    assert ((gaps - trials / 11) ** 2 / (trials / 11)).sum() < 43


# -------------------------------------------------------------------------------------------------- completeness


@pytest.mark.parametrize("batch", [1, 8, 13])
def test_every_window_once_per_epoch_and_epochs_and_seeds_differ(corpora, batch):
    dataset = slm_data.open_dataset(config(corpora[:1], batch=batch))
    stream = train_stream(corpora[0])
    windows = [tuple(stream[i : i + T + 1]) for i in range(0, len(stream) - T, T)]
    n = len(windows)
    seen = rows_of(dataset.batch_at(step) for step in range(math.ceil(3 * n / batch)))
    epochs = [list(map(tuple, seen[e * n : (e + 1) * n])) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(windows)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = slm_data.open_dataset(config(corpora[:1], batch=batch, seed=1))
    assert not np.array_equal(
        rows_of(other.batch_at(s) for s in range(8)), rows_of(dataset.batch_at(s) for s in range(8))
    )
    assert dataset.epochs_at(7) == pytest.approx(7 * batch / n)


def train_stream(path, held_out=False):
    """The tokens of one split, made the slow way: BOS and bytes of each document in turn."""
    out = []
    for line in Path(path).read_text().splitlines():
        text = json.loads(line)["text"]
        document = slm_data.corpus.Document("", text, text)
        if is_held_out(document, 0.2) == held_out:
            out += [256, *text.encode()]
    return out


def test_batches_do_not_depend_on_who_asked_before(corpora):
    cfg = config(corpora, weights=(0.5, 0.3, 0.2), decay_weights=(0.1, 0.1, 0.8))
    steps = list(range(0, 100, 7))
    straight = {s: b for s in steps for b in [slm_data.open_dataset(cfg).batch_at(s)]}
    dataset = slm_data.open_dataset(cfg)
    for step in random.Random(0).sample(steps * 2, len(steps) * 2):
        for a, b in zip(dataset.batch_at(step), straight[step], strict=True):
            assert a.dtype == np.int32 and a.shape == (8, T + 1) and np.array_equal(a, b)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_rows_of_all_processes_make_the_batch(corpora, processes):
    dataset = slm_data.open_dataset(config(corpora, weights=(2.0, 1.0, 1.0)))
    for step in (0, 3, 50):
        whole, size = dataset.batch_at(step), 8 // processes
        parts = [dataset.batch_at(step, slice(p * size, (p + 1) * size)) for p in range(processes)]
        for i in range(2):
            assert np.array_equal(np.concatenate([part[i] for part in parts]), whole[i])


def test_only_the_rows_asked_for_are_read(corpora, monkeypatch):
    read = []
    cfg = config(["markov:8:0"], tokenizer="none")
    monkeypatch.setattr(
        markov, "sampler", lambda *_: lambda windows: read.append(len(windows)) or np.zeros((len(windows), T + 1))
    )
    dataset = slm_data.open_dataset(cfg)
    read.clear()
    dataset.batch_at(0, slice(2, 5))
    assert read == [3]


def test_prefetch_gives_the_same_batches(corpora):
    dataset = slm_data.open_dataset(config(corpora[:1]))
    ahead = list(slm_data.prefetch(dataset, 5, 25, buffer=4))
    assert [step for step, _ in ahead] == list(range(5, 25))
    for step, batch in ahead:
        assert np.array_equal(batch.tokens_BT1, dataset.batch_at(step).tokens_BT1)


# ------------------------------------------------------------------------------------------------------ mixtures


WEIGHTS = st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.3, 1.0, 2.5]), min_size=2, max_size=4).filter(
    lambda w: sum(w) > 0
)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(6, 33), st.integers(0, 10**7))
def test_mixture_is_within_a_row_of_exact_at_any_step(weights, batch, step):
    counts = order.build_mixture(
        config(["markov:4:0"] * len(weights), weights=weights, batch=batch, tokenizer="none", steps=10**7)
    ).counts
    if step > 10**7 - 30:
        step = 10**7 - 30
    exact = [Fraction(str(w)) / sum(Fraction(str(w)) for w in weights) * step * batch for w in weights]
    got, following = counts(step), counts(step + 1)
    assert sum(got) == step * batch and sum(following) == (step + 1) * batch
    assert all(b >= a for a, b in zip(got, following, strict=True))
    heaviest = weights.index(max(weights))
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        assert abs(a - b) <= (Fraction(len(weights) - 1, 2) if i == heaviest else Fraction(1, 2))


def source_of(row):
    """Which corpus a window is from, told from its characters (bytes of U+0100 + 500 * source ...)."""
    text = bytes(t for t in row if t < 256).decode(errors="ignore")
    return {(ord(c) - 0x100) // 500 for c in text}


def test_phases_switch_at_the_decay_and_positions_continue(corpora):
    cfg = config(corpora, weights=(0.75, 0.25, 0.0), decay_weights=(0.0, 0.25, 0.75))
    start, mixture, dataset = decay_start(cfg), order.build_mixture(cfg), slm_data.open_dataset(cfg)
    assert start == 70
    assert mixture.counts(start) == [420, 140, 0]
    assert mixture.counts(100) == [420, 200, 180]
    before, after = (dataset.batch_at(s).tokens_BT1 for s in (start - 1, start))
    assert sorted(s for row in before for s in source_of(row)) == [0] * 6 + [1] * 2
    assert sorted(s for row in after for s in source_of(row)) == [1] * 2 + [2] * 6
    # Source 1 gives two rows a step and goes on as if it were alone: nothing skipped or repeated at the switch.
    alone = slm_data.open_dataset(config(corpora, weights=(0.0, 1.0, 0.0), batch=1))
    expected = rows_of(alone.batch_at(s) for s in range(200))
    for step in range(100):
        taken = [tuple(row) for row in dataset.batch_at(step).tokens_BT1 if source_of(row) == {1}]
        assert sorted(taken) == sorted(map(tuple, expected[2 * step : 2 * step + 2]))


def test_trunk_and_branch_share_the_stable_phase(corpora):
    trunk, branch = (
        slm_data.open_dataset(config(corpora[:2], weights=(3.0, 1.0), decay_weights=w, steps=steps))
        for w, steps in (((), 200), ((1.0, 3.0), 100))
    )
    for step in range(70):
        assert np.array_equal(trunk.batch_at(step).tokens_BT1, branch.batch_at(step).tokens_BT1)
    assert not np.array_equal(trunk.batch_at(75).tokens_BT1, branch.batch_at(75).tokens_BT1)


def test_rows_of_a_mixed_batch_are_spread(corpora):
    dataset = slm_data.open_dataset(config(corpora[:2], weights=(1.0, 1.0)))
    halves = [sum(0 in source_of(row) for row in dataset.batch_at(s).tokens_BT1[:4]) for s in range(20)]
    assert len(set(halves)) > 2 and abs(sum(halves) / 20 - 2) < 0.7


def test_a_batch_too_small_for_the_mixture_is_refused():
    with pytest.raises(
        ConfigError, match=r"train.batch_size=1 is too small for data.weights=.*use train.batch_size >= 2"
    ):
        order.build_mixture(config(["markov:4:0"] * 3, batch=1, tokenizer="none"))
    with pytest.raises(ConfigError, match=r"data\.decay_weights"):
        order.build_mixture(
            config(
                ["markov:4:0"] * 3, weights=(1.0, 0.0, 0.0), decay_weights=(1.0, 1.0, 1.0), batch=1, tokenizer="none"
            )
        )


# ------------------------------------------------------------------------------- documents, splits and identities


def test_segments_are_single_documents(corpora):
    dataset = slm_data.open_dataset(config(corpora, weights=(1.0, 1.0, 1.0)))
    several = 0
    for batch in [dataset.batch_at(step) for step in range(40)] + [dataset.held_out]:
        for tokens, segments in zip(*batch, strict=True):
            assert segments[0] == 1 and set(np.diff(segments)) <= {0, 1}
            several += segments[-1] > 2
            for segment in range(1, segments[-1] + 1):
                inside = tokens[segments == segment]
                assert (inside[1:] != 256).all() and (segment == 1 or inside[0] == 256)
                # A document repeats one two-byte character, so at most two different bytes follow the BOS.
                assert len(set(inside) - {256}) <= 2
    assert several > 100  # windows do hold several documents, so the above was put to the test


def test_concat_packing_has_one_segment(corpora):
    dataset = slm_data.open_dataset(config(corpora[:1], packing="concat"))
    assert (dataset.batch_at(0).segments_BT1 == 1).all() and (dataset.held_out.segments_BT1 == 1).all()
    assert (dataset.batch_at(0).tokens_BT1 == 256).any()


def characters(rows):
    return set("".join(tokenizers.byte_tokenizer().decode(row).replace("\ufffd", "") for row in rows))


def test_held_out_documents_are_never_trained_on(corpora):
    dataset = slm_data.open_dataset(config(corpora[:1]))
    train = characters(rows_of(dataset.batch_at(step) for step in range(60)))
    held_out = characters(dataset.held_out.tokens_BT1)
    assert len(train) > 30 and len(held_out) > 4 and not train & held_out


def test_held_out_is_untouched_by_seed_steps_and_decay(corpora):
    base = slm_data.open_dataset(config(corpora[:2])).held_out
    for change in ({"seed": 5}, {"steps": 50}, {"decay_weights": (1.0, 9.0)}, {"batch": 4}):
        other = slm_data.open_dataset(config(corpora[:2], **change)).held_out
        assert np.array_equal(base.tokens_BT1, other.tokens_BT1)


def test_held_out_keeps_the_shares_and_says_when_it_is_short(corpora):
    held = slm_data.open_dataset(config(corpora[:2], weights=(1.0, 2.0))).held_out.tokens_BT1
    assert len(held) == 24
    assert sum(source_of(row) == {0} for row in held) == 8
    stream = train_stream(corpora[0], held_out=True)
    cfg = override(config(corpora[:1]), {"train.eval_sequences": 10**6})
    assert len(slm_data.open_dataset(cfg).held_out.tokens_BT1) == (len(stream) - 1) // T
    rows = slm_data.open_dataset(cfg).held_out.tokens_BT1
    assert sorted(map(tuple, rows)) == sorted(tuple(stream[i : i + T + 1]) for i in range(0, len(stream) - T, T))


def test_bytes_per_token_is_that_of_the_windows_evaluated(corpora):
    dataset = slm_data.open_dataset(config(corpora[:1]))
    targets = dataset.held_out.tokens_BT1[:, 1:]
    assert (
        dataset.bytes_per_token == pytest.approx((targets != 256).sum() / targets.size) and dataset.bytes_per_token < 1
    )


def test_bpe_is_trained_on_the_train_split_and_bytes_per_token_are_exact(tmp_path):
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "\u00e9t\u00e9", "x = 1", "\n\n"]
    with open(tmp_path / "words.jsonl", "w") as file:
        for _ in range(400):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=20))}) + "\n")
    cfg = config([str(tmp_path / "words.jsonl")], tokenizer="bpe", vocab_size=300)
    dataset = slm_data.open_dataset(cfg)
    [model] = [p for p in (cache.folder() / "tokenizers").iterdir() if p.suffix == ".model"]
    tokenizer = tokenizers.load(model)
    # A window may begin or end inside a character, whose bytes are then not UTF-8: count those windows' bytes by id.
    sizes = []
    for row in dataset.held_out.tokens_BT1[:, 1:]:
        text = tokenizer.decode(row)
        sizes.append(sum(tokenizer.token_bytes[row]) if "\ufffd" in text else len(text.encode()))
    assert dataset.bytes_per_token == pytest.approx(sum(sizes) / dataset.held_out.tokens_BT1[:, 1:].size)
    documents = [json.loads(line)["text"] for line in (tmp_path / "words.jsonl").read_text().splitlines()]
    kept = [t for t in documents if not is_held_out(slm_data.corpus.Document("", t, t), 0.2)]
    assert tokenizers.train_bpe(kept, 300, tmp_path / "again.model").hash == dataset.fingerprint["tokenizer"]
    assert dataset.vocab_size == 300


def test_fingerprint_is_of_the_text_and_nothing_else(tmp_path, monkeypatch):
    def fingerprint(path):
        return slm_data.open_dataset(config([str(path)])).fingerprint

    path = tmp_path / "a.jsonl"
    write_corpus(path)
    first = fingerprint(path)
    (tmp_path / "elsewhere").mkdir()
    path2 = tmp_path / "elsewhere" / "b.jsonl"
    path2.write_bytes(path.read_bytes())
    path.touch()
    assert fingerprint(path) == fingerprint(path2) == first
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[::-1]))
    reordered = fingerprint(path)
    path.write_text("".join([*lines, '{"text": "one more"}\n']))
    appended = fingerprint(path)
    last = lines[-1]
    path.write_text("".join([*lines[:-1], last[:-3] + "?" + last[-3:]]))
    edited = fingerprint(path)
    assert len({f["corpus"] for f in (first, reordered, appended, edited)}) == 4
    assert len({f["tokenizer"] for f in (first, reordered, appended, edited)}) == 1
    monkeypatch.setenv("SLMJAX_CACHE", str(tmp_path / "another cache"))
    assert fingerprint(path2) == first


def test_markov_dataset_knows_its_entropy():
    dataset = slm_data.open_dataset(config(["markov:16:3"], tokenizer="none"))
    assert dataset.entropy == markov.chain(16, 3).entropy_rate and dataset.vocab_size == 16
    assert dataset.bytes_per_token is None and dataset.epochs_at(10**6) == 0
    rows = rows_of(dataset.batch_at(step) for step in range(50))
    assert len(np.unique(rows, axis=0)) == 400 and (dataset.batch_at(0).segments_BT1 == 1).all()
    assert not {r.tobytes() for r in dataset.held_out.tokens_BT1} & {r.tobytes() for r in rows}
    mixed = slm_data.open_dataset(config(["markov:16:3", "markov:8:1"], tokenizer="none"))
    assert mixed.entropy is None and mixed.vocab_size == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "none"}, "is text; use bpe or byte"),
        ({"seq_len": 10**6}, "fewer than one window"),
        ({"held_out": 1e-9}, "has 0 held_out tokens"),
        ({"tokenizer": "/no/such.model"}, "does not exist"),
        ({"text_key": "txet"}, "no field 'txet'"),
    ],
)
def test_unusable_choices_are_refused(corpora, change, message):
    with pytest.raises(ConfigError, match=message):
        slm_data.open_dataset(config(corpora[:1], **change))


# ---------------------------------------------------------------------------------------------- the embedded text


def test_embedded_splits_share_no_document_and_domains_differ():
    code, prose = (list(embedded.open_embedded(f"stdlib:{d}").documents()) for d in ("code", "prose"))
    both = list(embedded.open_embedded("stdlib").documents())
    assert 4e6 < sum(len(d.text) for d in code) < 4e7 and sum(len(d.text) for d in prose) > 1e6
    assert {d.name for d in both} == {d.name for d in code} | {d.name for d in prose if d.name.startswith("pydoc/")}
    for documents in (code, prose, both):
        held_out, train = ([d for d in documents if is_held_out(d, 0.05) == side] for side in (True, False))
        assert len(held_out) > 5 and not {d.text for d in held_out} & {d.text for d in train}
        assert len({d.text for d in documents}) == len(documents)
    # A docstring goes where its module goes: prose may not reveal what held-out code says.
    side = {d.name: is_held_out(d, 0.05) for d in code}
    docstrings = [d for d in prose if not d.name.startswith("pydoc/")]
    assert len(docstrings) > 1000 and all(d.name.startswith(d.unit) and d.unit in side for d in docstrings)
    assert all(side[d.unit] == is_held_out(d, 0.05) for d in docstrings)
    names = {d.name for d in code}
    assert "stdlib/os.py" in names and not any("/test" in n or "encodings/" in n or "pydoc_data" in n for n in names)


def test_dependencies_are_found_through_metadata(tmp_path, monkeypatch):
    info = tmp_path / "slmjax-0.1.0.dist-info"
    info.mkdir()
    requires = 'Requires-Dist: absl-py>=2.1\nRequires-Dist: pytest; extra == "dev"\n'
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: slmjax\nVersion: 0.1.0\n{requires}")
    monkeypatch.syspath_prepend(str(tmp_path))
    library = {d.name for d in embedded.open_embedded("stdlib:code").documents()}
    added = {d.name for d in embedded.open_embedded("stdlib+deps:code").documents()} - library
    assert "absl/flags/_flag.py" in added and all(name.startswith("absl/") for name in added)
    assert not any("/tests/" in name or name.endswith("_test.py") for name in added)


def test_unknown_embedded_corpora_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'stdlib:prose'"):
        embedded.open_embedded("stdlib:prosa")


def test_the_default_config_opens_and_says_what_it_holds():
    cfg = resolve({})
    dataset = slm_data.open_dataset(cfg)
    assert dataset.vocab_size == 1024 and 2 < dataset.bytes_per_token < 4
    assert dataset.batch_at(0).tokens_BT1.shape == (16, 129) and len(dataset.held_out.tokens_BT1) == 256
    table = slm_data.inspect(cfg)
    assert table.count("\n") == 2 and dataset.fingerprint["tokenizer"] in table
    assert f"{dataset.epochs_at(1000):.3g}" in table.splitlines()[1].split()


def test_inspect_counts_what_is_there(corpora):
    lines = slm_data.inspect(config(corpora[:2])).splitlines()
    for path, line in zip(corpora, lines[1:3], strict=False):
        train, held_out = train_stream(path), train_stream(path, held_out=True)
        documents = Path(path).read_text().count("\n")
        text_bytes = sum(t < 256 for t in train + held_out)
        cells = line.removeprefix(path).replace(",", "").split()
        assert cells[:3] == [str(documents), str(len(train)), str(len(held_out))]
        assert float(cells[3]) == pytest.approx(text_bytes / len(train + held_out), abs=1e-3)
        assert int(cells[4]) == (len(train) - 1) // T
        assert float(cells[5]) == pytest.approx(400 / int(cells[4]), rel=1e-2)
