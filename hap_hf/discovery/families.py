"""From single units to groups: units of equal build that lie one after the other in every tensor."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hap_hf.discovery.components import Component, Key, find_components
from hap_hf.discovery.counters import counters_of, structural_counters
from hap_hf.discovery.counting import Counts
from hap_hf.discovery.partition import Partition, partition
from hap_hf.discovery.record import Recording
from hap_hf.discovery.whole import LeftWhole
from hap_hf.layers.projection import spatial_dims
from hap_hf.names.group import Group, Kind, Role, Slice

logger = logging.getLogger(__name__)

Population = list[Component]
"""Units of equal build, in order."""


@dataclass(frozen=True)
class Candidate:
    """A group that follows from the dependences, before it has been tried.

    Args:
        group: What would be removable: units, slices and counters.
        consumers: Projections that read the units.
        shape_class: Kind, class names along the path and names of layers. Candidates of equal class are taken to come
            from equal code.
        family: Candidates of equal family share a layer, so they may have to keep equal numbers of units.
    """

    group: Group
    consumers: tuple[str, ...]
    shape_class: tuple[str, ...]
    family: int = 0


def find_candidates(model: nn.Module, recording: Recording, counts: Counts) -> list[Candidate]:
    """Return every group that the dependences between projections allow.

    Args:
        model: The model that was recorded.
        recording: Its cut-open forward pass.
        counts: How often its layers are used.

    Returns:
        The candidates in the order in which the model runs.
    """
    partitions = {}
    for name in recording.inputs:
        found = partition(recording, name)
        if found is not None:
            partitions[name] = found
        else:
            logger.debug("left whole: the input of %s, of which every channel depends on everything or nothing", name)
    by_build: dict[tuple[tuple[str, ...], tuple[tuple[Key, int], ...]], Population] = defaultdict(list)
    for consumers, component in find_components(model, recording, partitions):
        build = tuple(sorted((key, len(indices)) for key, indices in component.items()))
        by_build[consumers, build].append(component)
    families = _families([set(population[0]) for population in by_build.values()])
    candidates = []
    for family, ((consumers, _), components) in zip(families, by_build.items(), strict=True):
        members = [partitions[name] for name in consumers]
        maker = _Maker(model, recording, counts, members, family)
        candidates += maker.candidates(components)
    order = {name: i for i, name in enumerate(recording.inputs)}
    return sorted(candidates, key=lambda c: order[c.consumers[0]])


def _families(builds: Sequence[set[Key]]) -> list[int]:
    """Return a number for each build, equal where two of them lie in one dimension of one tensor."""
    # Groups may share a layer without a unit in common, as the parts of a layer whose outputs are split evenly.
    number = list(range(len(builds)))
    first: dict[tuple[str, int], int] = {}
    for i, keys in enumerate(builds):
        for key in keys:
            j = first.setdefault((key.tensor, key.dim), i)
            if number[j] != number[i]:
                old, new = number[i], number[j]
                number = [new if n == old else n for n in number]
    return number


class _Maker:
    """Makes candidates out of the units that some projections read.

    Args:
        model: The model that was recorded.
        recording: Its cut-open forward pass.
        counts: How often its layers are used.
        members: Partitions of the projections that read the units.
        family: Number of the family.
    """

    def __init__(
        self,
        model: nn.Module,
        recording: Recording,
        counts: Counts,
        members: Sequence[Partition],
        family: int,
    ) -> None:
        self._model = model
        self._recording = recording
        self._counts = counts
        self._members = members
        self._family = family

    def candidates(self, components: Population) -> list[Candidate]:
        """Return a candidate for each stretch of units that lie one after the other.

        Args:
            components: Units of equal build.

        Returns:
            The candidates; none where the units are scattered.
        """
        # A stretch ends before a unit that must stay. Many stretches mean that the units lie in no order at all.
        stretches = list(_stretches(sorted(components, key=lambda c: [i[0] for i in c.values()])))
        consumers = [p.consumer for p in self._members]
        if len(stretches) > _MOST_STRETCHES:
            self._recording.left_whole.append(LeftWhole((consumers[0],), "units of its input do not lie evenly"))
            return []
        kind = self._kind(components[0])
        if kind is Kind.FFN and not self._is_block(components[0]):
            self._recording.left_whole.append(
                LeftWhole((consumers[0],), "its input is no hidden layer of one block or module")
            )
            return []
        return [self._candidate(kind, stretch) for stretch in stretches if len(stretch) > 1]

    def _kind(self, unit: Component) -> Kind:
        """Return what a unit is, by the layers that it lies in and the number of channels that its readers see."""
        layers = {key.tensor.rpartition(".")[0] for key in unit}
        is_neuron = all(len(indices) == 1 for key, indices in unit.items() if key.role is Role.CONSUMER)
        convolves = any(spatial_dims(self._model.get_submodule(n)) for n in layers)
        # Linear layers with batch norms take the place of 1 x 1 convolutions.
        if convolves or (is_neuron and any(key.role is Role.STATISTIC for key in unit)):
            return Kind.CHANNELS
        return Kind.FFN if is_neuron else Kind.HEADS

    def _sources(self, unit: Component) -> list[str]:
        """Return the layers that make a unit, in the order in which they were found."""
        makers = {Role.PRODUCER, Role.FACTOR}
        return list(dict.fromkeys(key.tensor.rpartition(".")[0] for key in unit if key.role in makers))

    def _is_block(self, unit: Component) -> bool:
        """Return whether the block gives back the width it takes, or its layers stand side by side in one module.

        What is neither is a pooler with a classifier behind it. The head of a model of transformers stays whole
        either way: checkpoints are loaded without it, and with one for other classes.
        """
        sources = self._sources(unit)
        inputs = {self._recording.channels(n) for n in sources}
        if all(inputs == {self._recording.leaves[p.consumer][0].shape[-1]} for p in self._members):
            return True
        layers = [*sources, *(p.consumer for p in self._members)]
        base = getattr(self._model, "base_model_prefix", "")
        in_head = bool(base) and hasattr(self._model, base) and not all(n.startswith(f"{base}.") for n in layers)
        return len({n.rpartition(".")[0] for n in layers}) == 1 and not in_head

    def _candidate(self, kind: Kind, units: Population) -> Candidate:
        """Return the candidate whose units are a stretch."""
        sources, consumers = self._sources(units[0]), [p.consumer for p in self._members]
        # Where the units of one member come from tells which attention or FFN it belongs to.
        homes = [home([p.consumer, *(n for n in sources if n in p.columns)]) for p in self._members]
        place = homes[0] if len(homes) == 1 else home(consumers)
        core = 0.0
        # Attention products are made outside of all layers, and each head has an equal share of them.
        if kind is Kind.HEADS:
            # Two layers of one attention may read its heads; its products are made once.
            each = {
                h: self._counts.core_macs.get(h, 0.0) / p.num_units for h, p in zip(homes, self._members, strict=True)
            }
            core = sum(each.values())
        # The first unit says where all lie: in a stretch, unit u has the same runs u widths further on.
        slices = tuple(s for key in units[0] for s in self._slices(key, units[0][key]))
        group = Group(
            f"{sources[0] if kind is Kind.CHANNELS else place}:{kind.value}",
            kind,
            len(units),
            slices,
            counters_of(self._model, self._members, kind, slices, len(units))
            + structural_counters(self._model, slices),
            core,
        )
        return Candidate(group, tuple(consumers), self._shape_class(kind, sources), self._family)

    def _slices(self, key: Key, first: Sequence[int]) -> list[Slice]:
        """Return the slices of one tensor, one for each run of consecutive indices of the first unit."""
        shape = tuple(_tensor(self._model, key.tensor).shape)
        uses = self._counts.positions.get(key.tensor.rpartition(".")[0], 0.0)
        # Biases, norms and statistics multiply too, but no convention of counting counts them.
        weighs = key.role not in {Role.ALIGNED, Role.STATISTIC}
        return [
            Slice(key.tensor, shape, key.dim, start, length, key.role, uses if weighs else 0.0)
            for start, length in runs(first)
        ]

    def _shape_class(self, kind: Kind, sources: Sequence[str]) -> tuple[str, ...]:
        """Return the classes of the modules around the first consumer, and the names of the layers."""
        parts = self._members[0].consumer.split(".")
        around = [type(self._model.get_submodule(".".join(parts[:i]))).__name__ for i in range(1, len(parts))]
        names = [n.rpartition(".")[2] for n in [*sources, self._members[0].consumer]]
        return (kind.value, *around, *dict.fromkeys(names))


_MOST_STRETCHES = 16


def _stretches(components: Population) -> Iterable[Population]:
    """Yield units that follow each other without a gap in every tensor."""
    stretch: Population = []
    for component in components:
        # Each run of the next unit must begin where the same run of the last one ended, in every tensor at once.
        if stretch and any(
            runs(indices) != [(start + length * len(stretch), length) for start, length in runs(stretch[0][key])]
            for key, indices in component.items()
        ):
            yield stretch
            stretch = []
        stretch.append(component)
    if stretch:
        yield stretch


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(owner), leaf)
    return tensor


def home(names: Sequence[str]) -> str:
    """Return the innermost module that holds all of the named ones.

    Args:
        names: Dotted module names.

    Returns:
        Dotted name of the module, empty for the model itself.
    """
    paths = [n.split(".") for n in names]
    if len(names) == 1:
        return ".".join(paths[0][:-1])
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Return ascending ``indices`` as runs of consecutive ones.

    Args:
        indices: Ascending integers.

    Returns:
        First index and length of each run.
    """
    result: list[tuple[int, int]] = []
    for i in indices:
        if result and result[-1][0] + result[-1][1] == i:
            result[-1] = (result[-1][0], result[-1][1] + 1)
        else:
            result.append((i, 1))
    return result
