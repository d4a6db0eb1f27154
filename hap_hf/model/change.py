"""What became of the tensors of a model, for whoever holds the old ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TensorChange:
    """One tensor that surgery replaced or added.

    Args:
        name: Dotted name of the new tensor.
        old: The tensor that was there, or None for an implant's new weight.
        new: The tensor that is there now.
        index: For each changed dimension, the old indices in their new order.
        beside: For a new tensor, the tensor of the same layer that it follows.
    """

    name: str
    old: Tensor | None
    new: Tensor
    index: Mapping[int, Tensor] = field(default_factory=dict)
    beside: Tensor | None = None


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Return the memory format in which copies of ``tensor`` shall lie.

    Args:
        tensor: A weight.

    Returns:
        ``torch.channels_last`` for kernels of a model that was moved to it, else ``torch.contiguous_format``.
    """
    # Kernels of one tap or one input are contiguous in both formats, and say nothing about the model's.
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
