"""Which units of different projections are one and the same: they share a source or are read together."""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from hap_hf.discovery.dependence import SHARED, everything_behind, reached
from hap_hf.discovery.partition import Partition
from hap_hf.discovery.record import Recording
from hap_hf.discovery.unions import Unions
from hap_hf.discovery.whole import LeftWhole
from hap_hf.layers.kind import Segment
from hap_hf.layers.projection import known, spatial_dims
from hap_hf.names.group import Role


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
        model: The model that was recorded; only asked which modules share parameters.
        recording: Its cut-open forward pass.
        partitions: Partitions of the inputs of projections, in the order in which they run.

    Returns:
        For each unit the projections that read it and what goes with it; units of one consumer in ascending order.
    """
    unions: Unions[Node] = Unions()
    frozen: set[Node] = set()
    for p in partitions.values():
        for unit in range(p.num_units):
            # Naming a unit makes a set of it, and sets come out in the order of naming: units of a consumer ascend.
            unions.root(Node("in", p.consumer, unit))
        for source, codes in p.columns.items():
            for feature, unit in enumerate(codes.tolist()):
                if unit >= 0:
                    unions.join(Node("in", p.consumer, unit), Node("out", source, feature))
                elif unit == SHARED:  # several units need it, so it outlives any of them
                    frozen.add(Node("out", source, feature))
        for parameter, (dim, codes) in p.parameters.items():
            owner, _, leaf = parameter.rpartition(".")
            for index, unit in enumerate(codes.tolist()):
                if unit >= 0:
                    unions.join(Node("in", p.consumer, unit), Node(leaf, owner, index, dim))
        if p.scattered:
            recording.left_whole.append(LeftWhole((p.consumer,), "units of its input are scattered in a parameter"))
            frozen |= {Node("in", p.consumer, unit) for unit in p.scattered}
    frozen |= _used_otherwise(model, recording, partitions)
    frozen |= _needed_whole(recording, partitions, unions)
    # Joined nodes go together or not at all: one that must stay keeps its whole set.
    rotten = {unions.root(node) for node in frozen}
    result = []
    for root, nodes in unions.sets().items():
        consumers = tuple(dict.fromkeys(n.name for n in nodes if n.side == "in"))
        # Without an output of a projection there is nothing that makes the unit, only a parameter that is read.
        if root not in rotten and consumers and any(n.side == "out" for n in nodes):
            result.append((consumers, _entries(recording, partitions, nodes)))
    return result


def _needed_whole(recording: Recording, partitions: Mapping[str, Partition], unions: Unions[Node]) -> set[Node]:
    """Return what lies behind the outputs, and behind projections of which each channel reads everything."""
    # A layer without a partition mixes all that it reads, so nothing behind it can go. One backward pass from all of
    # them: random cotangents do not cancel, and it does not matter which of them needs an entry.
    mixing = [x for n, inputs in recording.inputs.items() if n not in partitions for x in inputs]
    needed = everything_behind(recording, [*recording.outputs, *mixing])
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
                mask = mask.reshape(len(mask), -1).any(1)  # [shape[dim]]: needed if any entry at the index is
            along[name, node.dim] = mask.tolist()
        if along[name, node.dim][node.number]:
            result.add(node)
    return result


def _used_otherwise(model: nn.Module, recording: Recording, partitions: Mapping[str, Partition]) -> set[Node]:
    """Return all of the projections whose weight is tied, or read by something other than their own forward."""
    # A projection that is cut open does not touch its parameters. Those that the graph still leads to are read by
    # something else, which would find them smaller after pruning.
    behind = {id(t): n for n, t in recording.parameters.items()}
    read = set(reached(behind, [*recording.outputs, *(x for xs in recording.inputs.values() for x in xs)]))
    directly = {n.rpartition(".")[0] for n in read} & set(recording.projections)
    tied = _tied(model) & set(recording.projections)
    for names, why in (
        (directly, "the weight is also used outside of the layer's forward"),
        (tied, "the weight is tied to another layer's"),
    ):
        if names:
            recording.left_whole.append(LeftWhole(tuple(sorted(names)), why))
    frozen = set()
    for name in directly | tied:
        frozen |= {Node("out", name, f) for f in range(_num_features(recording, name))}
        frozen |= {Node("in", name, u) for u in range(partitions[name].num_units)} if name in partitions else set()
    return frozen


def _num_features(recording: Recording, name: str) -> int:
    """Return the number of output features of a projection, those of an implant included."""
    module = recording.projections[name]
    segments = known(module).outputs(module)
    return sum(s.size for s in segments if s.tensor != "bias")


def _tied(model: nn.Module) -> set[str]:
    """Return the modules that share a parameter with another module."""
    owners: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].add(name.rpartition(".")[0])
    # One module under two paths, as in models that share layers, ties nothing.
    return {n for names in owners.values() if len({id(model.get_submodule(n)) for n in names}) > 1 for n in names}


def _entries(recording: Recording, partitions: Mapping[str, Partition], nodes: list[Node]) -> Component:
    """Return which indices of each tensor a set of nodes takes with it."""
    result: dict[Key, set[int]] = defaultdict(set)

    def add(name: str, segments: list[Segment], feature: int, role_of_weight: Role) -> None:
        for s in segments:
            if s.first_feature <= feature < s.first_feature + s.size:
                role = Role.ALIGNED if s.tensor == "bias" else role_of_weight
                result[Key(f"{name}.{s.tensor}", s.dim, role)].add(s.first_index + feature - s.first_feature)

    for node in nodes:
        if node.side == "in":
            module = recording.projections[node.name]
            segments = known(module).inputs(module)
            for channel in (partitions[node.name].units == node.number).nonzero().flatten().tolist():
                add(node.name, segments, channel, Role.CONSUMER)
        elif node.side == "out":
            module = recording.projections[node.name]
            # A kernel of one tap is its own implant: where that is allowed for is where implants are counted.
            pointwise = spatial_dims(module) > 0 and module.get_parameter("weight").shape[2:].numel() == 1
            could = known(module).takes_implant(module) or (pointwise and not known(module).has_implant)
            role = Role.PRODUCER if could else Role.FACTOR
            add(node.name, known(module).outputs(module), node.number, role)
        else:
            for tensor, role in _aligned_tensors(recording, node):
                result[Key(tensor, node.dim, role)].add(node.number)
    return {key: sorted(indices) for key, indices in result.items()}


def _tensor_of(node: Node) -> str:
    return f"{node.name}.{node.side}" if node.name else node.side


def _aligned_tensors(recording: Recording, node: Node) -> list[tuple[str, Role]]:
    """Return the tensor that a parameter's node lies in, and those that follow it, with their roles."""
    tensor = _tensor_of(node)
    # It makes the unit's output, as the rows of a projection do, though it was not cut open and is a parameter here.
    is_kernel = node.name in recording.grouped and node.side == "weight"
    result = [(tensor, Role.FACTOR if is_kernel else Role.ALIGNED)]
    result += [(name, Role.ALIGNED) for name in recording.followers.get(tensor, ())]
    return [(t, Role.STATISTIC if t.rpartition(".")[2].startswith("running_") else role) for t, role in result]
