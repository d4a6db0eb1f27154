"""Making units smaller step by step, so that little is lost when they go."""

from collections.abc import Callable, Iterator
from enum import StrEnum

import torch
from torch import Tensor, nn

from hap_hf.names.group import Group, Role, Slice


class Shrunk(StrEnum):
    """Which weights of a unit shrink."""

    READ = "read"
    """Those that read it: its contribution falls in proportion, whatever norms and activations lie on the way."""
    ROWS = "rows"
    """Those that make it, with its biases and norms, as in the paper. A norm behind them undoes a good part of it."""


_ROLES = {Shrunk.READ: {Role.CONSUMER}, Shrunk.ROWS: {Role.PRODUCER, Role.FACTOR, Role.ALIGNED}}


def slices_of(model: nn.Module, group: Group, on: Shrunk) -> Iterator[tuple[nn.Parameter, Slice]]:
    """Yield where the entries lie that shrink with the units of a group.

    Args:
        model: The model that the group was found in.
        group: The group.
        on: Which weights shrink.

    Yields:
        The parameter and the slice; each part of a parameter once, also where it is known by several names.
    """
    seen = set()
    for s in group.slices:
        if s.role not in _ROLES[on]:
            continue
        parameter = model.get_parameter(s.tensor)
        part = (id(parameter), s.dim, s.offset, s.width)
        if part not in seen:
            seen.add(part)
            yield parameter, s


def _entries(tensor: Tensor, group: Group, s: Slice) -> Tensor:
    """Return a view of the entries of a tensor, a parameter or its gradient, that belong to the units of a group."""
    return tensor.detach().narrow(s.dim, s.offset, group.num_units * s.width)


def _along(values: Tensor, entries: Tensor, s: Slice) -> Tensor:
    """Return a value for each unit in a shape that is broadcast over entries."""
    each = values.to(entries.device, entries.dtype).repeat_interleave(s.width)
    return each.view(*(-1 if d == s.dim else 1 for d in range(entries.dim())))


def shrink_(
    model: nn.Module, group: Group, penalties: Tensor, on: Shrunk, rate: Callable[[nn.Parameter], float]
) -> None:
    r"""Take a step of weight decay with a penalty of its own for each unit: :math:`w \gets (1 - \eta \lambda) w`.

    Args:
        model: The model, changed in place.
        group: The group.
        penalties: The penalty :math:`\lambda` of each unit, ``[num_units]``, float64.
        on: Which weights shrink.
        rate: The learning rate :math:`\eta` of a parameter.
    """
    for parameter, s in slices_of(model, group, on):
        # A step beyond zero would make the unit larger again, with the other sign.
        factors = (1 - rate(parameter) * penalties).clamp_min(0)
        entries = _entries(parameter, group, s)
        entries.mul_(_along(factors, entries, s))


def add_penalty_(model: nn.Module, group: Group, penalties: Tensor, on: Shrunk) -> None:
    r"""Add the gradient :math:`\lambda w` of the penalty :math:`\lambda/2 \|w\|^2` to the gradients there are.

    Args:
        model: The model, whose gradients are changed in place.
        group: The group.
        penalties: The penalty of each unit, ``[num_units]``, float64.
        on: Which weights it is about.
    """
    for parameter, s in slices_of(model, group, on):
        if parameter.grad is not None:
            entries = _entries(parameter, group, s)
            _entries(parameter.grad, group, s).add_(_along(penalties, entries, s) * entries)


def mean_sizes(model: nn.Module, group: Group, on: Shrunk, chosen: Tensor) -> tuple[float, float]:
    """Return how large entries of the chosen units and of the others are.

    Args:
        model: The model.
        group: The group.
        on: Which weights are looked at.
        chosen: Which units are chosen, ``[num_units]``.

    Returns:
        The mean absolute value of the chosen units' entries, and of the others'; NaN where there are none.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)
    for parameter, s in slices_of(model, group, on):
        sizes = (
            _entries(parameter, group, s)
            .abs()
            .double()
            .movedim(s.dim, 0)
            .reshape(s.width * group.num_units, -1)
            .sum(1)
            .cpu()
        )
        each = sizes.view(-1, s.width).sum(1)
        for index, members in enumerate((chosen, ~chosen)):
            sums[index] += each[members].sum()
            counts[index] += members.sum() * s.entries_per_unit
    found = sums / counts
    return float(found[0]), float(found[1])
