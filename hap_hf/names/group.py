"""What can be removed, in names and numbers only: units, the slices that hold them, groups of units.

Importing this module imports no torch: a group must survive JSON, pickling and the ``meta`` device.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from math import prod
from typing import NamedTuple


class Kind(StrEnum):
    """What one unit of a group is."""

    HEADS = "heads"
    """An attention head; under grouped queries, a key/value head with its query heads."""
    FFN = "ffn"
    """A neuron of a feed-forward block: a row of the up (and gate) projection and a column of the down projection."""
    CHANNELS = "channels"
    """A convolution channel, in every layer that keeps or loses it together; a whole group of a grouped convolution."""


class Role(StrEnum):
    """How a tensor takes part in a group."""

    PRODUCER = "producer"
    """A weight matrix whose output entries are the unit. An implant may replace these rows."""
    FACTOR = "factor"
    """Like a producer, where no implant can stand: grouped convolutions, those of one and three dimensions, layers that
    have an implant already."""
    CONSUMER = "consumer"
    """A weight matrix that reads the unit. Removing the unit removes these columns."""
    ALIGNED = "aligned"
    """Any other parameter with entries for each unit: biases, norms, relative position tables. It follows the units."""
    STATISTIC = "statistic"
    """A buffer with entries for each unit, such as the running mean of a batch norm: no parameter."""


@dataclass(frozen=True, slots=True)
class Slice:
    """The entries of one tensor that belong to the units of a group.

    Unit ``u`` occupies indices ``offset + u * width`` to ``offset + (u + 1) * width - 1`` along ``dim``.

    Args:
        tensor: Dotted name of the parameter or buffer.
        shape: Shape of the whole tensor before anything is removed.
        dim: Dimension along which the units lie.
        offset: Index of the first unit's first entry, as in the query, key and value thirds of a fused projection.
        width: Number of indices a unit has, ``head_dim`` for heads.
        role: How the tensor takes part.
        uses: Multiply-accumulates per entry and sample of the example batch; 0 where none are counted (biases).
    """

    tensor: str
    shape: tuple[int, ...]
    dim: int
    offset: int
    width: int
    role: Role
    uses: float = 0.0

    @property
    def entries_per_unit(self) -> int:
        """Number of entries that one unit has in this tensor."""
        # An earlier stage may have left a dimension empty.
        return self.width * prod(self.shape) // self.shape[self.dim] if self.shape[self.dim] else 0

    def indices(self, unit: int) -> range:
        """Return the indices of ``unit`` along ``dim``."""
        start = self.offset + unit * self.width
        return range(start, start + self.width)


@dataclass(frozen=True, slots=True)
class Counter:
    """An integer attribute of a module that counts units or their entries, such as ``num_attention_heads``.

    Args:
        attribute: Dotted name, the module's name followed by the attribute's.
        width: How much the attribute falls by for each removed unit.
    """

    attribute: str
    width: int


class ImplantShape(NamedTuple):
    """What an implant would replace: rows of a linear layer, or kernels of a convolution.

    Args:
        rows: Output features or channels.
        inputs: Input features or channels.
        taps: Entries of one kernel, None for a linear layer.
    """

    rows: int
    inputs: int
    taps: int | None = None

    @property
    def replaced(self) -> int:
        """Number of weights that go."""
        return self.rows * self.inputs * (1 if self.taps is None else self.taps)

    @property
    def max_rank(self) -> int:
        """Largest rank; 1 for a convolution, where it stands for the one tap of the implant."""
        return min(self.rows, self.inputs) if self.taps is None else 1

    def weights(self, rank: int) -> int:
        """Return the number of weights of the implant: two factors, or a kernel of one tap.

        Args:
            rank: Size of the bottleneck of a linear layer's implant.

        Returns:
            The number.
        """
        return rank * (self.rows + self.inputs) if self.taps is None else self.rows * self.inputs


@dataclass(frozen=True, slots=True)
class Group:
    """Units that share one axis, with every slice and counter that must change with them.

    Args:
        name: Name of the smallest module that holds the group, and the kind, as in
            ``"encoder.layer.0.attention:heads"``.
        kind: What one unit is.
        num_units: Number of units.
        slices: Where the units live.
        counters: Integer attributes that follow the number of units.
        core_macs: Multiply-accumulates per unit and sample outside the slices (attention products).
        may_be_empty: Whether the model still runs, and equals the masked one, with every unit removed.
    """

    name: str
    kind: Kind
    num_units: int
    slices: tuple[Slice, ...]
    counters: tuple[Counter, ...] = ()
    core_macs: float = 0.0
    may_be_empty: bool = False

    @property
    def params_per_unit(self) -> int:
        """Number of parameters that removing one unit removes."""
        return sum(s.entries_per_unit for s in self.slices if s.role is not Role.STATISTIC)

    @property
    def macs_per_unit(self) -> float:
        """Multiply-accumulates per sample of the example batch that removing one unit saves."""
        return self.core_macs + sum(s.entries_per_unit * s.uses for s in self.slices)

    def implant_shapes(self, implanted: int) -> dict[str, ImplantShape]:
        """Return the shape of the weights that an implant would replace in each producer.

        All slices of one tensor, such as the query, key and value thirds of a fused projection, share one implant.

        Args:
            implanted: Number of implanted units.

        Returns:
            The shapes by tensor name.
        """
        rows: dict[str, int] = defaultdict(int)
        shapes: dict[str, ImplantShape] = {}
        for s in self.slices:
            if s.role is Role.PRODUCER:
                rows[s.tensor] += implanted * s.width
                # A weight is [out, in, *kernel], GPT-2's is [in, out]: inputs lie along the other one of the first two.
                inputs = s.shape[1 - s.dim] if len(s.shape) > 1 and s.dim < 2 else 0
                taps = prod(s.shape[2:]) if len(s.shape) > 2 else None
                shapes[s.tensor] = ImplantShape(rows[s.tensor], inputs, taps)
        return shapes

    def matches(self, pattern: str) -> bool:
        """Return whether a pattern of :mod:`fnmatch` matches the group's name or that of one of its tensors."""
        return any(fnmatchcase(name, pattern) for name in (self.name, *(s.tensor for s in self.slices)))

    def scored_slices(self) -> Iterator[Slice]:
        """Yield the slices whose entries make up a unit's weights ``w_u``: matrices, as in the paper, not biases.

        Returns:
            The slices that are scored.
        """
        return (s for s in self.slices if s.role not in {Role.ALIGNED, Role.STATISTIC} and len(s.shape) > 1)
