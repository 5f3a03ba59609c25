"""The mirror of a run that several processes train: the first one sends, each has what the store has before it begins.

Their scratch folder may be one that they share, or each host's own. With folders of their own, the first process must
hold all of the state, for it alone sends checkpoints: a batch split over hosts (mesh.data) is well, a model split over
them (mesh.fsdp, tensor, expert) is refused.
"""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

from slmjax import paths
from slmjax.config import ConfigError
from slmjax.mirror import pull
from slmjax.mirror.session import Mirror

SPLIT = ("fsdp", "tensor", "expert")


@contextlib.contextmanager
def mirrored(runs, folder: Path, remote: paths.Path, name: str = "", **settings) -> Iterator[None]:
    """`session.Mirror`, in whichever process of the run this is; JAX must know of all of them by now.

    Raises:
      ConfigError: folders of their own, and a model that is split.
    """
    import jax

    if jax.process_count() == 1:
        with Mirror(runs, folder, remote, name, **settings):
            yield
        return
    from jax.experimental import multihost_utils

    own = not _is_shared(folder, multihost_utils)
    split = [axis for axis in SPLIT if getattr(runs[0].config.mesh, axis) > 1]
    if own and split:
        raise ConfigError(
            f"mesh.{split[0]} splits the model, and each process has a {folder} of its own: a checkpoint would lie in "
            "parts; use a folder that all hosts share (NFS, Filestore), or mesh.data alone"
        )
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            mirror = stack.enter_context(Mirror(runs, folder, remote, name, **settings))
            mirror.push_now()  # what only this one has, the others will look for
        multihost_utils.sync_global_devices("mirror: the first process has everything")
        if own and jax.process_index():
            pull.pull_pack(runs, folder, remote)
        multihost_utils.sync_global_devices("mirror: all have everything")
        yield


def _is_shared(folder: Path, multihost_utils) -> bool:
    """Whether the processes see one folder: the first leaves a mark there, which the others look for."""
    import jax
    import numpy as np

    name = multihost_utils.broadcast_one_to_all(np.frombuffer(uuid.uuid4().bytes, np.uint8)).tobytes().hex()
    mark = folder / f".shared-{name}"
    if jax.process_index() == 0:
        paths.write_bytes(mark, b"")
    multihost_utils.sync_global_devices("mirror: marked")
    seen = multihost_utils.process_allgather(np.array(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink()
    return bool(seen.all())
