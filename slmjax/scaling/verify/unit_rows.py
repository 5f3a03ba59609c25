"""Numbers that follow from published formulas alone: one function per source, no table read."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slmjax.scaling import leverage, moe_cost
from slmjax.scaling.laws import data_constrained, load_law
from slmjax.scaling.rates.hyper_laws import deepseek, load_hyper_law
from slmjax.scaling.verify import Check

SOURCES: dict[str, list[tuple[str, dict[str, float], float]]] = {
    "minicpm_batch": [("batch", {"L": 2.5}, 3.98e6), ("batch", {"L": 3.0}, 1.275e6)],
    "deepseek": [
        ("lr", {"C": 8.46e22}, 4.25e-4),
        ("batch", {"C": 8.46e22}, 9.22e6),
        ("lr", {"C": 9.95e23}, 3.12e-4),
        ("batch", {"C": 9.95e23}, 20.7e6),
    ],
    "step_law": [("lr", {"N": 1e9, "D": 1e11}, 1.63e-3), ("batch", {"N": 1e9, "D": 1e11}, 1.108e6)],
    "critical_batch": [
        ("batch_chinchilla", {"N": 151e6}, 985.0),
        ("batch_fixed_tokens", {"N": 151e6}, 961.0),
        ("batch_chinchilla", {"N": 1200e6}, 2610.0),
        ("batch_fixed_tokens", {"N": 1200e6}, 1151.0),
    ],
}
TOLERANCE = {"minicpm_batch": 0.005, "deepseek": 0.005, "step_law": 0.01, "critical_batch": 0.005}
ROWS = {"minicpm_batch": 7, "deepseek": 12, "step_law": 14, "critical_batch": 15}


def checks(folder: Path | None) -> Iterator[Check]:
    for name, examples in SOURCES.items():
        law = load_hyper_law(name)
        for output, inputs, printed in examples:
            said = ", ".join(f"{x}={value:g}" for x, value in inputs.items())
            ours = law.recommend(**inputs)[output]
            yield _check(ROWS[name], f"{name} {output} at {said}", ours, printed, TOLERANCE[name] * printed)
    ours = deepseek.non_embedding_flops_per_token(num_layers=8, width=512, seq_len=4096)
    yield _check(13, "DeepSeek FLOPs per token of (8, 512, 4096)", ours, 352_321_536, 0.0)
    yield from _tokens_per_parameter()
    yield from _repetition()
    yield from _joint_moe()
    yield from _granularity()
    ours = leverage.efficiency_leverage(active_ratio=0.031, granularity=12, flops=1e22)
    yield _check(21, "Ling efficiency leverage at 3.1% active, G = 12, 1e22", ours, 7.24, 0.01 * 7.24)
    yield _check(21, "Ling best granularity", leverage.best_granularity(), 11.3, 0.01 * 11.3)


def _check(row, what, ours, published, tolerance, measured=None):
    against = "published" if measured is None else "measured"
    return Check("unit_rows", f"row {row}: {what}", float(ours), published, measured, tolerance, against)


def optimum(law, parameters: dict[str, float], flops: float, **fixed: float) -> tuple[float, float]:
    """(N, D) of least loss on 6 N D = flops: where one percent of N is worth as much loss as one percent of D."""
    centre_F = np.zeros(len(law.inputs))
    theta_P = law.coordinates(np.array([[parameters[name] for name in law.parameters]]), centre_F)[0]
    low, high = math.log(1e3), math.log(flops / 6) - math.log(1e3)
    for _ in range(100):
        log_N = 0.5 * (low + high)
        at = {"N": log_N, "D": math.log(flops / 6) - log_N} | {name: math.log(value) for name, value in fixed.items()}
        slope_F = law.slopes(theta_P[None], np.array([[at[name]] for name in law.inputs]))[:, 0]
        slope = dict(zip(law.inputs, slope_F, strict=True))
        low, high = (log_N, high) if slope["N"] < slope["D"] else (low, log_N)
    return math.exp(log_N), flops / 6 / math.exp(log_N)


def _tokens_per_parameter():
    law = load_law("minicpm")
    printed = {"code": 194.93, "en_wikihow": 166.04, "zh_wikihow": 833.95, "ultratext": 95.60, "zh_yayi": 112.79}
    recomputed = {"code": 193.7, "en_wikihow": 176.9, "zh_wikihow": 879.0, "ultratext": 91.2, "zh_yayi": 105.8}
    for name in (*printed, "average"):
        N, D = optimum(law, law.published[name], 1e21)
        published, rounded = printed.get(name, 191.87), recomputed.get(name, 183.9)
        yield _check(8, f"MiniCPM {name} D/N at 1e21, rounded coefficients", D / N, published, 0.005 * rounded, rounded)
        yield _check(8, f"MiniCPM {name} D/N at 1e21", D / N, published, 0.08 * published)
    law = load_law("chinchilla")
    for name, expected in (("hoffmann2022", 92.6), ("hoffmann2022_unrounded", 59.0), ("besiroglu2024", 18.4)):
        N, D = optimum(law, law.published[name], 5.76e23)
        yield _check(16, f"{name} D/N at 5.76e23", D / N, expected, 0.01 * expected)


def _repetition():
    """D'/U after 4 and 16 epochs, and without end, at R_D* = 15.387756 as Muennighoff et al. print it."""
    for epochs, expected in ((4.0, 3.726), (16.0, 10.58), (1e9, 16.39)):
        log_worth = data_constrained.worth(np.log(np.array([epochs])), math.log(15.387756))[0][0]
        yield _check(17, f"unique tokens' worth of {epochs:g} epochs", math.exp(log_worth), expected, 1e-3 * expected)


def _joint_moe():
    law = load_law("joint_moe")
    for experts, N_expected, D_expected in ((8, 0.99e9, 16.8e9), (32, 0.674e9, 24.7e9)):
        N, D = optimum(law, law.published["ludziejewski2025"], 1e20, E=experts)
        yield _check(19, f"joint MoE N at 1e20, E = {experts}", N, N_expected, 0.02 * N_expected)
        yield _check(19, f"joint MoE D at 1e20, E = {experts}", D, D_expected, 0.02 * D_expected)


# Krajewski et al., table 2: active size, tokens, granularity, training FLOPs (None: not computed a second time), loss.
GRANULAR = (
    (100e6, 4.37e9, 8, 2.944e18, 3.133),
    (1e9, 28.94e9, 16, 1.934e20, 2.491),
    (3e9, 72.9e9, 16, None, 2.245),
    (7e9, 137.6e9, 32, 6.468e21, 2.076),
    (70e9, 941e9, 32, None, 1.694),
    (300e9, 2.96e12, 64, None, 1.503),
    (1e12, 7.94e12, 64, None, 1.367),
)


def _granularity():
    law = load_law("granularity")
    theta_P = law.coordinates(np.array([[law.published["experts_64"][name] for name in law.parameters]]), np.zeros(3))
    for active, tokens, grains, flops, loss in GRANULAR:
        blocks = moe_cost.num_blocks(active)
        said = f"{active:g} active parameters"
        if flops is not None:
            ours = moe_cost.training_flops(blocks, 64, grains, tokens)
            yield _check(20, f"granularity FLOPs at {said}", ours, flops, 0.01 * flops)
        at = {"N": moe_cost.total_params(blocks, 64), "D": tokens, "G": grains}
        ours = law.loss(theta_P, np.log([[at[name]] for name in law.inputs]))[0][0, 0]
        yield _check(20, f"granularity loss at {said}, rounded coefficients", ours, loss, 0.025)
