"""Where the output of a layer ends up: the value of the residual stream behind it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hap_hf.host import BATCH_NORMS, TorchDispatchMode

_aten = torch.ops.aten
_SUMS = {_aten.add.Tensor, _aten.add_.Tensor}
_PRODUCTS = {_aten.mul.Tensor, _aten.mul_.Tensor}


@dataclass
class Way:
    """What has been done to the output of a layer so far: ``factor * output + something``, channel by channel.

    Args:
        tip: The tensor that it is now.
        channels: The dimension of the channels, counted from the last one.
        factor: Per channel, in a shape that broadcasts.
        steps: Number of operations behind it.
        shifts: Biases of batch norms that were passed, which can take up a constant, each with the factor behind it.
    """

    tip: Tensor
    channels: int
    factor: Tensor
    steps: int = 0
    shifts: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, output: Tensor, channels: int) -> "Way":
        """Return the way that begins at the output of a layer."""
        return cls(output, channels, torch.ones([1] * -channels, dtype=output.dtype, device=output.device))

    def follow(self, function: Any, args: tuple[Any, ...], out: Any) -> bool | None:
        """Follow the output through one operation that has it as an argument.

        Args:
            function: The operation.
            args: Its arguments.
            out: Its result.

        Returns:
            Whether something else was added that has a value at each position, as a residual stream has; None where
            the way ends, as the operation is none of these.
        """
        adds = function in _SUMS
        result = out[0] if isinstance(out, (tuple, list)) else out
        if adds or function in _PRODUCTS:
            other = args[1] if args[0] is self.tip else args[0]
            if other is self.tip or (isinstance(other, Tensor) and not adds and not self._per_channel(other)):
                return None
            self.factor = self.factor if adds else self.factor * other
        elif function in BATCH_NORMS:
            place = BATCH_NORMS[function]
            weight, bias, _, variance = args[1:5]
            if args[0] is not self.tip or variance is None or (place is not None and args[place]):
                return None
            scale = (variance + args[-1]).rsqrt() * (1.0 if weight is None else weight)
            self.factor = self.factor * scale.view(-1, *[1] * (-1 - self.channels))
            if isinstance(bias, Tensor):
                self.shifts.append((bias, self.factor.flatten()))
        else:
            return None
        if not isinstance(result, Tensor) or result.shape != self.tip.shape:
            return None
        met = adds and isinstance(other, Tensor) and other.shape == result.shape
        self.tip, self.steps = result, self.steps + 1
        return met

    def _per_channel(self, other: Tensor) -> bool:
        """Return whether a factor has one value for each channel, or one for all."""
        sizes = list(other.shape)
        own = self.channels + len(sizes)
        return all(size == 1 for d, size in enumerate(sizes) if d != own)


class Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows one output at a time through what is computed from it.

    Args:
        met: Called with the way whenever a residual stream was added to the output.
    """

    def __init__(self, met: Callable[[Way], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._met = met
        self.way: Way | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and see whether the output of the layer took part."""
        out = func(*args, **(kwargs or {}))
        way = self.way
        if way is not None and any(a is way.tip for a in args):
            # A scaled sum, `add(x, y, alpha=2)`, is rare enough to end the way.
            met = None if kwargs else way.follow(func, args, out)
            if met is None:
                self.way = None
            elif met:
                self._met(way)
        return out
