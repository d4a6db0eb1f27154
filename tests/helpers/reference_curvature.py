"""Slow and simple truths about second derivatives, written without importing hap_hf."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import product

import torch
from torch import Tensor


def dense_hessian(loss: Callable[[dict[str, Tensor]], Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the whole Hessian, entries of the tensors one after the other, by ``torch.func.hessian``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.func itself calls torch.jit.script
        warnings.simplefilter("ignore", DeprecationWarning)
        blocks = torch.func.hessian(loss)({n: t.detach() for n, t in tensors.items()})
    rows = [
        torch.cat([blocks[a][b].reshape(tensors[a].numel(), tensors[b].numel()) for b in tensors], dim=1)
        for a in tensors
    ]
    return torch.cat(rows)


def linear_regression_hessian(x: Tensor, outputs: int) -> Tensor:
    """Return the Hessian of mean((x w^T - y)^2) for ``w`` of shape [outputs, inputs], row-major."""
    return torch.kron(torch.eye(outputs, dtype=x.dtype), 2 * x.T @ x / (len(x) * outputs))


def softmax_regression_hessian(x: Tensor, w: Tensor) -> Tensor:
    """Return the Hessian of the mean cross entropy of logits x w^T, the mean of (diag(p) - p p^T) kron x x^T."""
    terms = [
        torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(row, row))
        for row, p in zip(x, (x @ w.T).softmax(-1), strict=True)
    ]
    return torch.stack(terms).mean(0)


def hadamard(order: int) -> Tensor:
    """Return Sylvester's matrix of signs with orthogonal columns; ``order`` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def split_like(vector: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut a long vector into the shapes of ``tensors``."""
    parts = vector[: sum(t.numel() for t in tensors.values())].split([t.numel() for t in tensors.values()])
    return {n: p.reshape(t.shape).to(t) for (n, t), p in zip(tensors.items(), parts, strict=True)}


def every_sign_vector(length: int) -> Iterator[Tensor]:
    """Yield all 2^length sign vectors."""
    for signs in product((-1.0, 1.0), repeat=length):
        yield torch.tensor(signs, dtype=torch.float64)


def difference_product(
    loss: Callable[[], Tensor], tensors: Mapping[str, Tensor], vector: Mapping[str, Tensor], step: float = 1e-5
) -> dict[str, Tensor]:
    """Return H v by central differences of plain gradients: nothing is differentiated twice."""

    def gradient(sign: int) -> tuple[Tensor, ...]:
        with torch.no_grad():
            for n, t in tensors.items():
                t.add_(sign * step * vector[n])
        try:
            return torch.autograd.grad(loss(), list(tensors.values()))
        finally:
            with torch.no_grad():
                for n, t in tensors.items():
                    t.sub_(sign * step * vector[n])

    return {n: (a - b) / (2 * step) for n, a, b in zip(tensors, gradient(1), gradient(-1), strict=True)}
