"""slmjax curves and slmjax rates: planted laws come back through the command line, and bad calls are one line."""

import json
import re

import numpy as np
import pytest

from slmjax.cli import main
from slmjax.scaling.curves import multi_power
from slmjax.scaling.curves.decay_share import decayed
from slmjax.scaling.rates import hyper_laws


def write(path, header, rows):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


def planted_sweep(folder, seed):
    """lr* = 2 N^-.7 D^.3 and batch* = .5 D^.6, each cell a bowl around them; every grid holds its cell's optimum."""
    rng, rows = np.random.default_rng(seed), []
    for N in (1e7, 4e7, 1.6e8):
        for ratio in (10, 30, 100):
            D = ratio * N
            lr, batch = 2 * N**-0.7 * D**0.3, 0.5 * D**0.6
            for x in (-2, -1, 0, 1, 2):
                for y in (-2, -1, 0, 1, 2):
                    loss = 3 + 0.02 * x * x + 0.01 * y * y + 1e-6 * rng.random()
                    rows.append((N, D, lr * 1.5**x, batch * 2.0**y / 256, loss))
    return write(folder / "sweep.csv", "n,d,rate,sequences,final", rows)


def test_a_planted_sweep_gives_its_exponents_and_recommends(tmp_path, seed, capsys):
    sweep = planted_sweep(tmp_path, seed)
    columns = "--columns=N=n,D=d,lr=rate,batch=sequences,loss=final"
    asked = ["--params=1e9", "--tokens=2e10", f"--json={tmp_path / 'fit.json'}"]
    assert main(["rates", sweep, columns, "--batch_unit=256", *asked]) == 0
    out = capsys.readouterr().out
    for name, planted in (("lr_N", -0.7), ("lr_D", 0.3), ("batch_D", 0.6)):
        assert float(re.search(rf"^{name} +(\S+)", out, re.M)[1]) == pytest.approx(planted, abs=2e-3)
    assert float(re.search(r"^lr +([0-9.e-]+) ", out, re.M)[1]) == pytest.approx(2 * 1e9**-0.7 * 2e10**0.3, rel=1e-2)
    assert json.loads((tmp_path / "fit.json").read_text())["format"].startswith("slmjax-hyper-fit")


def test_a_published_law_recommends_what_it_computes(capsys):
    for name in hyper_laws.names():
        law = hyper_laws.load_hyper_law(name)
        asked = {"N": ("--params", 2e9), "D": ("--tokens", 3e10), "C": ("--flops", 1e20), "L": ("--loss", 2.7)}
        asked |= {"E": ("--experts", 8.0)}
        wanted = ("N", "D") if law.inputs == ("tokens_per_parameter",) else law.inputs
        assert main(["rates", f"--law={name}", *(f"{asked[x][0]}={asked[x][1]}" for x in wanted)]) == 0
        out = capsys.readouterr().out
        inputs = {x: asked[x][1] for x in wanted} if wanted == law.inputs else {"tokens_per_parameter": 15.0}
        for value in law.recommend(**inputs).values():
            assert f"{value:.4g}" in out


def planted_curves(folder, seed):
    """Curves of a random Multi-Power Law under a constant, a cosine and two WSD schedules."""
    rng = np.random.default_rng(seed)
    values = np.array([2.5, 0.6, 0.45, 400.0, 2.0, 0.6, 0.64]) * rng.uniform(0.97, 1.03, 7)
    steps_n, peak, rows = np.arange(400, 6001, 80), 3e-4, []
    for name, share, shape in (("flat", None, ""), ("wsd20", 0.2, "1-sqrt"), ("wsd10", 0.1, "linear")):
        flat = decayed(6000, peak, "linear", 0.01, 300, 0.999999)
        lr_T = flat if share is None else decayed(6000, peak, shape, share, 300, 0.1)
        loss_n = multi_power.loss(values, multi_power.knots(lr_T, steps_n, 1, 1.0, 1.0))
        rows += [(name, step, float(lr_T[step]), loss) for step, loss in zip(steps_n, loss_n, strict=True)]
    return write(folder / "curves.csv", "schedule,step,lr,loss", rows)


def test_planted_curves_predict_a_schedule_left_out(tmp_path, seed, capsys):
    curves = planted_curves(tmp_path, seed)
    asked = ["--warmup=300", "--test=wsd10", "--bootstrap=100", "--decay=1-sqrt", "--steps=6000"]
    assert main(["curves", curves, *asked, f"--json={tmp_path / 'fit.json'}"]) == 0
    out = capsys.readouterr().out
    r2 = float(re.search(r"^wsd10 +(\S+)", out, re.M)[1])
    assert r2 > 0.99
    assert re.search(r"^10\.0% .* 0\.0", out, re.M) and (tmp_path / "fit.json").exists()


@pytest.mark.parametrize(
    "argv, says",
    [
        (["rates", "--law=steplaw", "--params=1e9"], "did you mean 'step_law'"),
        (["rates", "--law=step_law", "--params=-1", "--tokens=1e9"], "positive"),
        (["rates", "missing.csv"], "missing.csv: No such file"),
        (["curves"], "takes one CSV"),
        (["curves", "x.csv", "--decay=linear"], "--steps"),
    ],
)
def test_bad_calls_are_one_line(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and not out
