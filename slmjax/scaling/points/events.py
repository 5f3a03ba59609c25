"""TensorBoard event folders as a table, read without TensorFlow: scalars by step, hyper-parameters and texts by run.

A run is a folder that holds event files; its name is the path from the root, without slmjax's own last part, `tb`. A
file is a row of records: length, its checksum, an Event, its checksum (TFRecord). EventAccumulator of the tensorboard
package reads the same, after two thirds of a second of imports, and keeps 10,000 of a run's steps drawn at random.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slmjax.scaling.points.columns import FILE
from slmjax.scaling.points.tables import RUN, STEP, Table

PATTERN = "*tfevents*"
LARGEST = 2**14  # bytes of a record that may hold scalars or hyper-parameters; larger ones are images and graphs
HPARAMS = "_hparams_/session_start_info"


def holds_events(folder: Path) -> bool:
    return next(folder.rglob(PATTERN), None) is not None


def read_events(root: Path) -> Table:
    """One row per run and step below `root`.

    Columns: run, step, one per scalar tag, hyper-parameter and text; of values logged twice at a step, the later one. A
    file that ends within a record, as after a kill, is read up to there, with a note.
    Raises:
      ValueError: a damaged file, named, or none that holds a scalar.
    """
    rows, notes, unclear = [], [], {}
    for folder, files in sorted(_runs(root).items()):
        relative = folder.relative_to(root)
        run = (relative.parent if relative.name == "tb" else relative).as_posix()
        scalars, constants = _read_run(files, notes)
        for name in {tag for cells in scalars.values() for tag in cells} & set(constants):
            unclear[name] = f"is a scalar and a hyper-parameter of run {run}; log one under another name"
        name = root.name if run == "." else run
        for step, cells in sorted(scalars.items()):
            rows.append({RUN: name, STEP: step, FILE: folder.as_posix()} | constants | cells)
    if not rows:
        raise ValueError(f"{root}: its event files hold no scalars")
    headers = tuple(dict.fromkeys(header for row in rows for header in row if header != FILE))
    places = tuple(f"{root} run {row[RUN]} step {row[STEP]}" for row in rows)
    return Table(root, headers, tuple(rows), places, {"run_id": RUN, "step": STEP}, unclear, tuple(notes))


def _runs(root):
    """Run folder → its event files in order of writing.

    PyTorch's add_hparams writes a folder of its own into the run's: the same run.
    """
    files = {}
    for path in sorted(root.rglob(PATTERN)):
        files.setdefault(path.parent, []).append(path)
    for folder in sorted(files, reverse=True):
        if folder != root and folder.parent in files and _has_hparams(files[folder]):
            files[folder.parent] += files.pop(folder)
    return files


def _has_hparams(paths):
    return any(HPARAMS.encode() in path.read_bytes() for path in paths)


def _read_run(paths, notes):
    """({step: {tag: value}}, {hyper-parameter or text: value}) of one run."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    scalars, constants = {}, {}
    for path in paths:
        for payload in read_records(path, notes):
            event = Event.FromString(payload)
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                # A restart: what was logged from this step on was trained again.
                scalars = {step: cells for step, cells in scalars.items() if step < event.step}
            for value in event.summary.value:
                found = _cells(value)
                if isinstance(found, dict):
                    constants |= found
                elif found is not None:
                    scalars.setdefault(event.step, {})[value.tag] = found
    return scalars, constants


def _cells(value) -> float | dict | None:
    """A scalar, the constants of hyper-parameters or a text, or None for images, histograms and the like."""
    if value.HasField("simple_value"):
        return value.simple_value
    if value.tag == HPARAMS:
        return _hparams(value.metadata.plugin_data.content)
    if not value.HasField("tensor"):
        return None
    if value.metadata.plugin_data.plugin_name == "text":
        return {value.tag: b"\n".join(value.tensor.string_val).decode()}
    return _scalar(value.tensor)


def _scalar(tensor) -> float | None:
    """A tensor of one float, as TensorFlow 2 and PyTorch's double_precision write; DT_FLOAT is 1, DT_DOUBLE 2."""
    if tensor.dtype not in (1, 2) or any(dim.size != 1 for dim in tensor.tensor_shape.dim):
        return None
    if tensor.tensor_content:
        return float(np.frombuffer(tensor.tensor_content, "<f4" if tensor.dtype == 1 else "<f8")[0])
    values = tensor.float_val if tensor.dtype == 1 else tensor.double_val
    return float(values[0]) if values else None


def _hparams(content):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in sorted(found.items())}


# --- records ---------------------------------------------------------------------------------------------------------


def read_records(path: Path, notes: list[str]) -> Iterator[bytes]:
    """The payloads of a TFRecord file, checked, but for the largest; a cut last one is left out and noted."""
    data, at, spans = path.read_bytes(), 0, []
    while at < len(data):
        end = at + 12 + (struct.unpack_from("<Q", data, at)[0] if at + 12 <= len(data) else 0) + 4
        if end > len(data):
            # The length's own checksum tells a cut record from a damaged length.
            if at + 12 <= len(data) and not _sound(data, [(at, at + 8)])[0]:
                raise ValueError(f"{path}: damaged at byte {at}; leave the file out or restore it")
            notes.append(f"{path}: ends within a record, as after a kill; read up to there")
            break
        spans.append((at, end))
        at = end
    small = [(a, b) for a, b in spans if b - a <= LARGEST]
    checked = [(a, a + 8) for a, _ in spans] + [(a + 12, b - 4) for a, b in small]
    for (a, _), sound in zip(checked, _sound(data, checked), strict=True):
        if not sound:
            raise ValueError(f"{path}: damaged at byte {a} (checksum); leave the file out or restore it")
    for a, b in small:
        yield data[a + 12 : b - 4]


def _sound(data: bytes, spans: list[tuple[int, int]]) -> np.ndarray:
    """Whether the four bytes after each span are its masked CRC-32C. All spans go together, byte by byte: a loop over
    bytes in Python would take a second a megabyte."""
    bytes_, table = np.frombuffer(data, np.uint8), _crc_table()
    start, length = np.array([a for a, _ in spans]), np.array([b - a for a, b in spans])
    order = np.argsort(-length, kind="stable")
    start, length = start[order], length[order]
    crc = np.full(len(spans), 0xFFFFFFFF, np.uint32)
    for i in range(int(length.max(initial=0))):
        k = int(np.searchsorted(-length, -i, side="left"))  # spans longer than i come first
        crc[:k] = table[(crc[:k] ^ bytes_[start[:k] + i]) & 0xFF] ^ (crc[:k] >> 8)
    crc = crc ^ np.uint32(0xFFFFFFFF)
    masked = ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
    said = np.array([struct.unpack_from("<I", data, spans[i][1])[0] for i in order], np.uint32)
    sound = np.empty(len(spans), bool)
    sound[order] = masked == said
    return sound


def _crc_table():
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)  # Castagnoli, reflected
    return table
