"""What rounding weights or inputs of layers changes at their outputs, and its products with the gradients there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hap_hf.curvature.layers import NotPerSampleError
from hap_hf.host import times_changed
from hap_hf.layers.grid import round_weight
from hap_hf.layers.quantized import channel_dim, inputs_of, product_of, round_by_itself, weight_names
from hap_hf.names.bits import Rounding


@dataclass
class _Call:
    """One call of a layer: its input, its output in the graph, and what each rounding changes there."""

    place: int
    read: Tensor
    output: Tensor
    changes: list[Tensor]

    @property
    def key(self) -> tuple[Any, ...]:
        """What calls that read the same values have in common; other tensors may use the memory only afterwards."""
        return self.read.data_ptr(), self.read.shape, self.read.stride(), times_changed(self.read)


class RoundingWatch:
    """What rounding the weights of some layers, or their inputs, would change at their outputs.

    Args:
        layers: The layers by name.
        bits: Numbers of bits.
        rounding: How inputs are rounded; None where they are not looked at.
    """

    def __init__(self, layers: Mapping[str, nn.Module], bits: Sequence[int], rounding: Rounding | None = None) -> None:
        self.layers, self.bits, self.rounding = layers, bits, rounding
        self.calls: list[_Call] = []
        self.num_samples = 1

    @property
    def columns(self) -> int:
        """Number of changes of a layer: one for each number of bits of its weights, then those of its inputs."""
        return len(self.bits) * (1 if self.rounding is None else 2)

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
            if self.rounding is not None and inputs_of(module):
                changes += [self._with_rounded_input(module, x, own, b) - exact for b in self.bits]
        self.calls.append(_Call(place, x, output, changes))

    def _with_rounded_input(self, module: nn.Module, x: Tensor, weights: Mapping[str, Tensor], bits: int) -> Tensor:
        """Return the output for rounded values, also between the factors of an implant."""
        assert self.rounding is not None
        rounded = partial(round_by_itself, type(module), bits=bits, rounding=self.rounding)
        return product_of(module, rounded(x), weights, rounded)

    def of_weights(self, products: Tensor) -> Tensor:
        """Return the products of rounded weights alone: the range of an input is that of its batch."""
        return products.view(len(products), -1, self.columns)[..., : len(self.bits)]

    def inputs(self) -> tuple[dict[str, int], list[list[str]]]:
        """Return what the layers of the last recording have read.

        Returns:
            The number of values for a sample by layer, and the layers that read the same.
        """
        names = list(self.layers)
        sizes: dict[str, int] = {}
        readers: dict[tuple[Any, ...], list[str]] = {}
        for call in self.calls:
            name = names[call.place]
            if inputs_of(self.layers[name]):
                sizes[name] = sizes.get(name, 0) + call.read.numel() // self.num_samples
                if name not in readers.setdefault(call.key, []):
                    readers[call.key].append(name)
        return sizes, [group for group in readers.values() if len(group) > 1]

    def products(self, targets: Sequence[Tensor], starts: Sequence[Tensor], num_samples: int) -> Tensor:
        """Return the products of gradients and changes, ``[samples, layers * columns]``, float64.

        Args:
            targets: Where a backward pass starts.
            starts: With what.
            num_samples: Number of samples.

        Returns:
            The products, those of all calls of a layer added up.

        Raises:
            NotPerSampleError: If an output does not have as many rows for each sample.
        """
        self.num_samples = num_samples
        outputs = [call.output for call in self.calls]
        gradients = torch.autograd.grad(targets, outputs, starts, retain_graph=True, allow_unused=True)
        result = torch.zeros(num_samples, len(self.layers) * self.columns, dtype=torch.float64)
        for call, gradient in zip(self.calls, gradients, strict=True):
            if gradient is None:
                continue
            if gradient.shape[0] % num_samples:
                raise NotPerSampleError(f"an output of shape {list(gradient.shape)} for {num_samples} samples")
            rows = gradient.double().reshape(num_samples, -1)
            for j, change in enumerate(call.changes):
                column = call.place * self.columns + j
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
