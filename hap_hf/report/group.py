"""What happened to one group."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from hap_hf.errors import ConfigError
from hap_hf.names.actions import IMPLANT, KEEP, PRUNE, decode_actions, encode_actions
from hap_hf.names.group import Kind
from hap_hf.report.size import ModelSize
from hap_hf.report.words import counts


@dataclass(frozen=True)
class GroupReport:
    """What happened to one group.

    Args:
        name: Name of the group.
        kind: What one unit is.
        units: Number of units before.
        kept: Number of units kept.
        implanted: Number of units implanted.
        removed: Number of units removed.
        uncertain: Units within two standard errors of the threshold; None where the group was not scored.
        negative: Units with a negative sensitivity; None where the group was not scored.
        before: Size of the group before.
        after: Size of the group after, implants included.
        limit: Sensitivity at which units of this group are cut; None where it was not scored.
        actions: One letter a unit, ``k`` keep, ``i`` implant, ``p`` prune; empty in reports of earlier versions.
    """

    name: str
    kind: Kind
    units: int
    kept: int
    implanted: int
    removed: int
    uncertain: int | None
    negative: int | None
    before: ModelSize
    after: ModelSize
    limit: float | None = None
    actions: str = field(default="", repr=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what ``to_dict`` of a report said of one group."""
        given = {name: value for name, value in values.items() if name != "summary"}  # which follows from the others
        sizes = {name: size_of(values[name]) for name in ("before", "after")}
        actions = decode_actions(values["actions"], values["units"], values["name"]) if values.get("actions") else ""
        return cls(**{**given, **sizes, "kind": Kind(values["kind"]), "actions": actions})

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values, the actions with runs written short."""
        return {**asdict(self), "actions": encode_actions(self.actions), "summary": self.summary}

    @property
    def kept_units(self) -> list[int]:
        """The units that stay as they are, by their number in the model before."""
        return self._units(KEEP)

    @property
    def implanted_units(self) -> list[int]:
        """The units that an implant stands in for."""
        return self._units(IMPLANT)

    @property
    def removed_units(self) -> list[int]:
        """The units that are gone."""
        return self._units(PRUNE)

    def _units(self, action: str) -> list[int]:
        if not self.actions:
            raise ConfigError(f"this report of {self.name} has numbers only, by an earlier version; see hap_hf.plan_of")
        return [unit for unit, letter in enumerate(self.actions) if letter == action]

    @property
    def summary(self) -> str:
        """The heads or the width, as in ``heads 12 -> 7 (+2 implants)``: 7 are kept, 2 implanted, 3 removed."""
        return f"{self.kind.value} {counts(self.units, self.kept, self.implanted)}"


def number_of(value: float | None) -> float:
    """Return a number that JSON had no word for, if it was not finite, as NaN."""
    return math.nan if value is None else value


def size_of(values: Mapping[str, Any]) -> ModelSize:
    """Return a size from its JSON values."""
    return ModelSize(values["params"], number_of(values["macs"]))
