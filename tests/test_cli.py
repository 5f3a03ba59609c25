"""The command line: exit codes, one line for what the user can mend, and no JAX where there is nothing to train."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from planted_study import LAW, planted_loss, write_study

from slmjax import cli, environment, records
from slmjax.cli import options

TINY = """
from experiments import base

def get_config(arg=""):
    c = base.get_config("tiny")
    c.data.sources, c.data.tokenizer, c.data.seq_len = ("markov:16:1",), "none", 16
    base.resize(c, 16, 1, 8)
    c.train.batch_size, c.train.steps, c.train.eval_sequences = 8, 20, 8
    c.schedule.warmup_steps, c.log.tensorboard, c.log.log_every = 2, False, 1
    return c
"""


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    return tmp_path / "tiny.py"


def slmjax(*args, **kwargs):
    """Another process, as a user starts it."""
    command = [sys.executable, "-m", "slmjax", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


# ---- usage ----------------------------------------------------------------------------------------------------------

MISTAKES = {
    "trian": ("'trian'", "'train'"),
    "study paln --study=wsd_ladder": ("'paln'", "'plan'"),
    "study plan": ("--study=",),
    "study plan --study=wsd_lader": ("'wsd_lader'", "'wsd_ladder'"),
    "study plan --study=minicpm": ("get_study", "train"),
    "study plan --study=wsd_ladder:tny": ("'tny'", "'tiny'"),
    "study status --study=wsd_ladder --out=nowhere": ("nowhere/wsd_ladder", "study.json"),
    "study run --study=wsd_ladder --jobs=many": ("--jobs=many", "int"),
    "train": ("--config=", "wsd_ladder"),
    "train --config=no/such.py": ("no/such.py", "wsd_ladder"),
    "train --config=base --config.optim.lrr=3": ("'optim.lrr'", "'optim.lr'"),
    "train --config=base --config.optim.lr=big": ("optim.lr=big", "float"),
    "train --config=base --config.train.steps=1e3": ("train.steps=1e3", "int"),
    "train --config=base --config.optim.lr=-1": ("optim.lr=-1.0", "> 0"),
    "train --config=base --config.optim.name=adam": ("'adam'", "'adamw'"),
    "train --config.optim.lr=3": ("--config=FILE",),
    "train --cofnig=base": ("--cofnig", "--config"),
    "train base": ("'base'", "--config=base"),
    "fit": ("SOURCE",),
    "fit nothing.csv": ("nothing.csv", "does not exist"),
    "fit x.csv --columns=N": ("'N'", "name=header"),
    "fit x.csv --show=everything": ("--show=everything", "agreement"),
    "forecast no.json --flops=1e20": ("no.json", "No such file"),
    "forecast no.json": ("--flops", "--params"),
    "forecast no.json --params=1e9": ("--params", "--tokens"),
    "check cord --config=base": ("'cord'", "coord"),
    "check coord --config=base --widths=64": ("--widths=64", "two or more"),
    "data text.txt": ("--tokenizer", "--out"),
    "tokenize text.txt": ("--model",),
    "pack": ("one file",),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_that_names_it_and_the_way_out(line, capsys):
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    for part in MISTAKES[line]:
        assert part in err


def test_an_unexpected_error_keeps_its_traceback(monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def get_study(arg=''):\n    return int('x')\n")
    for error in (TypeError("ours"), ValueError("from elsewhere")):
        monkeypatch.setattr(options, "load_study", lambda spec, error=error: exec("raise error", {"error": error}))
        with pytest.raises(type(error)):
            cli.main(["study", "plan", "--study=wsd_ladder"])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["study", "plan", f"--study={broken}"])


def test_help(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in cli.VERBS) and "wsd_ladder" in text
    for verb in cli.VERBS:
        assert cli.main([verb, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"slmjax {verb} ") and "flags:" in text
    assert cli.main([]) == 2


def test_overrides_reach_the_config_in_any_order():
    from absl.flags import FlagValues

    flags = FlagValues()
    options.define_config(flags)
    argv = ["--config.optim.lr=0.5", "--config.data.sources=('a.txt','b.txt')", "--config", "base:tiny"]
    options.parse(flags, [*argv, "--config.data.weights=(1,2.5)", "--config.model.qk_norm"])
    cfg = options.config_of(flags)
    assert (cfg.optim.lr, cfg.data.sources, cfg.data.weights) == (0.5, ("a.txt", "b.txt"), (1.0, 2.5))
    assert cfg.model.qk_norm and cfg.model.width == 32


# ---- what needs no JAX ----------------------------------------------------------------------------------------------


def test_planning_fitting_and_reporting_never_import_jax(tmp_path):
    folder = write_study(tmp_path / "study", widths=(64, 96, 128), ratios=(10, 20, 40), mishaps=False)
    lines = [
        "--help",
        "train --help",
        "study plan --study=wsd_ladder --json",
        f"study status --study={folder}",
        f"study logs trunk0064 --study={folder}",
        f"fit {folder} --json={tmp_path}/fit.json --bootstrap=100",
        f"forecast {tmp_path}/fit.json --flops=1e18",
        f"study report --study={folder}",
    ]
    code = "import sys, json; from slmjax.cli import main\n" + "".join(
        f"assert main({line.split()!r}) == 0, {line!r}\nassert 'jax' not in sys.modules, {line!r}\n" for line in lines
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").exists()


def test_planning_starts_at_once():
    """CPU seconds, so that other work on the machine does not count; 0.3 on two cores of 2021."""
    before = os.times()
    assert slmjax("study", "plan", "--study=wsd_ladder").returncode == 0
    after = os.times()
    assert (after.children_user - before.children_user) + (after.children_system - before.children_system) < 1.5


def test_fit_and_forecast_recover_a_planted_law(tmp_path, capsys):
    rows = ["params,D,final"]
    rows += [f"{N},{D},{planted_loss(N, D)}" for N in (1e6, 3e6, 1e7, 3e7) for D in (1e8, 3e8, 1e9, 4e9)]
    (tmp_path / "points.csv").write_text("\n".join(rows))
    fit = ["fit", str(tmp_path / "points.csv"), "--columns=N=params,D=D,loss=final", "--bootstrap=100"]
    assert cli.main([*fit, f"--json={tmp_path}/fit.json"]) == 0
    assert "left out" not in capsys.readouterr().out
    found = json.loads((tmp_path / "fit.json").read_text())["parameters"]
    assert all(abs(found[name] / value - 1) < 0.01 for name, value in LAW.items()), found
    assert cli.main(["forecast", f"{tmp_path}/fit.json", "--params=1e8", "--tokens=1e10", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert abs(made[0]["quantities"]["loss"]["value"] - planted_loss(1e8, 1e10)) < 1e-3
    assert cli.main(["forecast", f"{tmp_path}/fit.json", "--flops=1e18,1e20"]) == 0
    assert capsys.readouterr().out.count("forecast of chinchilla") == 2


def test_status_tells_of_every_run(tmp_path, capsys):
    folder = write_study(tmp_path / "study")
    assert cli.main(["study", "status", f"--study={folder}", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["run_id"] for row in rows] == [run["run_id"] for run in records.load_study(folder)[0]["runs"]]
    assert cli.main(["study", "logs", "no-such-run", f"--study={folder}"]) == 2
    assert "no-such-run" in capsys.readouterr().err


def test_tokenize_and_data(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} of some text, said {i % 7} times" for i in range(2000)))
    model, shards = tmp_path / "t.model", tmp_path / "shards"
    assert cli.main(["tokenize", str(tmp_path / "text.txt"), "--vocab_size=300", f"--model={model}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 300
    assert cli.main(["data", str(tmp_path / "text.txt"), f"--tokenizer={model}", f"--out={shards}"]) == 0
    assert "train: " in capsys.readouterr().out and (shards / "manifest.json").exists()
    assert cli.main(["data", "--config=base:tiny", "--config.data.sources=('markov:16:0',)",
                     "--config.data.tokenizer=none"]) == 0  # fmt: skip
    assert "endless" in capsys.readouterr().out


# ---- train ----------------------------------------------------------------------------------------------------------


def test_train_ends_stays_ended_and_says_so(config_file, tmp_path):
    line = ["train", f"--config={config_file}", f"--out={tmp_path}"]
    first = slmjax(*line)
    assert first.returncode == 0, first.stderr
    assert "20 steps, held-out loss" in first.stdout
    again = slmjax(*line, "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["status"] == "done"
    run_dir = tmp_path / json.loads(again.stdout)["run_id"]
    assert len(records.attempt_files(run_dir)) == 1, "a finished run was begun again"


def test_train_with_bad_data_is_a_usage_error(config_file, tmp_path):
    bad = slmjax("train", f"--config={config_file}", f"--out={tmp_path}", "--config.data.sources=no/such.bin",
                 "--config.model.vocab_size=16")  # fmt: skip
    assert bad.returncode == 2, bad.stderr
    assert "no/such.bin" in bad.stderr and "Traceback" not in bad.stderr


def test_a_signal_saves_and_exits_3_and_the_same_command_goes_on(config_file, tmp_path):
    line = [sys.executable, "-m", "slmjax", "train", f"--config={config_file}", f"--out={tmp_path}"]
    line += ["--config.train.steps=30000", "--config.log.log_every=50"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while not any('"train"' in path.read_text() for path in tmp_path.glob("*/attempt-*.jsonl")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 3 and "is saved at step" in said
    run = records.load_run(next(tmp_path.glob("*/config.json")).parent)
    assert run.end["status"] == "preempted" and 0 < run.end["step"] < 30000


# ---- environment ----------------------------------------------------------------------------------------------------


def test_settings_do_not_override_the_users():
    added = environment.variables(3, {"JAX_COMPILATION_CACHE_DIR": "mine", "XLA_FLAGS": "--xla_other=2"})
    assert "JAX_COMPILATION_CACHE_DIR" not in added and added["JAX_NUM_CPU_DEVICES"] == "3"
    assert "XLA_FLAGS" not in added
    forced = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    assert "JAX_NUM_CPU_DEVICES" not in environment.variables(3, forced)
    assert environment.variables(3, {"SLMJAX_TUNE": "0"}) == {"JAX_NUM_CPU_DEVICES": "3"}


def test_jax_takes_the_settings(tmp_path):
    code = (
        "from slmjax import environment; environment.prepare(3)\n"
        "import jax; c = jax.config\n"
        "print(len(jax.devices()), c.jax_compilation_cache_dir, c.jax_persistent_cache_min_compile_time_secs)"
    )
    names = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR", "SLMJAX_TUNE")
    clean = {key: value for key, value in os.environ.items() if key not in names and not key.startswith("JAX_PERS")}
    env = clean | {"SLMJAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.stdout.split() == ["3", f"{tmp_path}/jax", "0.0"], done.stderr
