"""What happens to the units of one group, and how that is written down and read from a source not to be trusted."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hap_hf.errors import PlanFormatError
from hap_hf.names.actions import IMPLANT, KEEP, PRUNE, decode_actions, encode_actions
from hap_hf.names.group import Counter, Group, Kind, Role, Slice
from hap_hf.names.untrusted import (
    MAX_SIZE,
    dotted_name,
    fixed_items,
    items,
    member,
    number,
    real,
    short,
    typed,
)

_MAX_DIMS = 8
_MAX_SLICES = 100_000  # of one group: a table shared by all layers ties their heads together


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """What happens to the units of one group.

    Args:
        group: The units and where they live.
        actions: One letter a unit: ``k`` keep, ``i`` implant, ``p`` prune.
        ranks: Rank of the implant for each producer tensor that gets one, by tensor name; 1 for convolutions. Empty
            where nothing is implanted.
    """

    group: Group
    actions: str
    ranks: Mapping[str, int] = field(default_factory=dict)

    def units(self, action: str) -> list[int]:
        """Return the units with ``action``, in ascending order."""
        return [u for u, a in enumerate(self.actions) if a == action]

    def without(self, modules: Collection[str]) -> "GroupPlan":
        """Return the plan without what lies in some modules, or as it is where nothing else would be left."""

        def stays(name: str) -> bool:
            return name.rpartition(".")[0] not in modules

        slices = tuple(s for s in self.group.slices if stays(s.tensor))
        counters = tuple(c for c in self.group.counters if stays(c.attribute))
        ranks = {tensor: rank for tensor, rank in self.ranks.items() if stays(tensor)}
        return (
            replace(self, group=replace(self.group, slices=slices, counters=counters), ranks=ranks) if slices else self
        )

    def order(self) -> list[int]:
        """Return the surviving units in their new order: kept ones first, then implanted ones."""
        return self.units(KEEP) + self.units(IMPLANT)

    @property
    def kept(self) -> int:
        """Number of units that stay as they are."""
        return self.actions.count(KEEP)

    @property
    def implanted(self) -> int:
        """Number of units that an implant stands in for."""
        return self.actions.count(IMPLANT)

    @property
    def pruned(self) -> int:
        """Number of units that go."""
        return self.actions.count(PRUNE)

    @property
    def survivors(self) -> int:
        """Number of units that are there afterwards, implanted ones included."""
        return self.group.num_units - self.pruned

    def renamed(self, rename: Callable[[str], str]) -> "GroupPlan":
        """Return the same plan for a model in which modules and tensors have other names.

        Args:
            rename: Maps a dotted name to the other one.

        Returns:
            The plan with the same units and actions.
        """
        group = replace(
            self.group,
            name=rename(self.group.name),
            slices=tuple(replace(s, tensor=rename(s.tensor)) for s in self.group.slices),
            counters=tuple(replace(c, attribute=rename(c.attribute)) for c in self.group.counters),
        )
        return GroupPlan(group, self.actions, {rename(name): rank for name, rank in self.ranks.items()})


def group_to_dict(plan: GroupPlan) -> dict[str, Any]:
    """Return what happens to a group as plain JSON values."""
    group = plan.group
    return {
        "name": group.name,
        "kind": group.kind.value,
        "units": group.num_units,
        "slices": [[s.tensor, list(s.shape), s.dim, s.offset, s.width, s.role.value, s.uses] for s in group.slices],
        "counters": [[c.attribute, c.width] for c in group.counters],
        "core_macs": group.core_macs,
        "may_be_empty": group.may_be_empty,
        "actions": encode_actions(plan.actions),
        "ranks": dict(plan.ranks),
    }


def group_from_dict(data: object, where: str, most_units: int) -> GroupPlan:
    """Return what :func:`group_to_dict` described, after checking every value of it.

    Args:
        data: Parsed JSON.
        where: Place in the plan, for messages.
        most_units: Largest number of units.

    Returns:
        The group and its actions.

    Raises:
        PlanFormatError: If anything is missing, of the wrong type or out of range.
    """
    entry = typed(data, dict, where)
    num_units = number(entry.get("units"), f"{where}.units", 1, most_units)
    name = typed(entry.get("name"), str, f"{where}.name")
    if len(name) > 1000:
        raise PlanFormatError(f"{where}.name has {len(name)} characters, at most 1000 are allowed")
    if not name.isprintable():  # it appears in messages, and must neither break nor colour a terminal
        raise PlanFormatError(f"{where}.name must consist of printable characters, got {short(name)}")
    kind = member(entry.get("kind"), Kind, f"{where}.kind")
    slices = tuple(
        _slice_from_list(s, num_units, f"{where}.slices[{i}]")
        for i, s in enumerate(items(entry.get("slices"), f"{where}.slices", _MAX_SLICES))
    )
    if not slices:  # nothing would bound the number of units
        raise PlanFormatError(f"{where}.slices must name at least one tensor")
    counters = []
    for i, c in enumerate(items(entry.get("counters", []), f"{where}.counters", _MAX_SLICES)):
        attribute, width = fixed_items(c, 2, f"{where}.counters[{i}]")
        counters.append(
            Counter(dotted_name(attribute, where), number(width, f"{where}.counters[{i}] width", 1, MAX_SIZE))
        )
    core_macs = real(entry.get("core_macs", 0.0), f"{where}.core_macs")
    may_be_empty = typed(entry.get("may_be_empty", False), bool, f"{where}.may_be_empty")
    group = Group(name, kind, num_units, slices, tuple(counters), core_macs, may_be_empty)
    actions = decode_actions(entry.get("actions"), num_units, where)
    ranks = typed(entry.get("ranks", {}), dict, f"{where}.ranks")
    # Otherwise there would be units of which neither the weight nor an implant has the rows.
    if (IMPLANT in actions) != bool(ranks):
        raise PlanFormatError(f"{where} must have ranks exactly when units are implanted")
    shapes = group.implant_shapes(actions.count(IMPLANT))
    for tensor, rank in ranks.items():
        if tensor not in shapes:
            raise PlanFormatError(f"{where}.ranks names {short(tensor)}, which is no producer of the group")
        number(rank, f"{where}.ranks[{tensor!r}]", 1, shapes[tensor].max_rank)
    return GroupPlan(group, actions, dict(ranks))


def _slice_from_list(data: object, num_units: int, where: str) -> Slice:
    """Return one slice, which has room for all units of its group, after checking every value."""
    tensor, shape, dim, offset, width, role, uses = fixed_items(data, 7, where)
    sizes = tuple(number(n, f"{where} shape", 0, MAX_SIZE) for n in items(shape, f"{where} shape", _MAX_DIMS))
    checked_dim = number(dim, f"{where} dim", 0, max(len(sizes) - 1, 0))
    checked_offset = number(offset, f"{where} offset", 0, MAX_SIZE)
    checked_width = number(width, f"{where} width", 1, MAX_SIZE)
    if not sizes or checked_offset + num_units * checked_width > sizes[checked_dim]:
        raise PlanFormatError(
            f"{where}: {num_units} units of width {checked_width} from index {checked_offset} on do not fit "
            f"dimension {checked_dim} of shape {list(sizes)}"
        )
    return Slice(
        dotted_name(tensor, where),
        sizes,
        checked_dim,
        checked_offset,
        checked_width,
        member(role, Role, f"{where} role"),
        real(uses, f"{where} uses"),
    )
