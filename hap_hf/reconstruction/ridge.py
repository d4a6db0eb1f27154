"""Ridge regression from second moments, its strength chosen by samples that were not fitted."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Strengths of regularisation to choose from, relative to the mean square of an input."""


@dataclass(frozen=True)
class Moments:
    """Sums over positions of what a regression needs: inputs ``a``, targets ``r``, each position with its weight.

    Args:
        inputs: ``sum_t w_t a_t a_t^T``, ``[inputs, inputs]``, float64.
        across: ``sum_t w_t a_t r_t^T``, ``[inputs, outputs]``, float64.
        square: ``sum_t w_t r_t^2``, ``[outputs]``, float64.
    """

    inputs: Tensor
    across: Tensor
    square: Tensor

    @classmethod
    def of(cls, a: Tensor, r: Tensor, weights: Tensor | None = None) -> "Moments":
        """Return the sums of some positions.

        Args:
            a: Inputs, ``[positions, inputs]``.
            r: Targets, ``[positions, outputs]``.
            weights: Of the positions; 1 by default.

        Returns:
            The sums.
        """
        if weights is not None:
            root = weights.to(a.dtype).sqrt()[:, None]
            a, r = a * root, r * root
        return cls((a.T @ a).double(), (a.T @ r).double(), r.square().sum(0).double())

    def __add__(self, other: "Moments") -> "Moments":
        """Return the sums of the positions of both."""
        return Moments(self.inputs + other.inputs, self.across + other.across, self.square + other.square)

    def first(self, number: int) -> "Moments":
        """Return the sums of the first inputs alone."""
        return Moments(self.inputs[:number, :number], self.across[:number], self.square)

    def solution(self, ridge: float, free: int = 0) -> Tensor | None:
        """Return ``D`` that minimises ``sum_t w_t ||r_t - D^T a_t||^2 + r m ||D||^2``, m the mean square of an input.

        Args:
            ridge: Strength r of the regularisation.
            free: The first so many inputs are not regularised: a constant is no weight that could be too large.

        Returns:
            ``[inputs, outputs]``; None where it is not determined.
        """
        system = self.inputs.clone()
        held = system.diagonal()[free:]
        held += ridge * held.mean() if len(held) else 0.0
        factor, failed = torch.linalg.cholesky_ex(system)
        return None if failed.item() else torch.cholesky_solve(self.across, factor)

    def error(self, solution: Tensor, scale: Tensor | None = None) -> float:
        """Return ``sum_t w_t ||r_t - D^T a_t||^2``.

        Args:
            solution: ``D``, ``[inputs, outputs]``.
            scale: Weights of the outputs, ``[outputs]``; 1 by default.

        Returns:
            The error.
        """
        each = self.square + ((self.inputs @ solution) * solution - 2 * self.across * solution).sum(0)
        return (each if scale is None else each * scale).sum().item()


@dataclass(frozen=True)
class RidgeFit:
    """A regression whose strength was chosen.

    Args:
        solution: ``[inputs, outputs]``, of all samples.
        ridge: The strength; infinite where nothing is better than no change, which is a solution of zeros.
        left: Share of the squared targets that is left on the samples held out.
    """

    solution: Tensor
    ridge: float
    left: float


def fit_held_out(
    train: Moments,
    test: Moments,
    *,
    free: int = 0,
    scale: Tensor | None = None,
    start: float = 1e-2,
) -> RidgeFit:
    """Choose the strength of a ridge regression by samples that were held out, and fit all samples with it.

    From ``start`` on, neighbouring strengths are tried as long as the error falls, so that layers that need about the
    same strength cost three factorisations and one for all samples.

    Args:
        train: Moments of the samples to fit.
        test: Moments of the samples to choose by.
        free: The first so many inputs are not regularised.
        scale: Weights of the outputs in the error, ``[outputs]``.
        start: Strength to begin with, one of :data:`RIDGES`.

    Returns:
        The fit.
    """
    zeros = torch.zeros_like(train.across)
    nothing = test.error(zeros, scale)
    if not nothing > 0:
        return RidgeFit(zeros, math.inf, 1.0)
    errors: dict[float, float] = {}

    def error(place: int) -> float:
        if not 0 <= place < len(RIDGES):
            return math.inf
        if RIDGES[place] not in errors:
            solution = train.solution(RIDGES[place], free)
            errors[RIDGES[place]] = math.inf if solution is None else test.error(solution, scale)
        return errors[RIDGES[place]]

    place = RIDGES.index(start)
    # Downhill to both sides: the error is a smooth function of the strength with one valley.
    for step in (-1, 1):
        while error(place + step) < error(place):
            place += step
    solution = (train + test).solution(RIDGES[place], free) if error(place) < nothing else None
    if solution is None:
        return RidgeFit(zeros, math.inf, 1.0)
    return RidgeFit(solution, RIDGES[place], error(place) / nothing)
