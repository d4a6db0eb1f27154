"""From partitions of single projections to groups of units that must go together."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hap_hf.discovery.counters import counters_of
from hap_hf.discovery.dependence import UNUSED, Dependence, Partition, partition
from hap_hf.discovery.layout import Segment, input_segments, output_segments, runs
from hap_hf.discovery.record import Recording
from hap_hf.group import Group, Kind, Role, Slice
from hap_hf.surgery.implant import ImplantLinear

logger = logging.getLogger(__name__)

Key = tuple[str, int, Role]
"""Name of a tensor, a dimension of it, and its role."""


@dataclass(frozen=True)
class Candidate:
    """A group that follows from the dependences, before it has been tried.

    Args:
        group: The group.
        consumers: Projections that read the units.
        shape_class: Candidates of equal class come from equal code: class names along the path, and kind.
    """

    group: Group
    consumers: tuple[str, ...]
    shape_class: tuple[str, ...]


def find_candidates(model: nn.Module, recording: Recording, core_macs: Mapping[str, float]) -> list[Candidate]:
    """Return every group that the dependences between projections allow.

    Args:
        model: The model that was recorded.
        recording: Its cut-open forward pass.
        core_macs: Multiply-accumulates per sample in each module outside of projections, by module name.

    Returns:
        The candidates in the order in which the model runs.
    """
    partitions: dict[str, Partition] = {}
    frozen: set[str] = set()
    for name in recording.inputs:
        dependence = Dependence(recording, recording.inputs[name])
        found = partition(recording, name, dependence)
        if found is not None:
            partitions[name] = found
        else:
            frozen |= dependence.sources
    frozen |= Dependence(recording, recording.outputs).sources
    used_directly = {n.rpartition(".")[0] for n in frozen} & set(recording.projections)
    tied = _tied(model) & set(recording.projections)
    for names, why in (
        (used_directly, "whose weight is also used outside of its forward"),
        (tied, "whose weight is tied"),
    ):
        if names:
            logger.info("left whole: %s, %s", sorted(names), why)
    for name in (used_directly | tied) & set(partitions):
        p = partitions.pop(name)
        frozen |= set(p.columns) | set(p.parameters)
    frozen |= used_directly | tied
    _freeze_partners(partitions, frozen)

    candidates: list[Candidate] = []
    for family in _families(partitions):
        members = [partitions[name] for name in family]
        candidates += _candidates_of_family(model, recording, members, core_macs)
    return candidates


def _tied(model: nn.Module) -> set[str]:
    """Return the modules that share a parameter with another module."""
    owners: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].add(name.rpartition(".")[0])
    # One module under two paths, as in models that share layers, ties nothing.
    return {n for names in owners.values() if len({id(model.get_submodule(n)) for n in names}) > 1 for n in names}


def _owned(p: Partition) -> set[str]:
    """Return the sources that would lose entries if a unit of ``p`` went."""
    return {n for n, codes in [*p.columns.items(), *p.parameters.items()] if bool((codes >= 0).any())}


def _freeze_partners(partitions: dict[str, Partition], frozen: set[str]) -> None:
    """Drop, until nothing changes, every partition of which a source is needed whole elsewhere."""
    while dropped := [name for name, p in partitions.items() if _owned(p) & frozen]:
        for name in dropped:
            logger.debug(
                "left whole: the input of %s, of which %s is needed elsewhere", name, _owned(partitions[name]) & frozen
            )
            p = partitions.pop(name)
            frozen |= set(p.columns) | set(p.parameters)


def _families(partitions: Mapping[str, Partition]) -> Iterable[list[str]]:
    """Yield the partitions connected by a source of which both own entries."""
    by_source: dict[str, list[str]] = defaultdict(list)
    for name, p in partitions.items():
        for source in _owned(p):
            by_source[source].append(name)
    family = {name: [name] for name in partitions}
    for names in by_source.values():
        for other in names[1:]:
            if family[names[0]] is not family[other]:
                family[names[0]].extend(family[other])
                for n in family[other]:
                    family[n] = family[names[0]]
    seen: set[int] = set()
    for members in family.values():
        if id(members) not in seen:
            seen.add(id(members))
            yield members


def _candidates_of_family(
    model: nn.Module, recording: Recording, members: Sequence[Partition], core_macs: Mapping[str, float]
) -> list[Candidate]:
    name = members[0].consumer
    num_units = members[0].num_units
    if any(p.num_units != num_units for p in members) or not _same_units(members):
        logger.info(
            "left whole: the inputs of %s, which divide their channels differently", [p.consumer for p in members]
        )
        return []
    if num_units < 2:
        return []
    kind = Kind.FFN if members[0].width == 1 else Kind.HEADS
    if kind is Kind.FFN and not _is_block(model, recording, members):
        logger.info("left whole: the input of %s, which is no hidden layer of a feed-forward block", name)
        return []
    entries = _entries(recording, members)
    populations: dict[tuple[Key, ...], list[int]] = defaultdict(list)
    for unit in range(num_units):
        populations[tuple(key for key, by_unit in entries.items() if by_unit.get(unit))].append(unit)
    result = []
    for keys, units in populations.items():
        slices = []
        for key in keys:
            found = _affine(key, [entries[key][u] for u in units], recording)
            if found is None:
                logger.info("left whole: the input of %s, whose units do not lie evenly in %s", name, key[0])
                return []
            slices += found
        group = _group(model, members, kind, units, num_units, slices, core_macs)
        if any(s.role in {Role.PRODUCER, Role.FACTOR} for s in slices):
            result.append(Candidate(group, tuple(p.consumer for p in members), _shape_class(model, members, kind)))
    return result


def _same_units(members: Sequence[Partition]) -> bool:
    """Return whether every shared source gives the same unit numbers to all members."""
    seen: dict[str, Tensor] = {}
    for p in members:
        for source, codes in {**p.columns, **p.parameters}.items():
            if not bool((codes >= 0).any()):
                continue
            known = seen.setdefault(source, codes)
            both = (known >= 0) & (codes >= 0)
            if not torch.equal(known[both], codes[both]):
                return False
            seen[source] = torch.maximum(known, codes)
    return True


def _is_block(model: nn.Module, recording: Recording, members: Sequence[Partition]) -> bool:
    """Return whether the block gives back the width it takes: an FFN, not a pooler with its classifier."""
    for p in members:
        outputs = recording.leaves[p.consumer][0].shape[-1]
        sources = [n for n, codes in p.columns.items() if bool((codes >= 0).any())]
        if any(recording.inputs[n][0].shape[-1] != outputs for n in sources):
            return False
    return True


def _entries(recording: Recording, members: Sequence[Partition]) -> dict[Key, dict[int, list[int]]]:
    """Return for each tensor, dimension and role the indices of each unit."""
    result: dict[Key, dict[int, list[int]]] = {}

    def add(name: str, segment: Segment, role: Role, feature_units: Tensor) -> None:
        part = feature_units[segment.first_feature : segment.first_feature + segment.size].tolist()
        by_unit = result.setdefault((f"{name}.{segment.tensor}", segment.dim, role), {})
        for i, unit in enumerate(part):
            if unit >= 0 and segment.first_index + i not in (known := by_unit.setdefault(unit, [])):
                known.append(segment.first_index + i)

    for p in members:
        module = recording.projections[p.consumer]
        for segment in input_segments(module):
            add(p.consumer, segment, Role.CONSUMER, torch.arange(p.num_units * p.width) // p.width)
        for source, codes in p.columns.items():
            if bool((codes >= 0).any()):
                producer = recording.projections[source]
                made = Role.FACTOR if isinstance(producer, ImplantLinear) else Role.PRODUCER
                for segment in output_segments(producer):
                    add(source, segment, Role.ALIGNED if segment.tensor == "bias" else made, codes)
        for parameter, codes in p.parameters.items():
            if bool((codes >= 0).any()):
                aligned = _aligned_dim(codes)
                if aligned is None:
                    logger.info("left whole: the input of %s, whose units are scattered in %s", p.consumer, parameter)
                    return {}
                owner, _, leaf = parameter.rpartition(".")
                dim, units = aligned
                add(owner, Segment(leaf, dim, 0, len(units), 0), Role.ALIGNED, units)
    return {key: by_unit for key, by_unit in result.items() if by_unit}


def _aligned_dim(codes: Tensor) -> tuple[int, Tensor] | None:
    """Return the dimension along which each index belongs to one unit, and the units, or None."""
    for dim in range(codes.dim()):
        rows = codes.movedim(dim, 0).flatten(1) if codes.dim() > 1 else codes[:, None]
        highest = rows.amax(1)
        if bool(((rows == highest[:, None]) | (rows == UNUSED)).all()) and bool((highest >= 0).any()):
            return dim, highest
    return None


def _affine(key: Key, per_unit: Sequence[list[int]], recording: Recording) -> list[Slice] | None:
    """Return the slices in which the units lie one after the other, or None."""
    tensor, dim, role = key
    first = runs(sorted(per_unit[0]))
    for u, indices in enumerate(per_unit):
        if runs(sorted(indices)) != [(start + u * length, length) for start, length in first]:
            return None
    value = recording.parameters[tensor]
    owner = tensor.rpartition(".")[0]
    uses = 0.0
    if role is not Role.ALIGNED:
        rows = sum(x[..., 0].numel() for x in recording.inputs[owner])
        uses = rows / recording.batch_size
    return [Slice(tensor, tuple(value.shape), dim, start, length, role, uses) for start, length in first]


def _group(
    model: nn.Module,
    members: Sequence[Partition],
    kind: Kind,
    units: Sequence[int],
    num_units: int,
    slices: Sequence[Slice],
    core_macs: Mapping[str, float],
) -> Group:
    homes = [home([p.consumer, *(n for n, c in p.columns.items() if bool((c >= 0).any()))]) for p in members]
    core = sum(core_macs.get(h, 0.0) for h in homes) / num_units if kind is Kind.HEADS else 0.0
    place = homes[0] if len(homes) == 1 else home([p.consumer for p in members])
    counters = counters_of(model, members, kind, num_units)
    return Group(f"{place}:{kind.value}", kind, len(units), tuple(slices), counters, core)


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


def _shape_class(model: nn.Module, members: Sequence[Partition], kind: Kind) -> tuple[str, ...]:
    """Return the classes of the modules around the first consumer, and the sources' own names."""
    parts = members[0].consumer.split(".")
    around = [type(model.get_submodule(".".join(parts[:i]))).__name__ for i in range(1, len(parts))]
    return (kind.value, *around, *(n.rpartition(".")[2] for n in [*members[0].columns, members[0].consumer]))
