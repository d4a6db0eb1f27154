"""A low-rank linear path beside a block, in names and numbers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from hap_hf.names.untrusted import MAX_SIZE, dotted_name, fixed_items, number, real

MAX_STRIDE = 2**12


class Implants(StrEnum):
    """What stands in for units that go."""

    ROWS = "rows"
    """Cheaper rows in the layers that make the units, for the ``implant_ratio`` most sensitive of the cut ones, as
    published."""
    AUTO = "auto"
    """Low-rank paths beside whole blocks, with as many directions as win more than the units that pay for them."""


BYPASS = "bypass"
"""Under this name a bypass is a child of the layer whose output it adds to."""


@dataclass(frozen=True, slots=True)
class BypassPlan:
    """A low-rank linear path from the input of a block's first layer to the output of its last one.

    Args:
        entry: Name of the first layer.
        exit: Name of the last layer, whose output it adds to.
        inputs: Number of inputs of the first layer after the stage.
        outputs: Number of outputs of the last one after the stage.
        rank: Number of directions.
        stride: Of positions: a convolutional block may give fewer than it is given. 1 for linear layers.
        spatial_dims: 2 for a path of 1 x 1 convolutions, 0 for one of linear layers.
        uses: Multiply-accumulates per weight and sample of the example batch: the number of positions of the output.
    """

    entry: str
    exit: str
    inputs: int
    outputs: int
    rank: int
    stride: int = 1
    spatial_dims: int = 0
    uses: float = 0.0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its two weights by their names in the model."""
        taps = (1,) * self.spatial_dims
        return {
            f"{self.exit}.{BYPASS}.down.weight": (self.rank, self.inputs, *taps),
            f"{self.exit}.{BYPASS}.up.weight": (self.outputs, self.rank, *taps),
        }

    @property
    def params(self) -> int:
        """Number of its parameters."""
        return self.rank * (self.inputs + self.outputs)

    @property
    def macs(self) -> float:
        """Multiply-accumulates per sample of the example batch."""
        return self.params * self.uses

    def is_inside(self, prefix: str) -> bool:
        """Return whether the names of both layers begin with a prefix."""
        return self.entry.startswith(prefix) and self.exit.startswith(prefix)

    def renamed(self, rename: Callable[[str], str]) -> "BypassPlan":
        """Return the same for a model in which modules have other names."""
        return replace(self, entry=rename(self.entry), exit=rename(self.exit))

    def to_list(self) -> list[Any]:
        """Return it as plain JSON values."""
        return [self.entry, self.exit, self.inputs, self.outputs, self.rank, self.stride, self.spatial_dims, self.uses]

    @classmethod
    def from_list(cls, data: object, where: str) -> "BypassPlan":
        """Return what :meth:`to_list` described, after checking every value of it.

        Args:
            data: Parsed JSON, from a source that need not be trusted.
            where: Place in the plan, for messages.

        Returns:
            The bypass.

        Raises:
            PlanFormatError: If anything is missing, of the wrong type or out of range.
        """
        entry, exit_, inputs, outputs, rank, stride, dims, uses = fixed_items(data, 8, where)
        sizes = (number(n, f"{where} size", 1, MAX_SIZE) for n in (inputs, outputs))
        first, last = sizes
        return cls(
            dotted_name(entry, where),
            dotted_name(exit_, where),
            first,
            last,
            # More directions than there are inputs or outputs would say nothing new.
            number(rank, f"{where} rank", 1, min(first, last)),
            number(stride, f"{where} stride", 1, MAX_STRIDE),
            number(dims, f"{where} spatial dimensions", 0, 3),
            real(uses, f"{where} uses"),
        )
