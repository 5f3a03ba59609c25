"""The effective number of experts, which saturates at both ends; of the routing laws."""

import numpy as np

from slmjax.scaling.laws._terms import positive

E_START, E_MAX = positive(1.0, 50.0), positive(8.0, 1e5)


def effective(log_E, log_start, log_max):
    """log Ê of 1/Ê = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max (Clark et al. 2022, equation 5), and its derivatives
    by log E, log E_start and log E_max."""
    E, start, most = np.exp(log_E), np.exp(log_start), np.exp(log_max)
    lift = 1 / (1 / start - 1 / most)
    spread = E - 1 + lift
    inverse = 1 / spread + 1 / most
    by_spread = 1 / (spread**2 * inverse)  # d log Ê / d spread
    by_start = by_spread * lift**2 / start
    by_max = 1 / (most * inverse) - by_spread * lift**2 / most
    return -np.log(inverse), by_spread * E, by_start, by_max
