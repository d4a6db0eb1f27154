"""Checks of settings, each of which says what was expected, what came and what to do."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from enum import StrEnum
from typing import Any, TypeVar, cast

from hap_hf.errors import ConfigError

_E = TypeVar("_E", bound=StrEnum)
_C = TypeVar("_C")


def member(enum: type[_E], name: str, value: object) -> _E:
    """Return the member of an enum that a string names.

    Args:
        enum: The enum.
        name: Name of the setting.
        value: A member or its value.

    Returns:
        The member.

    Raises:
        ConfigError: If there is none.
    """
    try:
        return enum(str(value))
    except ValueError:
        known = [m.value for m in enum]
        raise ConfigError(f"{name} must be one of {known}, got {value!r}{meant(str(value), known)}") from None


def strings(name: str, value: object) -> tuple[Any, ...]:
    """Return a string or a sequence of strings as a tuple.

    Args:
        name: Name of the setting.
        value: What was given.

    Returns:
        The tuple.

    Raises:
        ConfigError: If it is something else.
    """
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, (tuple, list)):
        raise ConfigError(f"{name} must be a string or a sequence of strings, got {value!r}")
    for item in value:
        if not isinstance(item, str):
            raise ConfigError(f"{name} must hold strings, got {item!r}")
    return tuple(value)


def share(name: str, value: object, interval: str = "(0, 1)") -> None:
    """Check that a setting is a number between 0 and 1.

    Args:
        name: Name of the setting.
        value: What was given.
        interval: Which ends are allowed, as in ``"[0, 1)"``.

    Raises:
        ConfigError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} must be a number in {interval}, got {value!r}")
    above = value >= 0 if interval[0] == "[" else value > 0
    below = value <= 1 if interval[-1] == "]" else value < 1
    if not (above and below):  # NaN fails both comparisons
        advice = f"; it is a share, so write {value / 100:g} for {value:g}%" if 1 < value < 100 else ""
        raise ConfigError(f"{name} must lie in {interval}, got {value!r}{advice}")


def shares(name: str, value: object, interval: str) -> dict[str, float]:
    """Return a mapping of kinds or patterns to shares, as a plain one.

    Args:
        name: Name of the setting.
        value: What was given; None for nothing.
        interval: Which shares are allowed, as in ``"[0, 1)"``.

    Returns:
        The shares by what they are for.

    Raises:
        ConfigError: If it is no such mapping.
    """
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{name} must map kinds or patterns to shares, got {value!r}; for example {{'heads': 0.8}}")
    given = dict(value or {})
    for key, number in given.items():
        if not isinstance(key, str):
            raise ConfigError(f"{name} must map kinds or patterns to shares, got the key {key!r}")
        share(f"{name}[{key!r}]", number, interval)
    return given


def at_least(name: str, value: object, low: int, *, none: bool = False) -> None:
    """Check that a setting is an integer that is not too small.

    Args:
        name: Name of the setting.
        value: What was given.
        low: Smallest value allowed.
        none: Whether None is allowed, too.

    Raises:
        ConfigError: If it is not.
    """
    if none and value is None:
        return
    # To Python True is the integer 1.
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be an integer of at least {low}, got {value!r}")


def seed(name: str, value: object) -> None:
    """Check that a setting is a seed of random numbers.

    Args:
        name: Name of the setting.
        value: What was given.

    Raises:
        ConfigError: If it is not.
    """
    at_least(name, value, 0)
    if isinstance(value, int) and value >= 2**63:
        raise ConfigError(f"{name} must be below 2**63, the largest that torch.Generator takes, got {value!r}")


def boolean(name: str, value: object, *, none: bool = False) -> None:
    """Check that a setting is True or False.

    Args:
        name: Name of the setting.
        value: What was given.
        none: Whether None is allowed, too.

    Raises:
        ConfigError: If it is not.
    """
    if not isinstance(value, bool) and not (none and value is None):
        raise ConfigError(f"{name} must be True{', False or None' if none else ' or False'}, got {value!r}")


def plain_json(value: Any) -> Any:
    """Return a setting as JSON would give it back: members of enums as their values, tuples as lists.

    Args:
        value: A setting, or a container of some.

    Returns:
        The plain value.
    """
    if isinstance(value, Mapping):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain_json(v) for v in value]
    return value.value if isinstance(value, StrEnum) else value


def meant(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that says which name was probably meant.

    Args:
        name: What was given.
        known: The names there are.

    Returns:
        ``"; did you mean ...?"``, or nothing.
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def of_settings(kind: type[_C], values: Mapping[str, Any]) -> _C:
    """Return a dataclass of settings made of values by name.

    Args:
        kind: The dataclass, which checks the values.
        values: Some of its settings.

    Returns:
        The settings; the rest are defaults.

    Raises:
        ConfigError: If there is no setting of a name.
    """
    known = {f.name for f in fields(cast(Any, kind))}
    for name in values:
        if name not in known:
            raise ConfigError(f"{kind.__name__} has no setting {name!r}{meant(name, known)}")
    return kind(**values)
