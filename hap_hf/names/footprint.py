"""What groups cost together: a tensor that two groups cut along two dimensions is counted once."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from hap_hf.names.group import Group, ImplantShape, Role, Slice
from hap_hf.names.plan import IMPLANT, KEEP, PRUNE, GroupPlan


class Footprint(NamedTuple):
    """What is left of the slices of some groups.

    Args:
        params: Number of parameters.
        macs: Multiply-accumulates per sample of the example batch.
    """

    params: float
    macs: float

    def __sub__(self, other: "Footprint") -> "Footprint":
        """Return the difference of both numbers."""
        return Footprint(self.params - other.params, self.macs - other.macs)


Cut = tuple[Slice, GroupPlan]
"""A slice and what happens to its units."""


def footprint(plans: Iterable[GroupPlan]) -> Footprint:
    """Return what some groups cost together after a plan; entries that are in no slice do not count.

    Args:
        plans: Plans of groups of one stage.

    Returns:
        Parameters and multiply-accumulates, implants and attention products included.
    """
    cuts: dict[str, list[Cut]] = defaultdict(list)
    macs = 0.0
    for g in plans:
        macs += core_macs(g)
        for s in g.group.slices:
            cuts[s.tensor].append((s, g))
    each = [tensor_footprint(pairs) for pairs in cuts.values()]
    return Footprint(sum(f.params for f in each), macs + sum(f.macs for f in each))


def whole_footprint(groups: Iterable[Group]) -> Footprint:
    """Return what some groups cost together before anything is cut.

    Args:
        groups: The groups.

    Returns:
        Parameters and multiply-accumulates.
    """
    return footprint(GroupPlan(g, KEEP * g.num_units) for g in groups)


def core_macs(plan: GroupPlan) -> float:
    """Return the multiply-accumulates left outside of the slices of a group.

    Args:
        plan: The group's plan.

    Returns:
        Multiply-accumulates per sample.
    """
    return plan.group.core_macs * (plan.group.num_units - plan.actions.count(PRUNE))


def tensor_footprint(cuts: Sequence[Cut]) -> Footprint:
    """Return what is left of one tensor, without the entries that no slice holds.

    Args:
        cuts: Every slice of the tensor, with the plan of its group.

    Returns:
        Parameters and multiply-accumulates, those of its implant included.
    """
    shape, tensor = cuts[0][0].shape, cuts[0][0].tensor
    kept, inert = list(shape), list(shape)
    factored: dict[int, int] = {}
    rank = 0
    for s, g in cuts:
        inert[s.dim] -= s.width * g.group.num_units
        kept[s.dim] -= s.width * g.actions.count(PRUNE)
        if s.role is Role.PRODUCER and tensor in g.ranks:
            rows = s.width * g.actions.count(IMPLANT)
            kept[s.dim] -= rows
            factored[s.dim] = factored.get(s.dim, 0) + rows
            rank = max(rank, g.ranks[tensor])
    entries = prod(kept) - prod(inert)
    for dim, rows in factored.items():
        taps = prod(shape[2:]) if len(shape) > 2 else None
        entries += ImplantShape(rows, kept[1 - dim], taps).weights(rank) if rows else 0
    counts = cuts[0][0].role is not Role.STATISTIC
    return Footprint(entries if counts else 0, entries * max(s.uses for s, _ in cuts))


def cuts_by_tensor(groups: Sequence[Group]) -> Mapping[str, list[tuple[Slice, int]]]:
    """Return the slices of each tensor with the positions of their groups.

    Args:
        groups: The groups.

    Returns:
        Slices and positions by tensor name.
    """
    result: dict[str, list[tuple[Slice, int]]] = defaultdict(list)
    for index, group in enumerate(groups):
        for s in group.slices:
            result[s.tensor].append((s, index))
    return result
