"""A pruning plan: what happens to every unit, in names and numbers, ready for JSON.

A plan needs no scores, no batches and no torch. It is what ``config.json`` carries and what surgery reads.
Plans may come from strangers, so :meth:`PruningPlan.from_dict` trusts nothing.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
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
    json_object,
    member,
    number,
    real,
    short,
    typed,
)

FORMAT_VERSION = 2
MAX_STAGES = 64
MAX_GROUPS = 100_000
MAX_UNITS = 2**26  # of the whole plan: run-length coding must not turn a small file into a large string
_MAX_DIMS = 8
_MAX_SLICES = 100_000  # of one group: a table shared by all layers ties their heads together
MAX_PROVENANCE = 4096  # values of one stage


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


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """Everything that surgery needs to make a model smaller.

    Args:
        stages: Stages applied one after the other; each names tensors as the stage before left them.
        provenance: How each stage came about, as JSON values. It is there for people to read: nothing here does.
    """

    stages: tuple[tuple[GroupPlan, ...], ...]
    provenance: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Give every stage a provenance, if an empty one.

        Raises:
            ValueError: If there are more of them than stages.
        """
        missing = len(self.stages) - len(self.provenance)
        if missing < 0:
            raise ValueError(f"expected a provenance for each of {len(self.stages)} stages, got {len(self.provenance)}")
        if not all(isinstance(origin, Mapping) for origin in self.provenance):
            raise ValueError(f"expected a mapping for each stage as provenance, got {self.provenance!r:.80}")
        object.__setattr__(self, "provenance", (*self.provenance, *({} for _ in range(missing))))

    def __iter__(self) -> Iterator[GroupPlan]:
        """Iterate over the groups of all stages.

        Returns:
            The iterator.
        """
        return (g for stage in self.stages for g in stage)

    def then(self, other: "PruningPlan") -> "PruningPlan":
        """Return the plan that does this one first and ``other`` to its result.

        Args:
            other: A plan made for the model that this plan leaves behind.

        Returns:
            The composed plan; applying it equals applying both in turn.
        """
        return PruningPlan(self.stages + other.stages, self.provenance + other.provenance)

    def renamed(self, rename: Callable[[str], str]) -> "PruningPlan":
        """Return the same plan for a model in which modules and tensors have other names.

        Args:
            rename: Maps a dotted name to the other one.

        Returns:
            The plan with the same stages and provenance.
        """
        return PruningPlan(tuple(tuple(g.renamed(rename) for g in stage) for stage in self.stages), self.provenance)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "format": FORMAT_VERSION,
            "stages": [
                {"groups": [_group_to_dict(g) for g in stage], "provenance": copy.deepcopy(dict(origin))}
                for stage, origin in zip(self.stages, self.provenance, strict=True)
            ],
        }

    @classmethod
    def from_dict(cls, data: object) -> "PruningPlan":
        """Return the plan that ``to_dict`` described, after checking every value of it.

        Args:
            data: Parsed JSON, from a source that need not be trusted.

        Returns:
            The plan. That it fits a model is checked when it is applied.

        Raises:
            PlanFormatError: If anything is missing, of the wrong type, out of range or of a newer format.
        """
        plan = typed(data, dict, "plan")
        version = number(plan.get("format"), "plan.format", 1, MAX_SIZE)
        if version > FORMAT_VERSION:
            raise PlanFormatError(
                f"the plan has format {version}, this hap_hf reads up to {FORMAT_VERSION}; upgrade hap_hf"
            )
        entries = items(plan.get("stages"), "plan.stages", MAX_STAGES)
        if version == 1:  # stages were lists of groups, with one provenance for all of them
            origins: list[object] = [*({} for _ in entries[1:]), plan.get("provenance", {})]
            groups_of = [(entry, f"plan.stages[{i}]") for i, entry in enumerate(entries)]
        else:
            stages = [typed(entry, dict, f"plan.stages[{i}]") for i, entry in enumerate(entries)]
            origins = [stage.get("provenance", {}) for stage in stages]
            groups_of = [(stage.get("groups"), f"plan.stages[{i}].groups") for i, stage in enumerate(stages)]
        provenance = [
            json_object(origin, f"the provenance of plan.stages[{i}]", MAX_PROVENANCE)
            for i, origin in enumerate(origins[: len(entries)])
        ]
        # For the whole plan: many groups, each of a legal size, would add up.
        room = MAX_UNITS
        parsed: list[tuple[GroupPlan, ...]] = []
        for stage, where in groups_of:
            found: dict[str, GroupPlan] = {}
            for j, entry in enumerate(items(stage, where, MAX_GROUPS)):
                group = _group_from_dict(entry, f"{where}[{j}]", room)
                room -= group.group.num_units
                # Scores, reports and decisions know groups by their names.
                if group.group.name in found:
                    raise PlanFormatError(f"{where} has two groups of the name {short(group.group.name)}")
                found[group.group.name] = group
            parsed.append(tuple(found.values()))
        return cls(tuple(parsed), tuple(provenance))


def _group_to_dict(plan: GroupPlan) -> dict[str, Any]:
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


def _group_from_dict(data: object, where: str, most_units: int) -> GroupPlan:
    """Return one group and its actions, of at most ``most_units`` units, after checking every value."""
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
