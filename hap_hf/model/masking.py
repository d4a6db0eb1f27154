"""Silencing units without removing them: what pruning must equal."""

from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hap_hf.layers.projection import channel_dim, on_input
from hap_hf.names.group import Group, Role

Units = Iterable[tuple[Group, Iterable[int]]]
"""Groups, and the indices of some of their units."""


@contextmanager
def masked(model: nn.Module, units: Units) -> Generator[None]:
    """Zero units where they are read, inside the block.

    Args:
        model: The model that the groups were found in; no weight is touched.
        units: Which units.
    """
    # A zero input to a column equals a column that is gone. Zeros where units are made would not do: biases, norms and
    # activations on the way make something of them.
    handles = [
        on_input(module := model.get_submodule(name), _zeroing(indices, channel_dim(module)))
        for name, indices in channels(units, {Role.CONSUMER}).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def channels(units: Units, roles: Collection[Role]) -> dict[str, list[int]]:
    """Return the channels of layers in which units lie.

    Args:
        units: Which units.
        roles: ``CONSUMER`` for the input channels through which they are read, ``PRODUCER`` and ``FACTOR`` for the
            output channels that make them.

    Returns:
        The channels by the layer's name.
    """
    result: dict[str, list[int]] = defaultdict(list)
    for group, indices in units:
        chosen = list(indices)
        for s in group.slices:
            if s.role in roles and s.tensor.endswith("weight"):
                result[s.tensor.rpartition(".")[0]] += [i for u in chosen for i in s.indices(u)]
    return result


def _zeroing(indices: list[int], dim: int) -> Callable[[Tensor], Tensor]:
    """Return what zeroes some channels of an input, ``dim`` counted from the last dimension."""

    def zero(x: Tensor) -> Tensor:
        # Out of place, as the same tensor may go to layers that read other units of it.
        keep = torch.ones(x.shape[dim], dtype=x.dtype, device=x.device)
        keep[indices] = 0
        return x * keep.view(-1, *[1] * (-1 - dim))

    return zero
