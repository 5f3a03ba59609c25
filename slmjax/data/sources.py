"""Every entry of `data.sources` as the same thing: numbered windows of T + 1 tokens, to train on and held out."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slmjax import tokenizer as tokenizers
from slmjax.config import ConfigError, DataConfig
from slmjax.data import build, embedded, files, order, shards, synthetic
from slmjax.data.corpus import Corpus
from slmjax.tokenizer import Tokenizer


class Windows(NamedTuple):
    """Window i is tokens [i*T, i*T + T + 1) of a split: the last target of one is the first input of the next."""

    read: Callable  # read(windows int64 [N]) -> int32 [N, T + 1]
    count: int | None  # None: endless
    num_tokens: int | None
    num_documents: int | None
    text_bytes: int | None


class Source(NamedTuple):
    spec: str
    train: Windows
    held_out: Windows
    vocab_size: int
    bos_id: int | None  # None: no documents in it
    token_bytes: np.ndarray | None  # int [V]: bytes of text per id; None: not text, or unknown
    tokenizer: str  # hash
    corpus: str  # hash of the text, or of the tokens where there is no text


def open_sources(data: DataConfig) -> list[Source]:
    """Opens, and where needed builds, every source of `data`, all with one tokenizer.

    Raises:
      ConfigError: an unknown source, a tokenizer that does not fit, or a split with less than one window.
    """
    if synthetic.module_of(data.sources[0]):  # all are, or none: config.validate
        return [_open_synthetic(spec, data.seq_len) for spec in data.sources]
    opened = [_open(spec, data) for spec in data.sources]
    tokenizer = _open_tokenizer(data, [source for source in opened if isinstance(source, Corpus)])
    sources = []
    for spec, source in zip(data.sources, opened, strict=True):
        if isinstance(source, Corpus):
            folder = build.cached_shards(source, tokenizer, data.held_out)
            sources.append(_open_shards(spec, folder, None, data.seq_len)._replace(corpus=build.identify(source)))
        else:
            sources.append(_open_shards(spec, *source, data.seq_len))
    _check_tokenizers(data, sources, tokenizer)
    return sources


def _open(spec: str, data: DataConfig):
    """A Corpus, or (folder, names of the train shards to use or None for all)."""
    if spec.partition(":")[0] in ("stdlib", "stdlib+deps"):
        return embedded.open_embedded(spec)
    kind, paths = files.find(spec)
    if kind != ".bin":
        return files.open_text(spec, data.text_key)
    folders = sorted({path.parent for path in paths})
    if len(folders) > 1:
        raise ConfigError(
            f"data.sources={spec!r} has shards in {len(folders)} folders; name each as a source of its own"
        )
    # Of a whole folder the manifest says what must be there, so that a lost shard is missed.
    return folders[0], None if Path(spec).expanduser().is_dir() else {path.name for path in paths}


def open_tokenizer(data: DataConfig) -> Tokenizer | None:
    """The tokenizer of `data`, without its tokens: of bpe, trained on the text of the sources where it is not cached.

    None: the sources are tokens already, and data.tokenizer does not say whose.

    Raises:
      ConfigError: as `open_sources`.
    """
    if data.tokenizer != "bpe":
        return _open_tokenizer(data, [])
    opened = (_open(spec, data) for spec in data.sources)
    return _open_tokenizer(data, [source for source in opened if isinstance(source, Corpus)])


def _open_tokenizer(data: DataConfig, corpora: list[Corpus]) -> Tokenizer | None:
    if data.tokenizer == "none":
        if corpora:
            raise ConfigError(f"data.tokenizer='none', but data.sources={corpora[0].spec!r} is text; use bpe or byte")
        return None
    if data.tokenizer == "byte":
        return tokenizers.byte_tokenizer()
    if data.tokenizer != "bpe":
        return tokenizers.load(data.tokenizer)
    if not corpora:
        raise ConfigError(f"data.sources={data.sources} are tokens already; use data.tokenizer='none'")
    return build.trained_tokenizer(corpora, data)


def _check_tokenizers(data: DataConfig, sources: list[Source], tokenizer: Tokenizer | None) -> None:
    expected = tokenizer.hash if tokenizer else sources[0].tokenizer
    for source in sources:
        if source.tokenizer != expected:
            raise ConfigError(
                f"data.sources={source.spec!r} was tokenized by {source.tokenizer}, not by {expected} "
                f"({f'data.tokenizer={data.tokenizer!r}' if tokenizer else f'as {sources[0].spec!r} was'}); "
                f"use one tokenizer for all"
            )
        if data.packing == "segments" and source.bos_id is None:
            raise ConfigError(
                f"data.sources={source.spec!r} marks no documents (bos_id is null); use data.packing='concat'"
            )


def _open_shards(spec: str, folder, only: set[str] | None, T: int) -> Source:
    splits = {}
    for split in ("train", "held_out"):
        tokens = shards.read_shards(folder, split, None if split == "held_out" else only)
        if tokens.num_tokens < T + 1:
            raise ConfigError(
                f"data.sources={spec!r} has {tokens.num_tokens} {split} tokens, fewer than one window of data.seq_len="
                f"{T} + 1; give more text, shorter windows, or another data.held_out"
            )
        splits[split] = tokens
    manifest, parts = splits["train"].manifest, (splits["train"].hash, splits["held_out"].hash)
    return Source(
        spec, _windows(splits["train"], T), _windows(splits["held_out"], T), manifest.vocab_size, manifest.bos_id,
        None if manifest.token_bytes is None else np.array(manifest.token_bytes), manifest.tokenizer, "-".join(parts),
    )  # fmt: skip


def _windows(tokens: shards.Tokens, T: int) -> Windows:
    def read(windows_N):
        return tokens.read(windows_N * T, T + 1)

    documents, text_bytes = (sum(getattr(s, field) for s in tokens.shards) for field in ("documents", "text_bytes"))
    return Windows(read, (tokens.num_tokens - 1) // T, tokens.num_tokens, documents or None, text_bytes or None)


def _open_synthetic(spec: str, T: int) -> Source:
    module = synthetic.module_of(spec)
    train, held_out = (
        Windows(module.sampler(spec, split, T + 1), None, None, None, None) for split in ("train", "held_out")
    )
    return Source(spec, train, held_out, module.vocab_size(spec), None, None, "none", spec)


def epochs(sources: list[Source], mixture: order.Mixture, step: int) -> list[float]:
    """Passes over each source's train split after `step` steps; 0 for an endless one."""
    return [n / s.train.count if s.train.count else 0.0 for n, s in zip(mixture.counts(step), sources, strict=True)]
