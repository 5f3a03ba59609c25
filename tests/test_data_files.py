"""Every format gives the same documents; what is broken is refused by file and place; builds survive kills."""

import gzip
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slmjax import data as slm_data
from slmjax.config import ConfigError, resolve
from slmjax.data import build, cache, files, shards
from slmjax.data.corpus import is_held_out
from slmjax.tokenizer import byte_tokenizer

TEXTS = ["first\n", "d\u00e9j\u00e0 vu \U0001f389", "tabs\t and\r\n line ends\n\n", "x" * 30000, "last"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLMJAX_CACHE", str(tmp_path / "cache"))


def write(path, texts=TEXTS, key="text"):
    """`texts` as one file of the kind that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"id": i, key: t}) + "\n" for i, t in enumerate(texts)).encode()
    if path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": range(len(texts)), key: texts}), path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def read(spec, key="text"):
    return [d.text for d in files.open_text(str(spec), key).documents()]


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".parquet"])
def test_every_kind_gives_the_same_documents(tmp_path, kind):
    path = write(tmp_path / f"data{kind}", [*TEXTS, ""], key="body")
    assert read(path, "body") == TEXTS  # an empty text has no tokens and is no document
    write(tmp_path / "more" / "b" / f"1{kind}", TEXTS[:2], "body")
    write(tmp_path / "more" / f"a{kind}", TEXTS[2:], "body")
    (tmp_path / "more" / "README").write_text("not data")
    assert read(tmp_path / "more", "body") == TEXTS[2:] + TEXTS[:2]
    assert read(f"{tmp_path}/more/b/*{kind}", "body") == TEXTS[:2]


def test_long_txt_is_cut_at_line_ends_and_loses_nothing(tmp_path):
    rng = random.Random(0)
    text = "".join("\u00e9\u6f22x"[rng.randrange(3)] * rng.randrange(200) + "\r\n" for _ in range(2000))
    (tmp_path / "book.txt").write_bytes(text.encode())
    documents = list(files.open_text(str(tmp_path / "book.txt"), "text").documents())
    assert "".join(d.text for d in documents) == text and len(documents) > 20
    assert all(d.text.endswith("\n") for d in documents)
    assert [d.continues for d in documents] == [False] + [True] * (len(documents) - 1)
    (tmp_path / "one_line.txt").write_bytes(("a" + "\u6f22" * 40000).encode())
    assert "".join(read(tmp_path / "one_line.txt")) == "a" + "\u6f22" * 40000


def test_neighbouring_sections_of_a_file_are_one_document(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"line {i} of the only book\n" for i in range(20000)))
    corpus = files.open_text(str(tmp_path / "book.txt"), "text")
    folder = build.cached_shards(corpus, byte_tokenizer(), 0.1)
    tokens = shards.read_shards(folder, "train")
    sides = [is_held_out(d, 0.1) for d in corpus.documents()]
    runs = sum(not side and (i == 0 or sides[i - 1]) for i, side in enumerate(sides))
    assert 1 < runs < sides.count(False)
    stream = tokens.read(np.array([0]), tokens.num_tokens)[0]
    assert (stream == 256).sum() == runs


FAULTS = {
    "bad json": ("a.jsonl", b'{"text": "ok"}\n{"text": oops}\n', r"a\.jsonl: line 2, column 10: not JSON"),
    "cut json": ("a.jsonl", b'{"text": "ok"}\n\n{"text": "en', r"a\.jsonl: line 3, column 10: not JSON"),
    "not utf-8": ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', r"a\.jsonl: line 2, byte 10: not UTF-8"),
    "no object": ("a.jsonl", b"[1, 2]\n", r"a\.jsonl: line 1: a JSON list"),
    "no field": ("a.jsonl", b'{"test": "x"}\n', r"line 1: no field 'text'; set data.text_key \(did you mean 'test'"),
    "not text": ("a.jsonl", b'{"text": null}\n', r"a\.jsonl: line 1: field 'text' holds NoneType"),
    "surrogate": ("a.jsonl", b'{"text": "ab\\ud800"}\n', r"a\.jsonl: line 1: field 'text': character 2 is a lone surr"),
    "txt bytes": ("a.txt", b"ok\n" * 5000 + b"\xff\xfe", r"a\.txt: byte 15000 is not UTF-8"),
    "cut gzip": (
        "a.jsonl.gz",
        gzip.compress(b'{"text": "ok"}\n' * 9)[:-9],
        r"a\.jsonl\.gz: the gzip stream breaks after",
    ),
    "no gzip": ("a.jsonl.gz", b'{"text": "ok"}\n', r"a\.jsonl\.gz: the gzip stream breaks after line 0"),
    "no parquet": ("a.parquet", b"PAR1 but no more", r"a\.parquet: not readable as parquet from row 0"),
}


@pytest.mark.parametrize(("name", "content", "message"), FAULTS.values(), ids=FAULTS)
def test_broken_text_is_refused_with_file_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(slm_data.DataError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(slm_data.DataError, match=message):
        slm_data.open_dataset(resolve({"data": {"sources": [str(tmp_path / name)], "tokenizer": "byte"}}))


def test_parquet_columns_are_checked(tmp_path):
    path = write(tmp_path / "a.parquet", ["x", None, "y"])
    with pytest.raises(slm_data.DataError, match=r"a\.parquet: row 1, column 'text' holds NoneType"):
        read(path)
    with pytest.raises(slm_data.DataError, match=r"no column 'texts'; set data.text_key \(did you mean 'text'"):
        read(path, "texts")


def test_missing_pyarrow_names_the_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'slmjax\[data\]'"):
        read(path)


def test_places_without_one_kind_of_text_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist; use stdlib"):
        files.find(str(tmp_path / "nothing*.jsonl"))
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(ConfigError, match="holds no file of a known kind"):
        files.find(str(tmp_path))
    write(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"mixes kinds \(1 .jsonl, 1 .txt\)"):
        files.find(str(tmp_path))


# -------------------------------------------------------------------------------------------------------- building

# A build of several groups in a process of its own, which a patch below can kill, slow down or count.
CHILD = """
import os, signal, sys, time
from pathlib import Path
from slmjax.data import build, cache, shards
from slmjax.tokenizer import byte_tokenizer
build.GROUP_CHARS = 3000
{patch}
build.build_shards({source!r}, byte_tokenizer(), {out!r}, 0.2)
"""
# Dies at the n-th rename, of a file or of the whole folder, as if half-way through writing what would be renamed.
KILL = """
real, calls = os.replace, 0
def deadly(*a):
    global calls
    calls += 1
    if calls == {n}:
        if os.path.isfile(a[0]):
            os.truncate(a[0], os.path.getsize(a[0]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    real(*a)
os.replace = os.rename = deadly
"""
SLOW = """
real = shards.write_shard
def slow(*a):
    time.sleep(.2)
    print("wrote", flush=True)
    return real(*a)
shards.write_shard = slow
"""


def source(tmp_path):
    rng = random.Random(1)
    return str(write(tmp_path / "text.jsonl", [f"{i} " * rng.randrange(1, 60) for i in range(150)]))


def child(tmp_path, out, patch=""):
    code = CHILD.format(patch=patch, source=source(tmp_path), out=str(out))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def digest(folder):
    """Hash of every file of a folder, names included."""
    found = sorted((p.name, p.read_bytes()) for p in Path(folder).iterdir())
    assert found
    return hashlib.sha256(repr(found).encode()).hexdigest()


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Digest of the shards of one build that nothing disturbed."""
    monkeypatch.setattr(build, "GROUP_CHARS", 3000)
    build.build_shards(source(tmp_path), byte_tokenizer(), tmp_path / "straight", 0.2)
    assert len(list((tmp_path / "straight").glob("train-*.bin"))) > 3
    return digest(tmp_path / "straight")


def test_a_build_killed_anywhere_goes_on_and_ends_the_same(tmp_path, built, monkeypatch):
    out = tmp_path / "shards"
    kept = []
    for n in (1, 2, 4, 5, 3, 6):
        process = child(tmp_path, out, KILL.format(n=n))
        process.communicate()
        assert process.returncode == -9 and not out.exists()
        kept.append(len(list(tmp_path.glob("shards.building/group-*.json"))))
    assert kept == sorted(kept) and kept[-1] >= 2
    written, real = [], shards.write_shard
    monkeypatch.setattr(shards, "write_shard", lambda path, *rest: written.append(path.name) or real(path, *rest))
    build.build_shards(source(tmp_path), byte_tokenizer(), out, 0.2)
    assert digest(out) == built
    redone = {name for name in written if int(name.split("-")[1][:5]) < kept[-1]}
    assert written and not redone, "finished groups are not done again"


def test_a_build_killed_at_its_last_rename_is_finished_by_the_next(tmp_path, built):
    process = child(tmp_path, tmp_path / "shards", KILL.format(n=1).replace("os.replace = os.rename", "os.rename"))
    process.communicate()
    assert process.returncode == -9 and (tmp_path / "shards.building" / "manifest.json").exists()
    build.build_shards(source(tmp_path), byte_tokenizer(), tmp_path / "shards", 0.2)
    assert digest(tmp_path / "shards") == built


def test_two_builders_at_once_do_the_work_once(tmp_path, built):
    out = tmp_path / "shards"
    source(tmp_path)
    pair = [child(tmp_path, out, SLOW) for _ in range(2)]
    wrote = sorted(process.communicate()[0].count("wrote") for process in pair)
    assert [process.returncode for process in pair] == [0, 0]
    assert wrote[0] == 0 and wrote[1] == len(list(out.glob("*.bin")))
    assert digest(out) == built


def test_another_recipe_starts_over_and_other_folders_are_left_alone(tmp_path, built):
    out = tmp_path / "shards"
    process = child(tmp_path, out, KILL.format(n=6))
    process.communicate()
    assert process.returncode == -9
    build.build_shards(source(tmp_path), byte_tokenizer(), out, 0.3)
    assert digest(out) != built
    with pytest.raises(slm_data.DataError, match="holds shards of another held_out"):
        build.build_shards(source(tmp_path), byte_tokenizer(), out, 0.2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(slm_data.DataError, match="not a folder of shards"):
        build.build_shards(source(tmp_path), byte_tokenizer(), tmp_path / "mine", 0.2)


def test_text_that_changes_while_it_is_read_is_refused(tmp_path):
    path = Path(source(tmp_path))
    corpus = files.open_text(str(path), "text")
    build.identify(corpus)
    path.write_text(path.read_text().replace("7", "8"))
    with pytest.raises(slm_data.DataError, match="changed while it was tokenized"):
        build.cached_shards(corpus, byte_tokenizer(), 0.2)
    tokens = cache.folder() / "tokens"
    assert not tokens.exists() or not list(tokens.iterdir())
    build.cached_shards(files.open_text(str(path), "text"), byte_tokenizer(), 0.2)


def test_built_shards_train_like_the_text_they_are_from(tmp_path):
    path = source(tmp_path)
    build.build_shards(path, byte_tokenizer(), tmp_path / "shards", 0.2)

    def opened(spec, tokenizer):
        data = {"sources": [spec], "tokenizer": tokenizer, "held_out": 0.2, "seq_len": 32}
        return slm_data.open_dataset(resolve({"data": data}))

    text, tokens = opened(path, "byte"), opened(str(tmp_path / "shards"), "none")
    for step in range(5):
        assert (text.batch_at(step).tokens_BT1 == tokens.batch_at(step).tokens_BT1).all()
        assert (text.batch_at(step).segments_BT1 == tokens.batch_at(step).segments_BT1).all()
    assert (text.held_out.tokens_BT1 == tokens.held_out.tokens_BT1).all()
    assert text.bytes_per_token == tokens.bytes_per_token
    assert text.fingerprint["tokenizer"] == tokens.fingerprint["tokenizer"]
    with pytest.raises(ConfigError, match=r"are tokens already; use data\.tokenizer='none'"):
        opened(str(tmp_path / "shards"), "bpe")
