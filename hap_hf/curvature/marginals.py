"""Statistics of per-sample gradients, summed over all dimensions of a parameter but one."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hap_hf.curvature.hvp import accumulation_dtype

Statistic = Callable[[Tensor, Tensor], Tensor]
"""What is summed, of gradients ``[samples, *shape]`` and their parameter: :func:`squared` or :func:`times_weights`."""

_WORKSPACE = 64 * 2**20


def squared(gradients: Tensor, parameter: Tensor) -> Tensor:
    """Return the squares of per-sample gradients.

    Args:
        gradients: Gradient of each sample, ``[samples, *shape]``.
        parameter: The parameter, ``[*shape]``.

    Returns:
        The squares, ``[samples, *shape]``.
    """
    return gradients.square()


def times_weights(gradients: Tensor, parameter: Tensor) -> Tensor:
    """Return per-sample gradients times the weights.

    Args:
        gradients: Gradient of each sample, ``[samples, *shape]``.
        parameter: The parameter, ``[*shape]``.

    Returns:
        The products, ``[samples, *shape]``.
    """
    return gradients * parameter.detach().to(gradients.dtype)


def marginals(gradients: Tensor, parameter: Tensor, dims: Collection[int], statistic: Statistic) -> dict[int, Tensor]:
    """Return the sums of a statistic over all dimensions of a parameter but one.

    Args:
        gradients: Gradient of each sample, ``[samples, *shape]``.
        parameter: The parameter, ``[*shape]``.
        dims: The dimensions to keep, one at a time.
        statistic: What to sum.

    Returns:
        The sums by dimension, ``[samples, shape[dim]]``.
    """
    values = statistic(gradients, parameter)
    # [samples, shape[d]]; dimension d of the parameter comes behind that of the samples
    return {d: values.movedim(d + 1, 1).flatten(2).sum(2) if values.dim() > 2 else values for d in dims}


def chunks(num_samples: int, bytes_per_sample: int) -> Iterator[slice]:
    """Yield slices of samples that need 64 MiB of temporary memory, or of one sample where that needs more.

    Args:
        num_samples: Number of samples.
        bytes_per_sample: What one of them needs.

    Yields:
        The slices, in order.
    """
    size = max(1, _WORKSPACE // max(bytes_per_sample, 1))
    for start in range(0, num_samples, size):
        yield slice(start, min(start + size, num_samples))


Marginals = dict[tuple[str, int], Tensor]
"""A statistic of each sample's gradient, by the name of the weight and one of its dimensions, ``[samples, size]``."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of the gradients of samples.

    Args:
        tensors: The weights, by name.
        dims: Dimensions of each weight along which sums are asked for, by name.
        statistic: What is summed along all the other dimensions.
    """

    tensors: Mapping[str, Tensor]
    dims: Mapping[str, Collection[int]]
    statistic: Statistic

    def of_gradients(self, name: str, gradients: Tensor) -> Marginals:
        """Return what is asked for, from the gradients of one weight written out.

        Args:
            name: Name of the weight.
            gradients: Its gradient for each sample, ``[samples, *shape]``.

        Returns:
            The sums.
        """
        found = marginals(gradients, self.tensors[name], self.dims[name], self.statistic)
        return {(name, d): x for d, x in found.items()}

    def zeros(self, num_samples: int) -> Marginals:
        """Return what is asked for where nothing depends on the weights.

        Args:
            num_samples: Number of samples.

        Returns:
            Zeros.
        """
        return {
            (name, d): torch.zeros(num_samples, t.shape[d], dtype=accumulation_dtype(t.dtype), device=t.device)
            for name, t in self.tensors.items()
            for d in self.dims[name]
        }
