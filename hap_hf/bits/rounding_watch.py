"""What rounding the weights of layers changes at their outputs, and its products with the gradients there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hap_hf.curvature.layers import NotPerSampleError
from hap_hf.layers.grid import round_weight
from hap_hf.layers.quantized import channel_dim, product_of, weight_names


@dataclass
class _Call:
    """One call of a layer: its output in the graph, and what rounding to each number of bits changes there."""

    place: int
    output: Tensor
    changes: list[Tensor]


class RoundingWatch:
    """What rounding the weights of some layers would change at their outputs.

    Args:
        layers: The layers by name.
        bits: Numbers of bits.
    """

    def __init__(self, layers: Mapping[str, nn.Module], bits: Sequence[int]) -> None:
        self.layers, self.bits = layers, bits
        self.calls: list[_Call] = []

    def recording(self) -> "_Recording":
        """Record the calls inside the block."""
        self.calls = []
        return _Recording(self)

    def record(self, place: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Keep what is needed of one call."""
        x = args[0] if args else next(iter(kwargs.values()))
        names = weight_names(module)
        own = {name: module.get_parameter(name).detach() for name in names}
        with torch.no_grad():
            exact = _output(module, x, own)
            changes = []
            for b in self.bits:
                rounded = {name: round_weight(w, b, channel_dim(module, name)) for name, w in own.items()}
                changes.append(_output(module, x, rounded) - exact)
        self.calls.append(_Call(place, output, changes))

    def products(self, targets: Sequence[Tensor], starts: Sequence[Tensor], num_samples: int) -> Tensor:
        """Return the products of gradients and changes, ``[samples, layers * bits]``, float64.

        Args:
            targets: Where a backward pass starts.
            starts: With what.
            num_samples: Number of samples.

        Returns:
            The products, those of all calls of a layer added up.

        Raises:
            NotPerSampleError: If an output does not have as many rows for each sample.
        """
        outputs = [call.output for call in self.calls]
        gradients = torch.autograd.grad(targets, outputs, starts, retain_graph=True, allow_unused=True)
        result = torch.zeros(num_samples, len(self.layers) * len(self.bits), dtype=torch.float64)
        for call, gradient in zip(self.calls, gradients, strict=True):
            if gradient is None:
                continue
            if gradient.shape[0] % num_samples:
                raise NotPerSampleError(f"an output of shape {list(gradient.shape)} for {num_samples} samples")
            rows = gradient.double().reshape(num_samples, -1)
            for j, change in enumerate(call.changes):
                column = call.place * len(self.bits) + j
                result[:, column] += (rows * change.double().reshape(num_samples, -1)).sum(1).cpu()
        return result


class _Recording:
    """Hooks on the layers of a watch, for as long as a block lasts."""

    def __init__(self, watch: RoundingWatch) -> None:
        self.watch = watch

    def __enter__(self) -> None:
        self.handles = [
            layer.register_forward_hook(partial(self.watch.record, place), with_kwargs=True)
            for place, layer in enumerate(self.watch.layers.values())
        ]

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()


def _output(module: nn.Module, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    if isinstance(module, nn.Embedding):
        return functional.embedding(x, weights["weight"], module.padding_idx)
    return product_of(module, x, weights)
