"""Token shards come back as they were written, and nothing damaged is ever trained on."""

import json
import os

import numpy as np
import pytest

from slmjax import data as slm_data
from slmjax.config import ConfigError, resolve
from slmjax.data import shards

V = 1000


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLMJAX_CACHE", str(tmp_path / "cache"))


def arrays(sizes, vocab_size=V, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, size) for size in sizes]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tokens"
    shards.write_shards(path, {"train": arrays((500, 300)), "held_out": arrays((200,), seed=1)}, V, bos_id=0)
    return path


@pytest.mark.parametrize(("vocab_size", "dtype", "itemsize"), [(1 << 16, "uint16", 2), ((1 << 16) + 1, "uint32", 4)])
def test_round_trip_across_shards(tmp_path, vocab_size, dtype, itemsize):
    parts = arrays((50, 0, 3, 1, 70), vocab_size)
    parts[0][0], parts[4][-1] = 0, vocab_size - 1
    shards.write_shards(tmp_path / "t", {"train": parts}, vocab_size)
    tokens = shards.read_shards(tmp_path / "t", "train")
    stream = np.concatenate(parts)
    assert tokens.manifest.dtype == dtype and tokens.num_tokens == len(stream) == 124
    assert (tmp_path / "t" / "train-00000.bin").stat().st_size == 50 * itemsize
    starts = np.arange(124 - 20)
    got = tokens.read(starts, 21)
    assert got.dtype == np.int32
    assert np.array_equal(got, np.lib.stride_tricks.sliding_window_view(stream, 21)[starts])


def test_ids_outside_the_vocabulary_are_not_written(tmp_path):
    for bad in (-1, V):
        with pytest.raises(ValueError, match=rf"train-00000\.bin: token 2 is id {bad}, outside \[0, {V}\)"):
            shards.write_shards(tmp_path, {"train": [np.array([0, 1, bad, 3])]}, V)
    assert not list(tmp_path.glob("*"))


def rewrite(path, edit):
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def flip(data):
    data[555] ^= 4


def edit_manifest(folder, edit):
    path = folder / shards.MANIFEST
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def list_twice(content):
    content["splits"]["train"][1]["file"] = "train-00000.bin"


def first(folder):
    return folder / "train-00000.bin"


def shard_line(**changes):
    """Damage: other values in the manifest's line of the first train shard."""
    return lambda folder: edit_manifest(folder, lambda m: m["splits"]["train"][0].update(changes))


def header(**changes):
    return lambda folder: edit_manifest(folder, lambda m: m.update(changes))


def cut(name, start, stop=None):
    return lambda folder: rewrite(folder / name, lambda data: data.__delitem__(slice(start, stop)))


FAULTS = {
    "truncated": (cut("train-00000.bin", -3), r"ends at byte 997, not 1000.*truncated"),
    "too long": (lambda f: rewrite(first(f), lambda d: d.extend(b"12")), r"ends at byte 1002, not 1000.*too long"),
    "empty": (lambda f: first(f).write_bytes(b""), r"ends at byte 0, not 1000.*truncated"),
    "flipped bit": (lambda f: rewrite(first(f), flip), "bytes 0 to 1000 do not match their checksum"),
    "missing": (lambda f: first(f).unlink(), r"train-00000\.bin is missing"),
    "wrong width": (header(dtype="uint32"), "ends at byte 1000, not 2000"),
    "unknown dtype": (header(dtype="float32"), "dtype 'float32' is not one of"),
    "id >= vocabulary": (header(vocab_size=900), r"token \d+ \(byte \d+\) is id 9\d\d, outside"),
    "wrong sha256": (shard_line(sha256="0" * 64), "do not match sha256"),
    "listed twice": (lambda f: edit_manifest(f, list_twice), r"json: shard 'train-00000\.bin' is listed 2 times"),
    "elsewhere": (shard_line(file="../x.bin"), "not in this folder"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json is missing"),
    "cut manifest": (cut("manifest.json", 100), r"manifest\.json: byte \d+: not JSON"),
    "other format": (header(format="x 2"), "format is 'x 2', not 'slmjax tokens 1'"),
    "missing field": (lambda f: edit_manifest(f, lambda m: m.pop("bos_id")), "a field is missing .*'bos_id'"),
    "missing split": (lambda f: edit_manifest(f, lambda m: m["splits"].pop("held_out")), "no split 'held_out' among"),
}


def open_shards(spec, **data):
    values = {"sources": [str(spec)], "tokenizer": "none", "seq_len": 16, **data}
    return slm_data.open_dataset(resolve({"data": values}))


@pytest.mark.parametrize(("damage", "message"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("opened_before", [False, True])
def test_damage_is_refused_with_file_and_place(folder, damage, message, opened_before):
    if opened_before:
        open_shards(folder)
    damage(folder)
    with pytest.raises(slm_data.DataError, match=message) as caught:
        open_shards(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_the_place_of_a_fault_is_right(folder):
    array = arrays((500,))[0]
    header(vocab_size=900)(folder)
    token = int(np.argmax(array >= 900))
    with pytest.raises(slm_data.DataError, match=rf"token {token} \(byte {2 * token}\) is id {array[token]},"):
        open_shards(folder)


def test_a_flipped_bit_is_located_within_its_chunk(folder, monkeypatch):
    monkeypatch.setattr(shards, "_CHUNK", 256)
    shards.write_shards(folder, {"train": arrays((500,)), "held_out": arrays((200,))}, V, bos_id=0)
    rewrite(first(folder), flip)
    with pytest.raises(slm_data.DataError, match="bytes 512 to 768 do not match"):
        open_shards(folder)


def test_contents_are_verified_once_per_file_identity(folder, monkeypatch):
    verified, real = [], shards._verify
    monkeypatch.setattr(shards, "_verify", lambda path, *rest: verified.append(path.name) or real(path, *rest))
    open_shards(folder)
    assert sorted(verified) == ["held_out-00000.bin", "train-00000.bin", "train-00001.bin"]
    open_shards(folder)
    assert len(verified) == 3
    os.utime(first(folder), ns=(1, 1))
    open_shards(folder)
    assert verified[3:] == ["train-00000.bin"]


def test_a_glob_takes_only_the_train_shards_it_names(folder):
    whole, part = open_shards(folder), open_shards(folder / "train-00001.bin")
    assert np.array_equal(whole.held_out.tokens_BT1, part.held_out.tokens_BT1)
    assert part.epochs_at(100) > 2 * whole.epochs_at(100)
    assert part.fingerprint != whole.fingerprint
    (folder / "stray.bin").write_bytes(b"12")
    with pytest.raises(slm_data.DataError, match=r"stray\.bin is not listed in manifest\.json"):
        open_shards(folder / "*.bin")


def test_shards_need_document_marks_for_segments_and_one_tokenizer(tmp_path, folder):
    shards.write_shards(tmp_path / "bare", {"train": arrays((100,)), "held_out": arrays((100,))}, V)
    with pytest.raises(ConfigError, match="marks no documents"):
        open_shards(tmp_path / "bare")
    dataset = open_shards(tmp_path / "bare", packing="concat")
    assert dataset.bytes_per_token is None and dataset.vocab_size == V
    shards.write_shards(
        tmp_path / "other", {"train": arrays((100,)), "held_out": arrays((100,))}, V, bos_id=0, tokenizer="another"
    )
    with pytest.raises(ConfigError, match="was tokenized by another, not by unknown"):
        open_shards(folder, sources=[str(folder), str(tmp_path / "other")], weights=(1.0, 1.0))
