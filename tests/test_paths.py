"""Reading a file that others replace."""

import errno
import pathlib

import pytest

from slmjax import paths, records


def test_a_file_replaced_by_another_nfs_client_is_read_again(tmp_path, monkeypatch):
    path, left, read_bytes = tmp_path / "status.json", [], pathlib.Path.read_bytes
    path.write_text('{"state": "running"}')

    def read(path):
        if left:
            raise OSError(left.pop(), "from the server")
        return read_bytes(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", read)
    left[:] = [errno.ESTALE] * (paths.READ_TRIES - 1)
    assert records.read_json(path) == {"state": "running"}
    for fault, tries in ((errno.ESTALE, paths.READ_TRIES), (errno.EIO, 1)):  # in the end it is told, and others at once
        left[:] = [fault] * tries
        with pytest.raises(OSError, match="from the server"):
            records.read_json(path)
        assert not left
