"""What layers read, and the gradients there: products of weights and gradients without gradients of weights."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.nn import Module

from hap_hf.curvature.hvp import accumulation_dtype
from hap_hf.curvature.layers import NotPerSampleError
from hap_hf.curvature.marginals import Statistic, times_weights
from hap_hf.layers.kind import kind_of
from hap_hf.layers.projection import channel_dim, input_dim


@dataclass(frozen=True, eq=False)
class ReadInput:
    """The input of one call of a layer.

    Args:
        path: Name of the layer.
        x: The input, on a branch of the graph of its own.
        channels: The dimension of ``x`` along which its features or channels lie, counted from the last one.
    """

    path: str
    x: Tensor
    channels: int

    def weights(self, grad: Tensor) -> Tensor:
        """Return the squared norm of the gradient at each position, in the shape of ``x`` with one channel.

        Args:
            grad: Gradient of the input.

        Returns:
            The squares, in float32 (float64 for float64 inputs).
        """
        return position_weights(grad, self.channels)


def position_weights(grad: Tensor, channels: int) -> Tensor:
    """Return the squared norm of a gradient at each position.

    Args:
        grad: Gradient of what a layer reads.
        channels: The dimension of its features or channels.

    Returns:
        The squares in the shape of ``grad`` with one channel, in float32 (float64 for float64 gradients).
    """
    return grad.to(accumulation_dtype(grad.dtype)).square().sum(channels, keepdim=True)


def gradient_moment(grad: Tensor, channels: int) -> Tensor:
    """Return the sum of ``g g^T`` over the positions of a gradient.

    Args:
        grad: Gradient of what a layer reads.
        channels: The dimension of its features or channels.

    Returns:
        The moment, ``[channels, channels]``, in float32 (float64 for float64 gradients).
    """
    flat = grad.to(accumulation_dtype(grad.dtype)).movedim(channels, -1).flatten(0, -2)
    return flat.T @ flat


class InputListener(Protocol):
    """Is told what layers read, while gradients of samples are taken anyway."""

    @property
    def paths(self) -> Collection[str]:
        """Names of the layers whose inputs are wanted."""

    @property
    def gradients_at(self) -> Collection[str]:
        """Names of those of which the moments of the gradients are wanted, too."""

    def hear(
        self,
        index: int,
        num_samples: int,
        read: Sequence[ReadInput],
        weights: Sequence[Tensor],
        gradients: Mapping[str, Tensor],
    ) -> None:
        """Take the inputs of one batch.

        Args:
            index: Index of the batch.
            num_samples: Number of its samples.
            read: What was read, call by call.
            weights: For each the expected squared norm of the gradient at each position, as of
                :meth:`ReadInput.weights`.
            gradients: The expected :func:`gradient_moment` by name of the layer, where it is wanted and the loss was
                reached.
        """


def branch(x: Tensor) -> Tensor:
    """Return ``x`` as a branch of the graph of its own, whose gradient is that of one reader alone.

    Args:
        x: What a layer reads.

    Returns:
        A view of it, or a leaf where it has no graph.
    """
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def read_by_mask(
    module: Module, attributes: Mapping[str, str], dims: Mapping[str, Collection[int]], statistic: Statistic
) -> bool:
    """Return whether what is asked of the weights of a layer is the derivative of a mask on its input channels.

    Args:
        module: A module that owns some weights.
        attributes: Its attributes by the name of the weight.
        dims: Dimensions of each weight along which sums are asked for, by name.
        statistic: What is summed.

    Returns:
        Whether :class:`InputCall` knows the answer.
    """
    kind = kind_of(module)
    # Not where two weights read one input, each kernel reads only some channels, or the weight that acts is made of the
    # parameter: there the product at the input is another one.
    if statistic is not times_weights or kind is None or kind.has_implant or not kind.fixed:
        return False
    if kind.num_groups(module) > 1 or list(attributes.values()) != ["weight"]:
        return False
    return all(set(dims[name]) == {input_dim(module)} for name in attributes)


class InputCall:
    r"""A call of a layer that multiplies all its inputs with one weight, seen from its input.

    The output is linear in the weight and in the input. So for channel c, with the columns ``W_c`` that read it and its
    values ``x_c`` at the positions of a sample,

        <W_c, dL/dW_c> = sum_t x_tc dL/dx_tc,

    which is the derivative of L by a factor on the channel. No gradient of a weight is computed, and no patch of a
    convolution unfolded.

    Reference: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017,
    for products of activations and gradients.

    Args:
        module: A layer for which :func:`read_by_mask` holds.
        x: Its input on a branch of its own.

    Raises:
        NotPerSampleError: If the input has no dimension of samples.
    """

    reads_graph = True  # the branch is in the graph, also where what was read is not

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x = module, x
        self.channels = channel_dim(module)
        self.dim = input_dim(module)
        if x.dim() < 1 - self.channels:
            raise NotPerSampleError(f"a {type(module).__name__} was called with an input of shape {list(x.shape)}")

    @property
    def num_rows(self) -> int:
        """Size of the first dimension of the input."""
        return self.x.shape[0]

    def products(self, grad: Tensor, num_samples: int) -> Tensor:
        """Return the sums over each sample's positions.

        Args:
            grad: Gradient of the input.
            num_samples: Number of samples, each with as many consecutive rows.

        Returns:
            ``[num_samples, inputs]``, in float32 (float64 for float64 weights).
        """
        dtype = accumulation_dtype(self.module.get_parameter("weight").dtype)
        values = self.x.detach().to(dtype) * grad.to(dtype)
        values = values.movedim(self.channels, 1)  # [rows, inputs, ...]
        values = values.flatten(2).sum(2) if values.dim() > 2 else values
        return values.view(num_samples, -1, values.shape[1]).sum(1)
