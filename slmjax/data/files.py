"""Text in local files: .txt, .jsonl, .jsonl.gz, .parquet; one file, a folder or a glob of one kind.

Nothing is repaired or skipped: a line that is not JSON or bytes that are not UTF-8 stop the reading, with the place.
"""

import glob
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from slmjax.config import ConfigError, nearest
from slmjax.data.corpus import Corpus, DataError, Document, stamp_files

# A .txt file is cut at line ends into sections of about this many bytes, so that one long file still splits into
# train and held-out; sections that stay neighbours stay one document.
_SECTION_BYTES = 8192


def find(spec: str) -> tuple[str, list[Path]]:
    """(kind, files) of a path, folder or glob; kind is a key of the readers below, or `.bin`.

    Raises:
      ConfigError: nothing there, or files of several kinds.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        candidates = [p for p in path.rglob("*") if p.is_file()]
    else:
        candidates = [path] if path.is_file() else [Path(p) for p in glob.glob(str(path), recursive=True)]
    by_kind = {}
    for candidate in sorted(candidates):
        kind = next((k for k in (*_READERS, ".bin") if candidate.name.endswith(k)), None)
        if kind and candidate.is_file():
            by_kind.setdefault(kind, []).append(candidate)
    if not by_kind:
        kinds = ", ".join((*_READERS, ".bin"))
        why = f"holds no file of a known kind ({kinds})" if candidates else "does not exist"
        raise ConfigError(f"data.sources={spec!r} {why}; use stdlib, markov:STATES:SEED, or a file, folder or glob")
    if len(by_kind) > 1:
        counts = ", ".join(f"{len(v)} {k}" for k, v in by_kind.items())
        raise ConfigError(
            f"data.sources={spec!r} mixes kinds ({counts}); name one, e.g. {spec.rstrip('/')}/*{next(iter(by_kind))}"
        )
    return next(iter(by_kind.items()))


def open_text(spec: str, text_key: str) -> Corpus:
    """The corpus of text files; every document is held out or not by a hash of its content.

    Content rather than name, so that copies of a document fall on one side and renaming a file changes nothing.

    Raises:
      ConfigError: as `find`, or token shards where text is needed.
      DataError: (while reading) a fault in a file, named with its line or byte.
    """
    kind, paths = find(spec)
    if kind == ".bin":
        raise ConfigError(
            f"data.sources={spec!r} holds token shards, not text; use data.tokenizer='none' to train on it"
        )

    def documents():
        for path in paths:
            yield from _READERS[kind](path, text_key)

    return Corpus(spec, stamp_files(paths, text_key, kind), documents)


def _read_txt(path: Path, text_key: str) -> Iterator[Document]:
    with open(path, "rb") as file:
        offset = 0
        while block := file.read(_SECTION_BYTES):
            block += file.readline(_SECTION_BYTES)
            while (
                len(block) < 2 * _SECTION_BYTES + 4 and (following := file.peek(1)[:1]) and following[0] & 0xC0 == 0x80
            ):
                block += file.read(1)  # a line too long to be kept whole is still not cut inside a character
            try:
                text = block.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: byte {offset + error.start} is not UTF-8 ({error.reason})") from None
            yield Document(f"{path.name}:{offset}", text, text, continues=offset > 0)
            offset += len(block)


def _read_jsonl(path: Path, text_key: str, opener: Callable = open) -> Iterator[Document]:
    with opener(path, "rb") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    text = _parse_line(line, f"{path}: line {number}", text_key)
                    if text:
                        yield Document(f"{path.name}:{number}", text, text)
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: the gzip stream breaks after line {number} ({error}); copy it again") from None


def _read_jsonl_gz(path: Path, text_key: str) -> Iterator[Document]:
    return _read_jsonl(path, text_key, gzip.open)


def _parse_line(line: bytes, where: str, text_key: str) -> str:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}, byte {error.start}: not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}, column {error.colno}: not JSON ({error.msg})") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}, not an object with a {text_key!r} field")
    if text_key not in record:
        raise DataError(f"{where}: no field {text_key!r}; set data.text_key ({nearest(text_key, record)})")
    return _checked(record[text_key], f"{where}: field {text_key!r}")


def _checked(text, where: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{where} holds {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: character {error.start} is a lone surrogate, which UTF-8 cannot write") from None
    return text


def _read_parquet(path: Path, text_key: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{path}: .parquet needs pyarrow; pip install 'slmjax[data]'") from None
    row = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if text_key not in file.schema_arrow.names:
            names = nearest(text_key, file.schema_arrow.names)
            raise DataError(f"{path}: no column {text_key!r}; set data.text_key ({names})")
        for batch in file.iter_batches(1024, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                if text := _checked(text, f"{path}: row {row}, column {text_key!r}"):
                    yield Document(f"{path.name}:{row}", text, text)
                row += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not readable as parquet from row {row} on ({str(error).splitlines()[0]})") from None


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl_gz, ".parquet": _read_parquet}
