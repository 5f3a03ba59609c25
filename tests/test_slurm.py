"""Slurm: what is asked of it, against stand-ins for its programs; and whole studies on a real one (`make slurm`)."""

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster

from slmjax import cli, launchers, records
from slmjax.cli import options
from slmjax.launchers import backends, driver, slurm, status, submissions
from slmjax.launchers.backend import BackendError, chain_packs, chains
from slmjax.launchers.command import Refused
from slmjax.launchers.slurm import Slurm

ROOT = Path(__file__).parents[1]

STUDY = """
from experiments import base
from slmjax import config
from slmjax.study import Cell, Study, axis, branch, product

def get_study(arg="12"):
    c = base.get_config("tiny")
    c.data.sources, c.data.tokenizer, c.data.seq_len = ("markov:16:1",), "none", 16
    base.resize(c, 32, 1, 16)
    c.train.batch_size, c.train.eval_sequences, c.train.steps = 8, 16, 5000
    c.schedule.warmup_steps = 5
    c.log.tensorboard, c.log.log_every, c.log.eval_every, c.log.checkpoint_every = False, 50, 0, 100
    cells = product(axis("train.seed", [0, 1, 2]), axis("optim.lr", [0.001, 0.002, 0.005, 0.01]))
    if arg == "branches":
        cells = branch(product(axis("optim.lr", [0.001, 0.002])), (300, 600), decay_fraction=0.2)
    if arg == "fewer":  # another order, and one left out
        cells = cells[:0:-1]
    if arg == "two_nodes":
        c.mesh.data, c.train.steps, c.log.checkpoint_every = 2, 8_000, 2000
        cells = [Cell({}, {})]
    return Study("s", config.resolve(c), cells)
"""


@pytest.fixture(scope="module")
def study_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "s.py"
    path.write_text(STUDY)
    return path


def plan_of(study_file, arg):
    return options.load_study(f"{study_file}:{arg}")


# ---- stand-ins ------------------------------------------------------------------------------------------------------

STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, sys
folder, name, args = pathlib.Path(os.environ["STAND_IN"]), pathlib.Path(sys.argv[0]).name, sys.argv[1:]
queue = json.loads((folder / "queue.json").read_text())
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps([name, *args]) + "\\n")
if (folder / f"fail-{{name}}").exists():
    sys.exit((folder / f"fail-{{name}}").read_text())
if name == "scontrol":
    print("MaxArraySize            = 5")
if name == "squeue":
    wanted = next(a for a in args if a.startswith("--name="))[7:].split(",")
    shown = os.environ.get("SQUEUE_STATES", "PENDING,RUNNING").split(",")
    print("\\n".join(line for line in queue if line.split("|")[0] in wanted and line.split("|")[3] in shown))
if name == "sbatch":
    said = {{a.split("=")[0][2:]: a.split("=", 1)[1] for a in args if a.startswith("--") and "=" in a}}
    job = str(1 + len({{line.split("|")[1] for line in queue}}))
    for task in range(int(said["array"].split("%")[0].split("-")[1]) + 1):
        queue.append("|".join([said["job-name"], job, str(task), "PENDING", "Priority", ""]))
    (folder / "queue.json").write_text(json.dumps(queue))
    if (folder / "lose-sbatch").exists():
        sys.exit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    print(job)
if name == "scancel":
    (folder / "queue.json").write_text(json.dumps([l for l in queue if "_".join(l.split("|")[1:3]) not in args]))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Slurm's programs as scripts with a queue in a file, in which nothing ever runs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "squeue", "scancel", "scontrol"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    (folder / "queue.json").write_text("[]")
    monkeypatch.setenv("STAND_IN", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def calls(stand_in, name):
    return [args for called, *args in map(json.loads, (stand_in / "calls").read_text().splitlines()) if called == name]


def queue(stand_in, change=None):
    lines = json.loads((stand_in / "queue.json").read_text())
    if change:
        (stand_in / "queue.json").write_text(json.dumps(change(lines)))
    return lines


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.sh"
    path.write_text("#!/bin/bash\n")
    return path


def hand_over(study_file, out, job, arg="12", **options):
    plan = plan_of(study_file, arg)
    folder = plan.save(out)
    return driver.run(plan, folder, Slurm(folder, job, **options), watch=False), folder


def handed(folder):
    """run_id → how many submissions have it."""
    runs = [run.run_id for path in (folder / "submissions").glob("*.json") for name in submissions.read(path).packs
            for run in launchers.read_pack(folder / "packs" / f"{name}.json").runs]  # fmt: skip
    return {run_id: runs.count(run_id) for run_id in runs}


def test_arrays_hold_to_the_sites_limit_and_the_users_throttle(study_file, tmp_path, stand_in, job):
    code, folder = hand_over(study_file, tmp_path, job, jobs=2, arguments="--partition=main --exclude='n 3'")
    assert code == 0
    arrays = [next(a for a in args if a.startswith("--array=")) for args in calls(stand_in, "sbatch")]
    assert sorted(arrays) == ["--array=0-1%2", "--array=0-4%2", "--array=0-4%2"]
    for args in calls(stand_in, "sbatch"):
        assert args[-4:-2] == ["--partition=main", "--exclude=n 3"] and args[-2] == str(job)
        assert {"--parsable", "--requeue", "--open-mode=append"} <= set(args)
        sent = submissions.read(Path(args[-1]))
        assert f"--job-name={sent.name}" in args
        for task in range(len(sent.packs)):
            assert submissions.pack_file(Path(args[-1]), task).exists()
        with pytest.raises(ValueError, match=f"tasks 0 to {len(sent.packs) - 1}"):
            submissions.pack_file(Path(args[-1]), len(sent.packs))
    assert handed(folder) == dict.fromkeys([run.run_id for run in plan_of(study_file, "12").runs], 1)


def test_nothing_in_the_queue_is_handed_over_again(study_file, tmp_path, stand_in, job):
    """Nor by another order of the cells, nor when cells come to the study; what has left the queue is, once."""
    _, folder = hand_over(study_file, tmp_path, job, "fewer")
    first = handed(folder)
    assert len(first) == 11
    hand_over(study_file, tmp_path, job, "fewer")
    assert handed(folder) == first
    hand_over(study_file, tmp_path, job, "12")
    second = handed(folder)
    assert set(second.values()) == {1} and len(second) == 12 and set(first) < set(second)
    gone = queue(stand_in, lambda lines: lines[1:])[0].split("|")
    lost = submissions.read(folder / "submissions" / f"{gone[0]}.json").packs[int(gone[2])]
    (run,) = launchers.read_pack(folder / "packs" / f"{lost}.json").runs
    hand_over(study_file, tmp_path, job, "12")
    assert handed(folder) == second | {run.run_id: 2}


def test_a_lost_answer_is_not_a_second_job(study_file, tmp_path, stand_in, job):
    """sbatch fails although Slurm has taken the job, as it does when the answer is late."""
    (stand_in / "lose-sbatch").touch()
    with pytest.raises(BackendError, match="Socket timed out"):
        hand_over(study_file, tmp_path, job)
    (stand_in / "lose-sbatch").unlink()
    _, folder = hand_over(study_file, tmp_path, job)
    assert set(handed(folder).values()) == {1} and len(queue(stand_in)) == 12


def test_a_refusal_leaves_nothing_behind_and_ends_the_watch(study_file, tmp_path, stand_in, job, monkeypatch):
    """Slurm said no and means it, as to a partition that is not there; tried again a few times, for it may not."""
    monkeypatch.setattr(driver, "BACKOFF_S", 0.01)
    monkeypatch.setattr(Slurm, "poll_s", 0.01)
    (stand_in / "fail-sbatch").write_text("sbatch: error: invalid partition specified: gpu")
    plan = plan_of(study_file, "12")
    folder = plan.save(tmp_path)
    with pytest.raises(Refused, match="invalid partition"):
        driver.run(plan, folder, Slurm(folder, job), watch=True)
    assert handed(folder) == {} and len(calls(stand_in, "sbatch")) == driver.MAX_LAUNCHES


def test_an_answer_that_is_late_is_waited_for(study_file, tmp_path, stand_in, job, monkeypatch):
    """sbatch was cut off, and squeue does not list the job yet: nothing is handed over before that is settled."""
    (stand_in / "fail-sbatch").write_text("sbatch: error: Unable to contact slurm controller (connect failure)")
    for _ in range(2):
        with contextlib.suppress(BackendError):
            hand_over(study_file, tmp_path, job, "fewer", chains_per_pack=11)
    assert len(calls(stand_in, "sbatch")) == 1
    (stand_in / "fail-sbatch").unlink()
    monkeypatch.setattr(slurm, "SETTLE_S", 0.0)
    _, folder = hand_over(study_file, tmp_path, job, "fewer", chains_per_pack=11)
    assert len(queue(stand_in)) == 1 and set(handed(folder).values()) == {2}


def test_a_users_filters_hide_no_job(study_file, tmp_path, stand_in, job, monkeypatch):
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    _, folder = hand_over(study_file, tmp_path, job)
    hand_over(study_file, tmp_path, job)
    assert set(handed(folder).values()) == {1}


def test_a_controller_that_does_not_answer_stops_the_hand_over(study_file, tmp_path, stand_in, job, capsys):
    _, folder = hand_over(study_file, tmp_path, job)
    before = handed(folder)
    (stand_in / "fail-squeue").write_text("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    line = ["study", "run", "--on=slurm", f"--script={job}", f"--study={study_file}:12", f"--out={tmp_path}"]
    assert cli.main(line) == 1
    assert "Unable to contact slurm controller" in capsys.readouterr().err
    assert handed(folder) == before
    assert cli.main(["study", "status", f"--study={folder}"]) == 0, "the folders are there to be read"
    said = capsys.readouterr().out
    assert "12 queued of 12 runs" in said and "Unable to contact" in said


def test_a_branch_stays_with_its_trunk(study_file, tmp_path):
    plan = plan_of(study_file, "branches")
    made = chains(plan.runs)
    assert [len(chain) for chain in made] == [3, 3]
    for trunk, *rest in made:
        assert all(run.parent == trunk.run_id for run in rest)
    folder = plan.save(tmp_path)
    packs = chain_packs(plan, folder, set())
    assert len(packs) == 2 and len(chain_packs(plan, folder, set(), chains_per_pack=2)) == 1
    busy = {run.run_id for run in packs[0].runs}
    assert [pack.name for pack in chain_packs(plan, folder, busy)] == [packs[1].name]


def test_waiting_tasks_are_shown_and_cancelled(study_file, tmp_path, stand_in, job, capsys):
    _, folder = hand_over(study_file, tmp_path, job)
    queue(stand_in, lambda lines: [lines[0].replace("PENDING|Priority|", "RUNNING|None|n7"), *lines[1:]])
    assert cli.main(["study", "status", f"--study={folder}"]) == 0
    said = capsys.readouterr().out
    assert said.count("Priority") == 11 and "starting" in said and "n7" in said
    assert "11 waiting" in said and "1 starting" in said
    assert cli.main(["study", "cancel", f"--study={folder}"]) == 0
    assert capsys.readouterr().out.count("Slurm job") == 12
    assert queue(stand_in) == [] and backends.in_hand(folder) == ({}, [])


def test_a_dry_run_writes_nothing(study_file, tmp_path, stand_in, job, capsys):
    out = tmp_path / "OUT"
    line = ["study", "run", "--on=slurm", f"--script={job}", f"--study={study_file}:12", f"--out={out}", "--dry_run"]
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert not out.exists() and "sbatch --parsable" in said and "--array=0-11" in said and "#!/bin/bash" in said
    assert not (stand_in / "calls").exists() or not calls(stand_in, "sbatch")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--on=slrum"], "slurm"),
        (["--on=slurm"], "launch/slurm/job.sh"),
        (["--on=slurm", "--script=no/such.sh"], "no/such.sh"),
        (["--script=job.sh"], "--script means nothing with --on=local"),
        (["--on=slrum", "--devices_per_node=8"], "--on=slrum"),
        (["--on=slurm", "--script=", "--jobs=2"], "launch/slurm/job.sh"),
        (["--on=slurm", "--jobs=0"], "--jobs=0"),
        (["--on=slurm", "--chains_per_pack=-1"], "--chains_per_pack=-1"),
        (["--device_hours=-1"], "device_hours=-1"),
    ],
)
def test_a_mistake_is_one_line(study_file, tmp_path, stand_in, flags, said, capsys):
    assert cli.main(["study", "run", f"--study={study_file}:12", f"--out={tmp_path}", *flags]) == 2
    heard = capsys.readouterr().err
    assert said in heard and heard.count("\n") == 1


def test_a_mesh_of_more_devices_gets_more_nodes(study_file, tmp_path, stand_in, job):
    hand_over(study_file, tmp_path, job, "two_nodes", devices_per_node=1)
    (args,) = calls(stand_in, "sbatch")
    assert "--nodes=2" in args


# ---- a real Slurm ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if lacking := slurm_cluster.missing():
        pytest.skip(f"missing: {', '.join(lacking)}; Debian: {slurm_cluster.INSTALL}")
    folder = tmp_path_factory.mktemp("slurm")
    conf = slurm_cluster.start(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(conf))
        yield conf
    slurm_cluster.stop(folder)


def site_script(folder: Path, **changes: str) -> Path:
    """The recipe with its SITE lines edited as for these nodes: one core a task, no GPU."""
    text = (ROOT / "launch/slurm/job.sh").read_text()
    edits = {"--gpus-per-node=8 .*": "", "--cpus-per-task=8": "--cpus-per-task=1", **changes}
    edits |= {
        "^source .*": f'export JAX_NUM_CPU_DEVICES=1 PATH="{Path(sys.executable).parent}:$PATH" PYTHONPATH={ROOT}'
    }
    for pattern, new in edits.items():
        text, count = re.subn(pattern, new, text, flags=re.MULTILINE)
        assert count == 1, pattern
    path = folder / "job.sh"
    path.write_text(text)
    return path


def study(action, study_file, arg, out, *more):
    line = [sys.executable, "-m", "slmjax", "study", action, f"--study={study_file}:{arg}", f"--out={out}", *more]
    return subprocess.run(line, capture_output=True, text=True, timeout=600, cwd=ROOT)


def losses(folder):
    """run_id → every step's recorded loss and the final one, each step once."""
    found = {}
    for run_id, run in records.load_study(folder)[1].items():
        steps = [line["step"] for line in run.train]
        assert steps == sorted(set(steps))
        found[run_id] = [line["loss"] for line in run.train], run.end["loss"]
    return found


def ends(folder):
    """run_id → statuses of all its attempts' ends."""
    found = {}
    for run_id in records.load_study(folder)[1]:
        lines = [line for path in records.attempt_files(folder / run_id) for line in records.read_lines(path)]
        found[run_id] = [line["status"] for line in lines if line["kind"] == "end"]
    return found


def run_of(folder, job):
    """The one run of a task of the study's one array, given as Slurm names it."""
    (path,) = (folder / "submissions").glob("*.json")
    (run,) = launchers.read_pack(submissions.pack_file(path, int(job.split("_")[1]))).runs
    return run.run_id


def tasks(conf, state="RUNNING"):
    said = slurm_cluster.run(conf, "squeue", "--array", "-h", "-t", state, "-o", "%F_%K %N")
    return [line.split() for line in said.splitlines()]


def operate(conf):
    """What an operator does after a controller died: it has forgotten its last seconds, and trusts its nodes less."""
    for line in slurm_cluster.run(conf, "sinfo", "-h", "-N", "-o", "%N %T").splitlines():
        node, state = line.split()
        if "drain" in state:  # by the controller, which knows of a job there no more; or again, its end forgotten
            slurm_cluster.run(conf, "scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
    said = slurm_cluster.run(conf, "squeue", "--array", "-h", "-t", "PENDING", "-o", "%F_%K|%r")
    for job, reason in (line.split("|") for line in said.splitlines()):
        if "held" in reason.lower():
            slurm_cluster.run(conf, "scontrol", "release", job, check=False)


def hurry(conf, job):
    """Starts a requeued job soon. Slurm holds it back for two minutes, for nodes refuse one that is back too early."""
    time.sleep(5)
    slurm_cluster.run(conf, "scontrol", "update", f"JobId={job}", "StartTime=now", check=False)


@pytest.mark.slurm
def test_faults_of_every_kind_cost_nothing(study_file, cluster, tmp_path):
    """12 runs over 2 nodes; 5 requeues, 2 drains, the controller killed: each run ends once, losses as trained here."""
    here = study("run", study_file, "12", tmp_path / "here", "--jobs=2")
    assert here.returncode == 0, here.stderr
    out, script = tmp_path / "there", site_script(tmp_path)
    line = ("run", study_file, "12", out, "--on=slurm", f"--script={script}")
    assert (begun := study(*line)).returncode == 0, begun.stderr
    folder, draw = out / "s", random.Random(0)
    nodes, drained, requeued = set(), [], 0

    def done():
        return sum(row.state == "done" for row in status.study_status(folder))

    def running():
        """Tasks whose runs have begun to train, so that a fault finds something to lose."""
        slurm_cluster.wait_for(lambda: operate(cluster) or tasks(cluster) or done() == 12, 180)
        found = tasks(cluster)
        nodes.update(node for _, node in found)
        training = {row.run_id for row in status.study_status(folder) if row.state == "running" and row.step}
        return [(job, node) for job, node in found if run_of(folder, job) in training]

    def requeue(job):
        """Whether the task was requeued; one that was about to end has ended."""
        slurm_cluster.run(cluster, "scontrol", "requeue", job, check=False)
        time.sleep(1)
        if not any(job == each for state in ("PENDING", "COMPLETING") for each, *_ in tasks(cluster, state)):
            return False
        slurm_cluster.wait_for(lambda: any(job == each for each, *_ in tasks(cluster, "PENDING")), 60)
        hurry(cluster, job)
        return True

    killed = False
    while requeued < 5 or len(drained) < 2 or not killed:
        assert done() < 12, (requeued, drained, killed)
        found = running()
        if not found:
            time.sleep(0.2)
            continue
        if len(drained) < 2 and requeued > 2 * len(drained):
            node = draw.choice(sorted({node for _, node in found}))
            slurm_cluster.run(cluster, "scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
            try:
                for job, where in found:
                    if where == node:
                        requeue(job)  # a drained node lets its jobs end; an impatient operator does not
                slurm_cluster.wait_for(lambda node=node: node not in {where for _, where in tasks(cluster)}, 120)
            finally:
                slurm_cluster.run(cluster, "scontrol", "update", f"NodeName={node}", "State=RESUME")
            drained.append(node)
        elif requeued == 3 and not killed:
            slurm_cluster.kill_controller(cluster)
            again = study(*line)
            assert again.returncode == 1 and "squeue" in again.stderr, "nobody knows what is in the queue"
            slurm_cluster.start_controller(cluster)
            slurm_cluster.wait_for(lambda: operate(cluster) or tasks(cluster) or done() == 12)
            killed = True
        else:
            requeued += requeue(draw.choice(found)[0])
        print(
            f"{time.strftime('%X')} {done()} done, {requeued} requeued, drained {drained}, killed {killed}", flush=True
        )
    assert study(*line).returncode == 0
    slurm_cluster.wait_for(lambda: operate(cluster) or done() == 12, 600)
    assert nodes == {"n1", "n2"} and set(handed(folder).values()) == {1}
    assert [*ends(folder)] and all(said.count("done") == 1 and said[-1] == "done" for said in ends(folder).values())
    assert sum(said.count("preempted") for said in ends(folder).values()) >= 5
    assert losses(folder) == losses(tmp_path / "here" / "s")


@pytest.mark.slurm
def test_a_run_over_two_nodes_outlives_two_time_limits(study_file, cluster, tmp_path):
    """One process a node, stopped and requeued by its own script a minute before each limit, until it is done."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = site_script(
        tmp_path,
        **{
            "--nodes=1 ": "--nodes=2 ",
            "--time=04:00:00": "--time=2",
            "--signal=TERM@120": "--signal=TERM@60",
            # The names of emulated nodes do not resolve; real ones do, and JAX finds the first by itself.
            "^set -u": f"set -u\nexport JAX_COORDINATOR_ADDRESS=127.0.0.1:{port}",
        },
    )
    out = tmp_path / "OUT"
    assert (begun := study("run", study_file, "two_nodes", out, "--on=slurm", f"--script={script}")).returncode == 0, (
        begun
    )
    folder = out / "s"
    deadline = time.monotonic() + 1500

    while (row := status.study_status(folder)[0]).state != "done":
        assert row.state not in ("failed", "diverged"), row
        assert time.monotonic() < deadline, row
        for job, *_ in tasks(cluster, "PENDING"):
            hurry(cluster, job)
        print(time.strftime("%X"), row.state, row.step, row.attempts, flush=True)
        time.sleep(1)
    ((run_id, said),) = ends(folder).items()
    assert said[-1] == "done" and said.count("done") == 1 and said.count("preempted") >= 2, said
    starts = [records.read_lines(path)[0] for path in records.attempt_files(folder / run_id)]
    assert [start["step"] for start in starts] == sorted({start["step"] for start in starts}), (
        "each went on from a save"
    )
    assert all(start["mesh"]["data"] == 2 for start in starts)
    losses(folder)
