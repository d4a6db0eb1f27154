"""Which units of different projections are one and the same: they share a source or are read together."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from hap_hf.discovery.dependence import SHARED, everything_behind, reached
from hap_hf.discovery.partition import Partition
from hap_hf.discovery.record import Recording
from hap_hf.discovery.unions import Unions
from hap_hf.layers.projection import IMPLANTED
from hap_hf.layers.segments import Segment, input_segments, output_segments
from hap_hf.names.group import Role

logger = logging.getLogger(__name__)


class Node(NamedTuple):
    """Something that goes with a unit.

    Args:
        side: ``"in"``, a unit of a consumer's input; ``"out"``, a feature of a projection; else a parameter's name.
        name: The projection, or the module that owns the parameter.
        number: Which one; for a parameter, along the dimension that :attr:`dim` says.
        dim: Dimension of a parameter.
    """

    side: str
    name: str
    number: int
    dim: int = 0


class Key(NamedTuple):
    """A tensor, a dimension of it, and its role."""

    tensor: str
    dim: int
    role: Role


Component = dict[Key, list[int]]
"""One unit: the indices that it takes, by tensor, dimension and role."""


def find_components(
    model: nn.Module, recording: Recording, partitions: Mapping[str, Partition]
) -> list[tuple[tuple[str, ...], Component]]:
    """Return every unit that no other part of the model needs.

    Args:
        model: The model.
        recording: Its cut-open forward pass.
        partitions: Partitions of the inputs of projections, in the order in which they run.

    Returns:
        For each unit the projections that read it and what goes with it; units of one consumer in ascending order.
    """
    unions: Unions[Node] = Unions()
    frozen: set[Node] = set()
    for p in partitions.values():
        for unit in range(p.num_units):
            unions.root(Node("in", p.consumer, unit))
        for source, codes in p.columns.items():
            for feature, unit in enumerate(codes.tolist()):
                if unit >= 0:
                    unions.join(Node("in", p.consumer, unit), Node("out", source, feature))
                elif unit == SHARED:
                    frozen.add(Node("out", source, feature))
        for parameter, (dim, codes) in p.parameters.items():
            owner, _, leaf = parameter.rpartition(".")
            for index, unit in enumerate(codes.tolist()):
                if unit >= 0:
                    unions.join(Node("in", p.consumer, unit), Node(leaf, owner, index, dim))
        if p.scattered:
            logger.info("left whole: units of the input of %s, which are scattered in a parameter", p.consumer)
            frozen |= {Node("in", p.consumer, unit) for unit in p.scattered}
    frozen |= _used_otherwise(model, recording, partitions)
    frozen |= _needed_whole(recording, partitions, unions)
    rotten = {unions.root(node) for node in frozen}
    result = []
    for root, nodes in unions.sets().items():
        consumers = tuple(dict.fromkeys(n.name for n in nodes if n.side == "in"))
        if root not in rotten and consumers and any(n.side == "out" for n in nodes):
            result.append((consumers, _entries(recording, partitions, nodes)))
    return result


def _needed_whole(recording: Recording, partitions: Mapping[str, Partition], unions: Unions[Node]) -> set[Node]:
    """Return what lies behind the outputs, and behind projections of which each channel reads everything."""
    needed: dict[str, Tensor] = {}
    for targets in [recording.outputs, *(x for n, x in recording.inputs.items() if n not in partitions)]:
        for name, mask in everything_behind(recording, targets).items():
            needed[name] = needed[name] | mask if name in needed else mask
    along: dict[tuple[str, int], list[bool]] = {}
    result = set()
    for node in unions:
        name = node.name if node.side == "out" else _tensor_of(node)
        if node.side == "in" or name not in needed:
            continue
        if (name, node.dim) not in along:
            mask = needed[name]
            if node.side != "out":
                mask = mask.view(recording.parameters[name].shape).movedim(node.dim, 0)
                mask = mask.reshape(len(mask), -1).any(1)
            along[name, node.dim] = mask.tolist()
        if along[name, node.dim][node.number]:
            result.add(node)
    return result


def _used_otherwise(model: nn.Module, recording: Recording, partitions: Mapping[str, Partition]) -> set[Node]:
    """Return all of the projections whose weight is tied, or read by something other than their own forward."""
    behind = {id(t): n for n, t in recording.parameters.items()}
    read = set(reached(behind, [*recording.outputs, *(x for xs in recording.inputs.values() for x in xs)]))
    directly = {n.rpartition(".")[0] for n in read} & set(recording.projections)
    tied = _tied(model) & set(recording.projections)
    for names, why in (
        (directly, "whose weight is also used outside of its forward"),
        (tied, "whose weight is tied"),
    ):
        if names:
            logger.info("left whole: %s, %s", sorted(names), why)
    frozen = set()
    for name in directly | tied:
        frozen |= {Node("out", name, f) for f in range(_num_features(recording, name))}
        frozen |= {Node("in", name, u) for u in range(partitions[name].num_units)} if name in partitions else set()
    return frozen


def _num_features(recording: Recording, name: str) -> int:
    segments = output_segments(recording.projections[name])
    return sum(s.size for s in segments if s.tensor != "bias")


def _tied(model: nn.Module) -> set[str]:
    """Return the modules that share a parameter with another module."""
    owners: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].add(name.rpartition(".")[0])
    # One module under two paths, as in models that share layers, ties nothing.
    return {n for names in owners.values() if len({id(model.get_submodule(n)) for n in names}) > 1 for n in names}


def _entries(recording: Recording, partitions: Mapping[str, Partition], nodes: list[Node]) -> Component:
    """Return what a set of nodes takes of each tensor."""
    result: dict[Key, set[int]] = defaultdict(set)

    def add(name: str, segments: list[Segment], feature: int, role_of_weight: Role) -> None:
        for s in segments:
            if s.first_feature <= feature < s.first_feature + s.size:
                role = Role.ALIGNED if s.tensor == "bias" else role_of_weight
                result[Key(f"{name}.{s.tensor}", s.dim, role)].add(s.first_index + feature - s.first_feature)

    for node in nodes:
        if node.side == "in":
            segments = input_segments(recording.projections[node.name])
            for channel in (partitions[node.name].units == node.number).nonzero().flatten().tolist():
                add(node.name, segments, channel, Role.CONSUMER)
        elif node.side == "out":
            module = recording.projections[node.name]
            role = Role.FACTOR if isinstance(module, IMPLANTED) else Role.PRODUCER
            add(node.name, output_segments(module), node.number, role)
        else:
            for tensor, role in _aligned_tensors(recording, node):
                result[Key(tensor, node.dim, role)].add(node.number)
    return {key: sorted(indices) for key, indices in result.items()}


def _tensor_of(node: Node) -> str:
    return f"{node.name}.{node.side}" if node.name else node.side


def _aligned_tensors(recording: Recording, node: Node) -> list[tuple[str, Role]]:
    tensor = _tensor_of(node)
    is_kernel = node.name in recording.grouped and node.side == "weight"
    result = [(tensor, Role.FACTOR if is_kernel else Role.ALIGNED)]
    result += [(name, Role.ALIGNED) for name in recording.followers.get(tensor, ())]
    return [(t, Role.STATISTIC if t.rpartition(".")[2].startswith("running_") else role) for t, role in result]
