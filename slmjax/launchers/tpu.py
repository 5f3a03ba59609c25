"""Trains packs on TPU queued resources by the vendor's command line: one resource for each pack, deleted at its end.

What was done for a pack is in the study's folder, and the names of its resources follow from it, so that a launcher
finds them again from any machine that has the folder:

    OUT/<study>/tpu/<resource>.json    the pack, the settings, and what was last done

A launcher has to stay: it starts training when a TPU comes, asks for another when one is taken away, and deletes it at
the end. What is done when is decided in `tpu_machine`, what runs on the machines is in `tpu_remote`.
"""

import contextlib
import json
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from slmjax import launchers, records
from slmjax.launchers import Pack, store, submissions, tpu_machine, tpu_remote, tpu_settings
from slmjax.launchers.backend import BackendError, Seen, chain_packs
from slmjax.launchers.command import NoAnswer, Refused, ask, require
from slmjax.launchers.submissions import Submission
from slmjax.launchers.tpu_machine import Look, Note, Step
from slmjax.launchers.tpu_settings import Settings
from slmjax.study import Study

ASK_TIMEOUT_S = 120.0
LOCK_WAIT_S = 300.0
CANCEL_WAIT_S = tpu_machine.SAVE_S + 120.0
MISSING = "install the Google Cloud CLI and log in, see launch/README.md"
USER = "slmjax"  # on the machines: the same from whichever machine a launcher runs on, and so the same home
RESOURCES = ["gcloud", "compute", "tpus", "queued-resources"]


class Tpu:
    """Backend that is `Tended`, see `slmjax.launchers.backend`.

    script: see `tpu_settings`. jobs: how many TPUs at a time, 1 when not given. arguments: further ones of
    `queued-resources create`. mirror: the study's copy in an object store, see `slmjax.launchers.store`.
    """

    name, attached, queues_after, poll_s = "tpu", False, False, 20.0

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
        self.folder, self.script, self.places = folder, script, jobs or 1
        self.chains_per_pack, self.arguments = chains_per_pack, shlex.split(arguments)
        self.mirror = store.chosen(folder, mirror)
        self.listed: dict[str, tuple[str, str]] | None = None  # by `tend`, for the look that follows it

    # --- what every backend does -------------------------------------------------------------------------------------

    def packs(self, plan: Study, folder: Path, busy: set[str]) -> list[Pack]:
        return chain_packs(plan, folder, busy, self.chains_per_pack)

    def preview(self, packs: list[Pack], after: Mapping[str, set[str]]) -> list[str]:
        settings, lines = tpu_settings.read(self.script), []
        for i, pack in enumerate(packs):
            note = self._first_note(submissions.plan(self.folder, self.name, [pack], earlier=i), pack)
            lines += [shlex.join(self._create(note, settings)), "# when it is ACTIVE, on every worker:"]
            lines += [shlex.join(self._start(note, settings)), "# when the pack has ended:"]
            lines += [shlex.join(_delete(note.name, settings))]
        return lines

    def submit(self, packs: list[Pack], after: Mapping[str, set[str]]) -> None:
        settings = tpu_settings.read(self.script)
        require("gcloud", MISSING)
        store.send(self.folder, self.mirror, packs)
        for pack in packs:
            submission = submissions.plan(self.folder, self.name, [pack])
            submissions.write(self.folder, submission)
            note = self._first_note(submission, pack)
            with self._alone():
                self._write(note, settings)
                self._do(Step("create", note, note.attempt), settings)

    def poll(self) -> dict[str, Seen]:
        store.bring(self.folder, self.mirror)
        notes = [(note, settings) for note, settings in self._notes() if note.asked != "over"]
        listed, self.listed = self.listed, None
        if listed is None:
            listed = self._list(settings for _, settings in notes)
        seen = {}
        for note, _ in notes:
            state = listed.get(note.name, ("not there yet", ""))[0]
            trains = note.trained and state == "ACTIVE"
            seen[note.pack] = Seen("running" if trains else "waiting", note.name, note.end or state)
        return seen

    def tend(self) -> list[str]:
        """One step for each pack in hand; what was done, for a person to read."""
        lines = []
        with self._alone():
            notes = [(note, settings) for note, settings in self._notes() if note.asked != "over"]
            listed = self._list(settings for _, settings in notes)
            self.listed = listed
            for note, settings in notes:
                step = tpu_machine.next_step(note, self._look(note, settings, listed))
                self._write(step.note, settings)
                lines += [step.say] if step.say else []
                self._do(step, settings)
        return lines

    def logs(self, name: str, follow: bool) -> list[str] | None:
        """Of the first worker, while its TPU is there."""
        found = [(note, settings) for note, settings in self._notes() if note.pack == name]
        if not found:
            return None
        note, settings = max(found, key=lambda one: one[0].since)
        if note.asked == "over":
            return ["echo", f"{note.name} is deleted, and with it what was printed there"]
        return _ssh(note.name, settings, tpu_remote.show(note.name, follow), worker="0")

    def cancel(self, names: Iterable[str]) -> list[str]:
        """Lets the packs save, for a few minutes at most, and sees their resources gone."""
        names, asked = set(names), []
        with self._alone():
            for note, settings in self._notes():
                if note.pack in names and note.asked != "over":
                    self._write(tpu_machine.cancelled(note, time.time()), settings)
                    asked.append(note)
        deadline = time.monotonic() + CANCEL_WAIT_S
        while (left := {note.name for note, _ in self._notes() if note.asked != "over" and note.end}) and (
            time.monotonic() < deadline
        ):
            with contextlib.suppress(BackendError):  # what is still there is named below
                self.tend()
            time.sleep(min(self.poll_s, 5.0))
        ends = {note.resource: note.name for note, _ in self._notes()}
        return [
            f"TPU {ends[note.resource]}, {'NOT YET deleted' if ends[note.resource] in left else 'deleted'}"
            for note in asked
        ]

    # --- steps -------------------------------------------------------------------------------------------------------

    def _look(self, note: Note, settings: Settings, listed: dict[str, tuple[str, str]]) -> Look:
        named = re.compile(re.escape(note.resource) + r"-(\d+)")
        found = {int(match[1]): listed[name] for name in listed if (match := named.fullmatch(name))}
        newest = max(found, default=None)
        state, detail = found.get(newest, ("", ""))
        process, code = "no answer", 0
        if state == "ACTIVE" and note.asked != "delete":
            name = f"{note.resource}-{newest}"
            with contextlib.suppress(Refused, NoAnswer):
                command = _ssh(name, settings, tpu_remote.probe(name))
                process, code = tpu_remote.said(ask(command, ASK_TIMEOUT_S, MISSING))
        states = {attempt: state for attempt, (state, _) in found.items()}
        return Look(states, process, code, time.time(), self._finished(note), detail)

    def _finished(self, note: Note) -> bool:
        """Of each run: done, or failed since it was handed over."""
        for run in launchers.read_pack(self.folder / "packs" / f"{note.pack}.json").unfinished:
            said = records.read_json(self.folder / run.run_id / "status.json") or {"state": "queued"}
            if said["state"] not in ("failed", "diverged") or said["time"] < note.since:
                return False
        return True

    def _do(self, step: Step, settings: Settings) -> None:
        """What was written down. A command that fails is not the end of it: the next look tells what has come of it."""
        if step.do == "create":
            self._ask_for(step.note, settings)
        elif step.do == "start":
            self._try(self._start(step.note, settings))
        elif step.do == "stop":
            self._try(_ssh(step.note.name, settings, tpu_remote.stop(step.note.name)))
        elif step.do == "delete":
            self._try(_delete(f"{step.note.resource}-{step.attempt}", settings))
        elif step.do == "over" and step.note.end == "gave up":
            self._blame(step.note)

    def _ask_for(self, note: Note, settings: Settings) -> None:
        """A name that exists already is the answer to an earlier request."""
        try:
            ask(self._create(note, settings), ASK_TIMEOUT_S, MISSING)
        except NoAnswer:
            return
        except Refused as error:
            if not re.search(r"ALREADY_EXISTS|already exists", error.said):
                self._write(tpu_machine.refused(note, error.said, time.time()), settings)

    def _try(self, command: list[str]) -> None:
        with contextlib.suppress(Refused, NoAnswer):
            ask(command, ASK_TIMEOUT_S, MISSING)

    def _blame(self, note: Note) -> None:
        """Makes the reason that of the pack's runs, which will not be handed over again for it."""
        for run in launchers.read_pack(self.folder / "packs" / f"{note.pack}.json").unfinished:
            records.write_failure(self.folder / run.run_id, run.config.train.steps, f"no TPU: {note.reason}")
            store.copy(self.folder, self.mirror, [f"{run.run_id}/status.json"])

    # --- commands ----------------------------------------------------------------------------------------------------

    def _create(self, note: Note, settings: Settings) -> list[str]:
        node = [note.name, f"--node-id={note.name}"]
        return [*RESOURCES, "create", *node, *settings.place, *settings.creation, "--async", "--quiet", *self.arguments]

    def _start(self, note: Note, settings: Settings) -> list[str]:
        pack = store.address(self.folder, self.mirror, note.pack)
        delete = _delete(note.name, settings)
        return _ssh(note.name, settings, tpu_remote.start(note.name, settings.setup, pack, delete))

    def _list(self, places: Iterable[Settings]) -> dict[str, tuple[str, str]]:
        """Name → state and what the cloud says of it, of this study's resources in all zones that it uses."""
        listed = {}
        for place in sorted({tuple(settings.place) for settings in places}):
            wanted = f"--filter=name~slmjax-{slug(self.folder.name)}"
            said = ask([*RESOURCES, "list", *place, wanted, "--format=json"], ASK_TIMEOUT_S, MISSING)
            try:
                for item in json.loads(said or "[]"):
                    error = item["state"].get("failedData", {}).get("error", {}).get("message", "")
                    listed[item["name"].rpartition("/")[2]] = item["state"]["state"], error
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BackendError(f"gcloud listed no queued resources: {' '.join(said.split())[:200]}") from None
        return listed

    # --- notes -------------------------------------------------------------------------------------------------------

    def _first_note(self, submission: Submission, pack: Pack) -> Note:
        digest = submission.name.rpartition("-")[2]
        return Note(f"slmjax-{slug(self.folder.name)}-{digest}", pack.name, since=submission.time)

    def _write(self, note: Note, settings: Settings) -> None:
        path = self.folder / "tpu" / f"{note.resource}.json"
        path.parent.mkdir(exist_ok=True)
        records.write_json(path, {"note": asdict(note), "settings": asdict(settings)})

    def _notes(self) -> list[tuple[Note, Settings]]:
        said = [records.read_json(path) for path in sorted(self.folder.glob("tpu/*.json"))]
        return [(Note(**one["note"]), Settings(**one["settings"])) for one in said]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Of the launcher and `study cancel`, one at a time decides on a step and takes it."""
        (self.folder / "tpu").mkdir(exist_ok=True)
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            with launchers.held(self.folder / "tpu" / "lock") as mine:
                if mine:
                    yield
                    return
            if time.monotonic() > deadline:
                raise BackendError("another process has been busy with this study's TPUs for minutes")
            time.sleep(0.1)


def slug(name: str) -> str:
    """A study's name as a part of a resource's: lower case letters, digits, hyphens; 63 at most with all the rest."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-")


def _delete(name: str, settings: Settings) -> list[str]:
    return [*RESOURCES, "delete", name, *settings.place, "--force", "--async", "--quiet"]


def _ssh(name: str, settings: Settings, command: str, worker: str = "all") -> list[str]:
    to = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", f"{USER}@{name}", *settings.place]
    to += [f"--worker={worker}", "--quiet"]
    return [*to, f"--command={command}"]
