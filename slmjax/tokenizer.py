"""Text to token ids and back, without loss: SentencePiece BPE with byte fallback, and plain bytes.

Every tokenizer here gives back exactly the text it was given, so that bits per byte mean the same for all of them; a
model file that cannot is refused. Where text comes from and where ids are kept is `slmjax.data`'s business.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from slmjax.config import ConfigError

# SentencePiece writes a space as this character, so the character itself would come back as a space: it is
# kept away from SentencePiece and spelled in byte tokens.
_SPACE_MARK = "\u2581"
# More text than this changes few merges; 8 MB train in about a second.
_TRAINING_CHARS = 8_000_000
_CHUNK_LINES, _CHUNK_CHARS = 8, 4096
_PROBE = " a  b\n\n\tdef f():\r\n  x\u2581\u00e9\u6f22\U0001f389\x00 <s> "


class Tokenizer(NamedTuple):
    """Pure functions and what they promise: decode(encode([text])[0]) == text for every text UTF-8 can write."""

    encode: Callable[[list[str]], list[np.ndarray]]  # int32 ids of each text, without BOS
    decode: Callable[[Iterable[int]], str]  # BOS vanishes; bytes that are not UTF-8 become U+FFFD
    vocab_size: int
    bos_id: int
    token_bytes: np.ndarray  # int32 [V]: bytes of text each id stands for; 0 for BOS
    hash: str  # of the pieces and their scores: equal for equal tokenizers on any machine


def byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are the bytes of UTF-8 and 256 is BOS: a vocabulary of 257, with nothing to train."""

    def encode(texts):
        return [np.frombuffer(_utf8(text), np.uint8).astype(np.int32) for text in texts]

    def decode(ids):
        return bytes(i for i in _checked(ids, 257) if i < 256).decode(errors="replace")

    lengths = np.array([1] * 256 + [0], np.int32)
    return Tokenizer(encode, decode, 257, 256, lengths, hashlib.sha256(b"bytes, BOS 256").hexdigest()[:16])


def load(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a SentencePiece `.model` file.

    Raises:
      ConfigError: missing, not a model, without BOS, or unable to give back what it was given.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"data.tokenizer={str(path)!r} does not exist; use bpe, byte, or a .model file") from None
    except RuntimeError as error:
        raise ConfigError(f"data.tokenizer={str(path)!r} is not a SentencePiece model: {error}") from None
    if processor.bos_id() < 0:
        raise ConfigError(f"data.tokenizer={str(path)!r} has no BOS token; train it with bos_id >= 0")
    tokenizer = _wrap(processor)
    returned = tokenizer.decode(tokenizer.encode([_PROBE])[0])
    if returned != _PROBE:
        raise ConfigError(
            f"data.tokenizer={str(path)!r} turns {_PROBE!r} into {returned!r}: bits per byte need a lossless one; "
            f"train it with byte fallback, identity normalisation and no dummy prefix (slmjax tokenize)"
        )
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | os.PathLike) -> Tokenizer:
    """Trains a lossless BPE tokenizer on `texts` (a sample of about 8 MB when there is more) and writes it to `path`.

    The same texts give the same pieces whatever the machine: the sample depends on the text alone and one thread
    counts. The file appears whole or not at all.

    Raises:
      ConfigError: the text is too small, or has too many different characters, for `vocab_size`.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample(texts)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # runs of spaces: a quarter of the tokens of code otherwise
            unk_id=0,
            bos_id=1,
            eos_id=-1,  # the next document's BOS says that this one ended
            pad_id=-1,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit(") ", 1)[-1].rsplit("] ", 1)[-1].strip() or "no text to train on"
        raise ConfigError(f"data.vocab_size={vocab_size} cannot be trained on this text: {reason}") from None
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(model.getvalue())
    os.replace(partial, path)
    return load(path)


def train_from_files(
    paths: Iterable[str], vocab_size: int, out: str | os.PathLike, text_key: str = "text"
) -> Tokenizer:
    """`train_bpe` on every document of local files, folders or globs (.txt, .jsonl, .jsonl.gz, .parquet)."""
    from slmjax.data import files  # data imports this module

    corpora = [files.open_text(str(path), text_key) for path in paths]
    return train_bpe((document.text for corpus in corpora for document in corpus.documents()), vocab_size, out)


def _wrap(processor) -> Tokenizer:
    V, bos = processor.vocab_size(), processor.bos_id()
    pieces = [processor.id_to_piece(i) for i in range(V)]
    mark_ids = np.array([processor.piece_to_id(f"<0x{b:02X}>") for b in _SPACE_MARK.encode()], np.int32)

    def encode(texts):
        for text in texts:
            _utf8(text)
        parts = [text.split(_SPACE_MARK) for text in texts]
        ids = iter(processor.encode([part for split in parts for part in split]))
        return [_join([np.array(next(ids), np.int32) for _ in split], mark_ids) for split in parts]

    def decode(ids):
        return processor.decode([i for i in _checked(ids, V) if i != bos])

    def num_bytes(i):
        if processor.is_control(i) or processor.is_unknown(i):
            return 0
        return 1 if processor.is_byte(i) else len(pieces[i].replace(_SPACE_MARK, " ").encode())

    identity = json.dumps([(piece, processor.get_score(i)) for i, piece in enumerate(pieces)])
    lengths = np.array([num_bytes(i) for i in range(V)], np.int32)
    return Tokenizer(encode, decode, V, bos, lengths, hashlib.sha256(identity.encode()).hexdigest()[:16])


def _join(parts: list[np.ndarray], between: np.ndarray) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([a for part in parts for a in (part, between)][:-1])


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text has no UTF-8 form: a lone surrogate at character {error.start}") from None


def _checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    ids = [int(i) for i in ids]
    for position, i in enumerate(ids):
        if not 0 <= i < vocab_size:
            raise ValueError(f"token id {i} at position {position} is outside the vocabulary of {vocab_size}")
    return ids


def _sample(texts: Iterable[str]) -> list[str]:
    """Chunks of consecutive lines, at most about `_TRAINING_CHARS` in all, chosen by a hash of their content.

    One pass over any amount of text: when the sample grows to twice its size, the hash has to be half as large. Chunks
    hold several lines so that merges may contain line ends, which saves 4% of the tokens of code.
    """
    kept, total, limit = [], 0, 1 << 64
    for text in texts:
        for chunk in _chunks(text.replace(_SPACE_MARK, "")):
            rank = int.from_bytes(hashlib.blake2b(chunk.encode(), digest_size=8).digest(), "little")
            if rank < limit:
                kept.append((rank, chunk))
                total += len(chunk)
            if total > 2 * _TRAINING_CHARS:
                limit //= 2
                kept = [(r, c) for r, c in kept if r < limit]
                total = sum(len(c) for _, c in kept)
    return [chunk for _, chunk in kept]


def _chunks(text: str) -> Iterator[str]:
    lines, size = [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if len(lines) == _CHUNK_LINES or size >= _CHUNK_CHARS:
            joined = "".join(lines)
            yield from (joined[i : i + _CHUNK_CHARS] for i in range(0, size, _CHUNK_CHARS))
            lines, size = [], 0
    if lines:
        joined = "".join(lines)
        yield from (joined[i : i + _CHUNK_CHARS] for i in range(0, size, _CHUNK_CHARS))
