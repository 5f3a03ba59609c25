"""The SkyPilot launcher against jobs that are processes here: preempted, refused, lost and failed on command."""

import os
import signal
import subprocess
import sys

import clouds
import fake_sky
import pytest

from slmjax import cli, launchers, records
from slmjax.config import ConfigError
from slmjax.launchers import backends, driver, sky, status, store, submissions
from slmjax.launchers.backend import BackendError

TASK = """
resources: {accelerators: H100:8}
run: |
  slmjax pack "$SLMJAX_PACK"
"""
RECIPES = sorted((clouds.ROOT / "launch" / "sky").glob("*.yaml"))


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    monkeypatch.setattr(sky.Sky, "poll_s", 0.02)
    monkeypatch.setattr(driver, "BACKOFF_S", 0.05)
    made = clouds.Cloud(tmp_path / "cloud", "sky", fake_sky.SOURCE, monkeypatch)
    yield made
    made.end()


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(TASK)
    return path


def launch(tmp_path, script, num_packs=1, watch=True, **options):
    plan = clouds.study(num_packs)
    folder = plan.save(tmp_path / "OUT")
    return plan, folder, driver.run(plan, folder, sky.Sky(folder, script, **options), watch=watch)


def states(folder):
    return [row.state for row in status.study_status(folder)]


# --- a study from start to end ---------------------------------------------------------------------------------------


def test_each_pack_is_a_job_which_is_found_by_its_name(tmp_path, cloud, script):
    plan, folder, exit_code = launch(tmp_path, script, 3, jobs=2, arguments="--gpus 'H100:8'")
    assert exit_code == 0 and states(folder) == ["done"] * 3
    jobs = cloud.queue()
    assert len(jobs) == 3 and {job["status"] for job in jobs.values()} <= {"SUCCEEDED", "RUNNING"}
    assert sorted(job["job_name"] for job in jobs.values()) == sorted(
        path.stem for path in folder.glob("submissions/*.json")
    )
    assert sorted(cloud.trained("ends")) == sorted(run.run_id for run in plan.runs)
    assert all(call[-2:] == ["--gpus", "H100:8"] for call in cloud.calls("launch"))
    order = [call[1] for call in cloud.calls("jobs")]
    assert order.index("queue", order.index("launch")) < len(order) - 1 - order[::-1].index("launch"), "two at a time"
    assert launch(tmp_path, script, 3)[2] == 0 and len(cloud.queue()) == 3


def test_a_preempted_job_is_skypilots_to_recover(tmp_path, cloud, script):
    cloud.order("preempt")
    cloud.order("hold")
    clouds.later(lambda: len(cloud.trained("begins")) == 2, lambda: cloud.settle("hold"))
    _, folder, exit_code = launch(tmp_path, script)
    assert exit_code == 0 and states(folder) == ["done"] and len(cloud.calls("launch")) == 1
    assert [job["recovery_count"] for job in cloud.queue().values()] == [1]


@pytest.mark.parametrize(
    ("orders", "launches"),
    [
        ({"lose": ["once"], "down": ["once"] * 2}, 1),
        ({"lose": ["hang"]}, 1),
        ({"hide": ["once"], "lose": ["hang"]}, 1),
        ({"refuse": ["ERROR: no credentials for any cloud"], "asleep": ["once"] * 2}, 2),
        ({"fail": ["FAILED_NO_RESOURCE"]}, 2),
        ({"crash": ["once"]}, 2),
    ],
    ids=lambda orders: "+".join(orders) if isinstance(orders, dict) else None,
)
def test_trouble_on_the_way_ends_well(tmp_path, cloud, script, monkeypatch, orders, launches):
    monkeypatch.setattr(sky, "LAUNCH_TIMEOUT_S", 1.0 if "hang" in orders.get("lose", []) else 60.0)
    for name, lines in orders.items():
        cloud.order(name, *lines)
    _, folder, exit_code = launch(tmp_path, script)
    assert exit_code == 0 and states(folder) == ["done"]
    assert len(cloud.calls("launch")) == launches and len(cloud.trained("ends")) == 1


def test_without_watch_it_hands_over_and_leaves(tmp_path, cloud, script):
    _, folder, exit_code = launch(tmp_path, script, 2, watch=False)
    assert exit_code == 0 and len(cloud.queue()) == 2 and cloud.trained("begins") == []
    assert launch(tmp_path, script, 2, watch=False)[2] == 0 and len(cloud.queue()) == 2
    found, troubles = backends.in_hand(folder)
    assert troubles == [] and len(found) == 2 and {backend for backend, _ in found.values()} == {"sky"}
    assert launch(tmp_path, script, 2)[2] == 0 and states(folder) == ["done"] * 2 and len(cloud.queue()) == 2


def test_a_refused_launch_is_told_and_leaves_nothing_behind(tmp_path, cloud, script):
    cloud.order("refuse", "ERROR: no credentials for any cloud")
    with pytest.raises(BackendError, match="sky jobs launch failed: ERROR: no credentials"):
        launch(tmp_path, script, watch=False)
    assert launch(tmp_path, script)[2] == 0, "it can be launched at once"


def test_a_launcher_killed_while_it_launches_launches_once(tmp_path, cloud, script):
    cloud.order("lose", "hang")
    code = (
        "import pathlib, sys, clouds\nfrom slmjax.launchers import driver, sky\n"
        "plan = clouds.study(1)\nfolder = plan.save(pathlib.Path(sys.argv[1]))\n"
        "driver.run(plan, folder, sky.Sky(folder, pathlib.Path(sys.argv[2])), watch=False)"
    )
    env = os.environ | {"PYTHONPATH": f"{clouds.ROOT}{os.pathsep}{clouds.ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "OUT"), str(script)], env=env)
    clouds.wait_until(lambda: cloud.queue(), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, folder, exit_code = launch(tmp_path, script)
    assert exit_code == 0 and states(folder) == ["done"] and len(cloud.queue()) == 1


def test_cancel_ends_the_jobs(tmp_path, cloud, script, capsys):
    cloud.order("hold")
    _, folder, _ = launch(tmp_path, script, 2, watch=False)
    place = sky.Sky(folder)
    clouds.wait_until(lambda: (place.poll(), len(cloud.trained("begins")) == 2)[1])
    assert cli.main(["study", "cancel", f"--study={folder}"]) == 0
    said = capsys.readouterr().out
    assert "managed job 1 slmjax-tiny_study-" in said and "managed job 2 slmjax-tiny_study-" in said
    assert {job["status"] for job in cloud.queue().values()} == {"CANCELLED"} and place.poll() == {}
    cloud.settle("hold")
    assert launch(tmp_path, script, 2)[2] == 0 and states(folder) == ["done"] * 2


def test_what_a_mirror_holds_comes_home(tmp_path, cloud, script):
    """Here a folder that only the machines know."""
    pytest.importorskip("slmjax.launchers.pull", reason="needs object stores")
    mirror = tmp_path / "bucket" / "tiny_study"
    plan, folder, exit_code = launch(tmp_path, script, 2, mirror=str(mirror))
    assert exit_code == 0 and states(folder) == ["done"] * 2
    (first, *_) = cloud.calls("launch")
    assert f"SLMJAX_PACK={mirror}/packs/" in " ".join(first)
    for run in plan.runs:
        assert (mirror / run.run_id / "DONE").exists() and (folder / run.run_id / "DONE").exists()
    assert sky.Sky(folder).mirror == str(mirror)


@pytest.mark.slow
def test_real_training_through_a_preemption(tmp_path, cloud, script):
    cloud.install("slmjax", "from slmjax.cli import main\nimport sys\nsys.exit(main(sys.argv[1:]))\n")
    _, folder, exit_code = launch(tmp_path, script)
    assert exit_code == 0 and states(folder) == ["done"]
    assert status.study_status(folder)[0].loss < 3


# --- parts -----------------------------------------------------------------------------------------------------------


def test_the_dry_run_prints_every_command(tmp_path, cloud, script):
    folder = tmp_path / "OUT" / "tiny_study"
    lines = driver.preview(clouds.study(1), folder, sky.Sky(folder, script, arguments="--gpus H100:8"))
    pack = lines[0].split()[1].rstrip(":")
    assert lines[1].startswith(f"sky jobs launch {script} --name slmjax-tiny_study-")
    assert lines[2:] == [f"# {script}:", TASK.rstrip()]
    assert lines[1].endswith(f"--env SLMJAX_PACK={folder}/packs/{pack}.json --env SLMJAX_STUDY=tiny_study "
                             "--detach-run --yes --gpus H100:8")  # fmt: skip
    assert cloud.calls() == [] and not folder.exists()


def test_a_job_that_never_came_is_given_up_after_a_while(tmp_path, cloud, script, monkeypatch):
    plan = clouds.study(1)
    folder = plan.save(tmp_path / "OUT")
    place = sky.Sky(folder, script)
    (pack,) = place.packs(plan, folder, set())
    (folder / "packs").mkdir()
    launchers.write_packs([pack])
    submissions.write(folder, submissions.plan(folder, "sky", [pack]))
    assert place.poll()[pack.name].state == "waiting"
    assert place.logs(pack.name, True)[:4] == ["sky", "jobs", "logs", "--name"] and place.logs("other", True) is None
    monkeypatch.setattr(sky, "SETTLE_S", 0.0)
    assert place.poll() == {}


def test_a_missing_script_or_program_is_refused(tmp_path, cloud, script, monkeypatch):
    with pytest.raises(ValueError, match="copy one of launch/sky/"):
        launch(tmp_path, None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="there is no sky on this machine"):
        launch(tmp_path, script)


def test_a_mirror_is_named_like_the_study(tmp_path):
    folder = tmp_path / "tiny_study"
    with pytest.raises(ConfigError, match="must end in the study's name: --mirror=gs://b/OUT/tiny_study"):
        store.chosen(folder, "gs://b/OUT")
    assert store.address(folder, store.chosen(folder, "gs://b/tiny_study/"), "p") == "gs://b/tiny_study/packs/p.json"
    assert store.address(folder, store.chosen(folder, None), "p") == f"{folder}/packs/p.json"
    folder.mkdir()
    records.write_json(folder / store.FILE, {"mirror": "gs://b/tiny_study"})
    assert store.chosen(folder, None) == "gs://b/tiny_study"


# --- recipes, read by SkyPilot itself --------------------------------------------------------------------------------


def test_there_are_recipes():
    assert [path.stem for path in RECIPES] == ["gpu_8", "tpu_host", "tpu_slice", "tpu_slices"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_tasks(path, monkeypatch):
    real = pytest.importorskip("sky", reason="needs the sky extra")
    monkeypatch.chdir(clouds.ROOT)
    task = real.Task.from_yaml(str(path))
    assert task.envs.keys() >= {"SLMJAX_PACK", "SLMJAX_STUDY"} and 'slmjax pack "$SLMJAX_PACK"' in task.run
    assert task.resources and all(r.job_recovery["recover_on_exit_codes"] == [3] for r in task.resources)
    assert task.workdir and "launch/setup.sh" in task.setup
