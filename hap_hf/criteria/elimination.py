"""In which order units go if what stays makes up for each of them, and what each one costs then."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-2
"""Strength of the regularisation, relative to the mean second moment of an input."""

_MOST_PENDING = 64
"""So many columns of updates are kept until they are multiplied out together."""


@dataclass(frozen=True)
class Reading:
    """A layer that reads the units of a group.

    Args:
        moment: Weighted second moment of its inputs, those of units alone, unit after unit, ``[n, n]`` with
            ``n = units * width``, float64.
        columns: What it makes of each input, ``[outputs, n]``, float64.
    """

    moment: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Elimination:
    """What came of it.

    Args:
        order: Units, the first to go first, ``[units]``.
        costs: By how much the squared error of what is read rises when each unit goes, after those before it in the
            order and with what stays making up for it, ``[units]``, by unit. Along the order it never falls.
        own: What each unit adds by itself, squared, ``[units]``: its cost if nothing made up for it.
    """

    order: Tensor
    costs: Tensor
    own: Tensor


def eliminate(readings: Sequence[Reading], num_units: int) -> Elimination:
    r"""Remove units one after the other, each time the one whose removal costs least.

    With the inputs' moment C, the columns D and the inverse :math:`P = (C + r I)^{-1}` over the inputs that are left, a
    unit u whose columns are best made up for by all others costs
    :math:`\operatorname{tr}(D_u^T D_u P_{uu}^{-1})`. The others then take over
    :math:`D \leftarrow D - D_u P_{uu}^{-1} P_{u\cdot}`, and the inverse becomes that without the unit,
    :math:`P \leftarrow P - P_{\cdot u} P_{uu}^{-1} P_{u\cdot}`. Of two units that repeat each other the first is free,
    and the second then stands for both.

    References: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NeurIPS 1992;
    Minnehan and Savakis, "Cascaded Projection: End-to-End Network Compression and Acceleration", CVPR 2019, which keeps
    the inputs that span the others best, the same from the other end.

    Args:
        readings: The layers that read the units; their costs add up.
        num_units: Number of units.

    Returns:
        The order and the costs. It takes about ``4 n^3`` multiply-accumulates.
    """
    states = [_State(r, num_units) for r in readings]
    own = torch.stack([s.costs_alone() for s in states]).sum(0)
    alive = torch.ones(num_units, dtype=torch.bool, device=own.device)
    costs, order, reached = torch.zeros_like(own), [], 0.0
    for _ in range(num_units):
        each = torch.stack([s.costs() for s in states]).sum(0)
        unit = int(torch.where(alive, each, torch.full_like(each, torch.inf)).argmin())
        # What goes first must not cost more than what follows: a threshold then takes the first ones of the order.
        reached = max(reached, each[unit].item())
        costs[unit], alive[unit] = reached, False
        order.append(unit)
        for state in states:
            state.remove_(unit)
    return Elimination(torch.tensor(order, device=own.device), costs, own)


class _State:
    """One layer's inverse moment and the products of its columns, with updates that are not multiplied out yet."""

    def __init__(self, reading: Reading, num_units: int) -> None:
        self._width = len(reading.moment) // num_units
        self._moment_blocks = _blocks(reading.moment, num_units)
        self._inverse, heard = _inverse(reading.moment)
        self._gram = (reading.columns.T @ reading.columns) * float(heard)
        self._inverse_blocks = _blocks(self._inverse, num_units)
        self._gram_blocks = _blocks(self._gram, num_units)
        self._roots: list[Tensor] = []  # the inverse is less v v^T for each
        self._pairs: list[tuple[Tensor, Tensor]] = []  # the products are less a b^T + b a^T for each

    def costs_alone(self) -> Tensor:
        """Return what each unit costs if nothing makes up for it."""
        return torch.einsum("uij,uji->u", self._gram_blocks, self._moment_blocks)

    def costs(self) -> Tensor:
        """Return what each unit costs now; those that are gone cost nothing."""
        if self._width == 1:
            return self._gram_blocks[:, 0, 0] / self._inverse_blocks[:, 0, 0]
        solved: Tensor = torch.linalg.solve(self._inverse_blocks, self._gram_blocks)
        return solved.diagonal(dim1=1, dim2=2).sum(1)

    def remove_(self, unit: int) -> None:
        """Let a unit go, and the others take over what it made."""
        span = slice(unit * self._width, (unit + 1) * self._width)
        inverse, gram = self._inverse[:, span].clone(), self._gram[:, span].clone()
        for root in self._roots:
            inverse -= root @ root[span].T
        for a, b in self._pairs:
            gram -= a @ b[span].T + b @ a[span].T
        # The blocks are kept up to date, and what the differences leave of rounding is not symmetric.
        factor = torch.linalg.cholesky(self._inverse_blocks[unit])
        root = torch.linalg.solve_triangular(factor, inverse.T, upper=False).T  # [n, width]
        share = torch.linalg.solve_triangular(factor.T, root.T, upper=True).T
        other = gram - share @ self._gram_blocks[unit] / 2
        self._roots.append(root)
        self._pairs.append((share, other))
        num_units = len(self._inverse_blocks)
        roots, shares, others = (t.view(num_units, self._width, self._width) for t in (root, share, other))
        self._inverse_blocks = self._inverse_blocks - roots @ roots.mT
        crossed = shares @ others.mT
        self._gram_blocks = self._gram_blocks - crossed - crossed.mT
        self._inverse_blocks[unit] = torch.eye(self._width, dtype=root.dtype, device=root.device)
        self._gram_blocks[unit] = 0
        if len(self._roots) * self._width >= _MOST_PENDING:
            self._multiply_out()

    def _multiply_out(self) -> None:
        roots = torch.cat(self._roots, 1)
        a, b = (torch.cat(side, 1) for side in zip(*self._pairs, strict=True))
        self._inverse = self._inverse - roots @ roots.T
        crossed = a @ b.T
        self._gram = self._gram - crossed - crossed.T
        self._roots, self._pairs = [], []


def _blocks(matrix: Tensor, num_units: int) -> Tensor:
    """Return the blocks along the diagonal, ``[units, width, width]``."""
    width = len(matrix) // num_units
    return torch.einsum("uiuj->uij", matrix.view(num_units, width, num_units, width)).clone()


def _inverse(moment: Tensor) -> tuple[Tensor, bool]:
    """Return the inverse of a moment with a ridge, and whether there is anything in it."""
    mean, one = moment.diagonal().mean(), torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    ridge = RIDGE
    # Of inputs that are nearly constant, what is left without their mean may be less than the rounding of their sums.
    while mean > 0 and ridge < 1 / RIDGE**4:
        factor, failed = torch.linalg.cholesky_ex(moment + ridge * mean * one)
        if not failed.item():
            return torch.cholesky_inverse(factor), True
        ridge *= 10
    return one, False
