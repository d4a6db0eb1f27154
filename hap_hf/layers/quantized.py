"""Layers whose weights and inputs are rounded in every forward pass, as the integers of an export will be.

A layer becomes one by a change of its class: its parameters stay the same objects under the same names, so that
optimizers, schedulers and state dicts go on. Ranges of activations are buffers beside them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hap_hf.layers.grid import (
    activation_grid,
    round_activation,
    round_weight,
)
from hap_hf.layers.kind import kind_of, kind_of_class
from hap_hf.names.bits import LayerBits, Rounding

INPUT, INNER = "input", "inner"
_OBSERVED = "observed"


class Quantized(nn.Module):
    """What all quantized layers have in common; the class of each is derived from this one and from its own.

    Attributes:
        float_class: What the layer is when it is not quantized.
        bits: Bits of its weights and of its inputs.
        rounding: How its inputs are rounded.
        rounds: Whether it rounds; where not, it computes what it did before.
        observed: Smallest and largest value of each input since they were last taken, ``[2]``; None where nobody looks.
    """

    float_class: ClassVar[type[nn.Module]]
    bits: LayerBits
    rounding: Rounding
    rounds: bool
    observed: dict[str, Tensor] | None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, with rounded weights and a rounded input.

        Args:
            *args: The input.
            **kwargs: The input, where the model passes it by name.

        Returns:
            The output.
        """
        x = args[0] if args else next(iter(kwargs.values()))
        if issubclass(self.float_class, nn.Embedding):
            return self._embedded(x)
        weights = {name: self.rounded_weight(name) for name in weight_names(self)}
        inner = partial(self.rounded_input, INNER)
        return product_of(self, self.rounded_input(INPUT, x), weights, inner)

    def _embedded(self, ids: Tensor) -> Tensor:
        """Return the rounded rows of a table: only those are rounded that are read."""
        own = cast(Any, self)
        codes = getattr(self, codes_name("weight"), None)
        if codes is not None or not self.rounds:
            return functional.embedding(ids, self.rounded_weight("weight"), own.padding_idx)
        rows = functional.embedding(ids, own.weight, own.padding_idx)
        return round_weight(rows.reshape(-1, rows.shape[-1]), self.bits.weight, 0).view(rows.shape)

    def rounded_weight(self, name: str) -> Tensor:
        """Return a weight as the layer multiplies by it.

        Args:
            name: Name of the parameter.

        Returns:
            The rounded weight.
        """
        codes = getattr(self, codes_name(name), None)
        if codes is not None:  # while it is exported
            return cast(Tensor, codes())
        weight = self.get_parameter(name)
        return round_weight(weight, self.bits.weight, channel_dim(self, name)) if self.rounds else weight

    def rounded_input(self, which: str, x: Tensor) -> Tensor:
        """Return an input as the layer multiplies it.

        Args:
            which: The layer's input, or what lies between the two factors of its implant.
            x: The values.

        Returns:
            The rounded values.
        """
        # Of a training, what an evaluation in between lets through says nothing.
        if self.observed is not None and (self.training or not self.rounds):
            self._observe(which, x.detach())
        if not self.rounds or self.bits.activation is None:
            return x
        codes = getattr(self, codes_name(which), None)
        if codes is not None:
            return cast(Tensor, codes(x))
        if self.rounding is Rounding.PER_TOKEN:
            return round_by_itself(self.float_class, x, self.bits.activation, self.rounding)
        low, high = self.get_buffer(range_name(which))
        symmetric = self.rounding is Rounding.SYMMETRIC
        return round_activation(x, activation_grid(low, high, self.bits.activation, symmetric=symmetric))

    def _observe(self, which: str, x: Tensor) -> None:
        """Let the observed range hold ``x``. A value that is not finite says nothing of the range, and is left out."""
        if self.observed is None or not x.numel():
            return
        low, high = x.float().aminmax()
        seen = self.observed.get(which)
        before = torch.stack([low, high]) if seen is None else seen
        now = torch.stack([torch.minimum(before[0], low), torch.maximum(before[1], high)])
        self.observed[which] = torch.where(now.isfinite(), now, before)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return how copies and pickles are made: the class exists in the process that made it alone."""
        return _blank, (self.float_class,), dict(vars(self))


def round_by_itself(float_class: type[nn.Module], x: Tensor, bits: int, rounding: Rounding) -> Tensor:
    """Return an input rounded with the ranges that it has itself.

    Args:
        float_class: What the layer is when it is not quantized.
        x: Its input.
        bits: Bits of an activation, 2 to 8.
        rounding: How it is rounded; per token, each has a range of its own.

    Returns:
        The rounded values.
    """
    rows = x.reshape(1, -1)
    if rounding is Rounding.PER_TOKEN:
        # A row is a token of a text, or an image with all its channels.
        kind = kind_of_class(float_class)
        rows = x.flatten(0, -2) if kind is None or not kind.spatial_dims else x.flatten(1)
    low, high = rows.detach().aminmax(dim=1)
    grid = activation_grid(low, high, bits, symmetric=rounding is Rounding.SYMMETRIC)
    return round_activation(rows, grid).view(x.shape)


def _blank(float_class: type[nn.Module]) -> nn.Module:
    cls = class_of(float_class)
    return cls.__new__(cls)


_CLASSES: dict[Any, type[Quantized]] = {}


def class_of(float_class: type[nn.Module]) -> type[Quantized]:
    """Return the class of the quantized layers that are made of layers of a class."""
    if float_class not in _CLASSES:
        _CLASSES[float_class] = _derived(float_class)
    return _CLASSES[float_class]


def _derived(float_class: type[nn.Module]) -> type[Quantized]:
    return type(f"Quantized{float_class.__name__}", (Quantized, float_class), {"float_class": float_class})


def codes_name(name: str) -> str:
    """Return the attribute that holds the integers of a weight or an input while the layer is exported."""
    return f"{name}_codes"


def range_name(which: str) -> str:
    """Return the name of the buffer that holds the range of an input, ``[2]``: smallest and largest value."""
    return f"{which}_range"


def can_be_quantized(module: nn.Module) -> bool:
    """Return whether a layer can become a quantized one.

    Args:
        module: Any module.

    Returns:
        True for layers whose kind computes them with other weights, and for plain embeddings.
    """
    if type(module) is nn.Embedding:
        return module.max_norm is None and not module.sparse
    kind = kind_of(module)
    return kind is not None and kind.takes_weights(module)


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights of a layer that can be quantized, quantized or not; ``weight`` first."""
    kind = kind_of_class(getattr(module, "float_class", type(module)))
    return ("weight",) if kind is None else tuple(dict.fromkeys(kind.reads + kind.makes))


def channel_dim(module: nn.Module, name: str) -> int:
    """Return the dimension of a weight that has a scale for each of its entries.

    Args:
        module: A layer that can be quantized, quantized or not.
        name: Name of the weight.

    Returns:
        That of the outputs; of an embedding that of the rows.
    """
    kind = kind_of_class(getattr(module, "float_class", type(module)))
    return kind.output_dim(module) if kind is not None and name == "weight" else 0


def product_of(
    module: nn.Module, x: Tensor, weights: Mapping[str, Tensor], inner: Callable[[Tensor], Tensor] = lambda h: h
) -> Tensor:
    """Return the output of a layer that is no embedding with some weights in the place of its own.

    Args:
        module: A layer that can be quantized, quantized or not.
        x: Its input.
        weights: The weights by name.
        inner: Applied to what lies between the two factors of an implant.

    Returns:
        The output.
    """
    kind = kind_of_class(getattr(module, "float_class", type(module)))
    assert kind is not None
    return kind.forward_with(module, x, weights, inner)


def inputs_of(module: nn.Module) -> tuple[str, ...]:
    """Return the inputs of a layer that are rounded: none for an embedding, two where an implant has two factors."""
    if issubclass(getattr(module, "float_class", type(module)), nn.Embedding):
        return ()
    return (INPUT, INNER) if len(weight_names(module)) > 2 else (INPUT,)


def quantize_layer_(module: nn.Module, bits: LayerBits, rounding: Rounding) -> Quantized:
    """Make a layer a quantized one, in place; its ranges are empty.

    Args:
        module: A layer that :func:`can_be_quantized`.
        bits: Bits of its weights and its input.
        rounding: How its input is rounded.

    Returns:
        The same module.
    """
    module.__class__ = class_of(type(module))
    own = cast(Quantized, module)
    own.bits, own.rounding, own.rounds, own.observed = bits, rounding, True, None
    if bits.activation is not None and rounding is not Rounding.PER_TOKEN:
        weight = module.get_parameter("weight")
        for which in inputs_of(module):
            own.register_buffer(range_name(which), torch.zeros(2, device=weight.device, dtype=torch.float32))
    return own


def unquantize_layer_(module: Quantized) -> None:
    """Make a quantized layer what it was."""
    for which in inputs_of(module):
        if hasattr(module, range_name(which)):
            delattr(module, range_name(which))
    for name in ("bits", "rounding", "rounds", _OBSERVED):
        delattr(module, name)
    module.__class__ = module.float_class  # type: ignore[assignment]
