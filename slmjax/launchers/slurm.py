"""Hands packs to Slurm as job arrays. What a job needs beyond that is in a batch script that the user keeps.

The script, `launch/slurm/job.sh` to begin from, holds the site's `#SBATCH` lines, sets up the environment and trains
one pack, `slmjax pack $1 --task=$SLURM_ARRAY_TASK_ID`; what belongs to the study is given on sbatch's command line.
State is read from `squeue`: accounting (`sacct`) is not needed.
"""

import math
import os
import re
import shlex
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from slmjax.launchers import Pack, submissions
from slmjax.launchers.backend import BackendError, Seen, chain_packs, require_script, show_file
from slmjax.launchers.command import Refused, ask
from slmjax.launchers.submissions import Submission
from slmjax.study import Study

NO_SCRIPT = "--on=slurm needs a batch script; copy launch/slurm/job.sh, edit it, and name it by --script"
ASK_TIMEOUT_S = 60.0
SETTLE_S = 120.0  # after which a job that Slurm has not listed was never taken
UNSURE = re.compile(r"timed out|unable to contact|socket|zero bytes|communication", re.IGNORECASE)
MISSING = "launch from a login node of the cluster"
SQUEUE_FORMAT = "%j|%F|%K|%T|%r|%N"  # name, job, task of the array, state, reason, nodes
RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")


@dataclass(frozen=True)
class Task:
    """One pack in the queue."""

    job: str  # as scancel takes it: 17_3
    state: str
    reason: str
    nodes: str


class Slurm:
    """Backend, see `slmjax.launchers.backend`.

    jobs: how many tasks of one array run at a time; None: as many as the cluster has room for. devices_per_node: with
    it, packs whose mesh asks for more devices than one node has get as many nodes. arguments: further ones of sbatch.
    """

    name, attached, queues_after, places, poll_s = "slurm", False, True, None, 10.0

    def __init__(
        self,
        folder: Path,
        script: Path | None = None,
        *,
        jobs: int | None = None,
        chains_per_pack: int = 1,
        devices_per_node: int | None = None,
        arguments: str = "",
    ):
        self.folder, self.script, self.jobs = folder, script, jobs
        self.chains_per_pack, self.devices_per_node = chains_per_pack, devices_per_node
        self.arguments = shlex.split(arguments)

    def packs(self, plan: Study, folder: Path, busy: set[str]) -> list[Pack]:
        return chain_packs(plan, folder, busy, self.chains_per_pack)

    def preview(self, packs: list[Pack], after: Mapping[str, set[str]]) -> list[str]:
        require_script(self.script, NO_SCRIPT)
        planned = self._planned(packs, after, most=None)
        commands = [shlex.join(self._command(submission, nodes, [])) for submission, nodes, _ in planned]
        return [*commands, f"# {self.script}:", self.script.read_text().rstrip()]

    def submit(self, packs: list[Pack], after: Mapping[str, set[str]]) -> None:
        require_script(self.script, NO_SCRIPT)
        queue = self._queue() if any(after.values()) else {}
        for submission, nodes, follows in self._planned(packs, after, _max_array_size()):
            path = submissions.write(self.folder, submission)
            jobs = sorted(queue[name].job for name in follows if name in queue)
            try:
                said = _ask(self._command(submission, nodes, jobs))
            except Refused as error:
                if not UNSURE.search(error.said):  # said no and meant it
                    path.unlink()
                raise
            submissions.write(self.folder, replace(submission, taken=True))
            if ";" in said:
                raise BackendError(f"sbatch sent job {said.strip()} to another cluster, where it is not looked for")

    def poll(self) -> dict[str, Seen]:
        seen = {}
        for submission in submissions.unfinished(self.folder, self.name):
            if not submission.taken and time.time() - submission.time < SETTLE_S:
                seen |= dict.fromkeys(submission.packs, Seen("waiting", submission.name, "Slurm has not listed it yet"))
        for name, task in self._queue().items():
            state = "running" if task.state in RUNNING else "waiting"
            note = task.reason if task.reason not in ("None", "") else ""
            seen[name] = Seen(state, f"{task.job} {task.nodes}".strip(), note)
        return seen

    def logs(self, name: str, follow: bool) -> list[str] | None:
        submission = submissions.newest(self.folder, self.name, name)
        return submission and show_file(self._output(submission, str(submission.packs.index(name))), follow)

    def cancel(self, names: Iterable[str]) -> list[str]:
        queue = self._queue()
        jobs = [queue[name].job for name in names if name in queue]
        if jobs:
            _ask(["scancel", *jobs])
        return [f"Slurm job {job}" for job in jobs]

    def _planned(self, packs: list[Pack], after: Mapping[str, set[str]], most: int | None):
        """Submissions with nodes and what they follow: one array for each resource shape and such set."""
        groups: dict[tuple, list[Pack]] = {}
        for pack in packs:
            groups.setdefault((self._nodes(pack), frozenset(after.get(pack.name, ()))), []).append(pack)
        planned = []
        for (nodes, follows), members in groups.items():
            size = most or len(members)
            for first in range(0, len(members), size):
                part = members[first : first + size]
                submission = submissions.plan(self.folder, self.name, part, earlier=len(planned))
                planned.append((submission, nodes, follows))
        return planned

    def _nodes(self, pack: Pack) -> int | None:
        mesh = pack.runs[0].config.mesh
        if not self.devices_per_node or not mesh.data:
            return None
        devices = mesh.data * mesh.fsdp * mesh.tensor * mesh.expert
        if devices > self.devices_per_node and devices % self.devices_per_node:
            raise ValueError(
                f"a mesh of {devices} devices does not fill nodes of --devices_per_node={self.devices_per_node}; make "
                "the product of mesh.* a multiple of it"
            )
        return math.ceil(devices / self.devices_per_node)

    def _command(self, submission: Submission, nodes: int | None, follows: list[str]) -> list[str]:
        throttle = f"%{self.jobs}" if self.jobs else ""
        return [
            "sbatch",
            "--parsable",
            f"--job-name={submission.name}",
            f"--array=0-{len(submission.packs) - 1}{throttle}",
            "--requeue",
            "--open-mode=append",
            f"--output={self._output(submission, '%a')}",
            *([f"--nodes={nodes}"] if nodes else []),
            *([f"--dependency=afterany:{':'.join(follows)}"] if follows else []),
            *self.arguments,
            str(self.script),
            str(submission.path(self.folder).absolute()),
        ]

    def _output(self, submission: Submission, task: str) -> Path:
        return self.folder.absolute() / "submissions" / f"{submission.name}-{task}.log"

    def _queue(self) -> dict[str, Task]:
        """Pack name → its task; of a pack that was handed over again, the newest."""
        known = {submission.name: submission for submission in submissions.unfinished(self.folder, self.name)}
        if not known:
            return {}
        said = _ask(
            ["squeue", "--all", "--array", "--noheader", f"--name={','.join(known)}", f"--format={SQUEUE_FORMAT}"]
        )
        found = {}
        for line in filter(str.strip, said.splitlines()):
            name, job, task, state, reason, nodes = line.strip().split("|")
            if name in known and task.isdigit():
                pack = known[name].packs[int(task)]
                found.setdefault(known[name].time, {})[pack] = Task(f"{job}_{task}", state, reason, nodes)
        return {pack: task for when in sorted(found) for pack, task in found[when].items()}


def _max_array_size() -> int:
    """The site's limit: array indices must be less than it."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask(["scontrol", "show", "config"]), re.MULTILINE)
    if not found:
        raise BackendError("scontrol show config does not say MaxArraySize")
    return max(1, int(found[1]))


def _ask(command: list[str]) -> str:
    # SQUEUE_STATES and the like, from a user's shell, would hide jobs that are there.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    return ask(command, ASK_TIMEOUT_S, MISSING, env)
