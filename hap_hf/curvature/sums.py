"""Sums by key, of which not all are there from the beginning."""

from typing import TypeVar

from torch import Tensor

_K = TypeVar("_K")


def add_to_(sums: dict[_K, Tensor], key: _K, value: Tensor) -> None:
    """Add a value to the sum of its key.

    Args:
        sums: Sums by key; the first value of a key becomes its sum.
        key: The key.
        value: What is added; it is left as it is.
    """
    sums[key] = sums[key] + value if key in sums else value
