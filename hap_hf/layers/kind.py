"""What is asked of a layer that multiplies by a weight, and the answers of an ordinary linear one.

A kind of layer is one file and a registration: a class derived from :class:`LayerKind` (most often from the one of the
layer that it resembles) answers where a layer keeps its inputs and outputs, how its size attributes follow its weight,
and what an implant in it would be. Surgery, discovery, compensation and per-sample gradients ask it and no table of
their own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from hap_hf.host import own_parameters
from hap_hf.layers.implant_linear import ImplantLinear, factor_rows


@dataclass(frozen=True)
class Segment:
    """Consecutive features of a layer and where one of its tensors holds them.

    Args:
        tensor: Name of the tensor within the module.
        dim: Dimension along which the features lie.
        first_feature: First feature of the run.
        size: Number of features.
        first_index: Index of the first feature along ``dim``.
    """

    tensor: str
    dim: int
    first_feature: int
    size: int
    first_index: int


class LayerKind:
    """A layer that computes ``x W^T + b``, as ``nn.Linear`` does; the base of all other kinds.

    Attributes:
        spatial_dims: Over how many dimensions a kernel slides; 0 for layers without one.
        has_implant: Whether the layer is one with an implant.
        reads: Names of the weights that read the inputs, ``weight`` first.
        makes: Names of the weights that make the outputs, ``weight`` first.
        fixed: Whether the weight that acts is the parameter itself, and not made of it in every forward pass.
    """

    spatial_dims: ClassVar[int] = 0
    has_implant: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("weight",)
    makes: ClassVar[tuple[str, ...]] = ("weight",)
    fixed: ClassVar[bool] = True
    size_names: ClassVar[tuple[str, str]] = ("in_features", "out_features")

    def num_groups(self, module: nn.Module) -> int:
        """Return the number of groups of a convolution, 0 for everything that is no convolution."""
        return 0

    def output_dim(self, module: nn.Module) -> int:
        """Return the dimension of ``weight`` along which the outputs lie, 0 or 1."""
        return 0

    def outputs(self, module: nn.Module) -> list[Segment]:
        """Return where the output features are stored: segments of the weights and the bias."""
        size = module.get_parameter("weight").shape[self.output_dim(module)]
        bias = [Segment("bias", 0, 0, size, 0)] if module.bias is not None else []
        return [Segment("weight", self.output_dim(module), 0, size, 0), *bias]

    def inputs(self, module: nn.Module) -> list[Segment]:
        """Return where the input features are stored: segments of the weights."""
        dim = 1 - self.output_dim(module)
        return [Segment("weight", dim, 0, module.get_parameter("weight").shape[dim], 0)]

    def sync_sizes_(self, module: nn.Module) -> None:
        """Let the size attributes that the layer prints and checks follow its weight."""
        weight, out = module.get_parameter("weight"), self.output_dim(module)
        for name, size in zip(self.size_names, (weight.shape[1 - out], weight.shape[out]), strict=True):
            setattr(module, name, size)

    def plain(self, module: nn.Module) -> nn.Module:
        """Return the layer to put in the place of one whose weight cannot be cut; the same where it can."""
        return module

    def takes_constant(self, module: nn.Module) -> bool:
        """Return whether the bias can take up what some inputs are on average."""
        return isinstance(getattr(module, "bias", None), nn.Parameter)

    def rows(self, module: nn.Module, x: Tensor, output_size: Sequence[int]) -> Tensor | None:
        """Return what the weight matrix is multiplied with at each position, for per-sample gradients.

        Args:
            module: A convolution of this kind.
            x: Its input.
            output_size: Spatial size of its output.

        Returns:
            ``[rows of the batch, inputs * taps, positions]``; None where that is not known, so that the slow way is
            taken. Layers without a kernel are asked for nothing: their rows are the input.
        """
        return None

    def knows_rows(self, module: nn.Module) -> bool:
        """Return whether the gradient of a sample follows from the layer's input and the gradient of its output."""
        return True

    def takes_implant(self, module: nn.Module) -> bool:
        """Return whether some outputs can come through an implant, which multiplies as an ordinary layer does."""
        return self.knows_rows(module)

    def implanted(
        self, module: nn.Module, num_inputs: int, segments: Sequence[tuple[int, int]], rank: int
    ) -> nn.Module:
        """Return a layer with an implant in the place of ``module``, with its device, dtype and mode, without values.

        Args:
            module: The layer to be replaced, which stays as it is.
            num_inputs: Number of inputs that are left.
            segments: Number of kept and of implanted outputs in each segment.
            rank: Size of the bottleneck.

        Returns:
            The layer with an implant; its values are uninitialised memory.
        """
        old = module.get_parameter("weight")
        implant = ImplantLinear(
            num_inputs,
            segments,
            rank,
            bias=module.bias is not None,
            transposed=self.output_dim(module) == 1,
            device=old.device,
            dtype=old.dtype,
        )
        return implant.train(module.training)

    def takes_weights(self, module: nn.Module) -> bool:
        """Return whether :meth:`forward_with` computes the layer; where not, it is never quantized."""
        return False

    def forward_with(
        self, module: nn.Module, x: Tensor, weights: Mapping[str, Tensor], inner: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the layer's output with other weights in the place of its own.

        Args:
            module: A layer of this kind.
            x: Its input.
            weights: A value for each of its weights but the bias, by name, in the parameter's shape.
            inner: Applied to what lies between two weights that are multiplied one after the other.

        Returns:
            The output.

        Raises:
            NotImplementedError: Where :meth:`takes_weights` is False.
        """
        raise NotImplementedError(f"{type(self).__name__} does not compute a layer with other weights")

    def input_moment(self, module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        """Return the sum that an implant is fitted with, over the positions of one call.

        Args:
            module: A layer that takes an implant.
            x: Its input.

        Returns:
            For a linear layer ``sum x x^T``, ``[in_features, in_features]``, float64, and the number of positions.
        """
        rows = x.detach().flatten(0, -2)
        # In half precision, products of activations overflow and long sums lose small terms.
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return (rows.T @ rows).double(), rows.shape[0]

    def fitted(self, rows: Tensor, implant: nn.Module, moment: Tensor | None) -> Mapping[str, Tensor]:
        """Return the weights with which an implant best stands in for what it replaces.

        Args:
            rows: The weights it replaces, ``[implanted, in_features]``.
            implant: What :meth:`implanted` returned.
            moment: The mean of :meth:`input_moment`; None for white inputs.

        Returns:
            Values by the name of the implant's parameter.
        """
        up, down = factor_rows(rows, cast(ImplantLinear, implant).rank, moment)
        return {"implant_up": up, "implant_down": down}

    def approximated(self, rows: Tensor, rank: int, moment: Tensor) -> Tensor:
        """Return the weights that an implant in the place of ``rows`` amounts to.

        Args:
            rows: The weights it replaces, ``[implanted, in_features]``.
            rank: Its rank.
            moment: Second moment of what the rows are multiplied with, here ``[in_features, in_features]``.

        Returns:
            The weights, in the shape of ``rows``.
        """
        up, down = factor_rows(rows, rank, moment)
        return up @ down


Registered = Callable[[type[LayerKind]], type[LayerKind]]

# One object a kind, without state: whatever depends on a layer is asked with the layer.
_KINDS: dict[type[nn.Module] | str, LayerKind] = {}


def register_layer(*types: type[nn.Module] | str) -> Registered:
    """Make a kind of layer known: a decorator for a class derived from :class:`LayerKind`.

    Exact types count: a subclass may compute something else with its weight, as adapters and quantized layers do.

    Args:
        *types: Classes of modules, or ``"package.module.Class"`` for those of a library that is not imported here.

    Returns:
        The decorator.

    Example:
        >>> class Doubled(nn.Linear):
        ...     def forward(self, x): return 2 * super().forward(x)
        >>> @register_layer(Doubled)
        ... class DoubledKind(LayerKind):
        ...     def knows_rows(self, module): return False
        >>> kind_of(Doubled(2, 2)) is not None
        True
    """

    def register(kind: type[LayerKind]) -> type[LayerKind]:
        for each in types:
            _KINDS[each] = kind()
        return kind

    return register


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return what is known of the kind of a layer.

    Args:
        module: Any module.

    Returns:
        The kind, or None where its type is not registered, or its weight is made anew by a hook before each call, as
        ``torch.nn.utils.weight_norm`` does.
    """
    return kind_of_class(type(module)) if own_parameters(module).get("weight") is not None else None


def kind_of_class(own: Any) -> LayerKind | None:
    """Return what is known of the layers of a class.

    Args:
        own: A class of modules.

    Returns:
        The kind, or None where the class is not registered.
    """
    # A class given by name need not be imported to be recognised; where it is not, there is no layer of it either.
    found = _KINDS.get(own)
    return found if found is not None else _KINDS.get(f"{own.__module__}.{own.__qualname__}")
