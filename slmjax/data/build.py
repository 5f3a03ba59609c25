"""Text into token shards, once: what is built, under which name it is found again, and how a killed build goes on.

A corpus is tokenized in groups of documents. A finished group leaves its shards and a small record, so that the next
attempt starts at the first group without one; the folder gets its final name when everything is in it.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slmjax import tokenizer as tokenizers
from slmjax.config import DataConfig
from slmjax.data import cache, files, shards
from slmjax.data.corpus import Corpus, DataError, Document, content_hash, is_held_out
from slmjax.tokenizer import Tokenizer

GROUP_CHARS = 1 << 27  # of text per pair of shards: the work that a kill can cost
_ENCODE_CHARS = 1 << 22
_SPLITS = ("train", "held_out")
log = logging.getLogger(__name__)


def identify(corpus: Corpus) -> str:
    """The hash of all the corpus says; read once per stamp, remembered afterwards."""
    known = cache.recall("corpora", corpus.stamp)
    if known is None:
        known = {"corpus": _exhaust(content_hash(corpus.documents())), "spec": corpus.spec}
        cache.remember("corpora", known, corpus.stamp)
    return known["corpus"]


def trained_tokenizer(corpora: list[Corpus], data: DataConfig) -> Tokenizer:
    """The BPE tokenizer of the train split of `corpora`, trained once per (text, held-out share, vocabulary)."""
    name = cache.name_of([identify(c) for c in corpora], data.held_out, data.vocab_size)
    path = cache.folder() / "tokenizers" / f"{name}.model"
    if path.exists():
        return tokenizers.load(path)
    with cache.locked(path):
        if path.exists():
            return tokenizers.load(path)
        log.info("training a tokenizer of %d pieces", data.vocab_size)
        documents = (d for c in corpora for d in c.documents() if not is_held_out(d, data.held_out))
        return tokenizers.train_bpe((d.text for d in documents), data.vocab_size, path)


def cached_shards(corpus: Corpus, tokenizer: Tokenizer, held_out: float) -> Path:
    """The folder of the corpus's shards in the cache, built if it is not there yet."""
    name = cache.name_of(shards.FORMAT, identify(corpus), tokenizer.hash, held_out)
    folder = cache.folder() / "tokens" / name
    build(folder, corpus, tokenizer, held_out)
    return folder


def build_shards(
    inputs: str, tokenizer: Tokenizer, out_dir: str | os.PathLike, held_out: float = 0.05, text_key: str = "text"
) -> shards.Manifest:
    """Tokenizes a file, folder or glob of text into a new folder of shards; a second call goes on where one was killed.

    Raises:
      DataError: `out_dir` holds something else, or the text has a fault.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and any(out_dir.iterdir()) and not (out_dir / shards.MANIFEST).exists():
        raise DataError(f"{out_dir} exists and is not a folder of shards; name a new one")
    build(out_dir, files.open_text(inputs, text_key), tokenizer, held_out)
    return shards.read_manifest(out_dir)


def build(folder: Path, corpus: Corpus, tokenizer: Tokenizer, held_out: float) -> None:
    """Tokenizes `corpus` into `folder`, whole or not at all, by one process at a time; done already is done.

    Raises:
      DataError: the folder holds shards of something else, or the text changed between two readings.
    """
    text_hash = identify(corpus)
    recipe = {
        "corpus": text_hash, "tokenizer": tokenizer.hash, "held_out": held_out, "group_chars": GROUP_CHARS,
        "format": shards.FORMAT,
    }  # fmt: skip
    with cache.locked(folder):
        if (folder / shards.MANIFEST).exists():
            _check_recipe(folder, recipe)
            return
        building = folder.with_name(folder.name + ".building")
        if _load(building / "recipe.json") != recipe:
            shutil.rmtree(building, ignore_errors=True)
            cache.write_atomic(building / "recipe.json", json.dumps(recipe).encode())
        for partial in building.glob(".*.partial"):  # of a killed attempt
            partial.unlink()
        log.info("tokenizing %s", corpus.spec)
        documents = content_hash(corpus.documents())
        records, read_hash = _tokenize_groups(building, documents, tokenizer, held_out)
        if read_hash != text_hash:
            cache.forget("corpora", corpus.stamp)
            shutil.rmtree(building)
            raise DataError(f"data.sources={corpus.spec!r}: its text changed while it was tokenized; start again")
        splits = {split: [shards.Shard(**r[split]) for r in records if split in r] for split in _SPLITS}
        shards.write_manifest(
            building,
            shards.Manifest(
                shards.dtype_for(tokenizer.vocab_size), tokenizer.vocab_size, tokenizer.bos_id, tokenizer.hash,
                tokenizer.token_bytes.tolist(), splits,
            ),
        )  # fmt: skip
        for record in building.glob("group-*.json"):
            record.unlink()
        os.rename(building, folder)


def _tokenize_groups(building: Path, documents, tokenizer: Tokenizer, held_out: float) -> tuple[list[dict], str]:
    """(each group's shards by split, hash of everything read); groups with a record are only read over."""
    records = []
    groups = _groups(documents)
    while True:
        try:
            group = next(groups)
        except StopIteration as end:
            return records, end.value
        path = building / f"group-{len(records):05d}.json"
        record = _load(path)
        if record is None:
            record = {}
            for split in _SPLITS:
                tokens, text_bytes, count = _tokenize(group, tokenizer, held_out, split)
                if count:
                    target = building / f"{split}-{len(records):05d}.bin"
                    shard = shards.write_shard(target, tokens, tokenizer.vocab_size, text_bytes, count)
                    record[split] = shard._asdict()
            cache.write_atomic(path, json.dumps(record).encode())
        records.append(record)


def _tokenize(group: list[Document], tokenizer: Tokenizer, held_out: float, split: str):
    """(int32 ids of one split of a group, a BOS before every document; bytes of text; number of documents)."""
    chosen = [(i, d) for i, d in enumerate(group) if is_held_out(d, held_out) == (split == "held_out")]
    bos, parts, text_bytes, starts, previous = np.array([tokenizer.bos_id], np.int32), [], 0, 0, None
    for batch in _batches(chosen):
        for (i, document), ids in zip(batch, tokenizer.encode([d.text for _, d in batch]), strict=True):
            if not document.continues or previous != i - 1:
                parts.append(bos)
                starts += 1
            parts.append(ids)
            text_bytes += len(document.text.encode())
            previous = i
    return np.concatenate(parts or [bos[:0]]), text_bytes, starts


def _batches(documents: list) -> Iterator[list]:
    batch, size = [], 0
    for item in documents:
        batch.append(item)
        size += len(item[1].text)
        if size >= _ENCODE_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


def _groups(documents) -> Iterator[list[Document]]:
    """Documents in lists of at least GROUP_CHARS; returns what `documents` returns."""
    group, size = [], 0
    while True:
        try:
            document = next(documents)
        except StopIteration as end:
            if group:
                yield group
            return end.value
        group.append(document)
        size += len(document.text)
        if size >= GROUP_CHARS:
            yield group
            group, size = [], 0


def _check_recipe(folder: Path, recipe: dict) -> None:
    found = _load(folder / "recipe.json")
    differing = [k for k in recipe if k != "group_chars" and (found or {}).get(k) != recipe[k]]
    if differing:
        raise DataError(
            f"{folder} holds shards of another {', '.join(differing)}; name a new folder or delete this one"
        )


def _load(path: Path) -> dict | None:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def _exhaust(generator):
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value
