"""Slow and simple truths about Gauss-Newton matrices and per-sample gradients, written without importing hap_hf."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def gradient(scalar: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a plain gradient by name, zero where there is none."""
    found = torch.autograd.grad(scalar, list(tensors.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(tensors, found, strict=True))


def jacobian(outputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the Jacobian of all outputs, [outputs, weights], entries of the tensors one after the other."""
    rows = [gradient(z, tensors) for z in outputs.flatten()]
    return torch.stack([torch.cat([row[n].flatten() for n in tensors]) for row in rows])


def dense_ggn(
    outputs: Sequence[Callable[[], Sequence[Tensor]]],
    losses: Sequence[Callable[..., Tensor]],
    tensors: Mapping[str, Tensor],
    num_terms: int,
) -> Tensor:
    """Return 1/N sum_n J_n^T H_n J_n over samples, H_n by differentiating the sample's summed loss twice.

    ``outputs[n]`` computes the output tensors of sample n, and ``losses[n]`` the sum of its loss terms from them.
    """
    total = torch.zeros(())
    for compute, loss in zip(outputs, losses, strict=True):
        z = compute()
        sizes, shapes = [t.numel() for t in z], [t.shape for t in z]

        def of_vector(v: Tensor, loss=loss, sizes=sizes, shapes=shapes) -> Tensor:
            return loss(*(part.view(shape) for part, shape in zip(v.split(sizes), shapes, strict=True)))

        flat = torch.cat([t.flatten() for t in z])
        h = torch.autograd.functional.hessian(of_vector, flat.detach())
        j = jacobian(flat, tensors)
        total = total + j.T @ h @ j / num_terms
    return total


def along_each_dimension(values: Mapping[str, Tensor]) -> dict[tuple[str, int], Tensor]:
    """Return the sums of each tensor along all dimensions but one, for every one."""
    return {
        (name, dim): torch.stack([part.sum() for part in t.unbind(dim)])
        for name, t in values.items()
        for dim in range(t.dim())
    }
