"""Tokenizers give back what they were given, are the same every time, and refuse what they cannot do."""

import io
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax import tokenizer as tokenizers
from slmjax.config import ConfigError

WORDS = "def class return self value the of and in to for if else import range print None True name list".split()


def texts(num_texts=60, seed=0):
    """Code-like text: words, indents, digits, line ends."""
    rng = random.Random(seed)
    lines = lambda: "".join(  # noqa: E731
        " " * rng.choice((0, 4, 8)) + " ".join(rng.choices(WORDS, k=6)) + f" = {rng.randrange(1000)}:\n"
        for _ in range(rng.randrange(1, 30))
    )
    return [lines() for _ in range(num_texts)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.model"
    tokenizers.train_bpe(texts(), 400, path)
    return path


@pytest.fixture(scope="module", params=["bpe", "byte"])
def tokenizer(request, model_path):
    return tokenizers.load(model_path) if request.param == "bpe" else tokenizers.byte_tokenizer()


NASTY = [
    "",
    " ",
    "   a  b ",
    "\n\n\n",
    "\t\t x\r\n",
    "\u2581",
    "a\u2581\u2581 b \u2581",
    "\x00\x01",
    "x" * 5000,
    " " * 300,
]
NASTY += [
    "<s></s><unk><0x0A>",
    "\u2585 \u2047 \ufffd \ufeff",
    "\u00e9e\u0301 \u6f22\u5b57 \U0001f389\u200d \u2028 \x85",
]


@pytest.mark.parametrize("text", NASTY)
def test_round_trip_of_the_awkward(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t\u2581ab"))), max_size=4))
def test_round_trip_and_byte_counts_of_any_text(tokenizer, some):
    encoded = tokenizer.encode(some)
    assert len(encoded) == len(some)
    for text, ids in zip(some, encoded, strict=True):
        assert ids.dtype == np.int32
        assert tokenizer.bos_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_bos_is_outside_text_and_vanishes_in_decoding(tokenizer):
    ids = tokenizer.encode(["ab"])[0]
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.bos_id]) == "ab"
    assert 0 <= tokenizer.bos_id < tokenizer.vocab_size == len(tokenizer.token_bytes)
    assert tokenizer.token_bytes[tokenizer.bos_id] == 0


def test_byte_vocabulary_is_257():
    assert tokenizers.byte_tokenizer().vocab_size == 257


def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"id {bad} at position 1"):
            tokenizer.decode([0, bad])


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogate at character 2"):
        tokenizer.encode(["ok", "ab\ud800"])


def test_training_is_deterministic_and_depends_on_text_and_size(tmp_path):
    def trained(some, size):
        return tokenizers.train_bpe(some, size, tmp_path / "t.model").hash

    same = {trained(texts(), 400) for _ in range(3)}
    assert len(same) == 1
    assert same.isdisjoint({trained(texts(), 390), trained(texts(seed=1), 400)})
    assert [p.name for p in tmp_path.iterdir()] == ["t.model"]


def test_bpe_compresses_and_merges_line_ends(model_path):
    tokenizer, held_out = tokenizers.load(model_path), texts(20, seed=9)
    num_tokens = sum(len(ids) for ids in tokenizer.encode(held_out))
    assert sum(len(text.encode()) for text in held_out) > 3 * num_tokens
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    assert any("\n" in processor.id_to_piece(i) for i in range(processor.vocab_size()))


def test_plain_sentencepiece_gives_the_same_ids(model_path):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    some = texts(5, seed=3)
    for text, ids in zip(some, tokenizers.load(model_path).encode(some), strict=True):
        assert processor.encode(text) == ids.tolist()


def test_sample_is_bounded_spread_and_indifferent_to_order(monkeypatch):
    monkeypatch.setattr(tokenizers, "_TRAINING_CHARS", 4000)
    some = texts(200)
    sample = tokenizers._sample(some)
    assert 1500 < sum(map(len, sample)) <= 8000 < sum(map(len, some))
    assert sorted(tokenizers._sample(some[::-1])) == sorted(sample)
    places = [next(i for i, text in enumerate(some) if chunk in text) for chunk in sample]
    assert min(places) < 50 and max(places) >= 150  # not just one end of the text


def test_chunks_lose_nothing():
    text = "a\nb\r\n\n" * 50 + "x" * 20000 + "\n"
    chunks = list(tokenizers._chunks(text))
    assert "".join(chunks) == text and max(map(len, chunks)) <= tokenizers._CHUNK_CHARS


def lossy_model(path, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()), model_writer=model, vocab_size=350, minloglevel=2, hard_vocab_limit=False,
        **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def test_models_that_lose_text_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="lossless"):
        tokenizers.load(lossy_model(tmp_path / "unigram.model"))
    with pytest.raises(ConfigError, match="lossless"):
        tokenizers.load(lossy_model(tmp_path / "dummy.model", model_type="bpe", byte_fallback=True))
    with pytest.raises(ConfigError, match="no BOS"):
        tokenizers.load(lossy_model(tmp_path / "no_bos.model", bos_id=-1))


def test_unusable_model_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        tokenizers.load(tmp_path / "missing.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match=r"bad\.model' is not a SentencePiece model"):
        tokenizers.load(tmp_path / "bad.model")


@pytest.mark.parametrize(("some", "size"), [(["short"], 5000), (texts(), 100), ([], 400)])
def test_untrainable_vocabularies_are_refused_and_leave_no_file(tmp_path, some, size):
    with pytest.raises(ConfigError, match=f"data.vocab_size={size} cannot be trained on this text: .+"):
        tokenizers.train_bpe(some, size, tmp_path / "t.model")
    assert not list(tmp_path.iterdir())


def test_training_from_files_is_training_on_their_text(tmp_path, model_path):
    for i, text in enumerate(texts()):
        (tmp_path / f"{i:03d}.txt").write_text(text)
    trained = tokenizers.train_from_files([str(tmp_path)], 400, tmp_path / "out" / "t.model")
    assert trained.hash == tokenizers.load(model_path).hash
