"""What several amounts leave, as values: kept in a file, drawn, shown."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from hap_hf.errors import ConfigError
from hap_hf.names.group import Kind
from hap_hf.report.files import read_json, write_whole

SWEEP_FILE = "sweep.json"
LOSS = "loss"


@dataclass(frozen=True)
class TradeoffPoint:
    """One amount.

    Args:
        keep: Share of the prunable part that was asked for; 1 for the dense model.
        params: Parameters of the whole model.
        macs: Multiply-accumulates per sample.
        loss: Mean loss on the batches.
        value: The metric, or the loss where there is none.
        milliseconds: Time of one batch, the shortest of several; None where it was not measured.
        predicted: Sum of the sensitivities of the units that went; None for the dense model.
        actions: What happens to the units of each group, one letter a unit with runs written short.
    """

    keep: float
    params: int
    macs: float
    loss: float
    value: float
    milliseconds: float | None = None
    predicted: float | None = None
    actions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the point that JSON values describe, each checked.

        Args:
            values: Parsed JSON.

        Returns:
            The point.

        Raises:
            ConfigError: If it is none.
        """
        point = cls(**values)
        always = (point.keep, point.params, point.macs, point.loss, point.value)
        sometimes = [v for v in (point.milliseconds, point.predicted) if v is not None]
        texts = [*point.actions.keys(), *point.actions.values()]
        if not (all(map(_is_number, (*always, *sometimes))) and all(isinstance(text, str) for text in texts)):
            raise ConfigError(f"expected the values of an amount, numbers and actions, got others; read {SWEEP_FILE}")
        return point


@dataclass(frozen=True)
class TradeoffGroup:
    """What can be removed, and how sensitive the loss is to it.

    Args:
        name: Name of the group.
        kind: What one unit is.
        units: Number of units.
        sensitivity: Of each head, when it was scored; empty of other kinds, of which there are too many.
        error: Standard error of each sensitivity.
    """

    name: str
    kind: str
    units: int
    sensitivity: tuple[float, ...] = ()
    error: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the group that JSON values describe, each checked.

        Args:
            values: Parsed JSON.

        Returns:
            The group.

        Raises:
            ConfigError: If it is none.
        """
        given = {**values, "sensitivity": tuple(values["sensitivity"]), "error": tuple(values["error"])}
        group = cls(**given)
        strings = isinstance(group.name, str) and group.kind in {kind.value for kind in Kind}
        numbers = all(_is_number(v) for v in (*group.sensitivity, *group.error))
        lengths = {len(group.sensitivity), len(group.error)} <= {0, group.units}
        if not (strings and numbers and lengths and type(group.units) is int and 0 < group.units < 2**24):
            raise ConfigError(f"expected the values of a group of units, got others; read {SWEEP_FILE}")
        return group


@dataclass(frozen=True)
class Tradeoff:
    """What several amounts leave.

    Args:
        points: The dense model, then each amount.
        metric: What ``value`` is.
        higher_is_better: Whether a larger value is a better one.
        counted_in: What the share is a share of, ``params`` or ``macs``.
        machine: Where the time was measured.
        groups: What can be removed; empty in files of earlier versions.
        subject: Name of the model, if it has one.
    """

    points: tuple[TradeoffPoint, ...]
    metric: str = LOSS
    higher_is_better: bool = False
    counted_in: str = "params"
    machine: str = ""
    groups: tuple[TradeoffGroup, ...] = ()
    subject: str = ""

    @property
    def dense(self) -> TradeoffPoint:
        """The dense model."""
        return self.points[0]

    def chosen(self, tolerance: float = 0.02) -> TradeoffPoint | None:
        """Return the smallest model that is nearly as good as the dense one.

        Args:
            tolerance: How much worse it may be, as a share of the dense model's value.

        Returns:
            The point, or None where all are worse.
        """
        room = tolerance * abs(self.dense.value)
        sign = 1 if self.higher_is_better else -1
        good = [p for p in self.points[1:] if sign * (self.dense.value - p.value) <= room]
        return min(good, key=lambda p: (p.params, p.macs), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {"format": 1, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the sweep that ``to_dict`` described.

        Args:
            values: Parsed JSON.

        Returns:
            The sweep.

        Raises:
            ConfigError: If it is none.
        """
        try:
            given = {name: value for name, value in values.items() if name not in {"format", "points", "groups"}}
            if values["format"] != 1:
                raise ConfigError(f"expected a sweep of format 1, got {values['format']!r}; upgrade hap_hf")
            groups = tuple(TradeoffGroup.from_dict(g) for g in values.get("groups", ()))
            found = cls(tuple(TradeoffPoint.from_dict(p) for p in values["points"]), groups=groups, **given)
        except KeyError as error:
            raise ConfigError(f"expected the values of a sweep, got some without {error}; read {SWEEP_FILE}") from error
        except (TypeError, AttributeError) as error:
            raise ConfigError(f"expected the values of a sweep, got others ({error}); read {SWEEP_FILE}") from error
        texts = (found.metric, found.counted_in, found.machine, found.subject)
        if not (found.points and all(isinstance(text, str) for text in texts)):
            raise ConfigError(f"expected the values of a sweep, with points and texts, got others; read {SWEEP_FILE}")
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; a reader never sees half a file.

        Args:
            path: The file.

        Raises:
            ConfigError: If a loss or value is no number, which JSON has no word for.
        """
        for point in self.points:
            numbers = (point.loss, point.value, point.predicted or 0.0)
            if not all(map(_is_number, numbers)):
                raise ConfigError(
                    f"expected numbers in a sweep, and at {point.keep:g} loss, {self.metric} and predicted rise are "
                    f"{', '.join(f'{x:g}' for x in numbers)}; leave that amount out"
                )
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        write_whole(Path(path), partial(Path.write_text, data=text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the sweep that :meth:`save` wrote.

        Args:
            path: The file.

        Returns:
            The sweep.

        Raises:
            ConfigError: If the file is damaged, or none of a sweep.
        """
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
