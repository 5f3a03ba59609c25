"""The digests of a checkpoint: what a step's folder must hold, to the bit, and whether it does.

    step-00001200/digests.json   step, pinned, meta, types and shapes of leaves, sizes and digests of files

Standard library only, for copies are judged where nothing is trained. Never here: which step is trusted, or kept.
"""

import hashlib
import json
import os
import pathlib
import re

FORMAT = 1
DIGESTS = "digests.json"
STEP_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none that can be trusted is left. Never recovered from by starting over."""


class Damaged(Exception):
    """A step on disk is damaged; the message names the file."""


def _digest(data):
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _digest_stream(f):
    return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_files(root):
    """{relative path: [bytes, digest]} of all files below root, each flushed to the disk."""
    files = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as f:
                digest = _digest_stream(f)
                os.fsync(f.fileno())
                files[os.path.relpath(path, root)] = [os.fstat(f.fileno()).st_size, digest]
        fsync(folder)
    return dict(sorted(files.items()))


def fsync(folder):
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_manifest(root, manifest):
    body = json.dumps(manifest)
    with open(root / DIGESTS, "w") as f:
        f.write(json.dumps({"digest": _digest(body.encode()), "body": body}))
        f.flush()
        os.fsync(f.fileno())
    fsync(root)


def read_digests(content: bytes) -> dict:
    """What a digests.json says: step, pinned, meta, and `files`, relative path → [bytes, digest], all but itself.

    Raises:
      ValueError: it is damaged; the message goes on after the file's name.
    """
    try:
        outer = json.loads(content)
        if _digest(outer["body"].encode()) == outer["digest"]:
            return json.loads(outer["body"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is not readable: {error}") from error
    raise ValueError("does not match its own digest")


def damage(root) -> str | None:
    """What is wrong with a step's folder, wherever it was copied to; None when every file is as it was written."""
    try:
        verify(pathlib.Path(root))
    except Damaged as error:
        return str(error)
    return None


def read_manifest(root):
    """The dict of `write_manifest`. Raises Damaged if damaged, CheckpointError if its format is newer than ours."""
    if root.is_symlink() or (root / DIGESTS).is_symlink():
        raise Damaged(f"{root} leads out of the run directory through a link")
    try:
        manifest = read_digests((root / DIGESTS).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(f"{root / DIGESTS} is missing") from error
    except ValueError as error:
        raise Damaged(f"{root / DIGESTS} {error}") from error
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"{root} has format {manifest['format']}, this slmjax reads up to {FORMAT}; upgrade slmjax"
        )
    if STEP_NAME.fullmatch(root.name) and int(root.name[5:]) != manifest["step"]:
        raise Damaged(f"{root} holds step {manifest['step']}")
    return manifest


def verify(root):
    """Compare every file of a step with its size and digest. Raises Damaged naming the first that differs."""
    for name, (size, digest) in read_manifest(root)["files"].items():
        path = root / name
        if ".." in pathlib.PurePath(name).parts or os.path.realpath(path) != os.path.join(os.path.realpath(root), name):
            raise Damaged(f"{path} leads out of the step through a link")
        try:
            with open(path, "rb") as f:
                found = os.fstat(f.fileno()).st_size
                if found != size:
                    raise Damaged(f"{path} has {found} bytes, not {size}")
                if _digest_stream(f) != digest:
                    raise Damaged(f"{path} does not match its digest")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise Damaged(f"{path} is missing") from error
