"""How the input channels of a projection fall into units that share no source."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hap_hf.discovery.dependence import SHARED, Dependence
from hap_hf.discovery.record import Recording
from hap_hf.discovery.unions import Unions
from hap_hf.layers.projection import channel_dim


@dataclass(frozen=True, eq=False)
class Partition:
    """The finest division of a projection's input channels into units that share no source.

    Args:
        consumer: Name of the projection.
        units: Unit of each input channel, ``[channels]``.
        columns: For each source projection, the unit of each output feature, ``[out_features]``;
            :data:`~hap_hf.discovery.dependence.SHARED` where several units need it,
            :data:`~hap_hf.discovery.dependence.UNUSED` where none does.
        parameters: For other parameters, a dimension and the unit of each index along it, coded likewise.
        scattered: Units that own entries of parameters along no one dimension.
    """

    consumer: str
    units: Tensor
    columns: dict[str, Tensor]
    parameters: dict[str, tuple[int, Tensor]]
    scattered: set[int]

    @property
    def num_units(self) -> int:
        """Number of units."""
        return int(self.units.max()) + 1

    @property
    def shares_sources(self) -> bool:
        """Whether some source feature serves several units, as the one key head of multi-query attention does."""
        return any(bool((codes == SHARED).any()) for codes in self.columns.values())


def partition(recording: Recording, consumer: str) -> Partition | None:
    """Return how the input channels of a projection fall into units.

    Divisions are tried from the finest to coarser ones: single channels, stretches of them, and two guesses.

    Args:
        recording: The cut-open forward pass.
        consumer: Name of the projection.

    Returns:
        The partition, or None where every channel depends on everything or nothing, or on parameters only.
    """
    dim = channel_dim(recording.projections[consumer])
    dependence = Dependence(recording, recording.inputs[consumer], dim)
    channels = recording.channels(consumer)
    if not dependence.leaves or channels < 2:
        return None
    single = torch.arange(channels)
    # Behind a layer norm, where most linear layers read, no channel has a feature of its own and no wider unit has
    # either. The gradients that would say so one by one are the largest of the model, so there the cheap question comes
    # first; convolutions seldom read what mixes everything.
    linear = dim == -1
    if linear and _mixes_everything(dependence, channels) and not dependence.some_owned(single):
        return None
    owners = dependence.owners(single)
    if _is_clean(owners, dependence):
        return _made(consumer, single, owners, dependence)
    owned = any(bool((codes >= 0).any()) for codes in owners.values())
    if not linear and not owned and _mixes_everything(dependence, channels):
        return None
    # Heads. Their keys and values may serve all of them, so it is enough that one projection makes every unit.
    for width in _widths(dependence, channels):
        units = single // width
        owners = dependence.owners(units)
        if _covers(owners, dependence, channels // width):
            return _made(consumer, units, owners, dependence)
    # Units whose channels do not lie side by side: guesses from few questions, which the owners confirm.
    for guess in (_repeated, _unite):
        united = guess(dependence, channels)
        if united is not None and _is_clean(owners := dependence.owners(united), dependence):
            return _made(consumer, united, owners, dependence)
    return None


def _made(consumer: str, units: Tensor, owners: dict[str, Tensor], dependence: Dependence) -> Partition:
    """Return the partition with the parameters that lie along its units."""
    aligned, scattered = dependence.aligned(units)
    return Partition(consumer, units, owners, aligned, scattered)


def _is_clean(owners: dict[str, Tensor], dependence: Dependence) -> bool:
    """Return whether no feature of a projection serves two units."""
    return not any(bool((owners[n] == SHARED).any()) for n in dependence.leaves)


def _covers(owners: dict[str, Tensor], dependence: Dependence, num_units: int) -> bool:
    """Return whether some projection makes every unit, each from features of its own."""
    units = set(range(num_units))
    return any(units <= set(owners[n].tolist()) for n in dependence.leaves)


def _mixes_everything(dependence: Dependence, channels: int) -> bool:
    """Return whether the first channel depends on all of each source or on none of it, as behind a layer norm."""
    masks = dependence.touched(_only(0, channels), dependence.parameters).values()
    return any(bool(m.all()) and len(m) > 1 for m in masks) and all(bool(m.all()) or not bool(m.any()) for m in masks)


def _only(channel: int, channels: int) -> Tensor:
    mask = torch.zeros(channels)
    mask[channel] = 1
    return mask


def _widths(dependence: Dependence, channels: int) -> Iterator[int]:
    """Yield numbers of consecutive channels that may make up one unit, as those of an attention head."""
    first = dependence.touched(_only(0, channels), dependence.parameters)
    second = dependence.touched(_only(1, channels), dependence.parameters)
    if not any(bool((first[n] & second[n]).any()) for n in first):
        return  # neighbours have nothing in common
    fallback = []
    # Among units of w channels, channel w is the first of the second unit. A divisor below w leads to a channel of
    # the first unit, which shares its queries or keys. So w is the smallest one that leads to nothing in common.
    for width in (d for d in range(2, channels) if channels % d == 0):
        other = dependence.touched(_only(width, channels), dependence.parameters)
        if not any(bool((first[n] & other[n]).any()) for n in first):
            yield width
            break
        if any(bool((first[n] & ~other[n]).any()) for n in first):
            fallback.append(width)
    # Multi-query attention: every head has query rows of its own, and all share one key and one value head, so there is
    # no such width. All are tried at which channel 0 reads something that the other channel does not.
    yield from fallback


_MOST_QUESTIONS = 64


def _repeated(dependence: Dependence, channels: int) -> Tensor | None:
    """Return units of channels at equal distances, as in a concatenation of a layer with functions of itself.

    The channels that share a source with channel 0 are found by bisection: one question tells whether a range of
    channels holds any.

    Args:
        dependence: Answers about the channels.
        channels: Number of channels.

    Returns:
        Unit of each channel, ``[channels]``, or None where the first channel shares its sources with others.
    """
    first = dependence.touched(_only(0, channels), dependence.parameters)
    ranges, found, questions = [(1, channels)], [], 0
    while ranges and questions < _MOST_QUESTIONS:
        start, end = ranges.pop()
        mask = torch.zeros(channels)
        mask[start:end] = 1
        other = dependence.touched(mask, dependence.parameters)
        questions += 1
        if any(bool((first[n] & other[n]).any()) for n in first):
            middle = (start + end) // 2
            if end - start == 1:
                found.append(start)
            else:
                ranges += [(start, middle), (middle, end)]
    step = min(found, default=channels)
    evenly = sorted(found) == list(range(step, channels, step)) and channels % step == 0
    return torch.arange(channels) % step if found and evenly and not ranges else None


# With k channels that need a feature, another one is still suspected after all tests with probability (1 - 2^-k)^64:
# 1e-8 for two, 2e-4 for three, 2e-2 for four. False suspects make units too large, or too many to go on.
_NUM_TESTS = 64
_MOST_TOGETHER = 8


def _unite(dependence: Dependence, channels: int) -> Tensor | None:
    """Return units of channels that share a source, wherever they lie, as in a concatenation of a layer with itself.

    Random halves of the channels are asked which features they touch. A channel that needs a feature is in no half
    that does not touch it. So whoever was never seen in such a half, after many tests, is taken to need it.

    Args:
        dependence: Answers about the channels.
        channels: Number of channels.

    Returns:
        Unit of each channel, ``[channels]``, or None where some source serves many channels.
    """
    halves = torch.rand(_NUM_TESTS, channels, generator=torch.Generator().manual_seed(1)) < 0.5
    inside = [dependence.touched(half.float(), dependence.parameters) for half in halves]
    outside = [dependence.touched((~half).float(), dependence.parameters) for half in halves]
    unions = Unions(range(channels))
    for name in dependence.leaves:
        ones = torch.stack([mask[name] for mask in inside]).double()  # [tests, features]
        zeros = torch.stack([mask[name] for mask in outside]).double()
        used = (ones + zeros).sum(0) > 0
        # How often a channel was in a half that did not touch the feature: once proves that it does not need it.
        against = (1 - ones).T @ halves.double() + (1 - zeros).T @ (~halves).double()  # [features, channels]
        needed_by = (against == 0) & used[:, None]
        if int(needed_by.sum(1).max()) > _MOST_TOGETHER:
            return None
        for row in needed_by:
            together = row.nonzero().flatten().tolist()
            for other in together[1:]:
                unions.join(together[0], other)
    roots = [unions.root(c) for c in range(channels)]
    order = {root: i for i, root in enumerate(dict.fromkeys(roots))}
    return torch.tensor([order[r] for r in roots])
