"""Per-sample gradients of layers that multiply by a matrix, from their input and the gradient of their output."""

from collections.abc import Collection, Sequence
from math import prod

import torch
from torch import Tensor, nn

from hap_hf.curvature.hvp import accumulation_dtype
from hap_hf.curvature.marginals import Statistic, chunks, marginals, squared
from hap_hf.layers.kind import kind_of
from hap_hf.layers.projection import known


class NotPerSampleError(Exception):
    """A call of a layer cannot be split into samples. Caught inside the package, which knows a slower way."""


def multiplies_by_matrix(module: nn.Module) -> bool:
    """Return whether :class:`MatrixCall` knows ``module``.

    Args:
        module: Any module.

    Returns:
        Whether its kind says what its weight is multiplied with.
    """
    kind = kind_of(module)
    return kind is not None and kind.knows_rows(module)


class MatrixCall:
    r"""A call of a layer that multiplies its weight matrix with its input, or with patches of it.

    Let ``A`` ``[T, inputs]`` be what the matrix is multiplied with at the T positions of a sample, and ``G``
    ``[T, outputs]`` the gradients of the products. The sample's gradient is ``G^T A``; the squared norm of its row r is

        sum_i (G^T A)_ri^2 = g_r^T (A A^T) g_r

    with the Gram matrix of the inputs, ``[T, T]``. That takes ``T^2 (inputs + outputs)`` multiplications, the gradient
    itself ``T inputs outputs``; the cheaper way is taken. The inner product of the row with that of the weights is
    ``sum_t G_tr (A W^T)_tr``. For columns A and G change places.

    References: Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799, 2015, for one position;
    Rochette et al., "Efficient per-example gradient computations in convolutional neural networks", arXiv 1912.06015,
    2019; Dangel et al., "BackPACK: Packing more into backprop", ICLR 2020.

    Args:
        module: A layer that :func:`multiplies_by_matrix`.
        x: Its input, in which each sample has as many consecutive rows of the first dimension.

    Raises:
        NotPerSampleError: If the input has no dimension of samples.
    """

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x, self.reads_graph = module, x.detach(), x.requires_grad
        self.weight = module.get_parameter("weight")
        self.kind = known(module)
        self.groups = max(self.kind.num_groups(module), 1)
        self.output_dim = self.kind.output_dim(module)
        spatial = self.kind.spatial_dims
        if x.dim() != 2 + spatial if spatial else x.dim() < 2:
            raise NotPerSampleError(f"a {type(module).__name__} was called with an input of shape {list(x.shape)}")

    @property
    def num_rows(self) -> int:
        """Size of the first dimension of the input."""
        return self.x.shape[0]

    def sample_gradients(
        self, attributes: Sequence[str], grad: Tensor, num_samples: int, samples: slice
    ) -> list[Tensor]:
        """Return the gradient of each of some samples.

        Args:
            attributes: Names of parameters of the module.
            grad: Gradient of the layer's output.
            num_samples: Number of samples in it.
            samples: Which of them.

        Returns:
            For each parameter the gradients, ``[samples, *shape]``, in float32 (float64 for float64 weights).
        """
        A, G = self._matrices(grad, num_samples, samples)
        found = []
        for attribute in attributes:
            if attribute == "bias":
                found.append(G.sum(2).flatten(1))  # [samples, groups * outputs]
            else:
                gradient = G.mT @ A  # [samples, groups, outputs, inputs]
                found.append(gradient[:, 0].mT if self.output_dim else gradient.view(-1, *self.weight.shape))
        return found

    def marginals(
        self, attribute: str, dims: Collection[int], grad: Tensor, num_samples: int, statistic: Statistic
    ) -> dict[int, Tensor]:
        """Return the sums of a statistic of each sample's gradient over all dimensions of a parameter but one.

        Args:
            attribute: Name of a parameter of the module.
            dims: The dimensions to keep, one at a time.
            grad: Gradient of the layer's output.
            num_samples: Number of samples in it.
            statistic: What to sum.

        Returns:
            The sums by dimension, ``[num_samples, shape[dim]]``.
        """
        parameter = self.module.get_parameter(attribute)
        outputs, inputs = self._matrix_shape
        positions = grad.numel() // max(num_samples * self.groups * outputs, 1)
        # Multiplications of both ways, see the class. A dimension of taps has no closed form.
        by_gram = len(dims) * positions * (inputs + outputs) < inputs * outputs
        closed = attribute == "weight" and set(dims) <= {0, 1} and (by_gram or statistic is not squared)
        # What a sample takes: A and G, as much for products of their shapes, and a Gram matrix or a gradient.
        largest = min(positions**2, inputs * outputs) if closed else inputs * outputs
        numbers = self.groups * (2 * positions * (inputs + outputs) + largest)
        parts = []
        for samples in chunks(num_samples, numbers * accumulation_dtype(parameter.dtype).itemsize):
            if closed:
                parts.append(self._closed(dims, *self._matrices(grad, num_samples, samples), statistic))
            else:
                (gradients,) = self.sample_gradients([attribute], grad, num_samples, samples)
                parts.append(marginals(gradients, parameter, dims, statistic))
        return {d: torch.cat([part[d] for part in parts]) for d in dims}

    def _closed(self, dims: Collection[int], A: Tensor, G: Tensor, statistic: Statistic) -> dict[int, Tensor]:
        """Return marginals of the weight's gradient without the gradient; see the class."""
        result = {}
        for dim in dims:
            of_rows = dim == self.output_dim
            # Rows of the gradient go with outputs, columns with inputs; everything else is symmetric in A and G.
            one, other = (G, A) if of_rows else (A, G)
            if statistic is squared:
                # A sum of squares, which rounding may leave a little below zero.
                values = (one * (other @ other.mT @ one)).sum(2).clamp_min(0)
            else:
                matrix = self.weight.detach().to(A.dtype)
                matrix = matrix.T if self.output_dim else matrix.reshape(self.groups, *self._matrix_shape)
                values = (one * (other @ (matrix.mT if of_rows else matrix))).sum(2)
            # [samples, groups, outputs] or [samples, groups, inputs], the inputs of a convolution with its taps
            taps = 1 if of_rows else prod(self.weight.shape[2:])
            values = values.view(*values.shape[:2], -1, taps).sum(3)
            # Each group has outputs of its own, but the weight counts inputs from zero in every group.
            result[dim] = values.flatten(1) if of_rows else values.sum(1)
        return result

    @property
    def _matrix_shape(self) -> tuple[int, int]:
        """Number of outputs and of inputs, with taps, of one group of the layer."""
        outputs = self.weight.shape[self.output_dim] // self.groups
        return outputs, self.weight.numel() // max(self.groups * outputs, 1)

    def _matrices(self, grad: Tensor, num_samples: int, samples: slice) -> tuple[Tensor, Tensor]:
        """Return A, ``[samples, groups, T, inputs]``, and G, ``[samples, groups, T, outputs]``, of some samples."""
        rows = self.num_rows // num_samples
        chosen = slice(samples.start * rows, samples.stop * rows)
        dtype = accumulation_dtype(self.weight.dtype)
        x, grad = self.x[chosen].to(grad.device, dtype), grad[chosen].to(dtype)
        count = samples.stop - samples.start
        if not self.kind.spatial_dims:
            return x.reshape(count, 1, -1, x.shape[-1]), grad.reshape(count, 1, -1, grad.shape[-1])
        patches = self.kind.rows(self.module, x, grad.shape[2:])  # [rows of the samples, channels * taps, T of a row]
        if patches is None:
            raise NotPerSampleError(f"what a {type(self.module).__name__} multiplies its weight with is not known")
        return self._by_sample(patches, count), self._by_sample(grad.flatten(2), count)

    def _by_sample(self, columns: Tensor, count: int) -> Tensor:
        """Return ``[rows, groups * features, positions]`` as ``[samples, groups, T, features]``."""
        split = columns.reshape(count, columns.shape[0] // count, self.groups, -1, columns.shape[2])
        # A sample's T positions are those of all its rows, as the crops of an image or the choices of a question.
        return split.permute(0, 2, 1, 4, 3).flatten(2, 3)
