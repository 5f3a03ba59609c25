"""How much more compute one family of models takes for the loss of another: the efficiency leverage of a mixture of
experts over the dense model, the compute multiplier of masked diffusion over autoregression.

Published: Tian et al. 2025 (arXiv 2507.17702, "Ling"), whose source prints no bases for its logarithms: 2 for the
granularity and 10 for the compute reproduce its claims. Measured: from the fitted laws of two families, each at its own
compute-optimal sizes. Without laws, from pairs of runs: `leverage_pairs.py`; from IsoFLOP optima: `multiplier.py`.

Letters: K pairs of draws.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from slmjax.scaling import show
from slmjax.scaling.allocation import FARTHEST, Cost, allocate, best, make_cost
from slmjax.scaling.bias_corrected import bias_corrected
from slmjax.scaling.fit import Fit
from slmjax.scaling.prediction import LEVELS

A0, A_PER_DECADE = 1.23, -7.61e-2  # exponent of the activation ratio, and its change per factor 10 of compute
GAMMA, BETA = 1.67e-2, -1.17e-1  # of the squared and of the plain log2 granularity
RATIO_START, RATIO_MAX = 1.63e-2, 5.28e16

BLOCK = 32  # candidates for which a law is evaluated at each other's inputs too, as its interface has it
ROUNDING = 1e-9  # of FLOPs at the ends of a range
HALVINGS = 48  # of the log of FARTHEST squared: far below any interval
SAME_MEANING = ("n_convention", "flops_convention", "loss_unit", "loss_kind", "tokenizer", "corpus")


def efficiency_leverage(active_ratio: float, granularity: float, flops: float) -> float:
    """Leverage at equal loss.

    Args:
      active_ratio: active over all experts, shared ones counted in both.
      granularity: 2 width / width of an expert.
      flops: training FLOPs of the mixture.
    """
    if not 0 < active_ratio <= 1:
        raise ValueError(f"active_ratio={active_ratio} is not within (0, 1]: it is active over all experts")
    if not (granularity > 0 and flops > 0):
        raise ValueError(f"granularity={granularity} and flops={flops} must be positive numbers")
    saturated = 1 / (1 / (active_ratio + 1 / (1 / RATIO_START - 1 / RATIO_MAX)) + 1 / RATIO_MAX)
    fine = math.log2(granularity)
    return saturated ** (A0 + A_PER_DECADE * math.log10(flops) + GAMMA * fine**2 + BETA * fine)


def best_granularity() -> float:
    """Where the leverage is largest, at every compute and ratio: the exponent's parabola in log2 G has its vertex."""
    return 2 ** (-BETA / (2 * GAMMA))


# --- measured --------------------------------------------------------------------------------------------------------


class Leverage(NamedTuple):
    """C_sought / C_given at equal loss, both compute-optimal under their own laws.

    Attributes:
      flops, loss: training FLOPs of the given family, the anchor, and the loss that its law reaches with them.
      value, intervals: an end is inf where the draws of the sought law never fall to that loss, -inf where they are
        always below it. They hold the uncertainty of both laws, not an error of their form.
      sought_reach, given_reach: compute over the largest run's of that family.
      extrapolated: one of the two lies outside the compute that its family was trained with.
    """

    flops: float
    loss: float
    value: float
    intervals: dict[float, tuple[float, float]]
    sought_reach: float
    given_reach: float
    extrapolated: bool


def measured_leverage(sought: Fit, given: Fit, flops: float, seed: int = 0, mixed: Collection[str] = ()) -> Leverage:
    """How much more compute the sought family needs for the loss that the given one reaches with `flops`.

    N of a mixture is what its points say, active parameters for a comparison; compute is as the runs logged it, a
    router included. The families are two bootstraps of different runs, so their draws are paired at random.

    Args:
      sought, given: laws of N and D, their numbers of one meaning.
      flops: training FLOPs of the given family.
      seed: of the pairing.
      mixed: of SAME_MEANING, in what they may differ knowingly. Where loss_kind is: a bound is read as if it were the
        loss, see `bound_said`.
    Raises:
      ValueError: numbers of different meaning, an N that FLOPs do not follow, a law without a compute-optimal size.
    """
    require_one_meaning(sought, given, mixed)
    sought_cost, given_cost = logged_cost(sought), logged_cost(given)
    best(given, flops, given_cost)  # refuses a law without a best size
    num = min(len(sought.draws), len(given.draws))
    pair_K = np.random.default_rng(seed).permutation(len(sought.draws))[:num]
    target = _optimal_loss(given, given.theta[None], flops, given_cost)
    target_K = _optimal_loss(given, given.draws[:num], flops, given_cost)
    value_K = _compute_for(sought, np.stack([sought.theta, *sought.draws[pair_K]]),
                           np.concatenate([target, target_K]), flops, sought_cost) / flops  # fmt: skip
    value, draws_K1 = float(value_K[0]), bias_corrected(value_K[1:, None], value_K[:1])
    intervals = {}
    for level in LEVELS:
        # Order statistics: an infinite draw stays infinite and does not become nan.
        low, high = np.quantile(draws_K1[:, 0], [(1 - level) / 2, (1 + level) / 2], method="nearest")
        intervals[level] = (min(float(low), value) if low > 0 else -math.inf, max(float(high), value))
    (sought_low, sought_high), (given_low, given_high) = trained_with(sought), trained_with(given)
    inside = _within(value * flops, sought_low, sought_high) and _within(flops, given_low, given_high)
    return Leverage(
        float(flops), float(target[0]), value, intervals, value * flops / sought_high, flops / given_high, not inside
    )


def _within(flops, low, high):
    return low * (1 - ROUNDING) <= flops <= high * (1 + ROUNDING)


def trained_with(fit: Fit) -> tuple[float, float]:
    """Least and most training FLOPs of a family's runs."""
    C_n = [p["C"] for p in fit.points]
    if None in C_n:
        raise ValueError("the runs have no FLOPs, so there is no compute axis to compare on")
    return min(C_n), max(C_n)


def require_one_meaning(sought: Fit, given: Fit, mixed: Collection[str] = ()) -> None:
    """Raises ValueError unless N, C and the loss of two fits mean the same, but for what is `mixed`."""
    for name in SAME_MEANING:
        one, other = sought.conventions.get(name), given.conventions.get(name)
        if one != other and name not in mixed:
            raise ValueError(
                f"the families differ in {name.removesuffix('_convention').replace('_', ' ')}: {one} and {other}; a "
                "leverage is read at equal loss on one compute axis, so load both alike"
            )


def bound_said(names: tuple[str, str], kinds: tuple[str, str]) -> str:
    """What the ratio says of the true losses where losses are bounds, in one sentence; nothing where both are exact.

    Args:
      names, kinds: of the sought and of the given family; loss kinds as points have them.
    """
    sought, given = names
    if kinds == ("bound", "exact"):  # C at which a bound comes down to a loss is no less than C at which the loss does
        return f"an upper bound on the ratio at equal true loss, because the loss of {sought} is an upper bound"
    if kinds == ("exact", "bound"):
        return f"a lower bound on the ratio at equal true loss, because the loss of {given} is an upper bound"
    if kinds == ("bound", "bound"):
        return f"of the upper bounds of {sought} and {given}; their true losses may differ otherwise"
    if kinds != ("exact", "exact"):
        return f"across kinds of loss ({sought}: {kinds[0]}; {given}: {kinds[1]})"
    return ""


def logged_cost(fit: Fit) -> Cost:
    """How the runs of a family spend compute, as they logged it."""
    cost = make_cost(fit, "logged")
    if cost.coefficient < 0:
        raise ValueError(
            f"the logged FLOPs of family {fit.conventions['family']} lie below 6 N D: its N counts parameters that a "
            "token does not pass, as those of other experts; load it with n=active_non_embedding"
        )
    return cost


def inside_budgets(sought: Fit, given: Fit, num: int = 4) -> list[float]:
    """FLOPs that the given family was trained with, as far as the sought one went, evenly spaced in their logarithm."""
    (sought_low, sought_high), (given_low, given_high) = trained_with(sought), trained_with(given)
    low, high = max(sought_low, given_low), min(sought_high, given_high)
    if low >= high:
        raise ValueError(
            f"no compute was spent by both families: one ends at {high:.3g} FLOPs and the other begins at {low:.3g}; "
            "train both over one range"
        )
    # From the given one's smallest: a family that needs many times the compute need not have spent as little.
    return np.geomspace(given_low, high, num).tolist()


def leverage_table(
    made: list[Leverage], names: tuple[str, str] = ("dense", "moe"), word: str = "leverage", further: str = ""
) -> str:
    """One line per budget.

    Args:
      names: the sought family and the given one.
      word: what the ratio is called.
      further: what else is to be said of it, see `bound_said`.
    """
    sought, given = names
    rows = [(f"C of {given}", "loss", word, "80% interval", "95% interval", f"of {sought}'s largest run")]
    rows += [
        (
            f"{one.flops:.3g}",
            f"{one.loss:.4g}",
            times(one.value),
            *(show.interval(one.intervals[level], times) for level in LEVELS),
            times(one.sought_reach) + (", extrapolation" if one.extrapolated else ""),
        )
        for one in made
    ]
    said = f"{word}: {ratio_said(names)}, both at their best sizes" + (f"; {further}" if further else "")
    return "\n".join([*show.columns(rows), said]) + "\n"


def ratio_said(names: tuple[str, str]) -> str:
    sought, given = names
    return f"compute {sought} needs, over C, for the loss that {given} reaches with C"


def times(ratio: float) -> str:
    return show.times(ratio) if math.isfinite(ratio) else "unbounded"


def _optimal_loss(fit, theta_KP, flops, cost: Cost):
    """Loss [K] of each candidate law at its own best size of a budget, or of a budget each."""
    flops_K = flops * np.ones(len(theta_KP))
    # A draw in which one term vanished has no best size; its loss is read at the last one that makes sense.
    N_K = np.clip(allocate(fit, theta_KP, flops_K, cost)[0], 1.0, flops_K)
    u_FK = np.log([N_K, cost.tokens(N_K, flops_K)]) - fit.centre[:, None]
    blocks = [slice(k, k + BLOCK) for k in range(0, len(theta_KP), BLOCK)]
    return np.concatenate([np.diagonal(fit.form.loss(theta_KP[block], u_FK[:, block])[0]) for block in blocks])


def _compute_for(fit, theta_KP, loss_K, near, cost: Cost):
    """Least compute [K] with which each candidate law reaches a loss each: 0 or inf beyond FARTHEST of `near`."""
    low_K, high_K = (np.full(len(theta_KP), math.log(near) + sign * math.log(FARTHEST)) for sign in (-1, 1))
    with np.errstate(all="ignore"):
        never_K = ~(_optimal_loss(fit, theta_KP, np.exp(high_K), cost) <= loss_K)
        always_K = _optimal_loss(fit, theta_KP, np.exp(low_K), cost) <= loss_K
        for _ in range(HALVINGS):
            middle_K = 0.5 * (low_K + high_K)
            above_K = _optimal_loss(fit, theta_KP, np.exp(middle_K), cost) > loss_K
            low_K, high_K = np.where(above_K, middle_K, low_K), np.where(above_K, high_K, middle_K)
    return np.where(never_K, np.inf, np.where(always_K, 0.0, np.exp(high_K)))
