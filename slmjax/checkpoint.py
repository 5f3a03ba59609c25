"""Checkpoints of one run: asynchronous saves through Orbax, our own digests above it, fallback and branching.

Orbax moves the arrays; everything that decides *which* step is trusted is here, because Orbax restores flipped bits
without a word and never falls back to an older step. The only room that imports Orbax. Never here: what a state
contains (`train`), who may write into a run directory (`lease`). Run directories are POSIX file systems (local, NFS,
Lustre, Filestore).

    directory/step-00001200/state/...      Orbax, as it wrote it
    directory/step-00001200/digests.json   step, pinned, meta, types and shapes of leaves, sizes and digests of files
    directory/.tmp-...                     an unfinished save or deletion; removed by the next save, never read
    directory/quarantine/...               steps that failed verification, kept for the curious, never read

A step is built under `.tmp-`, hashed, and published by one rename, so `step-*` exists only when it is complete: a
kill at any moment costs at most the step in flight. We use Orbax's AsyncCheckpointer and not its CheckpointManager,
whose step list, garbage collection and "latest" would be a second opinion on exactly the questions answered here.

Two layouts, chosen by size and recorded in digests.json. `packed` (one process, up to PACK_LIMIT_BYTES): all leaves
as one byte vector, because Orbax's cost is per leaf. `tree`: one Orbax array per leaf, each process writing its own
shards.
"""

import functools
import json
import logging
import os
import pathlib
import shutil
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp

from slmjax import processes
from slmjax.digests import (
    DIGESTS,
    FORMAT,
    STEP_NAME,
    CheckpointError,
    Damaged,
    digest_files,
    fsync,
    read_manifest,
    verify,
    write_manifest,
)

PACK_LIMIT_BYTES = 64 * 2**20  # beyond this the extra host copy and the single file cost more than the leaves they save
QUARANTINE = "quarantine"
TEMPORARY = ".tmp-"

log = logging.getLogger(__name__)
# Orbax looks for OCDBT parts to merge even when told to write none, and warns about each packed save.
logging.getLogger("absl").addFilter(lambda record: "Skipping merge of OCDBT" not in str(record.msg))


class Checkpointer:
    """Saves and restores the steps of one run in `directory` (created by the first save).

    keep: how many of the newest steps that are not pinned stay; at least 2 leaves something to fall back to.
    async_save: hash, write and publish in a background thread; False does it all inside `save`.
    One thread may use an instance at a time; one writer per directory is the business of `lease.RunLease`. In a
    multi-process run every process makes the same calls, on a shared file system; `close` alone waits for no other.
    """

    def __init__(self, directory, keep=2, async_save=True):
        if "://" in os.fspath(directory):
            raise ValueError(f"checkpoint directory {directory} is a URL; mount the bucket and give a path")
        if keep < 1:
            raise ValueError(f"keep={keep}; at least 1 checkpoint must stay (2 leave one to fall back to)")
        self.directory = pathlib.Path(directory).absolute()
        self.keep, self.async_save = keep, async_save
        self._thread = None
        self._failure = None  # (step, exception) of a background save not yet reported
        self._pinned = {}  # step -> bool, so that garbage collection reads each digests.json once
        self._writers = {}  # layout -> Orbax checkpointer, built on first use

    def save(self, step, state, meta, pinned=False):
        """Save `state`, a pytree of jax or NumPy arrays, as `step`; returns once the values are copied to the host.

        meta: small JSON-able dict, returned by `restore`. pinned: never garbage-collected.
        Raises CheckpointError if the previous background save failed (nothing is saved then; call again to save),
        ValueError for a step not after the newest one, a leaf that is no array, or meta that is not JSON.
        """
        processes.together(self._check_next, step)
        leaves = _named_leaves(state)
        packed = processes.alone() and sum(x.nbytes for x in leaves.values()) <= PACK_LIMIT_BYTES
        manifest = {
            "format": FORMAT,
            "step": step,
            "pinned": bool(pinned),
            "layout": "packed" if packed else "tree",
            "leaves": {name: [str(x.dtype), list(x.shape)] for name, x in leaves.items()},
            "meta": json.loads(json.dumps(meta, allow_nan=False)),
        }
        processes.together(lambda: processes.first() and self._clear(step))
        item = {"bytes": _pack(leaves)} if packed else {name: x for name, x in leaves.items() if x.size}
        writer, target = self._writer(manifest["layout"]), self._temporary(step) / "state"
        start = functools.partial(writer.save, target, args=ocp.args.PyTreeSave(item))
        if not packed:  # the device-to-host copy of the shards happens in here
            start()
        self._thread = threading.Thread(
            target=self._finish, args=(step, manifest, start if packed else None), name=f"save-{step}"
        )
        self._thread.start()
        if not self.async_save:
            self.wait()

    def restore(self, abstract_state, step=None):
        """Return (step, state, meta) of the newest step whose digests verify, or None if nothing was ever saved here.

        abstract_state: the wanted pytree; a leaf with a `sharding` (ShapeDtypeStruct or jax.Array) comes back as a
        jax array placed so, any other leaf as a NumPy array of its own. A damaged step is moved to quarantine/ and
        the next older one tried.
        step: exactly this one (branching, evaluation). Then nothing in the directory is touched, damaged or not.
        Raises CheckpointError when steps exist or existed but none is good, when `step` is missing or damaged, or
        when the format is newer than this code; ValueError naming leaf and both shapes when the tree is another one.
        """
        self.wait()
        wanted = _named_leaves(abstract_state)
        if step is None:
            step = processes.of_first(self._newest_good)
            if step is None:
                return None
        else:
            processes.of_first(functools.partial(self._check_named, step))
        manifest = processes.together(read_manifest, self._path(step))
        _check_leaves(manifest["leaves"], wanted, self._path(step))
        leaves = self._read(step, manifest["layout"], manifest["leaves"], wanted)
        return step, jax.tree.unflatten(jax.tree.structure(abstract_state), list(leaves.values())), manifest["meta"]

    def steps(self):
        """All complete steps, ascending. Complete means published with digests; they are verified by `restore`."""
        return [step for step in self._published() if (self._path(step) / DIGESTS).is_file()]

    def latest(self):
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def wait(self):
        """Block until the save in flight, if any, is published; raise CheckpointError if it failed."""
        processes.together(self._join)

    def _join(self):
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            (step, error), self._failure = self._failure, None
            raise CheckpointError(
                f"saving step {step} in {self.directory} failed ({type(error).__name__}: {error}); "
                f"complete steps: {self.steps()}"
            ) from error

    def close(self):
        """Wait for the save in flight, then free Orbax's threads. The instance is of no use afterwards."""
        try:
            self._join()
        finally:
            for writer in self._writers.values():
                writer.close()
            self._writers = {}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    # ---- writing ---------------------------------------------------------------------------------

    def _check_next(self, step):
        """Raises where `step` cannot be saved now."""
        self._join()
        newest = self.latest()
        if step < 0 or (newest is not None and step <= newest):
            raise ValueError(
                f"step {step} is not after the newest checkpoint {newest} in {self.directory}; "
                "a branch saves into a directory of its own"
            )

    def _finish(self, step, manifest, start):
        """Background half of `save`: write (packed), wait for Orbax, hash, publish, collect garbage."""
        work = self._temporary(step)
        try:
            if start is not None:
                start()
            self._writer(manifest["layout"]).wait_until_finished()
            if processes.first():
                write_manifest(work, manifest | {"files": digest_files(work)})
                os.rename(work, self._path(step))
                fsync(self.directory)
                self._pinned[step] = manifest["pinned"]
                self._collect()
        except BaseException as error:
            log.error("saving step %d in %s failed: %s", step, self.directory, error)
            self._failure = (step, error)
            if processes.first():
                shutil.rmtree(work, ignore_errors=True)  # on a full disk the space is needed now

    def _clear(self, step):
        """Make room for `step`: remove what kills left behind, set aside a damaged directory of its name."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for entry in os.scandir(self.directory):
            if entry.name.startswith(TEMPORARY):
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
        if os.path.lexists(self._path(step)):
            self._quarantine(step, f"it has no {DIGESTS}")
        self._temporary(step).mkdir()

    def _collect(self):
        """Delete all but the newest `keep` of the steps that are not pinned."""
        loose = [step for step in self.steps() if not self._is_pinned(step)]
        for step in loose[: -self.keep]:
            # Renamed first: a kill inside rmtree must not leave half a step under a trusted name.
            doomed = self.directory / f"{TEMPORARY}delete-{self._path(step).name}"
            os.rename(self._path(step), doomed)
            shutil.rmtree(doomed)

    def _is_pinned(self, step):
        if step not in self._pinned:
            try:
                self._pinned[step] = read_manifest(self._path(step))["pinned"]
            except (Damaged, CheckpointError) as error:
                log.error("step %d in %s is kept, its %s cannot be read: %s", step, self.directory, DIGESTS, error)
                return True  # what we cannot read we do not delete
        return self._pinned[step]

    # ---- choosing --------------------------------------------------------------------------------

    def _newest_good(self):
        """The newest step that verifies, None if the directory never held one; moves damaged ones aside."""
        bad = []
        for step in reversed(self._published()):
            try:
                verify(self._path(step))
                return step
            except Damaged as error:
                if not os.path.lexists(self._path(step)):
                    continue  # its writer collected it while we looked
                self._quarantine(step, error)
                bad.append(step)
        quarantine = self.directory / QUARANTINE
        if bad or (quarantine.is_dir() and any(quarantine.iterdir())):
            # Also on the second launch, when all damaged steps are already aside: an automatic restart must not begin
            # at step 0.
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be trusted, see {quarantine}; the run stops here. "
                "Restore the directory from a copy, or delete it to train again from step 0"
            )
        return None

    def _check_named(self, step):
        if step not in self.steps():
            raise CheckpointError(f"no step {step} in {self.directory}; complete steps: {self.steps()}")
        try:
            verify(self._path(step))
        except Damaged as error:
            raise CheckpointError(f"step {step} in {self.directory} is damaged: {error}") from error

    def _quarantine(self, step, reason):
        aside = self.directory / QUARANTINE
        aside.mkdir(exist_ok=True)
        taken = sum(name.startswith(self._path(step).name) for name in os.listdir(aside))
        target = aside / (self._path(step).name + (f".{taken}" if taken else ""))
        os.rename(self._path(step), target)
        log.error("checkpoint step %d is damaged (%s); moved to %s", step, reason, target)

    def _published(self):
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        matches = filter(None, map(STEP_NAME.fullmatch, names))
        return sorted(int(m[1]) for m in matches if m[0] == self._path(int(m[1])).name)

    def _path(self, step):
        return self.directory / f"step-{step:08d}"

    def _temporary(self, step):
        return self.directory / f"{TEMPORARY}step-{step:08d}"

    # ---- Orbax -----------------------------------------------------------------------------------

    def _writer(self, layout):
        if layout not in self._writers:
            # Measured on 38 leaves, 2 MB: OCDBT costs 20 ms for one array and saves 70 files for many; compression of
            # float32 weights costs more time than it saves bytes.
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=layout == "tree", use_zarr3=False, use_compression=False)
            # Directories made in the background leave threads that wait 20 minutes when the save fails before they
            # are made.
            options = ocp.AsyncOptions(create_directories_asynchronously=False)
            self._writers[layout] = ocp.AsyncCheckpointer(handler, async_options=options)
        return self._writers[layout]

    def _read(self, step, layout, saved, wanted):
        """{name: array} for the names of `wanted`, in its order."""
        path, reader = self._path(step) / "state", self._writer(layout)
        if layout == "packed":
            args = ocp.args.PyTreeRestore(
                {"bytes": 0}, restore_args={"bytes": ocp.RestoreArgs(restore_type=np.ndarray)}
            )
            arrays = _unpack(reader.restore(path, args=args)["bytes"], saved)
            return {name: _place(arrays[name], leaf) for name, leaf in wanted.items()}
        restore_args = {name: _restore_args(leaf) for name, leaf in wanted.items() if leaf.size}
        args = ocp.args.PyTreeRestore(dict.fromkeys(restore_args, 0), restore_args=restore_args)
        arrays = reader.restore(path, args=args)
        empty = {name: _place(np.zeros(x.shape, x.dtype), x) for name, x in wanted.items() if not x.size}
        return {name: (arrays | empty)[name] for name in wanted}  # Orbax refuses arrays of size 0: they are not stored


# ---- leaves --------------------------------------------------------------------------------------


def _named_leaves(tree):
    """{"params/block/mlp/gate": leaf, ...} in tree order. Names, not containers, are the saved structure."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not isinstance(dtype, np.dtype) or dtype.hasobject:
            raise ValueError(
                f"{name} is {type(leaf).__name__} {dtype or ''}, not a numeric array; wrap numbers in np.int32 or "
                "np.float32, and store random keys as jax.random.key_data"
            )
        if name in leaves:
            raise ValueError(f"two leaves are named {name}; rename the one whose key holds a '/'")
        leaves[name] = leaf
    return leaves


def _check_leaves(saved, wanted, path):
    """saved: {name: [dtype, shape]} of digests.json. Raises ValueError listing the first differences."""

    def show(dtype, shape):
        return f"{dtype}{list(shape)}"

    wrong = [
        f"{name}: in the checkpoint {show(*saved[name])}, wanted {show(x.dtype, x.shape)}"
        for name, x in wanted.items()
        if name in saved and saved[name] != [str(x.dtype), list(x.shape)]
    ]
    wrong += [
        f"{name}: not in the checkpoint, wanted {show(x.dtype, x.shape)}"
        for name, x in wanted.items()
        if name not in saved
    ]
    wrong += [
        f"{name}: in the checkpoint {show(*spec)}, not wanted" for name, spec in saved.items() if name not in wanted
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path} holds another state: " + "; ".join(wrong[:5]) + more)


def _pack(leaves):
    """All leaves as one uint8 vector on the host: a copy, so the caller may donate or overwrite its arrays."""
    host = jax.device_get(list(leaves.values()))
    return np.concatenate([np.zeros(0, np.uint8)] + [np.ravel(x).view(np.uint8) for x in host])


def _unpack(bytes_N, saved):
    """{name: array}, views into bytes_N, from {name: [dtype, shape]} in saving order."""
    arrays, start = {}, 0
    for name, (dtype, shape) in saved.items():
        stop = start + np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
        arrays[name] = bytes_N[start:stop].view(dtype).reshape(shape)
        start = stop
    return arrays


def _restore_args(leaf):
    if getattr(leaf, "sharding", None) is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _place(array, wanted):
    sharding = getattr(wanted, "sharding", None)
    if sharding is None:
        return array.copy()  # not a view: one leaf must not keep the whole state alive
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index].copy())
