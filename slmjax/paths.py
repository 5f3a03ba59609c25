"""A folder named by a string, on a disk or in an object store (gs://, s3://), and the few things done to both alike.

Object stores come through etils.epath, the path library that Orbax uses, which is imported only for a name with "://".
They have no append, no rename and no lock: an object is written whole, and is seen when it is complete. What must hold
between objects (a checkpoint's files and its digests) is for the order of the writes to give.
"""

import errno
import importlib.util
import itertools
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PACKAGES = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}  # scheme → fsspec's name and our extra; the package
READ_TRIES = 3
NUM_THREADS = 16  # requests in flight: each takes tens of milliseconds and no work

Path = Any  # a pathlib.Path, or the epath.Path of an object store: both have the same methods
_parts = itertools.count()


def as_path(name: str | os.PathLike) -> Path:
    """A pathlib.Path for a plain folder, an epath.Path for a URL; a path is given back as it is.

    Raises:
      ValueError: a scheme that epath does not know, or one whose package is not installed.
    """
    if not isinstance(name, str):
        return name
    if "://" not in name:
        return pathlib.Path(name)
    scheme = name.split("://", 1)[0]
    protocol, package = PACKAGES.get(scheme, (scheme, f"fsspec's package for {scheme}://"))
    try:
        import fsspec
        from etils import epath

        # By default listings are remembered for good: a process that looks twice would not see what others have
        # written since, and would read a rewritten object at the length it had.
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
        path = epath.Path(name)
        if not importlib.util.find_spec("tensorflow"):  # with it, epath asks TensorFlow
            fsspec.get_filesystem_class(protocol)
        return path
    except KeyError:
        raise ValueError(f"{name}: no store has {scheme}://; use gs://, s3://, or a mounted folder") from None
    except ImportError as error:
        raise ValueError(
            f"{name} needs {package}, which is not installed ({error}); pip install 'slmjax[{protocol}]', or mount the "
            "bucket and give its folder"
        ) from None


def is_remote(path: Path) -> bool:
    """Whether every look at it is a request over a network, and nothing there can be renamed."""
    return "://" in os.fspath(path)


def names(folder: Path) -> list[str]:
    """What lies in a folder, sorted; [] when there is none."""
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_bytes(path: Path) -> bytes:
    """A file's content. One that is replaced while it is read is read again."""
    for attempt in range(READ_TRIES):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            # ESTALE: on NFS, of a file that another machine replaces meanwhile.
            if attempt == READ_TRIES - 1 or not (is_remote(path) or error.errno == errno.ESTALE):
                raise
            time.sleep(0.05)


def read_text(path: Path) -> str:
    return read_bytes(path).decode("utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that it is seen whole or not at all, with the folders above it."""
    if is_remote(path):
        path.write_bytes(content)
        return
    with _part(path) as part:
        part.write_bytes(content)


def copy(source: Path, target: Path) -> None:
    """A file of any size from one place to another, seen at `target` when it is all there."""
    if is_remote(target):
        with source.open("rb") as reader, target.open("wb") as writer:
            shutil.copyfileobj(reader, writer, 8 << 20)
        return
    with _part(target) as part, source.open("rb") as reader, part.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 8 << 20)


class _part:
    """A temporary file beside `path`, which takes its name when the block ends well."""

    def __init__(self, path: pathlib.Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Threads of a process may write the same file.
        self.path, self.part = path, path.with_name(f".{path.name}.{os.getpid()}.{next(_parts)}.part")

    def __enter__(self) -> pathlib.Path:
        return self.part

    def __exit__(self, kind, *_):
        if kind is None:
            os.replace(self.part, self.path)
        else:
            self.part.unlink(missing_ok=True)


def each(folder: Path, function: Callable, items: Iterable) -> list:
    """[function(item), ...]: one after another for a plain folder, many at a time where each is a request."""
    if not is_remote(folder):
        return [function(item) for item in items]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(function, items))
