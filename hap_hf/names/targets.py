"""The settings that say how much is to be left, of which exactly one is given."""

from collections.abc import Mapping
from typing import Any

from hap_hf.errors import ConfigError
from hap_hf.names.amount import Amount
from hap_hf.names.checks import share
from hap_hf.names.currencies import Currency, Macs, Params, Units
from hap_hf.names.whole_model import ModelMacs, ModelParams

TARGETS: dict[str, type[Currency]] = {c.setting: c for c in (Params, Macs, ModelParams, ModelMacs)}
"""Settings that are a share to keep, with what it is counted in."""

AMOUNTS = ("prune_ratio", *TARGETS, "amount")
"""All settings that say how much."""


def amount_of(settings: Mapping[str, Any]) -> Amount:
    """Return what some settings ask for.

    Args:
        settings: A value for each of ``AMOUNTS``; None where it is not given.

    Returns:
        The amount.

    Raises:
        ConfigError: If not exactly one of them is given, or its value is out of range.
    """
    given = {name: settings[name] for name in AMOUNTS if settings[name] is not None}
    for name, value in given.items():
        if name != "amount":
            share(name, value, "[0, 1)" if name == "prune_ratio" else "(0, 1)")
    if len(given) != 1:
        raise ConfigError(
            f"expected exactly one of {', '.join(AMOUNTS[:-1])} and {AMOUNTS[-1]}, got {given or 'none'}; for example "
            "HapConfig(prune_ratio=0.5)"
        )
    ((name, value),) = given.items()
    if name == "prune_ratio":
        return Amount(Units(), 1 - value)
    if name != "amount":
        return Amount(TARGETS[name](), value)
    if not isinstance(value, Amount):
        raise ConfigError(f"amount must be an Amount, got {value!r}; for example Amount('params', 0.5)")
    return value


def check_parts(parts: Mapping[str, float] | None, asked: Amount) -> None:
    """Check that shares of parts are shares of the same as the amount.

    Args:
        parts: Shares by kind or pattern.
        asked: How much is to be left.

    Raises:
        ConfigError: If the amount is one of the whole model.
    """
    if parts and asked.what.part != Params.part:
        raise ConfigError(
            f"parts are shares of what can be pruned, and {asked} is one of the whole model; ask for "
            "target_params or target_macs beside them"
        )


def check_bypasses(
    asked: Amount, per: Currency | None, implant_ratio: float, reconstructs: bool, parts: Mapping[str, float] | None
) -> None:
    """Check that settings let low-rank paths be weighed against units.

    Args:
        asked: How much is to be left.
        per: What sensitivities are divided by.
        implant_ratio: Share of the cut units whose rows are implanted.
        reconstructs: Whether layers are fitted after the choice.
        parts: Amounts of parts.

    Raises:
        ConfigError: If they do not.
    """
    wrong = {
        "needs target_params or target_macs, which say what a direction costs": isinstance(asked.what, Units),
        "has implants of its own kind; leave implant_ratio at 0": implant_ratio > 0,
        "fits paths together with the layers; leave reconstruct and compensate at their defaults": not reconstructs,
        "compares directions with units by what they cost; set per_cost=True": per is None,
        "knows one amount for all groups; leave parts out": bool(parts),
    }
    for reason, holds in wrong.items():
        if holds:
            raise ConfigError(f"implants='auto' {reason}")
