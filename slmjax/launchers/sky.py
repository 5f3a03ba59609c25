"""Hands packs to SkyPilot as managed jobs: it finds machines, begins again where a spot one is lost, and ends them.

A task file that the user keeps, in `launch/sky/` to begin from, says which machines and how they are set up; it trains
the pack that SLMJAX_PACK names. What belongs to the study is given on the command line. Only the `sky` command is used,
never its Python: it may live in an environment of its own.
"""

import json
import re
import shlex
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from slmjax.launchers import Pack, store, submissions
from slmjax.launchers.backend import BackendError, Seen, chain_packs, require_script
from slmjax.launchers.command import NoAnswer, Refused, ask, require
from slmjax.launchers.submissions import Submission
from slmjax.study import Study

NO_SCRIPT = "--on=sky needs a task file; copy one of launch/sky/, edit it, and name it by --script"
ASK_TIMEOUT_S = 120.0
LAUNCH_TIMEOUT_S = 1800.0  # the first launch makes the machine that the jobs are managed from
SETTLE_S = LAUNCH_TIMEOUT_S + 900.0  # after which a job that SkyPilot has not heard of was never taken
MISSING = "pip install 'slmjax[sky]', or put a sky of your own on the PATH"
NO_JOBS = "No in-progress managed jobs"  # what it says, as a failure, where there is no controller or it sleeps
ENDED = ("SUCCEEDED", "CANCELLED")  # and all that begin with FAILED


class Sky:
    """Backend, see `slmjax.launchers.backend`.

    jobs: how many packs SkyPilot has at a time; None: all of them. arguments: further ones of `sky jobs launch`.
    mirror: the study's copy in an object store, see `slmjax.launchers.store`.
    """

    name, attached, queues_after, poll_s = "sky", False, False, 30.0

    def __init__(
        self,
        folder: Path,
        script: Path | None = None,
        *,
        jobs: int | None = None,
        chains_per_pack: int = 1,
        arguments: str = "",
        mirror: str | None = None,
    ):
        self.folder, self.script, self.places = folder, script, jobs
        self.chains_per_pack, self.arguments = chains_per_pack, shlex.split(arguments)
        self.mirror = store.chosen(folder, mirror)

    def packs(self, plan: Study, folder: Path, busy: set[str]) -> list[Pack]:
        return chain_packs(plan, folder, busy, self.chains_per_pack)

    def preview(self, packs: list[Pack], after: Mapping[str, set[str]]) -> list[str]:
        require_script(self.script, NO_SCRIPT)
        planned = [submissions.plan(self.folder, self.name, [pack], earlier=i) for i, pack in enumerate(packs)]
        commands = [shlex.join(self._command(submission)) for submission in planned]
        return [*commands, f"# {self.script}:", self.script.read_text().rstrip()]

    def submit(self, packs: list[Pack], after: Mapping[str, set[str]]) -> None:
        require_script(self.script, NO_SCRIPT)
        require("sky", MISSING)
        store.send(self.folder, self.mirror, packs)
        for pack in packs:
            submission = submissions.plan(self.folder, self.name, [pack])
            path = submissions.write(self.folder, submission)
            try:
                ask(self._command(submission), LAUNCH_TIMEOUT_S, MISSING)
            except NoAnswer:
                raise  # it may have been taken: it is looked for by its name from now on
            except Refused:
                if submission.name not in self._jobs():  # said no and meant it
                    path.unlink()
                    raise

    def poll(self) -> dict[str, Seen]:
        store.bring(self.folder, self.mirror)
        handed = submissions.unfinished(self.folder, self.name)
        jobs = self._jobs() if handed else {}
        seen = {}
        for submission in handed:
            job = jobs.get(submission.name)
            if job is None and time.time() - submission.time < SETTLE_S:
                seen[submission.packs[0]] = Seen("waiting", submission.name, "sky has not listed it yet")
            elif job is not None and not _ended(job):
                seen[submission.packs[0]] = _seen(job)
        return seen

    def logs(self, name: str, follow: bool) -> list[str] | None:
        submission = submissions.newest(self.folder, self.name, name)
        how = "--follow" if follow else "--no-follow"
        return submission and ["sky", "jobs", "logs", "--name", submission.name, how]

    def cancel(self, names: Iterable[str]) -> list[str]:
        """SkyPilot ends the machines at once: what a run has saved last is what it goes on from."""
        names, asked = set(names), []
        jobs = self._jobs()
        for submission in submissions.unfinished(self.folder, self.name):
            job = jobs.get(submission.name)
            if names & set(submission.packs) and job is not None and not _ended(job):
                ask(["sky", "jobs", "cancel", "--name", submission.name, "--yes"], ASK_TIMEOUT_S, MISSING)
                asked.append(f"managed job {job['job_id']} {submission.name}")
        return asked

    def _command(self, submission: Submission) -> list[str]:
        variables = {
            "SLMJAX_PACK": store.address(self.folder, self.mirror, submission.packs[0]),
            "SLMJAX_STUDY": self.folder.name,
        }
        return [
            "sky",
            "jobs",
            "launch",
            str(self.script),
            "--name",
            submission.name,
            *(part for key, value in variables.items() for part in ("--env", f"{key}={value}")),
            "--detach-run",
            "--yes",
            *self.arguments,
        ]

    def _jobs(self) -> dict[str, dict]:
        """Name → job, the newest where several have a name."""
        try:
            said = ask(["sky", "jobs", "queue", "--all", "--verbose", "--output", "json"], ASK_TIMEOUT_S, MISSING)
        except Refused as error:
            if NO_JOBS in error.said:
                return {}
            raise
        try:
            listed = json.loads(said[re.search(r"^\[\]?$", said, re.MULTILINE).start() :])
            listed = sorted(listed, key=lambda job: job["job_id"])
            return {job["job_name"]: job for job in listed}
        except (AttributeError, ValueError, KeyError, TypeError):
            raise BackendError(f"sky jobs queue printed no list of jobs: {' '.join(said.split())[:200]}") from None


def _ended(job: dict) -> bool:
    return job["status"] in ENDED or job["status"].startswith("FAILED")


def _seen(job: dict) -> Seen:
    state = "running" if job["status"] in ("RUNNING", "WINDING_DOWN", "CANCELLING") else "waiting"
    restarts = f", recovered {job['recovery_count']} times" if job.get("recovery_count") else ""
    where = f"job {job['job_id']} {job.get('infra') or ''}".strip()
    return Seen(state, where, f"{job['status']}{restarts}")
