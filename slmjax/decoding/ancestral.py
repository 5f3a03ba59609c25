"""Ancestral sampling: the reverse process of masked diffusion on a grid of times (MDLM 2406.07524, MD4 2406.04329).

From time t to s each masked position is revealed with probability (t - s) / t, independently of the others, its value
drawn given what was visible at t. Positions revealed together are drawn as if independent, so this is not lossless:
with the exact posterior it samples the data's distribution only as the steps become many (`first_hitting` always does).
"""

import numpy as np

from slmjax.decoding import Decoded, loop
from slmjax.denoiser import Denoiser


def times(num_steps: int, grid: str = "uniform") -> np.ndarray:
    """float64 [num_steps + 1], from 1 down to exactly 0; "cosine" is t = cos(π/2 (1 - u)) of the uniform u (MD4)."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} is below 1; one step already draws all positions at once")
    u = 1 - np.arange(num_steps + 1) / num_steps
    if grid == "uniform":
        return u
    if grid == "cosine":
        return np.sin(np.pi / 2 * u)  # the same number; exactly 0 at u = 0, where the cosine is 6e-17
    raise ValueError(f"grid={grid!r} is not a grid of times; use uniform or cosine")


def steps(shape: tuple[int, ...], times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """At which step of the grid each position is revealed if it is masked: ints of 0..num_steps-1.

    A position is masked until its own uniform time. Given that this lies below t, it is above s with probability
    (t - s) / t: the Bernoulli draws of all steps in a single one, cheap however many the steps. One categorical over
    tokens and mask instead stalls at many steps, as float32's Gumbel noise has no such rare events (2409.02908).
    """
    return len(times) - 1 - np.searchsorted(times[::-1], rng.random(shape), side="right")


def sample(
    denoiser: Denoiser, tokens_BT, *, mask_id: int, num_steps: int, grid: str = "uniform", seed: int = 0
) -> Decoded:
    """num_steps or fewer calls: those that would reveal nothing are not made.

    Of M masks in all, N uniform steps cost N (1 - (1 - 1/N)^M) calls on average.
    """
    rng, tokens_BT = np.random.default_rng(seed), loop.checked(tokens_BT, mask_id)
    step_BT = steps(tokens_BT.shape, times(num_steps, grid), rng)
    return loop.by_plan(denoiser, tokens_BT, mask_id, step_BT, rng)
