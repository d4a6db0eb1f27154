"""A pruning plan: what happens to every unit, in names and numbers, ready for JSON.

A plan needs no scores, no batches and no torch. It is what ``config.json`` carries and what surgery reads.
Plans may come from strangers, so :meth:`PruningPlan.from_dict` trusts nothing.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hap_hf.errors import PlanFormatError
from hap_hf.names.bypass import BypassPlan
from hap_hf.names.group_plan import GroupPlan, group_from_dict, group_to_dict
from hap_hf.names.untrusted import MAX_SIZE, items, json_object, number, short, typed

__all__ = ["FORMAT_VERSION", "MAX_GROUPS", "MAX_PROVENANCE", "MAX_STAGES", "MAX_UNITS", "GroupPlan", "PruningPlan"]

FORMAT_VERSION = 3
MAX_STAGES = 64
MAX_GROUPS = 100_000
MAX_UNITS = 2**26  # of the whole plan: run-length coding must not turn a small file into a large string
MAX_PROVENANCE = 4096  # values of one stage


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """Everything that surgery needs to make a model smaller.

    Args:
        stages: Stages applied one after the other; each names tensors as the stage before left them.
        provenance: How each stage came about, as JSON values. It is there for people to read: nothing here does.
        bypasses: Low-rank paths that each stage puts beside blocks, once it has cut them.
    """

    stages: tuple[tuple[GroupPlan, ...], ...]
    provenance: tuple[Mapping[str, Any], ...] = ()
    bypasses: tuple[tuple[BypassPlan, ...], ...] = ()

    def __post_init__(self) -> None:
        """Give every stage a provenance and bypasses, if empty ones.

        Raises:
            ValueError: If there are more of them than stages.
        """
        missing = len(self.stages) - len(self.provenance)
        if missing < 0:
            raise ValueError(f"expected a provenance for each of {len(self.stages)} stages, got {len(self.provenance)}")
        if not all(isinstance(origin, Mapping) for origin in self.provenance):
            raise ValueError(f"expected a mapping for each stage as provenance, got {self.provenance!r:.80}")
        object.__setattr__(self, "provenance", (*self.provenance, *({} for _ in range(missing))))
        missing = len(self.stages) - len(self.bypasses)
        if missing < 0:
            raise ValueError(f"expected bypasses for each of {len(self.stages)} stages, got {len(self.bypasses)}")
        object.__setattr__(self, "bypasses", (*self.bypasses, *(() for _ in range(missing))))

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
        return PruningPlan(
            self.stages + other.stages, self.provenance + other.provenance, self.bypasses + other.bypasses
        )

    def since(self, done: int) -> "PruningPlan":
        """Return what is left to do.

        Args:
            done: Number of stages that were done.

        Returns:
            The plan without these.
        """
        return PruningPlan(self.stages[done:], self.provenance[done:], self.bypasses[done:])

    def renamed(self, rename: Callable[[str], str]) -> "PruningPlan":
        """Return the same plan for a model in which modules and tensors have other names.

        Args:
            rename: Maps a dotted name to the other one.

        Returns:
            The plan with the same stages and provenance.
        """
        stages = tuple(tuple(g.renamed(rename) for g in stage) for stage in self.stages)
        bypasses = tuple(tuple(b.renamed(rename) for b in stage) for stage in self.bypasses)
        return PruningPlan(stages, self.provenance, bypasses)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "format": FORMAT_VERSION,
            "stages": [
                {
                    "groups": [group_to_dict(g) for g in stage],
                    "bypasses": [b.to_list() for b in bypasses],
                    "provenance": copy.deepcopy(dict(origin)),
                }
                for stage, bypasses, origin in zip(self.stages, self.bypasses, self.provenance, strict=True)
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
        written: list[object]
        if version == 1:  # stages were lists of groups, with one provenance for all of them
            origins: list[object] = [*({} for _ in entries[1:]), plan.get("provenance", {})]
            groups_of = [(entry, f"plan.stages[{i}]") for i, entry in enumerate(entries)]
            written = [[] for _ in entries]
        else:
            stages = [typed(entry, dict, f"plan.stages[{i}]") for i, entry in enumerate(entries)]
            origins = [stage.get("provenance", {}) for stage in stages]
            groups_of = [(stage.get("groups"), f"plan.stages[{i}].groups") for i, stage in enumerate(stages)]
            written = [stage.get("bypasses", []) for stage in stages]  # of format 3
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
                group = group_from_dict(entry, f"{where}[{j}]", room)
                room -= group.group.num_units
                # Scores, reports and decisions know groups by their names.
                if group.group.name in found:
                    raise PlanFormatError(f"{where} has two groups of the name {short(group.group.name)}")
                found[group.group.name] = group
            parsed.append(tuple(found.values()))
        bypasses = tuple(_bypasses(entry, f"plan.stages[{i}].bypasses") for i, entry in enumerate(written))
        return cls(tuple(parsed), tuple(provenance), bypasses)


def _bypasses(data: object, where: str) -> tuple[BypassPlan, ...]:
    """Return the bypasses of a stage after checking every value."""
    found = tuple(BypassPlan.from_list(b, f"{where}[{i}]") for i, b in enumerate(items(data, where, MAX_GROUPS)))
    if len({b.exit for b in found}) < len(found):
        raise PlanFormatError(f"{where} has two bypasses that end at one layer")
    return found
