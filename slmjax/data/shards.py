"""Token shards, the internal format: flat little-endian `.bin` files, memory-mapped, and a `manifest.json` beside them.

The manifest says for each shard how many tokens it holds and what their checksums are. Sizes are compared at every
open. Reading 100 GB back takes minutes, so checksums and the range of the ids are verified once per file identity
(path, size, modification time), and the cache remembers that. Nothing here knows about text.
"""

import hashlib
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slmjax.data import cache
from slmjax.data.corpus import DataError, stamp_files

FORMAT = "slmjax tokens 1"
MANIFEST = "manifest.json"
_CHUNK = 1 << 22  # bytes per crc32: how closely a corrupt shard's fault is located
_DTYPES = {"uint16": "<u2", "uint32": "<u4"}
log = logging.getLogger(__name__)


class Shard(NamedTuple):
    file: str
    tokens: int
    sha256: str
    crc32: list[int]  # of each 4 MiB
    text_bytes: int = 0  # UTF-8 bytes of the text it was made from; 0: unknown
    documents: int = 0


class Manifest(NamedTuple):
    dtype: str  # uint16 or uint32
    vocab_size: int
    bos_id: int | None
    tokenizer: str  # hash
    token_bytes: list[int] | None  # bytes of text per id; None: unknown, and so are bits per byte
    splits: dict[str, list[Shard]]


class Tokens(NamedTuple):
    """One split, as one stream: its shards one after the other."""

    read: Callable  # read(starts int64 [N], length) -> int32 [N, length]
    num_tokens: int
    shards: list[Shard]
    manifest: Manifest
    hash: str  # of the shards' checksums, in order


def dtype_for(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_shard(path: Path, tokens: np.ndarray, vocab_size: int, text_bytes: int = 0, documents: int = 0) -> Shard:
    """Writes one shard, whole or not at all, and returns its line of the manifest.

    Raises:
      ValueError: an id outside [0, vocab_size).
    """
    tokens = np.asarray(tokens)
    outside = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if outside.size:
        raise ValueError(f"{path}: token {outside[0]} is id {tokens[outside[0]]}, outside [0, {vocab_size})")
    data = tokens.astype(_DTYPES[dtype_for(vocab_size)]).tobytes()
    cache.write_atomic(path, data)
    crcs = [zlib.crc32(data[i : i + _CHUNK]) for i in range(0, len(data), _CHUNK)]
    return Shard(path.name, len(tokens), hashlib.sha256(data).hexdigest(), crcs, text_bytes, documents)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    splits = {split: [shard._asdict() for shard in shards] for split, shards in manifest.splits.items()}
    content = {"format": FORMAT, **manifest._asdict(), "splits": splits}
    cache.write_atomic(Path(folder) / MANIFEST, json.dumps(content, indent=1).encode())


def write_shards(
    folder: str | os.PathLike,
    splits: Mapping[str, Iterable[np.ndarray]],
    vocab_size: int,
    *,
    bos_id: int | None = None,
    tokenizer: str = "unknown",
    token_bytes: list[int] | None = None,
) -> Manifest:
    """Writes arrays of token ids as shards, one each, e.g. {"train": [...], "held_out": [...]}; the manifest last."""
    folder = Path(folder)
    written = {
        split: [write_shard(folder / f"{split}-{i:05d}.bin", array, vocab_size) for i, array in enumerate(arrays)]
        for split, arrays in splits.items()
    }
    manifest = Manifest(dtype_for(vocab_size), vocab_size, bos_id, tokenizer, token_bytes, written)
    write_manifest(folder, manifest)
    return manifest


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """The manifest of a folder of shards.

    Raises:
      DataError: missing, not JSON, of another format, or without a field it must have.
    """
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing: shards are read with the manifest that `slmjax data` wrote") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        place = error.start if isinstance(error, UnicodeDecodeError) else error.pos
        raise DataError(f"{path}: byte {place}: not JSON; write it again with `slmjax data`") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: format is {found!r}, not {FORMAT!r}; write the shards again with `slmjax data`")
    try:
        splits = {split: [Shard(**shard) for shard in shards] for split, shards in content.pop("splits").items()}
        manifest = Manifest(splits=splits, **{k: content[k] for k in Manifest._fields if k != "splits"})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: a field is missing or unknown ({error}); write it again with `slmjax data`") from None
    if manifest.dtype not in _DTYPES:
        raise DataError(f"{path}: dtype {manifest.dtype!r} is not one of {', '.join(_DTYPES)}")
    listed = Counter(shard.file for shards in splits.values() for shard in shards)
    for name, times in listed.items():
        if times > 1 or Path(name).name != name:
            raise DataError(f"{path}: shard {name!r} is listed {times} times or is not in this folder")
    return manifest


def read_shards(folder: str | os.PathLike, split: str = "train", only: Iterable[str] | None = None) -> Tokens:
    """Maps a split's shards (those named in `only`, if given) into memory, verified.

    Raises:
      DataError: a shard is missing, of the wrong size, does not match its checksum or holds an id outside the
        vocabulary: with the file and the byte or token.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    if split not in manifest.splits:
        raise DataError(f"{folder / MANIFEST}: no split {split!r} among {sorted(manifest.splits)}; both are needed")
    shards = [s for s in manifest.splits[split] if only is None or s.file in only]
    unlisted = sorted(set(only or ()) - {s.file for group in manifest.splits.values() for s in group})
    if unlisted:
        raise DataError(f"{folder / unlisted[0]} is not listed in {MANIFEST}, so nothing vouches for it; name others")
    arrays = [_open_shard(folder / shard.file, shard, manifest) for shard in shards]
    ends = np.cumsum([0] + [shard.tokens for shard in shards])

    def read(starts_N, length):
        out = np.empty((len(starts_N), length), np.int32)
        first_N = np.searchsorted(ends, starts_N, "right") - 1
        for row, (start, s) in enumerate(zip(starts_N.tolist(), first_N.tolist(), strict=True)):
            filled = 0
            while filled < length:  # a window may begin in one shard and end in another
                offset = start + filled - int(ends[s])
                piece = arrays[s][offset : offset + length - filled]
                out[row, filled : filled + len(piece)] = piece
                filled += len(piece)
                s += 1
        return out

    digest = hashlib.sha256(" ".join(s.sha256 for s in shards).encode()).hexdigest()[:16]
    return Tokens(read, int(ends[-1]), shards, manifest, digest)


def _open_shard(path: Path, shard: Shard, manifest: Manifest) -> np.ndarray:
    dtype = np.dtype(_DTYPES[manifest.dtype])
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path} is missing, but {MANIFEST} lists it; restore it or write the shards again") from None
    expected = shard.tokens * dtype.itemsize
    if size != expected:
        raise DataError(
            f"{path}: ends at byte {size}, not {expected} ({shard.tokens} tokens of {manifest.dtype}): "
            f"{'truncated' if size < expected else 'too long'}; restore it or write the shards again"
        )
    if not size:
        return np.empty(0, dtype)
    # A plain view: slicing a memmap object itself costs several times as much.
    array = np.asarray(np.memmap(path, dtype, "r"))
    identity = (stamp_files([path]), shard.sha256, manifest.vocab_size, manifest.dtype)
    if cache.recall("verified", *identity) is None:
        if size > 1 << 30:
            log.warning("verifying %s (%.1f GB), once", path, size / 1e9)
        _verify(path, array, shard, manifest.vocab_size)
        cache.remember("verified", {"file": str(path)}, *identity)
    return array


def _verify(path: Path, array: np.ndarray, shard: Shard, vocab_size: int) -> None:
    digest, step = hashlib.sha256(), _CHUNK // array.itemsize
    for chunk, start in enumerate(range(0, len(array), step)):
        part = array[start : start + step]
        digest.update(part)
        if chunk >= len(shard.crc32) or zlib.crc32(part) != shard.crc32[chunk]:
            first, last = start * array.itemsize, (start + len(part)) * array.itemsize
            raise DataError(
                f"{path}: bytes {first} to {last} do not match their checksum; restore or rewrite the shard"
            )
        if part.max() >= vocab_size:
            token = start + int(np.argmax(part >= vocab_size))
            raise DataError(
                f"{path}: token {token} (byte {token * array.itemsize}) is id {array[token]}, outside the vocabulary "
                f"of {vocab_size}; was it written with another tokenizer?"
            )
    if digest.hexdigest() != shard.sha256:
        raise DataError(f"{path}: bytes 0 to {array.nbytes} do not match sha256 {shard.sha256[:12]}; restore the shard")
