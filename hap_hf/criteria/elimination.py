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
        moment: Second moment of its inputs, those of units alone, unit after unit, ``[n, n]`` with
            ``n = units * width``, float64.
        price: Of errors at these inputs, ``[n, n]``, symmetric and never negative, float64: an error e costs
            ``e^T price e``. With the columns D that read them it is ``D^T D`` for the squared error of the output.
    """

    moment: Tensor
    price: Tensor

    def of(self, units: Tensor, num_units: int) -> "Reading":
        """Return the same of some units."""
        inputs = _inputs_of(units, len(self.moment) // num_units)
        return Reading(self.moment[inputs][:, inputs], self.price[inputs][:, inputs])


@dataclass(frozen=True)
class Elimination:
    """What came of it.

    Args:
        order: Units, the first to go first, ``[units]``.
        costs: By how much the price of all errors rises when each unit goes, after those before it in the order and
            with what stays making up for it, ``[units]``, by unit. Along the order it never falls.
        own: What each unit costs if nothing makes up for it, ``[units]``.
    """

    order: Tensor
    costs: Tensor
    own: Tensor


def eliminate(readings: Sequence[Reading], num_units: int) -> Elimination:
    r"""Remove units one after the other, each time the one whose removal costs least.

    With the inputs' moment C, the price G and the inverse :math:`P = (C + r I)^{-1}` over the inputs that are left, a
    unit u that is best made up for by all others costs :math:`\operatorname{tr}(G_{uu} P_{uu}^{-1})`. The others then
    take over, and with :math:`A = P_{uu}^{-1} P_{u\cdot}` the price becomes
    :math:`G \leftarrow (I - E_u A)^T G (I - E_u A)`, as for columns :math:`D \leftarrow D - D_u A` and their
    :math:`D^T D`. The inverse becomes that without the unit, :math:`P \leftarrow P - P_{\cdot u} A`. Of two units that
    repeat each other the first is free, and the second then stands for both.

    References: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NeurIPS 1992;
    Minnehan and Savakis, "Cascaded Projection: End-to-End Network Compression and Acceleration", CVPR 2019, which keeps
    the inputs that span the others best, the same from the other end.

    Args:
        readings: The layers that read the units; their costs add up.
        num_units: Number of units.

    Returns:
        The order and the costs. It takes about ``n^3`` multiply-accumulates for n inputs.
    """
    wanted = torch.stack([r.price.diagonal().view(num_units, -1).sum(1) for r in readings]).sum(0) > 0
    # What nothing makes anything of, as after an earlier pass, is free and goes first.
    order = (~wanted).nonzero().flatten().tolist()
    costs, own = readings[0].price.new_zeros(2, num_units).unbind(0)
    if len(order) == num_units:
        return Elimination(torch.tensor(order, device=own.device), costs, own)
    # The states hold these units, in this order, and some of them are gone.
    held = wanted.nonzero().flatten()
    states = [_State(r.of(held, num_units), len(held)) for r in readings]
    own[held] = torch.stack([s.costs_alone() for s in states]).sum(0)
    gone, num_gone, reached = torch.zeros_like(held, dtype=torch.bool), 0, 0.0
    while len(order) < num_units:
        each = torch.stack([s.costs() for s in states]).sum(0)
        place = int(each.masked_fill(gone, torch.inf).argmin())
        # What goes first must not cost more than what follows: a threshold then takes the first ones of the order.
        reached = max(reached, each[place].item())
        unit = int(held[place])
        costs[unit], gone[place], num_gone = reached, True, num_gone + 1
        order.append(unit)
        for state in states:
            state.remove_(place)
        # Without those that are gone, matrices become smaller and smaller, and all together takes a third of the time.
        if num_gone < len(held) <= 8 * num_gone:
            left = (~gone).nonzero().flatten()
            for state in states:
                state.keep_(left)
            held, gone, num_gone = held[left], gone[left], 0
    return Elimination(torch.tensor(order, device=own.device), costs, own)


class _State:
    """One layer's inverse moment and price, with updates that are not multiplied out yet."""

    def __init__(self, reading: Reading, num_units: int) -> None:
        self._width = len(reading.moment) // num_units
        self._moment_blocks = _blocks(reading.moment, num_units)
        self._inverse, heard = _inverse(reading.moment)
        self._price = reading.price * float(heard)
        self._inverse_blocks = _blocks(self._inverse, num_units)
        self._price_blocks = _blocks(self._price, num_units)
        self._begin()

    def _begin(self) -> None:
        """Begin with no updates: the inverse is less R R^T, and the price less S O^T + O S^T."""
        self._pending = 0
        most = max(_MOST_PENDING, self._width)
        self._roots, self._shares, self._others = self._inverse.new_empty(3, len(self._inverse), most).unbind(0)

    def costs_alone(self) -> Tensor:
        """Return what each unit costs if nothing makes up for it."""
        return torch.einsum("uij,uji->u", self._price_blocks, self._moment_blocks)

    def costs(self) -> Tensor:
        """Return what each unit costs now; those that are gone cost nothing."""
        if self._width == 1:
            return self._price_blocks[:, 0, 0] / self._inverse_blocks[:, 0, 0]
        solved: Tensor = torch.linalg.solve(self._inverse_blocks, self._price_blocks)
        return solved.diagonal(dim1=1, dim2=2).sum(1)

    def remove_(self, place: int) -> None:
        """Let a unit go, and the others take over what it made."""
        if self._pending + self._width > self._roots.shape[1]:
            self._multiply_out()
        span = slice(place * self._width, (place + 1) * self._width)
        done, new = slice(self._pending), slice(self._pending, self._pending + self._width)
        inverse = self._inverse[:, span] - self._roots[:, done] @ self._roots[span, done].T
        price = self._price[:, span] - self._shares[:, done] @ self._others[span, done].T
        price -= self._others[:, done] @ self._shares[span, done].T
        # The blocks are kept up to date, and what the differences leave of rounding is not symmetric.
        factor = torch.linalg.cholesky(self._inverse_blocks[place])
        root = torch.linalg.solve_triangular(factor, inverse.T, upper=False).T  # [n, width]
        share = torch.linalg.solve_triangular(factor.T, root.T, upper=True).T
        other = price - share @ self._price_blocks[place] / 2
        self._roots[:, new], self._shares[:, new], self._others[:, new] = root, share, other
        self._pending += self._width
        num_held = len(self._inverse_blocks)
        roots, shares, others = (t.reshape(num_held, self._width, self._width) for t in (root, share, other))
        self._inverse_blocks -= roots @ roots.mT
        crossed = shares @ others.mT
        self._price_blocks -= crossed + crossed.mT
        self._inverse_blocks[place] = torch.eye(self._width, dtype=root.dtype, device=root.device)
        self._price_blocks[place] = 0

    def keep_(self, places: Tensor) -> None:
        """Forget all units but some."""
        self._multiply_out()
        inputs = _inputs_of(places, self._width)
        self._inverse, self._price = (m[inputs][:, inputs] for m in (self._inverse, self._price))
        self._inverse_blocks, self._price_blocks = self._inverse_blocks[places], self._price_blocks[places]
        self._begin()

    def _multiply_out(self) -> None:
        done = slice(self._pending)
        self._inverse = self._inverse - self._roots[:, done] @ self._roots[:, done].T
        crossed = self._shares[:, done] @ self._others[:, done].T
        self._price = self._price - crossed - crossed.T
        self._pending = 0


def _inputs_of(units: Tensor, width: int) -> Tensor:
    """Return the numbers of the inputs of some units."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


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
