"""A pruning plan: what happens to every unit, in names and numbers, ready for JSON.

A plan needs no scores, no batches and no torch. It is what ``config.json`` carries and what surgery reads.
Plans may come from strangers, so :meth:`PruningPlan.from_dict` trusts nothing.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from hap_hf.errors import PlanFormatError
from hap_hf.names.group import Counter, Group, Kind, Role, Slice
from hap_hf.names.untrusted import MAX_SIZE, dotted_name, fixed_items, items, member, number, real, short, typed

KEEP, IMPLANT, PRUNE = "k", "i", "p"

FORMAT_VERSION = 1
MAX_STAGES = 64
MAX_GROUPS = 100_000
MAX_UNITS = 2**26  # of the whole plan: run-length coding must not turn a small file into a large string
_MAX_DIMS = 8
_MAX_SLICES = 100_000  # of one group: a table shared by all layers ties their heads together
_MAX_PROVENANCE = 64
_RUN = re.compile(r"([0-9]{0,8})([kip])")


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

    def order(self) -> list[int]:
        """Return the surviving units in their new order: kept ones first, then implanted ones."""
        return self.units(KEEP) + self.units(IMPLANT)

    @property
    def params(self) -> int:
        """Parameters left in the group's slices, implants included.

        Other groups that cut the same tensors along another dimension are not looked at.
        """
        return round(self._remaining(lambda s: 0.0 if s.role is Role.STATISTIC else 1.0))

    @property
    def macs(self) -> float:
        """Multiply-accumulates left per sample of the example batch, implants and attention products included."""
        survivors = self.group.num_units - self.actions.count(PRUNE)
        return self._remaining(lambda s: s.uses) + survivors * self.group.core_macs

    def _remaining(self, weight: Callable[[Slice], float]) -> float:
        implanted = self.actions.count(IMPLANT)
        kept = self.actions.count(KEEP)
        shapes = self.group.implant_shapes(implanted)
        total = 0.0
        for s in self.group.slices:
            factored = s.role is Role.PRODUCER and s.tensor in self.ranks
            total += weight(s) * s.entries_per_unit * (kept if factored else kept + implanted)
            if factored and s.tensor in shapes:
                shape = shapes.pop(s.tensor)  # one implant for all slices of the tensor
                total += weight(s) * shape.weights(self.ranks[s.tensor])
        return total


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """Everything that surgery needs to make a model smaller.

    Args:
        stages: Stages applied one after the other; each names tensors as the stage before left them.
        provenance: How the plan came about, as a flat mapping of JSON scalars. Never read by surgery.
    """

    stages: tuple[tuple[GroupPlan, ...], ...]
    provenance: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)

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
        return PruningPlan(self.stages + other.stages, {**self.provenance, **other.provenance})

    @property
    def changes_something(self) -> bool:
        """Whether any unit is removed or implanted."""
        return any(a != KEEP for g in self for a in g.actions)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "format": FORMAT_VERSION,
            "stages": [[_group_to_dict(g) for g in stage] for stage in self.stages],
            "provenance": dict(self.provenance),
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
        stages = items(plan.get("stages"), "plan.stages", MAX_STAGES)
        provenance = typed(plan.get("provenance", {}), dict, "plan.provenance")
        if len(provenance) > _MAX_PROVENANCE or not all(
            isinstance(k, str) and (v is None or isinstance(v, str) or (isinstance(v, (int, float)) and abs(v) < 1e300))
            for k, v in provenance.items()
        ):
            raise PlanFormatError(
                f"plan.provenance must be a flat mapping of at most {_MAX_PROVENANCE} finite JSON scalars"
            )
        room = MAX_UNITS
        parsed: list[tuple[GroupPlan, ...]] = []
        for i, stage in enumerate(stages):
            groups: dict[str, GroupPlan] = {}
            for j, entry in enumerate(items(stage, f"plan.stages[{i}]", MAX_GROUPS)):
                group = _group_from_dict(entry, f"plan.stages[{i}][{j}]", room)
                room -= group.group.num_units
                if group.group.name in groups:
                    raise PlanFormatError(f"plan.stages[{i}] has two groups of the name {short(group.group.name)}")
                groups[group.group.name] = group
            parsed.append(tuple(groups.values()))
        return cls(tuple(parsed), dict(provenance))


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
    if (IMPLANT in actions) != bool(ranks):
        raise PlanFormatError(f"{where} must have ranks exactly when units are implanted")
    shapes = group.implant_shapes(actions.count(IMPLANT))
    for tensor, rank in ranks.items():
        if tensor not in shapes:
            raise PlanFormatError(f"{where}.ranks names {short(tensor)}, which is no producer of the group")
        number(rank, f"{where}.ranks[{tensor!r}]", 1, shapes[tensor].max_rank)
    return GroupPlan(group, actions, dict(ranks))


def _slice_from_list(data: object, num_units: int, where: str) -> Slice:
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


def encode_actions(actions: str) -> str:
    """Return ``actions`` with runs of two or more written as a count and a letter, as in ``"3kip12k"``."""
    runs = ((letter, len(list(run))) for letter, run in groupby(actions))
    return "".join(f"{count}{letter}" if count > 1 else letter for letter, count in runs)


def decode_actions(data: object, num_units: int, where: str = "plan") -> str:
    """Return the letters that ``encode_actions`` wrote.

    Args:
        data: The coded string.
        num_units: Number of letters expected; nothing longer is ever built.
        where: Place in the plan, for the message.

    Returns:
        One letter for each unit.

    Raises:
        PlanFormatError: If the string is malformed or does not hold exactly ``num_units`` letters.
    """
    text = typed(data, str, f"{where}.actions")
    parts, total, position = [], 0, 0
    while position < len(text):
        match = _RUN.match(text, position)
        if match is None:
            raise PlanFormatError(
                f"{where}.actions is malformed at character {position}: {text[position : position + 20]!r}"
            )
        count = int(match[1] or 1)
        total += count
        if count == 0 or total > num_units:
            break
        parts.append(match[2] * count)
        position = match.end()
    if total != num_units or position < len(text):
        raise PlanFormatError(f"{where}.actions must describe exactly {num_units} units")
    return "".join(parts)
