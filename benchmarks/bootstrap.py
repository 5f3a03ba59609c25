"""4,000 bootstrap refits of a scaling law: slmjax against a plain SciPy loop over the reference formulation.

    python benchmarks/bootstrap.py [--data=chinchilla_epoch.csv] [--resamples=4000] [--scipy=60] [--repeats=3] [--json]

CPU seconds (user and system). Ours: `fit` with its point estimate and two starts for every refit, in a process of its
own, imports included (cold), and again in this one (warm). The other: for every resample scipy's BFGS from Hoffmann's
point on the sum of Huber(1e-3) of log-sum-exp residuals in raw coordinates, with gradients by finite differences, as
the published analyses do. It is timed on the first --scipy resamples, spread between our repeats, and scaled to all.
Equal answers: on those resamples no objective of ours is above theirs, and the medians of the parameters agree.
Without --data the runs are planted: 240 on Besiroglu's surface with .5% of noise.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from slmjax.scaling import design, laws
from slmjax.scaling.fit import Fit, fit
from slmjax.scaling.points import Point, PointSet, load_points

DELTA = 1e-3
HOFFMANN = np.array([np.log(406.4), np.log(410.7), np.log(1.6934), 0.3392, 0.2849])  # log A, log B, log E, alpha, beta
SEED = 0


def planted() -> PointSet:
    law, rng = laws.load_law("chinchilla"), np.random.default_rng(SEED)
    E, A, B, alpha, beta = (law.published["besiroglu2024"][name] for name in law.parameters)
    N_n, C_n = 10 ** rng.uniform(7.7, 10, 240), 10 ** rng.uniform(18.5, 21.5, 240)
    D_n = C_n / (6 * N_n)
    loss_n = (E + A / N_n**alpha + B / D_n**beta) * np.exp(rng.normal(0, 0.005, 240))
    rows = zip(N_n, D_n, C_n, loss_n, strict=True)
    return PointSet(tuple(Point(f"r{i}", *map(float, row)) for i, row in enumerate(rows)))


def load(path: str | None) -> PointSet:
    """The 240 runs: five of the highest loss left out of the published 245."""
    return planted() if path is None else load_points([path]).drop_highest(5)


def scipy_refit(log_N_n, log_D_n, log_loss_n):
    """One refit as the reference analyses write it: minimum and minimiser."""
    from scipy.optimize import minimize
    from scipy.special import huber, logsumexp

    def objective(params):
        a, b, e, alpha, beta = params
        terms = [a - alpha * log_N_n, b - beta * log_D_n, np.full_like(log_N_n, e)]
        return huber(DELTA, logsumexp(terms, axis=0) - log_loss_n).sum()

    # In units of delta squared: at the default tolerance on the bare sum, BFGS stops before it has begun.
    found = minimize(lambda params: objective(params) / DELTA**2, HOFFMANN, method="BFGS")
    return found.fun * DELTA**2, found.x


def scipy_loop(points: PointSet, weight_Kn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minima [K] and parameters [K, 5] in the order E, A, B, alpha, beta."""
    logs_3n = np.log([[p.N, p.D, p.loss] for p in points.points]).T
    minima, values = [], []
    for weight_n in weight_Kn:
        chosen = np.repeat(np.arange(len(weight_n)), weight_n.astype(int))
        least, (a, b, e, alpha, beta) = scipy_refit(*logs_3n[:, chosen])
        minima.append(least)
        values.append([np.exp(e), np.exp(a), np.exp(b), alpha, beta])
    return np.array(minima), np.array(values)


def our_minima(fitted: Fit, weight_Kn: np.ndarray) -> np.ndarray:
    """Sum of Huber [K] of our draws on their resamples, by the formula."""
    N_n, D_n, loss_n = np.array([[p["N"], p["D"], p["loss"]] for p in fitted.points]).T
    draws = {name: draw_K[: len(weight_Kn), None] for name, draw_K in fitted.parameter_draws.items()}
    predicted_Kn = draws["E"] + draws["A"] / N_n ** draws["alpha"] + draws["B"] / D_n ** draws["beta"]
    size_Kn = np.abs(np.log(predicted_Kn) - np.log(loss_n))
    return (weight_Kn * np.where(size_Kn <= DELTA, size_Kn**2 / 2, DELTA * (size_Kn - DELTA / 2))).sum(axis=1)


def cold_seconds(args: argparse.Namespace) -> float:
    """CPU seconds of a fresh process that fits and stops: the interpreter and its imports included."""
    command = [sys.executable, __file__, f"--resamples={args.resamples}", "--only=fit"]
    command += [f"--data={args.data}"] if args.data else []
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(args: argparse.Namespace) -> dict:
    points = load(args.data)
    runs = np.arange(len(points))
    log_x_Fn = np.log([[p.N for p in points.points], [p.D for p in points.points]])
    u_Fn = log_x_Fn - log_x_Fn.mean(axis=1, keepdims=True)
    weight_Kn, _ = design.resamples(laws.load_law("chinchilla"), u_Fn, runs, runs, 5, args.resamples, SEED)
    scipy_refit(*np.log([[p.N, p.D, p.loss] for p in points.points]).T)  # imports
    cold, warm, plain, minima, values = [], [], 0.0, [], []
    fit(points, num_bootstrap=args.resamples, seed=SEED)
    for chosen in np.array_split(np.arange(args.scipy), args.repeats):
        cold.append(cold_seconds(args))
        start = time.process_time()
        fitted = fit(points, num_bootstrap=args.resamples, seed=SEED)
        warm.append(time.process_time() - start)
        start = time.process_time()
        least, found = scipy_loop(points, weight_Kn[chosen])
        plain += time.process_time() - start
        minima.append(least)
        values.append(found)
    theirs, ours = np.concatenate(minima), our_minima(fitted, weight_Kn[: args.scipy])
    excess = theirs / ours - 1
    assert excess.min() > -1e-8, f"SciPy found a lower minimum: {excess.min()}"
    assert np.median(excess) < 1e-4, f"SciPy stops short of the minimum: {np.median(excess)}"
    medians = np.median(np.concatenate(values), axis=0)
    ours_P = np.array([np.median(draw_K[: args.scipy]) for draw_K in fitted.parameter_draws.values()])
    np.testing.assert_allclose(medians, ours_P, rtol=0.01)
    scaled = plain / args.scipy * args.resamples
    warm_s, cold_s = float(np.median(warm)), float(np.median(cold))
    return {
        "resamples": args.resamples,
        "ours_warm_s": warm_s,
        "ours_cold_s": cold_s,
        "scipy_s": scaled,
        "scipy_resamples_timed": args.scipy,
        "ratio_warm": scaled / warm_s,
        "ratio_cold": scaled / cold_s,
        "scipy_excess_median": float(np.median(excess)),
        "scipy_excess_max": float(excess.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="chinchilla_epoch.csv; without it, planted runs")
    parser.add_argument("--resamples", type=int, default=4000)
    parser.add_argument("--scipy", type=int, default=60, help="resamples that the SciPy loop is timed on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=("fit",), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data and not Path(args.data).is_file():
        parser.error(f"--data={args.data} is not a file")
    if args.only:
        fit(load(args.data), num_bootstrap=args.resamples, seed=SEED)
        print(time.process_time())
        return
    found = measure(args)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['resamples']} refits, CPU seconds (median of {args.repeats}):")
    print(f"  slmjax, warm       {found['ours_warm_s']:8.2f}")
    print(f"  slmjax, cold       {found['ours_cold_s']:8.2f}   interpreter and imports included")
    print(f"  SciPy loop         {found['scipy_s']:8.1f}   scaled from {found['scipy_resamples_timed']} resamples")
    print(f"  ratio              {found['ratio_warm']:8.0f} warm, {found['ratio_cold']:.0f} cold")
    print(
        f"  equal answers: SciPy's objective is above ours by {found['scipy_excess_median']:.1e} in the median, "
        f"{found['scipy_excess_max']:.1e} at most, and never below"
    )


if __name__ == "__main__":
    main()
