"""Text that is always there: the running Python's standard library, and slmjax's own dependencies.

`stdlib:code` is every module as it is written; `stdlib:prose` is every docstring once, and pydoc's topics. `stdlib` is
the modules and the topics: the docstrings are in the modules already, and would otherwise be trained on twice.
`stdlib+deps` adds the modules of the installed packages that slmjax requires. All of it depends on the versions
installed, so losses compare only where the corpus hash agrees.
"""

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from slmjax.config import ConfigError, nearest
from slmjax.data.corpus import Corpus, DataError, Document, stamp_files

SPECS = ("stdlib", "stdlib:code", "stdlib:prose", "stdlib+deps", "stdlib+deps:code", "stdlib+deps:prose")
# Tests are stripped from slim images. The codecs are 1.4 MB of near-equal tables, an eighth of everything: they would
# skew both the tokenizer and the loss. pydoc_data is the topics, which are prose. _sysconfigdata is about this machine.
_SKIPPED = re.compile(
    r"(^|/)(tests?|testing|_tests?|idle_test|site-packages|dist-packages|lib2to3|encodings|pydoc_data|__pycache__)/"
    r"|(^|/)(test_[^/]*|_sysconfigdata[^/]*)$|_(test|pb2|pb2_grpc)\.py$"
)


def open_embedded(spec: str) -> Corpus:
    """The corpus of one of `SPECS`.

    Raises:
      ConfigError: not one of them, this Python has no library sources, or slmjax is not installed as a package.
    """
    if spec not in SPECS:
        raise ConfigError(f"data.sources={spec!r} is not known; {nearest(spec, SPECS)}")
    origin, _, domain = spec.partition(":")
    files = _library_files() + (_dependency_files() if origin == "stdlib+deps" else [])
    stamp = stamp_files((path for _, path in files), spec, sys.version)
    readers = {
        "": lambda: (*_modules(files), *_topics()),
        "code": lambda: _modules(files),
        "prose": lambda: (*_docstrings(files), *_topics()),
    }

    def documents():
        distinct = {}  # by text, the first to have it: a copy could be trained on while its twin is held out
        for document in readers[domain]():
            distinct.setdefault(document.text, document)
        # By hash of the name: neighbours in the alphabet resemble each other, and neighbouring windows should not.
        return iter(sorted(distinct.values(), key=lambda d: hashlib.sha256(d.name.encode()).digest()))

    return Corpus(spec, stamp, documents)


def _library_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").exists():
        raise ConfigError(f"data.sources=stdlib: {root} holds no .py sources; use a Python that ships them, or files")
    found = []
    for folder, subfolders, names in os.walk(root):
        relative = Path(folder).relative_to(root)
        subfolders[:] = [s for s in subfolders if not _SKIPPED.search(f"{(relative / s).as_posix()}/")]
        found += [(relative / name).as_posix() for name in names if name.endswith(".py")]
    return [(f"stdlib/{name}", root / name) for name in sorted(found) if not _SKIPPED.search(name)]


def _dependency_files() -> list[tuple[str, Path]]:
    """(name, path) of the modules of every package slmjax requires, directly or through another."""
    try:
        waiting, seen = importlib.metadata.requires("slmjax") or [], set()
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("data.sources=stdlib+deps needs slmjax installed as a package: pip install -e .") from None
    found = {}
    while waiting:
        requirement = waiting.pop()
        package = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
        if package in seen or "extra ==" in requirement:
            continue
        seen.add(package)
        try:
            distribution = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # required on another platform or Python only; the corpus hash says what was there
        waiting += distribution.requires or []
        for file in distribution.files or []:
            if file.suffix == ".py" and not _SKIPPED.search(file.as_posix()) and ".." not in file.parts:
                found[file.as_posix()] = Path(file.locate())
    return [(name, path) for name, path in sorted(found.items()) if path.exists()]


def _modules(files: list[tuple[str, Path]]) -> Iterator[Document]:
    for name, path in files:
        try:
            text = importlib.util.decode_source(path.read_bytes())  # heeds an encoding declared in the first lines
        except (UnicodeDecodeError, SyntaxError) as error:
            raise DataError(f"{path}: cannot be decoded ({error}); reinstall the package it belongs to") from None
        if text.strip():
            yield Document(name, text, name)


def _docstrings(files: list[tuple[str, Path]]) -> Iterator[Document]:
    """Every docstring, held out exactly if its module is: the same words must not be on both sides."""
    for module in _modules(files):
        for name, node in _definitions(module.name, _parse(module.text)):
            text = ast.get_docstring(node)
            if text:
                yield Document(name, text + "\n", module.unit)


def _parse(source: str) -> ast.Module:
    """The module, or an empty one for what is no Python of this version: a template has no docstrings to find."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # other people's escapes
        try:
            return ast.parse(source)
        except SyntaxError:
            return ast.Module([], [])


def _definitions(name: str, node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    yield name, node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(f"{name}#{child.name}", child)


def _topics() -> Iterator[Document]:
    for topic, text in importlib.import_module("pydoc_data.topics").topics.items():
        yield Document(f"pydoc/{topic}", text, f"pydoc/{topic}")
