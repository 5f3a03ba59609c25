"""TensorBoard folders as tables: what writers write is what is read, damage is told, and a study's mirror agrees."""

import json
import struct
import time

import numpy as np
import pytest
from planted_study import write_study
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from slmjax.config import DataConfig, RunConfig, TrainConfig
from slmjax.scaling.points import events, load_points, load_runs
from slmjax.tensorboard import TensorBoard

TAGS = {"N": "model/params", "D": "step*train.batch_size*data.seq_len", "loss": "eval/loss"}
CONFIG = RunConfig(data=DataConfig(seq_len=512), train=TrainConfig(batch_size=16))


def write_run(folder, losses, N, restart=None, steps=100):
    """A run as slmjax mirrors one: losses by evaluation; `restart` goes back to that step and logs again."""
    board = TensorBoard(folder)
    board.start(0)
    board.scalars(0, {"params": N}, "model")
    for i, loss in enumerate(losses, 1):
        board.scalars(i * steps, {"loss": loss}, "eval")
    if restart is not None:
        board.start(restart)
    board.hparams(CONFIG, {}, {})
    board.close()
    return folder


def read(root, **kwargs):
    return load_points([root], TAGS, **kwargs)


def float32(values):
    return np.asarray(values, np.float32).astype(float).tolist()


def test_runs_scalars_and_hyper_parameters(tmp_path, seed):
    losses = np.random.default_rng(seed).uniform(2, 4, (3, 4))
    for name, row in zip(("a/tb", "b/tb", "group/c"), losses.tolist(), strict=True):
        write_run(tmp_path / name, row, N=1e6)
    last, every = read(tmp_path), read(tmp_path, rows="all")
    assert {p.run_id: p.loss for p in last.points} == dict(
        zip(("a", "b", "group/c"), float32(losses[:, -1]), strict=True)
    )
    assert {p.D for p in last.points} == {400 * 16 * 512} and {p.N for p in last.points} == {1e6}
    assert [p.loss for p in every.points] == float32(losses.ravel())
    chosen = read(tmp_path, where=["data.seq_len=512", "run=b"])
    assert [p.run_id for p in chosen.points] == ["b"]
    with pytest.raises(ValueError, match="no column 'eval/los'; did you mean 'eval/loss'"):
        load_points([tmp_path], {**TAGS, "loss": "eval/los"})
    with pytest.raises(
        ValueError, match=r"which column is N and D and loss\? It has run, step, data.held_out, .* more; say"
    ):
        load_points([tmp_path])


def test_a_restart_takes_back_what_was_logged_past_it(tmp_path):
    write_run(tmp_path / "a", (3.0, 2.5, 2.0), 1e6, restart=250)
    (p,) = read(tmp_path).points
    assert (p.D, p.loss) == (200 * 16 * 512, 2.5)


def test_agrees_with_tensorboards_own_reader(tmp_path, seed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = np.random.default_rng(seed).uniform(2, 4, 50).tolist()
    write_run(tmp_path / "a", losses, 1e6, restart=3299)
    theirs = EventAccumulator(str(tmp_path / "a")).Reload()
    ours = events.read_events(tmp_path).rows
    assert [(e.step, e.value) for e in theirs.Scalars("eval/loss")] == [
        (row["step"], row["eval/loss"]) for row in ours if "eval/loss" in row
    ]


def board(folder):
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    return EventFileWriter(str(folder))


def add(writer, step, *values):
    from tensorboard.compat.proto.event_pb2 import Event

    writer.add_event(Event(step=step, summary=Summary(value=values)))


def test_every_way_to_write_a_scalar_and_a_text(tmp_path):
    """simple_value, and tensors of one or two widths, packed or not; images and vectors are no scalars."""
    writer, x = board(tmp_path / "a"), 2.718281828459045
    packed = TensorProto(dtype=2, tensor_content=struct.pack("<d", x))
    wide, plain = TensorProto(dtype=2, double_val=[x]), TensorProto(dtype=1, float_val=[x])
    vector = TensorProto(dtype=1, float_val=[1, 2])
    vector.tensor_shape.dim.add(size=2)
    text = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    add(writer, 7, Summary.Value(tag="simple", simple_value=x), Summary.Value(tag="packed", tensor=packed),
        Summary.Value(tag="wide", tensor=wide), Summary.Value(tag="plain", tensor=plain),
        Summary.Value(tag="vector", tensor=vector), Summary.Value(tag="image", image=Summary.Image(height=1)),
        Summary.Value(tag="corpus", tensor=TensorProto(dtype=7, string_val=[b"c4"]), metadata=text))  # fmt: skip
    writer.close()
    (row,) = events.read_events(tmp_path).rows
    f32 = float32([x])[0]
    assert {k: v for k, v in row.items() if k != "file"} == {
        "run": "a", "step": 7, "corpus": "c4", "simple": f32, "plain": f32, "packed": x, "wide": x,
    }  # fmt: skip


def test_pytorchs_folder_of_hyper_parameters_belongs_to_its_run(tmp_path):
    """SummaryWriter.add_hparams writes into a folder below the run's."""
    writer = board(tmp_path / "a")
    add(writer, 5, Summary.Value(tag="eval/loss", simple_value=3.0), Summary.Value(tag="model/params", simple_value=9))
    writer.close()
    below = TensorBoard(tmp_path / "a" / "1699999999.5")
    below.hparams(CONFIG, {}, {})
    below.close()
    (p,) = read(tmp_path).points
    assert (p.run_id, p.N, p.D, p.loss) == ("a", 9, 5 * 16 * 512, 3.0)


def test_a_cut_file_is_read_and_told_and_a_damaged_one_refused(tmp_path, seed):
    (path,) = write_run(tmp_path / "a", (3.0, 2.5, 2.0), 1e6).glob("*tfevents*")
    whole = path.read_bytes()
    records = list(events.read_records(path, []))
    ends = np.cumsum([len(r) + 16 for r in records])
    assert ends[-1] == len(whole)
    for cut in (1, 5, 13, len(records[-1]) + 15):
        path.write_bytes(whole[: ends[-1] - cut])
        notes = []
        assert list(events.read_records(path, notes)) == records[:-1] and "ends within a record" in notes[0]
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, len(whole), 20):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.integers(8))]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"tfevents.*damaged at byte"):
            list(events.read_records(path, []))


def test_large_records_cost_nothing(tmp_path):
    """Images and graphs hold no scalar; what stands around them is read."""
    writer = board(tmp_path / "a")
    image = Summary.Image(encoded_image_string=bytes(2_000_000))
    add(writer, 1, Summary.Value(tag="eval/loss", simple_value=3.0))
    add(writer, 1, Summary.Value(tag="image", image=image))
    add(writer, 2, Summary.Value(tag="eval/loss", simple_value=2.0))
    writer.close()
    before = time.process_time()
    assert [row["eval/loss"] for row in events.read_events(tmp_path).rows] == [3.0, 2.0]
    assert time.process_time() - before < 1.0  # ten seconds and more if they were checked byte by byte


def test_checksums_are_those_of_the_format(seed):
    rng = np.random.default_rng(seed)
    payloads = [rng.bytes(int(n)) for n in rng.integers(0, 50, 30)]
    data = b"".join(p + struct.pack("<I", masked_crc32c(p)) for p in payloads)
    at = np.cumsum([0] + [len(p) + 4 for p in payloads]).tolist()
    assert events._sound(data, [(a, a + len(p)) for a, p in zip(at, payloads, strict=False)]).all()


def test_a_studys_mirror_gives_the_points_of_its_records(tmp_path):
    """Losses in event files are float32, so they agree to its rounding."""
    study = write_study(tmp_path / "study", widths=(64, 96), ratios=(10, 20))
    logged = {p.run_id: p for p in load_points([study]).points}
    for run in load_runs(study):
        if run.run_id not in logged:
            continue
        mirror = TensorBoard(tmp_path / "boards" / run.run_id / "tb")
        for line in (*run.evals, run.end):
            mirror.scalars(line["step"], {"loss": line["loss"]}, "eval")
        mirror.hparams(CONFIG, run.start["counts"], run.end)
        mirror.close()
    columns = {
        "N": "counts.non_embedding",
        "D": "step*train.batch_size*data.seq_len",
        "loss": "eval/loss",
    }
    mirrored = load_points([tmp_path / "boards"], columns, "non_embedding")
    assert {p.run_id for p in mirrored.points} == set(logged)
    for p in mirrored.points:
        assert (p.N, p.D) == (logged[p.run_id].N, logged[p.run_id].D)
        assert p.loss == float32([logged[p.run_id].loss])[0]


def test_folders_without_scalars(tmp_path):
    board(tmp_path / "a").close()
    with pytest.raises(ValueError, match="hold no scalars"):
        events.read_events(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="holds no TensorBoard event files"):
        load_points([tmp_path / "b"])
