"""Which input channels of a projection depend on which output channels of which others.

The answers come from a cut-open forward pass (:mod:`hap_hf.discovery.record`). For the output projection of an
attention, one channel's gradient touches one head's rows of the query, key and value projections; for a down
projection it touches one row of the up and gate projections; behind a layer norm it touches everything.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hap_hf.discovery.record import Recording

SHARED, UNUSED = -1, -2


@dataclass(frozen=True, eq=False)
class Partition:
    """The finest division of a projection's input channels into units that share no source.

    Args:
        consumer: Name of the projection.
        num_units: Number of units.
        width: Input channels a unit has; unit ``u`` is channels ``u * width`` to ``(u + 1) * width - 1``.
        columns: For each source projection, the unit of each output feature, ``[out_features]``; ``SHARED`` where
            several units need it, ``UNUSED`` where none does.
        parameters: For other parameters, the unit of each entry, in the parameter's shape, coded likewise.
    """

    consumer: str
    num_units: int
    width: int
    columns: dict[str, Tensor]
    parameters: dict[str, Tensor]

    @property
    def shares_sources(self) -> bool:
        """Whether some source feature serves several units, as the one key head of multi-query attention does."""
        return any(bool((codes == SHARED).any()) for codes in self.columns.values())


class Dependence:
    """Answers about the input of one projection, or about the model's outputs.

    Args:
        recording: The cut-open forward pass.
        targets: The tensors asked about, ``[..., channels]`` where single channels are.
    """

    def __init__(self, recording: Recording, targets: list[Tensor]) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._targets = [t for t in targets if t.requires_grad]
        self._is_leaf = set(recording.leaves)
        behind = _variables_behind(self._targets)
        self._sources = [(n, leaf) for n, leaves in recording.leaves.items() for leaf in leaves if id(leaf) in behind]
        self._sources += [(n, p) for n, p in recording.parameters.items() if id(p) in behind]

    @property
    def sources(self) -> set[str]:
        """Names of the projections and parameters that lie behind the targets."""
        return {n for n, _ in self._sources}

    def touched(self, channels: Tensor, *, features_only: bool = False) -> dict[str, Tensor]:
        """Return which source entries the given channels depend on.

        Args:
            channels: Mask over the targets' channels, ``[channels]``.
            features_only: Ask for source projections only, not for parameters.

        Returns:
            For each source projection a mask over its output features, for each parameter one in its shape.
        """
        result: dict[str, Tensor] = {}
        sources = [s for s in self._sources if s[0] in self._is_leaf or not features_only]
        # Random cotangents: equal ones would cancel behind a layer norm or a softmax.
        cotangents = [
            (torch.randn(t.shape, generator=self._generator) * channels).to(t.device, t.dtype) for t in self._targets
        ]
        gradients = torch.autograd.grad(
            self._targets, [s for _, s in sources], cotangents, retain_graph=True, allow_unused=True
        )
        for (name, source), gradient in zip(sources, gradients, strict=True):
            mask = torch.zeros_like(source, dtype=torch.bool) if gradient is None else gradient != 0  # NaN counts
            if name in self._is_leaf:
                mask = mask.flatten(0, -2).any(0) if mask.dim() > 1 else mask
            result[name] = result[name] | mask if name in result else mask
        return {n: m.cpu() for n, m in result.items()}


def _variables_behind(targets: list[Tensor]) -> set[int]:
    """Return the ids of the leaves from which ``targets`` were computed, read off the autograd graph."""
    found, seen = set(), set()
    pending = [t.grad_fn for t in targets]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # only the nodes at the graph's ends have one
        if variable is not None:
            found.add(id(variable))
        pending += [n for n, _ in node.next_functions]
    return found


def partition(recording: Recording, consumer: str, dependence: Dependence) -> Partition | None:
    """Return how the input channels of a projection fall into units.

    Args:
        recording: The cut-open forward pass.
        consumer: Name of the projection.
        dependence: Answers about its inputs.

    Returns:
        The partition, or None where every channel depends on everything or nothing.
    """
    inputs = recording.inputs[consumer]
    channels = inputs[0].shape[-1]
    leaves = dependence.sources & set(recording.leaves)
    if not leaves or channels < 2:
        return None

    def reach(channel: int) -> dict[str, Tensor]:
        mask = torch.zeros(channels)
        mask[channel] = 1
        return dependence.touched(mask, features_only=True)

    first = reach(0)
    if any(bool(m.all()) and len(m) > 1 for m in first.values()) and all(
        bool(m.all()) or not bool(m.any()) for m in first.values()
    ):
        return None  # behind a norm: everything depends on everything
    fallback = []
    for width in (d for d in range(1, channels) if channels % d == 0):
        other = reach(width)
        if not any(bool((first[n] & other[n]).any()) for n in leaves):
            return _decode(recording, dependence, consumer, channels // width, width)
        if width > 1 and any(bool((first[n] & ~other[n]).any()) for n in leaves):
            fallback.append(width)
    # Multi-query attention: every head has rows of its own, and all share one key and one value head.
    for width in fallback:
        if found := _decode(recording, dependence, consumer, channels // width, width):
            return found
    return None


def _decode(
    recording: Recording, dependence: Dependence, consumer: str, num_units: int, width: int
) -> Partition | None:
    """Read off the unit of every source entry, a bit of its number at a time."""
    unit = torch.arange(num_units * width) // width
    codes: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    blurred: dict[str, Tensor] = {}
    for bit in range(max((num_units - 1).bit_length(), 1)):
        ones = dependence.touched((unit >> bit & 1) == 1)
        zeros = dependence.touched((unit >> bit & 1) == 0)
        for n in ones:
            either = ones[n] | zeros[n]
            if n not in codes:
                codes[n], seen[n] = torch.zeros_like(ones[n], dtype=torch.long), either
                shared[n], blurred[n] = torch.zeros_like(either), torch.zeros_like(either)
            codes[n] |= ones[n].long() << bit
            shared[n] |= ones[n] & zeros[n]
            blurred[n] |= either != seen[n]  # a dependence that comes and goes cannot be trusted
    if any(bool(b.any()) for b in blurred.values()):
        return None
    for n, code in codes.items():
        code[shared[n]] = SHARED
        code[~seen[n]] = UNUSED
    columns = {n: c for n, c in codes.items() if n in recording.leaves}
    units = set(range(num_units))
    if not any(units <= set(c.tolist()) for c in columns.values()):
        return None
    return Partition(consumer, num_units, width, columns, {n: c for n, c in codes.items() if n not in recording.leaves})
