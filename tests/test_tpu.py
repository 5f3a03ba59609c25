"""The TPU launcher against a cloud made of files: it takes back, fails, refuses and falls silent on command."""

import os
import signal
import socket
import subprocess
import sys

import clouds
import fake_gcloud
import pytest

from slmjax import cli, launchers, records
from slmjax.config import ConfigError
from slmjax.launchers import backends, driver, status, tpu, tpu_machine, tpu_remote, tpu_settings

SETTINGS = """
accelerator_type = "v5litepod-8"
zone = "us-west4-a"
runtime_version = "v2-alpha-tpuv5-lite"
spot = true
setup = "echo set up >> setups"
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu.Tpu, "poll_s", 0.02)
    monkeypatch.setattr(tpu_machine, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(tpu_machine, "MAX_SILENT", 4)
    monkeypatch.setattr(tpu_machine, "MAX_FAILURES", 3)
    monkeypatch.setattr(driver, "COUNT_INTERVAL_S", 0.1)
    monkeypatch.setattr(tpu_remote, "IDLE_S", 5)
    monkeypatch.setattr(driver, "BACKOFF_S", 0.05)
    made = clouds.Cloud(tmp_path / "cloud", "gcloud", fake_gcloud.SOURCE, monkeypatch)
    yield made
    made.end()
    assert not (made.folder / "two").exists(), (made.folder / "two").read_text()


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "tpu.toml"
    path.write_text(SETTINGS)
    return path


def launch(tmp_path, script, num_packs=1, jobs=None):
    plan = clouds.study(num_packs)
    folder = plan.save(tmp_path / "OUT")
    place = tpu.Tpu(folder, script, jobs=jobs)
    return plan, folder, driver.run(plan, folder, place, watch=False)


def created(cloud):
    path = cloud.folder / "created"
    return [name.rpartition("-")[2] for name in path.read_text().split()] if path.exists() else []


def in_background(tmp_path, script, until, *orders):
    """A launcher in a process of its own, once `until()` is so."""
    code = (
        "import pathlib, sys, clouds\nfrom slmjax.launchers import driver, tpu, tpu_remote\n"
        "tpu.Tpu.poll_s, tpu_remote.IDLE_S = 0.02, 5\n"
        "plan = clouds.study(1)\nfolder = plan.save(pathlib.Path(sys.argv[1]))\n"
        "sys.exit(driver.run(plan, folder, tpu.Tpu(folder, pathlib.Path(sys.argv[2])), watch=False))"
    )
    env = os.environ | {"PYTHONPATH": f"{clouds.ROOT}{os.pathsep}{clouds.ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "OUT"), str(script)], env=env)
    clouds.wait_until(until, process)
    return process


def states(folder):
    return [row.state for row in status.study_status(folder)]


# --- a study from start to end ---------------------------------------------------------------------------------------


def test_each_pack_has_a_tpu_which_is_gone_at_its_end(tmp_path, cloud, script, capsys):
    cloud.order("workers", "2")
    plan, folder, exit_code = launch(tmp_path, script, num_packs=2, jobs=2)
    assert exit_code == 0 and states(folder) == ["done", "done"] and cloud.queue() == {}
    assert created(cloud) == ["0", "0"]
    for worker in ("0", "1"):
        assert sorted(cloud.trained("ends", worker)) == sorted(run.run_id for run in plan.runs)
    setups = [path.read_text() for path in cloud.folder.glob("machines/*/*/slmjax/*/setups")]
    assert setups == ["set up\n"] * 4, "once on each worker of each machine"
    assert ": deleting it" in capsys.readouterr().err
    assert launch(tmp_path, script, num_packs=2)[2] == 0 and created(cloud) == ["0", "0"]


def test_a_tpu_that_is_taken_back_is_replaced_under_a_new_name(tmp_path, cloud, script):
    cloud.order("suspend")
    cloud.order("hold")
    clouds.later(lambda: len(created(cloud)) == 2, lambda: cloud.settle("hold"))
    _, folder, exit_code = launch(tmp_path, script)
    assert exit_code == 0 and states(folder) == ["done"] and cloud.queue() == {}
    assert created(cloud) == ["0", "1"] and len(cloud.trained("begins")) == 2 and len(cloud.trained("ends")) == 1


@pytest.mark.parametrize(
    "orders",
    [
        {"lose_create": ["once"], "fail": ["no capacity"], "ssh_down": ["once"] * 2, "lose_delete": ["once"] * 2},
        {"refuse_create": ["ERROR: RESOURCE_EXHAUSTED: Quota limit"] * 2, "list_down": ["once"] * 2},
        {"ssh_down": ["once"] * 4},
        {"crash": ["once"]},
    ],
    ids=lambda orders: "+".join(orders),
)
def test_trouble_on_the_way_ends_well(tmp_path, cloud, script, orders):
    for name, lines in orders.items():
        cloud.order(name, *lines)
    _, folder, exit_code = launch(tmp_path, script)
    assert exit_code == 0 and states(folder) == ["done"] and cloud.queue() == {}
    assert len(cloud.trained("ends")) == 1


@pytest.mark.parametrize(
    ("order", "line", "times"),
    [
        ("fail", "no capacity in the zone", 3),
        ("refuse_create", "ERROR: RESOURCE_EXHAUSTED: Quota limit is 0", 3),
        ("refuse_create", "ERROR: INVALID_ARGUMENT: unknown accelerator type", 1),
        ("start_down", "did not start", 1),
    ],
)
def test_what_cannot_be_had_is_given_up_with_the_reason(tmp_path, cloud, script, order, line, times):
    cloud.order(order, *[line] * 50)
    _, folder, exit_code = launch(tmp_path, script)
    (row,) = status.study_status(folder)
    assert exit_code == 1 and row.state == "failed" and row.reason.startswith("no TPU: ") and line in row.reason
    assert len(cloud.calls("create")) == times and cloud.queue() == {}


def test_a_set_up_that_fails_is_given_up(tmp_path, cloud, script):
    script.write_text(SETTINGS.replace("echo set up >> setups", "echo set up >> setups; false; true"))
    _, folder, exit_code = launch(tmp_path, script)
    (row,) = status.study_status(folder)
    assert exit_code == 1 and "could not be set up" in row.reason and cloud.queue() == {}
    assert cloud.trained("begins") == [] and created(cloud) == ["0"]


def test_with_a_mirror_what_is_given_up_is_so_there_too(tmp_path, cloud, script):
    """Here a folder that only the machines know: one run gets a TPU that is taken back, and then there is none."""
    pytest.importorskip("slmjax.launchers.pull", reason="needs object stores")
    plan, mirror = clouds.study(1), tmp_path / "bucket" / "tiny_study"
    folder = plan.save(tmp_path / "OUT")
    cloud.order("hold")
    cloud.order("suspend")
    clouds.later(lambda: len(created(cloud)) == 1, lambda: cloud.order("refuse_create", *["no quota"] * 9))
    assert driver.run(plan, folder, tpu.Tpu(folder, script, mirror=str(mirror)), watch=False) == 1
    (row,) = status.study_status(folder)
    assert row.state == "failed" and "no quota" in row.reason and row.step == 1 and cloud.queue() == {}
    assert records.read_json(mirror / row.run_id / "status.json")["reason"] == row.reason
    assert len(cloud.calls("create")) == 1 + tpu_machine.MAX_FAILURES, "it is not handed over again"


@pytest.mark.slow
def test_two_workers_train_one_run(tmp_path, cloud, script):
    """With real training."""
    cloud.install("slmjax", "import sys\nfrom slmjax.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        cloud.order("port", str(free.getsockname()[1]))
    cloud.order("workers", "2")
    _, folder, exit_code = launch(tmp_path, script)
    assert exit_code == 0 and states(folder) == ["done"] and cloud.queue() == {}
    (row,) = status.study_status(folder)
    start = records.load_run(folder / row.run_id).start
    assert row.loss < 3 and start["mesh"]["data"] == 2, start


# --- launchers that come and go --------------------------------------------------------------------------------------


def test_a_new_launcher_goes_on_with_what_is_there(tmp_path, cloud, script):
    cloud.order("hold")
    first = in_background(tmp_path, script, lambda: cloud.trained("begins"))
    first.send_signal(signal.SIGKILL)
    first.wait()
    cloud.settle("hold")
    _, folder, exit_code = launch(tmp_path, script)
    assert exit_code == 0 and states(folder) == ["done"] and cloud.queue() == {}
    assert created(cloud) == ["0"] and len(cloud.trained("begins")) == 1


def test_a_launcher_killed_before_it_heard_of_its_tpu_finds_it(tmp_path, cloud, script):
    cloud.order("stay", "always")
    first = in_background(tmp_path, script, lambda: cloud.queue())
    first.send_signal(signal.SIGKILL)
    first.wait()
    cloud.settle("stay")
    assert launch(tmp_path, script)[2] == 0 and created(cloud) == ["0"] and cloud.queue() == {}


def test_cancel_lets_the_pack_save_and_deletes_its_tpu(tmp_path, cloud, script, capsys):
    cloud.order("hold")
    process = in_background(tmp_path, script, lambda: cloud.trained("begins"))
    folder = tmp_path / "OUT" / "tiny_study"
    (name,) = cloud.queue()
    assert cli.main(["study", "cancel", f"--study={folder}"]) == 0
    assert f"TPU {name}, deleted" in capsys.readouterr().out
    assert process.wait(30) == 3 and states(folder) == ["preempted"] and len(cloud.trained("saved")) == 1
    assert set(cloud.queue()) <= {name} and {item["state"] for item in cloud.queue().values()} <= {"DELETING"}
    cloud.settle("hold")
    assert launch(tmp_path, script)[2] == 0 and states(folder) == ["done"] and created(cloud) == ["0", "0"]


def test_a_machine_that_nobody_deletes_asks_for_it_itself(tmp_path, cloud, script, monkeypatch):
    """The launcher leaves while the pack trains, which then ends alone."""
    monkeypatch.setattr(tpu_remote, "IDLE_S", 0.1)
    cloud.order("hold")
    place = tpu.Tpu(clouds.study(1).save(tmp_path / "OUT"), script)
    plan = clouds.study(1)
    packs = place.packs(plan, place.folder, set())
    launchers.write_packs(packs)
    place.submit(packs, {})
    clouds.wait_until(lambda: (place.tend(), cloud.trained("begins"))[1])
    printed = subprocess.run(place.logs(packs[0].name, follow=False), capture_output=True, text=True)
    assert printed.stdout.endswith("slmjax\n"), "where the command was found, before it is run"
    assert place.logs("other", follow=False) is None
    assert len(cloud.queue()) == 1 and cloud.calls("delete") == []
    cloud.settle("hold")
    clouds.wait_until(lambda: cloud.calls("delete"))
    assert launch(tmp_path, script)[2] == 0 and cloud.queue() == {} and created(cloud) == ["0"]
    assert place.logs(packs[0].name, follow=True)[0] == "echo"


def test_a_budget_that_is_spent_deletes_the_tpu(tmp_path, cloud, script):
    plan = clouds.study(1)
    folder = plan.save(tmp_path / "OUT")
    records.write_json(folder / "budget.json", {"device_hours": 1e-9})
    cloud.order("hold")
    clouds.later(lambda: cloud.trained("begins"), lambda: _spend(folder, plan.runs[0].run_id))
    assert driver.run(plan, folder, tpu.Tpu(folder, script), watch=False) == 3
    assert {item["state"] for item in cloud.queue().values()} <= {"DELETING"} and len(cloud.calls("delete")) >= 1


def _spend(folder, run_id):
    path = folder / run_id / "attempt-000.jsonl"
    with open(path, "a") as file:
        file.write('{"kind": "train", "step": 1, "wall_s": 3600}\n')


# --- parts -----------------------------------------------------------------------------------------------------------


def test_the_dry_run_prints_every_command(tmp_path, cloud, script):
    plan = clouds.study(1)
    lines = driver.preview(plan, tmp_path / "OUT" / "tiny_study", tpu.Tpu(tmp_path / "OUT" / "tiny_study", script))
    text = "\n".join(lines)
    for part in (
        "queued-resources create slmjax-tiny-study-",
        "--accelerator-type=v5litepod-8",
        "--spot",
        "tpu-vm ssh slmjax@slmjax-tiny-study-",
        "echo set up >> setups",
        f"slmjax pack {tmp_path}/OUT/tiny_study/packs/{lines[0].split()[1].rstrip(':')}.json --distributed",
        "queued-resources delete slmjax-tiny-study-",
    ):
        assert part in text, part
    assert cloud.calls() == [] and not (tmp_path / "OUT").exists()


def test_the_command_line_prints_it_and_loads_neither_jax_nor_sky(tmp_path, cloud, script):
    code = (
        "import sys, slmjax.launchers.sky, slmjax.cli\nassert slmjax.cli.main(sys.argv[1:]) == 0\n"
        "assert not {'jax', 'sky'} & set(sys.modules)"
    )
    line = ["study", "run", "--study=wsd_ladder:tiny", f"--out={tmp_path}", "--on=tpu", f"--script={script}"]
    line += ["--mirror=gs://b/OUT/wsd_ladder_tiny", "--arguments=--reserved", "--dry_run"]
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "slmjax pack gs://b/OUT/wsd_ladder_tiny/packs/" in done.stdout and " --reserved\n" in done.stdout
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SETTINGS + 'acelerator = "x"', "acelerator is not known; did you mean 'accelerator_type'"),
        (SETTINGS.replace("spot = true", 'spot = "yes"'), "spot='yes' must be a bool"),
        (SETTINGS.replace("zone", "network"), "zone is missing"),
        ("=", "is not TOML"),
    ],
)
def test_settings_that_are_not_understood_are_refused(tmp_path, text, message):
    path = tmp_path / "tpu.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        tpu_settings.read(path)


@pytest.mark.parametrize("path", sorted((clouds.ROOT / "launch" / "tpu").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_read(path):
    assert tpu_settings.read(path).place[0].startswith("--zone=")


def test_what_is_sent_twice_to_a_worker_is_done_once(tmp_path, cloud):
    (cloud.bin / "slmjax").write_text(
        "#!/bin/bash\necho begins >> $HOME/said\ntrap 'echo TERM >> $HOME/said' TERM\n"
        "until [ -e $HOME/go ]; do sleep 0.02; done\nexit 3\n"
    )

    def send(command):
        done = subprocess.run(["bash", "-c", command], env=os.environ | {"HOME": str(tmp_path)}, capture_output=True)
        return tpu_remote.said(done.stdout.decode())

    start = tpu_remote.start("n", "sleep 0.2", "p.json", ["true"])
    said = tmp_path / "said"
    assert send(tpu_remote.probe("n")) == ("absent", 0)
    for _ in range(2):
        send(start)
    clouds.wait_until(lambda: said.exists() and send(tpu_remote.probe("n")) == ("running", 0))
    send(start)
    for _ in range(3):
        send(tpu_remote.stop("n"))
    clouds.wait_until(lambda: "TERM" in said.read_text())
    (tmp_path / "go").touch()
    clouds.wait_until(lambda: send(tpu_remote.probe("n")) == ("ended", 3))
    assert said.read_text().split() == ["begins", "TERM"]
    send(start)
    clouds.wait_until(lambda: said.read_text().split() == ["begins", "TERM", "begins"])


def test_workers_speak_for_all():
    lines = {"running": "slmjax running\n", "absent": "slmjax absent\n"}
    for output, meant in {
        "": ("no answer", 0),
        lines["running"] + "slmjax ended 0\n": ("running", 0),
        lines["running"] + lines["absent"]: ("absent", 0),
        lines["absent"] + "slmjax ended 0\n": ("absent", 0),
        "slmjax ended 0\nslmjax ended 0\n": ("ended", 0),
        "slmjax ended 3\nslmjax ended 1\n": ("ended", 1),
        "slmjax ended 1\nslmjax ended 100\n": ("ended", 100),
        "a log line: slmjax running\n": ("no answer", 0),
    }.items():
        assert tpu_remote.said(output) == meant, output


def test_names_fit_the_cloud(tmp_path):
    assert tpu.slug("WSD_ladder:tiny.v2") == "wsd-ladder-tiny-v2"
    assert len(f"slmjax-{tpu.slug('x' * 99)}-{'0' * 8}-999") <= 63


def test_it_is_known_by_name(tmp_path):
    assert isinstance(backends.open_backend("tpu", tmp_path), tpu.Tpu)
