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
        checked("name", values["name"], str)
        for name in ("units", "kept", "implanted", "removed"):
            checked(name, values[name], int)
        for name, kind in (("uncertain", int), ("negative", int), ("limit", float)):
            checked(name, values.get(name), kind, None)
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


def checked(name: str, value: Any, kind: type, *other: None) -> Any:
    """Return a value of JSON that is of a kind.

    Args:
        name: What it is called.
        value: The value.
        kind: The kind; whole numbers are numbers, too.
        *other: Other values that it may have.

    Returns:
        The value.

    Raises:
        ConfigError: If it is of another kind.
    """
    kinds = (int, float) if kind is float else (kind,)
    if (isinstance(value, kinds) and not isinstance(value, bool)) or value in other:
        return value
    raise ConfigError(f"{name} must be {kind.__name__}, got {value!r}")


def number_of(value: float | None) -> float:
    """Return a number that JSON had no word for, if it was not finite, as NaN."""
    return math.nan if value is None else value


def size_of(values: Mapping[str, Any]) -> ModelSize:
    """Return a size from its JSON values."""
    params, macs = checked("params", values["params"], int), checked("macs", values["macs"], float, None)
    return ModelSize(params, number_of(macs))
