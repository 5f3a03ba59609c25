"""What a body of text is to the rest of `data`: named documents, a cheap stamp, and a rule for what is held out."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from slmjax.config import ConfigError


class DataError(ConfigError):
    """Data that must not be trained on. The message is one line: the file, where in it, and the way out."""


class Document(NamedTuple):
    name: str  # for people: where it is from
    text: str
    unit: str  # what is held out together: its hash decides
    continues: bool = False  # follows the previous document of the same file, so no BOS comes between them


class Corpus(NamedTuple):
    spec: str
    stamp: str  # changes whenever a file behind it may have: names, sizes and times, nothing read
    documents: Callable[[], Iterator[Document]]  # the same in the same order at every call


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document is kept for evaluation: a property of its `unit` alone, so no seed or order moves it."""
    rank = hashlib.sha256(b"held-out\0" + document.unit.encode()).digest()[:8]
    return int.from_bytes(rank, "little") < share * 2.0**64


def content_hash(documents: Iterable[Document]) -> Iterator[Document]:
    """Passes documents through and returns (as the generator's value) 16 hexadecimal digits of all they hold."""
    digest = hashlib.sha256()
    for document in documents:
        # Lengths first, or moving a boundary between two documents would not show.
        for part in (document.text.encode(), b"" if document.unit == document.text else document.unit.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
        digest.update(bytes([document.continues]))
        yield document
    return digest.hexdigest()[:16]


def stamp_files(paths: Iterable[str | os.PathLike], *extra) -> str:
    """Hash of each file's absolute path, size and modification time, and of `extra`."""
    digest = hashlib.sha256(repr(extra).encode())
    for path in paths:
        stat = os.stat(path)
        digest.update(f"{Path(path).absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]
