"""Several processes that train one run together, each on its own devices: how they join, and what they must do alike.

Every process runs the same loop over the same steps. What follows from configs, data and metrics is the same in all of
them by itself. What only one can know (a clock, a signal, what lies in a folder, an error) goes through here before
anyone acts on it: a process that acts alone leaves the others waiting in their next collective. Process 0 alone writes.
In a process on its own everything here is the plain thing. Never here: what is trained, or what is decided.
"""

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slmjax.config import ConfigError

HEARTBEAT_TIMEOUT_S = 60  # a process that was killed is missed after this long; a collective often fails sooner
BLOCK = 1024  # bytes that processes exchange at once: every length is a program to compile
ADDRESS, SIZE, RANK = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"  # JAX itself reads the first


class ElsewhereError(RuntimeError):
    """What another process raised, and so ends the work here as well."""


class DisagreementError(ConfigError):
    """The processes were started with different things; raised in all of them."""


# What JAX, gloo, NCCL and the coordination service say when a process they talk to has gone.
LOST = re.compile(r"gloo|nccl|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|heartbeat|coordination|connection", re.IGNORECASE)


def has_lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone: nothing is wrong with the run, which can go on elsewhere."""
    return not alone() and isinstance(error, jax.errors.JaxRuntimeError) and bool(LOST.search(str(error)))


def alone() -> bool:
    return jax.process_count() == 1


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


# --- joining and leaving ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(wanted: bool = True) -> Iterator[None]:
    """For the length of the block this process is one of several, where that is `wanted`.

    All leave together. A ConfigError is a fault of the plan and the same in all; after any other exception the others
    may be waiting for this process, and so it ends at once, which is how they notice.

    Raises:
      ConfigError: nothing says how many processes there are, or they have unequal numbers of devices.
    """
    if not wanted:
        yield
        return
    _initialize(os.environ)
    try:
        _check_devices()
        _connect()
        yield
    except ConfigError:
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        # 3, as after a signal: the newest checkpoint is there to go on from, and whoever started this may do so.
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 3 if has_lost(error) else 1)
    jax.distributed.shutdown()


def _initialize(environ: Mapping[str, str]) -> None:
    """JAX finds number, rank and coordinator on Slurm, Open MPI and TPUs; the variables of a launch by hand win."""
    try:
        num_processes, process_id = (int(environ[name]) if name in environ else None for name in (SIZE, RANK))
        # Its service would catch SIGTERM; `Vote` agrees on that signal, and on others too.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            num_processes=num_processes,
            process_id=process_id,
            local_device_ids=_local_device_ids(environ),
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
    except ValueError as error:
        raise ConfigError(
            f"--distributed: {error} Start the processes with srun or on a TPU slice, or set "
            f"{ADDRESS}=HOST:PORT {SIZE}=N {RANK}=0..N-1"
        ) from None


def _local_device_ids(environ: Mapping[str, str]) -> list[int] | None:
    """[], which is all of them, where Slurm has started one process on each node: JAX would take one device alone."""
    tasks_of_nodes = environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # as 1(x4), or 2(x3),1
    one_each = all(tasks.split("(")[0] == "1" for tasks in tasks_of_nodes.split(","))
    return [] if one_each and "JAX_LOCAL_DEVICE_IDS" not in environ else None


def _check_devices() -> None:
    counts = np.bincount([device.process_index for device in jax.devices()], minlength=jax.process_count())
    if len(set(counts)) > 1:
        raise ConfigError(
            f"the processes have {', '.join(map(str, counts))} devices; give each the same number "
            "(on CPU JAX_NUM_CPU_DEVICES sets it)"
        )


def _connect() -> None:
    """Collectives open connections at their first use, and gloo waits 30 seconds for the others to come: time enough
    now, when all of them have just met, and too little once they have a program to compile."""
    gather(None)
    ballot = Ballot()
    ballot.count(ballot.cast(Vote(stop=False, save=False, failed=False)))


# --- between dispatches: exchanges that every process waits for ------------------------------------------------------


def gather(value: Any) -> list:
    """The values of all processes in their order, as JSON gives them back."""
    if alone():
        return [value]
    body = np.frombuffer(json.dumps(value).encode(), np.uint8)
    blocks = multihost_utils.process_allgather(_block(body, BLOCK))
    sizes = np.ascontiguousarray(blocks[:, :4]).view(np.int32)[:, 0]
    longest = int(sizes.max()) + 4
    if longest > BLOCK:
        blocks = multihost_utils.process_allgather(_block(body, 1 << (longest - 1).bit_length()))
    return [json.loads(block[4 : 4 + size].tobytes()) for block, size in zip(blocks, sizes, strict=True)]


def _block(body: np.ndarray, size: int) -> np.ndarray:
    """The length of `body`, then as much of it as there is room for."""
    block = np.zeros(size, np.uint8)
    block[:4] = np.array([len(body)], np.int32).view(np.uint8)
    part = body[: size - 4]
    block[4 : 4 + len(part)] = part
    return block


def shared_error(error: Exception | None) -> Exception | None:
    """What went wrong in any process: `error` where it is this one, else an ElsewhereError; None when nothing did."""
    said = gather(error and f"{type(error).__name__}: {error}")
    told = (ElsewhereError(f"process {i}: {text}") for i, text in enumerate(said) if text)
    return error or next(told, None)


def together(function: Callable, *args) -> Any:
    """function(*args) in every process, with no exchange inside; when it fails in one, it fails in all."""
    if alone():
        return function(*args)
    result = error = None
    try:
        result = function(*args)
    except Exception as caught:
        error = caught
    if (error := shared_error(error)) is not None:
        raise error
    return result


def of_first(choose: Callable) -> Any:
    """choose() of process 0, something JSON can carry, in all; what it raises, all raise."""
    if alone():
        return choose()
    return gather(together(lambda: choose() if first() else None))[0]


def require_same(facts: dict[str, Any]) -> None:
    """Raises DisagreementError where a value is not what process 0 has, and names its key."""
    everyones = gather(facts)
    for i, theirs in enumerate(everyones):
        for key in dict.fromkeys([*everyones[0], *theirs]):
            wanted, found = everyones[0].get(key), theirs.get(key)
            if found != wanted:
                raise DisagreementError(
                    f"process {i} has {key}={found!r}, and process 0 has {key}={wanted!r}; start all with the same"
                )


# --- with every dispatch: nobody waits -------------------------------------------------------------------------------


class Vote(NamedTuple):
    """What a process asks of all: they do what any of them asks for."""

    stop: bool  # save and end: a signal came
    save: bool  # a checkpoint is due by the clock
    failed: bool  # this process cannot go on


class Ballot:
    """Votes are cast behind a dispatch and counted when its metrics are read, a dispatch later: the devices add them up
    after the step, so that no host waits for another, and every process counts the same votes at the same step.
    """

    def __init__(self):
        mesh = Mesh(np.array(jax.devices()), ("device",))
        self._placed = NamedSharding(mesh, PartitionSpec("device"))
        self._any = jax.jit(lambda votes_DV: jnp.max(votes_DV, 0), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def cast(self, vote: Vote):
        if alone():
            return vote
        mine_1V = np.array([vote], np.int32)
        shape = (len(self._placed.mesh.devices), len(vote))
        return self._any(jax.make_array_from_callback(shape, self._placed, lambda index: mine_1V))

    def count(self, cast) -> Vote:
        return cast if alone() else Vote(*(bool(asked) for asked in np.asarray(cast)))


# --- arrays ----------------------------------------------------------------------------------------------------------


def from_host(function: Callable, shardings: tuple) -> Callable:
    """`function` of arrays over all processes as one that takes NumPy arrays, of which each has all and gives its part.

    shardings: of each argument, one for all its leaves; None where it is on the devices already.
    """

    def place(argument, where):
        if where is None:
            return argument
        return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, where, lambda index: a[index]), argument)

    return lambda *args: function(*map(place, args, shardings))
