"""An object store in memory that epath takes for gs://, by fsspec's own registry: no append, no rename, no folders.

An object appears whole when its writer closes it. Every request is counted and can be told to fail, to be slow, or to
be the one at which its process dies.
"""

import io
import sys
import threading
import time
from unittest import mock

import fsspec.registry  # noqa: F401
import pytest
from fsspec.spec import AbstractFileSystem


class Died(BaseException):
    """The process is dead: nothing it asks of the store after this happens."""


class Bucket:
    """The objects, and what befalls those who ask for them. history: the objects after each change."""

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.times: dict[str, float] = {}
        self.requests: list[tuple[str, str]] = []
        self.history: list[dict[str, bytes]] = []
        self.dies_at: int | None = None
        self.fails = lambda number, what, name: False
        self.slow_s = 0.0
        self.lock = threading.RLock()

    def request(self, what: str, name: str) -> None:
        with self.lock:
            self.requests.append((what, name))
            number = len(self.requests)
        if self.dies_at is not None and number >= self.dies_at:
            raise Died(f"{what} {name}")
        if self.fails(number, what, name):
            raise OSError(f"planned: {what} {name}")
        time.sleep(self.slow_s)

    def change(self, name: str, content: bytes | None) -> None:
        with self.lock:
            if content is None:
                del self.objects[name]
            else:
                self.objects[name], self.times[name] = content, time.time()
            self.history.append(dict(self.objects))

    def names(self, what: str | None = None) -> list[str]:
        """Of the requests of one kind."""
        return [name for kind, name in self.requests if what in (None, kind)]


class Store(AbstractFileSystem):
    """fsspec's view of the bucket of the running test."""

    protocol = ("gs", "gcs")
    bucket: Bucket  # set by the fixture

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path).rstrip("/")
        self.bucket.request("list", path)
        found = {}
        for name, content in list(self.bucket.objects.items()):
            if name.startswith(path + "/"):
                head, *rest = name[len(path) + 1 :].split("/")
                found[head] = self._entry(f"{path}/{head}", None if rest else content)
            elif name == path:
                found[name] = self._entry(name, content)
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else [entry["name"] for entry in found.values()]

    def info(self, path, **_):
        path = self._strip_protocol(path).rstrip("/")
        self.bucket.request("info", path)
        if path in self.bucket.objects:
            return self._entry(path, self.bucket.objects[path])
        if any(name.startswith(path + "/") for name in self.bucket.objects):
            return self._entry(path, None)
        raise FileNotFoundError(path)

    def _entry(self, name, content):
        if content is None:
            return {"name": name, "type": "directory", "size": 0}
        return {"name": name, "type": "file", "size": len(content), "mtime": self.bucket.times[name]}

    def _open(self, path, mode="rb", **_):
        path = self._strip_protocol(path)
        if mode == "rb":
            self.bucket.request("read", path)
            if path not in self.bucket.objects:
                raise FileNotFoundError(path)
            return io.BytesIO(self.bucket.objects[path])
        assert mode == "wb", f"{mode}: an object cannot be appended to"
        return _Writer(self.bucket, path)

    def rm(self, path, recursive=False, **_):
        path = self._strip_protocol(path).rstrip("/")
        doomed = [n for n in sorted(self.bucket.objects) if n == path or (recursive and n.startswith(path + "/"))]
        if not doomed:
            raise FileNotFoundError(path)
        for name in reversed(doomed):  # one by one, in any order: a process may die between them
            self.bucket.request("delete", name)
            self.bucket.change(name, None)

    def makedirs(self, path, exist_ok=False):
        pass

    def mkdir(self, path, create_parents=True, **_):
        pass

    def mv(self, *_, **__):
        raise AssertionError("an object store has no rename")

    rename = mv


class _Writer(io.BytesIO):
    def __init__(self, bucket: Bucket, name: str):
        super().__init__()
        self.bucket, self.name = bucket, name

    def close(self):
        if not self.closed:
            content = self.getvalue()
            super().close()  # first: what fails is not written by the garbage collector either
            self.bucket.request("write", self.name)
            self.bucket.change(self.name, content)


@pytest.fixture
def bucket():
    """Of this test, under gs://."""
    Store.bucket = Bucket()
    Store.clear_instance_cache()
    registry = sys.modules["fsspec.registry"]._registry  # `fsspec.registry` is a view of it
    with mock.patch.dict(registry, {"gs": Store, "gcs": Store}):
        yield Store.bucket
