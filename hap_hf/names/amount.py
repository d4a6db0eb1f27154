"""How much is asked for, and what it is counted in."""

import math


def floor_share(amount: float) -> int:
    """Return ``amount`` rounded down, as the integer it was meant to be: 0.29 of 100 is 29, not 28.

    Args:
        amount: A share times a count.

    Returns:
        The largest integer that is at most a rounding error above ``amount``.
    """
    return math.floor(amount + 1e-6)
