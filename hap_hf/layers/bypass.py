"""A low-rank linear path beside a block: one implant for all of its units that went."""

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from hap_hf.host import call_hooks
from hap_hf.names.bypass import BYPASS


class _Handed:
    """What is under way from the first layer of a block to its last one; copies and files begin without."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


class Bypass(nn.Module):
    """Adds ``up(down(x))`` to the output of a block's last layer, where x is the input of its first one.

    What a block loses with its units is, for the most part, what it did to a few directions of its input, and much of
    that is linear. One path of rank k for the whole block costs ``k (inputs + outputs)`` parameters; implants that
    stand in for rows of the first layer would need the columns of the last one that read them as well.

    It is two ordinary layers. Hooks of the block's own layers take its input and add its output, so that these stay the
    layers that they are, and the model's code is left alone.

    Args:
        down: From the input to ``rank`` directions: a linear layer, or a 1 x 1 convolution with the block's stride.
        up: From these to the output.
    """

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down = down
        self.up = up
        self.handed = _Handed()

    @property
    def rank(self) -> int:
        """Number of directions."""
        return int(self.up.get_parameter("weight").shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the path alone."""
        out: Tensor = self.up(self.down(x))
        return out

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the input of the block: a hook before the call of its first layer."""
        # The directions and not the input, which would be kept alive.
        self.handed.value = self.down(args[0] if args else next(iter(kwargs.values())))

    def give(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add to the output of the block: a hook behind the call of its last layer.

        Args:
            module: The last layer.
            args: Its input.
            output: Its output.

        Returns:
            The sum.

        Raises:
            RuntimeError: If the first layer was not called before.
        """
        directions, self.handed.value = self.handed.value, None
        if directions is None:
            raise RuntimeError(
                f"a {type(module).__name__} with a bypass was called without the layer whose input the bypass takes; "
                "call the whole block"
            )
        out: Tensor = output + self.up(directions)
        return out


def connect_(entry: nn.Module | None, exit_: nn.Module | None, bypass: Bypass) -> None:
    """Let layers call a bypass; bound methods, as a copy of a model copies these with the modules that they are of."""
    if entry is not None:
        entry.register_forward_pre_hook(bypass.take, with_kwargs=True)
    if exit_ is not None:
        exit_.register_forward_hook(bypass.give)


def bypass_of(module: nn.Module) -> Bypass | None:
    """Return the bypass that adds to the output of a layer."""
    found = getattr(module, BYPASS, None)
    return found if isinstance(found, Bypass) else None


def carry_over_(old: nn.Module, new: nn.Module) -> None:
    """Let a layer that takes the place of another one call the bypasses that it called, and have its bypass.

    Args:
        old: The layer that was there.
        new: The layer that is there from now on.
    """
    for hook in call_hooks(old)[1].values():
        bypass = getattr(hook, "__self__", None)
        if isinstance(bypass, Bypass):
            connect_(new, None, bypass)
    own = bypass_of(old)
    if own is not None:
        setattr(new, BYPASS, own)
        connect_(None, new, own)
