"""Reduced-rank regression from second moments: some inputs act through a few directions only.

The outputs are ``r ~ D^T a + U V x`` with inputs ``a`` that are free to act and inputs ``x`` that share ``rank``
directions ``V x``. For a given ridge the best D is linear in ``U V``, so that the problem is one of ``U V`` alone, in
the metric of the Schur complement S of the inputs ``a``: with ``S = L L^T`` and B the unrestricted coefficients of x,
``min ||L^T (B - V^T U^T)||_F`` over matrices of that rank, which the truncated singular value decomposition of
``L^T B`` solves.

Reference: Izenman, "Reduced-rank regression for the multivariate linear model", J. Multivariate Analysis 5, 1975;
Reinsel and Velu, "Multivariate Reduced-Rank Regression", 1998, chapter 3, for the two groups of inputs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hap_hf.reconstruction.ridge import RIDGES, Moments


@dataclass(frozen=True)
class LowRankFit:
    """A regression in which some inputs act through a few directions.

    Args:
        solution: Coefficients of the inputs that are free, ``[inputs, outputs]``.
        down: The directions, ``[rank, inputs beside]``.
        up: What they add to the outputs, ``[outputs, rank]``.
        ridge: Strength of the regularisation.
        gains: By how much each direction, after those before it, lowers the squared error on the samples held out.
    """

    solution: Tensor
    down: Tensor
    up: Tensor
    ridge: float
    gains: Tensor


@dataclass(frozen=True)
class _Path:
    """All directions, the most important one first, and how the free inputs give way to each of them.

    Args:
        alone: Coefficients of the free inputs without any direction, ``[free inputs, outputs]``.
        down: ``[directions, inputs beside]``.
        up: ``[outputs, directions]``.
        yielding: By how much the coefficients of the free inputs fall for each direction, times what it adds to the
            outputs, ``[free inputs, directions]``.
    """

    alone: Tensor
    down: Tensor
    up: Tensor
    yielding: Tensor

    def at(self, rank: int) -> Tensor:
        """Return the coefficients of the free inputs with so many directions."""
        return self.alone - self.yielding[:, :rank] @ self.up[:, :rank].T


def fit_low_rank(
    train: Moments, test: Moments, *, beside: int, rank: int, free: int, scale: Tensor, start: float
) -> LowRankFit | None:
    """Fit with a given number of directions; the strength of the ridge is chosen by samples that were held out.

    Args:
        train: Moments of the samples to fit; the last ``beside`` inputs act through the directions.
        test: Moments of the samples to choose by.
        beside: Number of inputs that act through the directions.
        rank: Number of directions.
        free: The first so many inputs are not regularised.
        scale: Weights of the outputs, ``[outputs]``.
        start: Strength to begin with; from there on neighbours are tried as long as the error falls.

    Returns:
        The fit, of all samples; None where no strength determines it.
    """
    found: dict[float, tuple[float, Tensor]] = {}

    def error(place: int) -> float:
        if not 0 <= place < len(RIDGES):
            return math.inf
        ridge = RIDGES[place]
        if ridge not in found:
            path = _path(train, beside=beside, rank=rank, free=free, scale=scale, ridge=ridge)
            gains = torch.zeros(rank) if path is None else _gains(path, test, scale)
            left = math.inf if path is None else test.error(_joined(path, 0), scale) - gains.sum().item()
            found[ridge] = left, gains
        return found[ridge][0]

    place = RIDGES.index(start)
    for step in (-1, 1):
        while error(place + step) < error(place):
            place += step
    whole = train + test
    path = _path(whole, beside=beside, rank=rank, free=free, scale=scale, ridge=RIDGES[place])
    if path is None or not math.isfinite(error(place)):
        return None
    return LowRankFit(path.at(rank), path.down[:rank], path.up[:, :rank], RIDGES[place], found[RIDGES[place]][1])


def _path(moments: Moments, *, beside: int, rank: int, free: int, scale: Tensor, ridge: float) -> _Path | None:
    """Return the best directions of a fit with a given ridge."""
    own = len(moments.inputs) - beside
    system = moments.inputs.clone()
    # Each kind of inputs by its own mean square: they are of very different sizes.
    for part in (system.diagonal()[free:own], system.diagonal()[own:]):
        part += ridge * part.mean() if len(part) else 0.0
    factor, failed = torch.linalg.cholesky_ex(system[:own, :own])
    if failed.item():
        return None
    alone = torch.cholesky_solve(moments.across[:own], factor)
    explained = torch.cholesky_solve(system[:own, own:], factor)  # [own, beside]
    schur = system[own:, own:] - system[own:, :own] @ explained
    root, failed = torch.linalg.cholesky_ex((schur + schur.T) / 2)
    if failed.item():
        return None
    lacking = moments.across[own:] - explained.T @ moments.across[:own]  # [beside, outputs]
    weights = scale.to(lacking.dtype).sqrt()
    # L^T B = L^-1 (S B), and S B is what is left to explain.
    u, s, vh = torch.linalg.svd(
        torch.linalg.solve_triangular(root, lacking, upper=False) * weights, full_matrices=False
    )
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    share = s.sqrt()  # each factor takes a part, as of very unequal ones one would learn much faster
    down = torch.linalg.solve_triangular(root.T, u * share, upper=True).T
    inverse = torch.where(weights > 0, 1 / weights, torch.zeros_like(weights))
    return _Path(alone, down, (share[:, None] * vh).T * inverse[:, None], explained @ down.T)


def _joined(path: _Path, rank: int) -> Tensor:
    """Return the coefficients of all inputs."""
    return torch.cat([path.at(rank), path.down[:rank].T @ path.up[:, :rank].T])


def _gains(path: _Path, test: Moments, scale: Tensor) -> Tensor:
    """Return by how much each direction lowers the error on other samples."""
    # One direction changes the solution by an outer product z u^T, and the error by that much of a quadratic form.
    solution = _joined(path, 0)
    seen = test.inputs @ solution  # [inputs, outputs]
    z = torch.cat([-path.yielding, path.down.T])  # [inputs, rank]
    gains = []
    for i in range(z.shape[1]):
        u, through = path.up[:, i] * scale, test.inputs @ z[:, i]
        gains.append(2 * (z[:, i] @ (test.across - seen)) @ u - (z[:, i] @ through) * (u @ path.up[:, i]))
        seen = seen + torch.outer(through, path.up[:, i])
    return torch.stack(gains)
