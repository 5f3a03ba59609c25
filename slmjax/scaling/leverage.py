"""Efficiency leverage of a mixture of experts: how much more compute the dense model of the same loss takes.

Tian et al. 2025 (arXiv 2507.17702, "Ling"). The source prints no bases for its logarithms: 2 for the granularity and 10
for the compute reproduce its claims.
"""

import math

A0, A_PER_DECADE = 1.23, -7.61e-2  # exponent of the activation ratio, and its change per factor 10 of compute
GAMMA, BETA = 1.67e-2, -1.17e-1  # of the squared and of the plain log2 granularity
RATIO_START, RATIO_MAX = 1.63e-2, 5.28e16


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
