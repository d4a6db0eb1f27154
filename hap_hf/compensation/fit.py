"""What is predictable of some inputs of a layer from its other inputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""Strengths of regularisation to choose from, relative to the mean second moment of an input."""

_MOST_OUTPUTS = 64
"""A strength is chosen by the errors of so many sums of outputs, which takes less time than all outputs."""


@dataclass(frozen=True)
class Fit:
    """What is to be added to the weights of a layer when some of its inputs go.

    Args:
        kept: Indices of the inputs that stay, ``[num_kept]``.
        weights: For these inputs, ``[outputs, num_kept]``, float64.
        constants: For the bias, ``[outputs]``, float64.
        unexplained: Share that is left of the second moment of what the layer made of the removed inputs, on samples
            that were not fitted.
    """

    kept: Tensor
    weights: Tensor
    constants: Tensor
    unexplained: float


def fit_removed(
    halves: Tensor, removed: Tensor, rows: Tensor, *, constant: bool, floors: Sequence[float] = (0.0,)
) -> list[Fit | None]:
    r"""Return the weights with which the kept inputs x_K best replace what a layer made of the removed ones, x_R.

    Ridge regression: ``D`` and ``c`` minimise ``sum_t w_t ||W_R x_R - D x_K - c||^2 + r m ||D||^2`` over positions t
    with weights w_t, where m is the mean second moment of a kept input. The strength r is one of :data:`RIDGES`. From
    the strongest to weaker ones, each half of the samples is fitted and the fit is tried on the other half; the last
    strength before the error grows is taken.

    Without the ridge, adding D to the weights of the kept inputs and c to the bias is the optimal update of what
    remains, in the quadratic approximation of the loss around it, if the curvature is that of the layer's outputs times
    that of its inputs.

    References: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NeurIPS 1992;
    Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022, for one layer at a time.

    Args:
        halves: ``sum_t w_t z_t z_t^T`` of the inputs and a one, ``z = (x, 1)``, over each half of the samples,
            ``[2, inputs + 1, inputs + 1]``.
        removed: Indices of the removed inputs.
        rows: The layer's weights, ``[outputs, inputs]``.
        constant: Whether the layer has a bias that c may go to.
        floors: Weakest strengths that may be chosen.

    Returns:
        For each floor the fit; None if nothing is lost with the removed inputs, or if no fit helps on samples that
        were not fitted.
    """
    halves, rows = halves.double(), rows.detach().to(halves.device).double()
    one = halves.shape[-1] - 1
    kept = _others(removed, one)
    known = torch.cat([kept, torch.tensor([one] if constant else [], dtype=torch.long, device=kept.device)])
    both = _Problem.of(halves.sum(0), known, removed, rows[:, removed], len(kept))
    mixed = _mixed(rows[:, removed])
    first, second = (_Problem.of(half, known, removed, mixed, len(kept)) for half in halves)
    if not both.lost > 0 or not all(p.mean_square > 0 for p in (first, second)):
        return [None] * len(floors)
    lost = first.lost + second.lost
    errors = {math.inf: lost}  # of the strengths that are worth it, from no fit at all on
    # Cross-fitting: each half is predicted by the fit of the other, which has not seen its noise. The error on the half
    # that was fitted would fall with every weaker ridge, and choose none.
    for ridge in RIDGES:
        solutions = first.solution(ridge), second.solution(ridge)
        if solutions[0] is None or solutions[1] is None:
            break
        error = second.error(solutions[0]) + first.error(solutions[1])
        if error >= min(errors.values()):
            break
        errors[ridge] = error
    # The weakest that was worth it; no fit at all, which counts as infinite, where the floor allows none of them.
    chosen = [min(ridge for ridge in errors if ridge >= floor) for floor in floors]
    fits = dict.fromkeys(chosen)
    for ridge in fits:
        if not math.isinf(ridge) and (solution := both.solution(ridge)) is not None:
            constants = solution[:, -1] if constant else torch.zeros_like(solution[:, 0])
            fits[ridge] = Fit(kept, solution[:, : len(kept)], constants, errors[ridge] / lost)
    return [fits[ridge] for ridge in chosen]


def _mixed(rows: Tensor) -> Tensor:
    """Return a few sums of outputs with random signs s: as E s s^T = 1, squared errors add up to those of all."""
    if len(rows) <= _MOST_OUTPUTS:
        return rows
    signs = torch.randint(2, (_MOST_OUTPUTS, len(rows)), generator=torch.Generator().manual_seed(0), device="cpu")
    return (2 * signs - 1).to(rows) @ rows / math.sqrt(_MOST_OUTPUTS)


def _others(removed: Tensor, total: int) -> Tensor:
    """Return the indices below ``total`` that are not removed, in order."""
    left = torch.ones(total, dtype=torch.bool, device=removed.device)
    left[removed] = False
    return left.nonzero().flatten()


@dataclass(frozen=True)
class _Problem:
    """Second moments of what is known, of what is lost with the removed inputs, and between both."""

    known: Tensor  # [known, known]
    across: Tensor  # [outputs, known]
    lost: float
    num_kept: int

    @classmethod
    def of(cls, moment: Tensor, known: Tensor, removed: Tensor, weights: Tensor, num_kept: int) -> "_Problem":
        """Return the problem that the moments of all inputs pose, with the removed ones' ``weights``."""
        lost = ((weights @ moment[removed][:, removed]) * weights).sum().item()
        return cls(moment[known][:, known], weights @ moment[removed][:, known], lost, num_kept)

    @property
    def mean_square(self) -> float:
        """Mean second moment of a kept input, up to the sum of the weights."""
        return self.known.diagonal()[: self.num_kept].mean().item() if self.num_kept else 0.0

    def solution(self, ridge: float) -> Tensor | None:
        """Return the weights, that of the constant last, ``[outputs, known]``; None where they are not determined."""
        system = self.known.clone()
        # Not the constant, which is last: a mean is no weight that could be too large.
        system.diagonal()[: self.num_kept] += ridge * self.mean_square
        factor, failed = torch.linalg.cholesky_ex(system)
        return None if failed.item() else torch.cholesky_solve(self.across.T, factor).T

    def error(self, weights: Tensor) -> float:
        """Return the squared error of the outputs with these weights in place of the removed ones."""
        # ||a - D b||^2 = ||a||^2 - 2 <D, a b^T> + <D b b^T, D>, summed over positions
        return self.lost + ((weights @ self.known) * weights - 2 * weights * self.across).sum().item()
