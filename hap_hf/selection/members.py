"""Which groups may lose units, and which of them compete with each other."""

import difflib
from collections.abc import Sequence

from hap_hf.config import HapConfig
from hap_hf.errors import ConfigError
from hap_hf.names.amount import Amount
from hap_hf.names.group import Group


def select_groups(groups: Sequence[Group], config: HapConfig) -> tuple[Group, ...]:
    """Return the groups that ``config`` lets be pruned.

    Args:
        groups: All groups of a model.
        config: Settings; ``kinds``, ``include`` and ``exclude`` are used.

    Returns:
        The groups of the wanted kinds that a pattern includes and none excludes, in the same order.

    Raises:
        ConfigError: If none is left, a pattern matches no group, or two groups have the same name.
    """
    names = [g.name for g in groups]
    if len(set(names)) < len(names):
        raise ConfigError(f"group names must be unique, got {sorted({n for n in names if names.count(n) > 1})} twice")
    for setting in ("include", "exclude"):
        patterns: tuple[str, ...] = getattr(config, setting)
        if unmatched := [p for p in patterns if not any(g.matches(p) for g in groups)]:
            raise ConfigError(f"{setting} patterns {unmatched} match {_no_group(unmatched[0], groups)}")
    left = tuple(g for g in groups if config.selects(g))
    if not left:
        wanted = [g for g in groups if g.kind in config.kinds]
        kinds = [k.value for k in config.kinds]
        patterns_said = [f"{n}={list(getattr(config, n))}" for n in ("include", "exclude") if getattr(config, n)]
        reason = (
            f"{' and '.join(patterns_said)} leave{'s' * (len(patterns_said) == 1)} none of {len(wanted)} groups of the "
            f"kinds {kinds}"
            if wanted
            else f"there are no groups of the kinds {kinds}, only {sorted({g.kind.value for g in groups})}"
            if groups
            else "there are no groups"
        )
        raise ConfigError(f"the plan would change nothing: {reason}")
    return left


def portions(groups: Sequence[Group], config: HapConfig) -> list[tuple[str, Amount, list[Group]]]:
    """Return which groups compete with each other, and how much of them is to be left.

    Args:
        groups: The groups that are selected.
        config: Settings; ``parts`` says what has a share of its own.

    Returns:
        The pattern, empty for the rest, the amount and the groups; without those that are to stay whole.

    Raises:
        ConfigError: If a pattern matches no group.
    """
    members: dict[str, list[Group]] = {key: [] for key in config.parts or {}}
    fits = {key: [g.kind == key or g.matches(key) for g in groups] for key in members}
    if unmatched := [key for key, found in fits.items() if not any(found)]:
        raise ConfigError(f"parts {unmatched} match no kind, {_no_group(unmatched[0], groups)}")
    rest: list[Group] = []
    for index, group in enumerate(groups):
        members.get(next((key for key, found in fits.items() if found[index]), ""), rest).append(group)
    asked = [("", config.asked, rest), *((k, config.asked_of((config.parts or {})[k]), m) for k, m in members.items())]
    return [(key, amount, found) for key, amount, found in asked if amount is not None and found]


def _no_group(pattern: str, groups: Sequence[Group]) -> str:
    """Return the end of a message about a pattern that matches nothing, with names that are near."""
    anywhere = f"*{pattern}*"
    if found := [g.name for g in groups if g.matches(anywhere)]:
        return (
            f"no group and no tensor of one: a pattern is about the whole name, and * stands for any characters; "
            f"{anywhere!r} matches {_some(found)}"
        )
    names = [g.name for g in groups]
    near = difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.3)
    if near:
        return f"no group and no tensor of one; near names are {near}, and * stands for any characters"
    return f"no group and no tensor of one; groups are {_some(names)}, and * stands for any characters"


def _some(names: Sequence[str]) -> str:
    return f"{list(names[:3])}{' and so on' if len(names) > 3 else ''}"
