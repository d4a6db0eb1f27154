"""What an amount is counted in: what groups cost at a width.

A new currency is a frozen dataclass derived from :class:`Currency`, registered by :func:`register_currency`; selection,
passes, rounds and reports ask it and know no other.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self, TypeVar

from hap_hf.errors import ConfigError
from hap_hf.names.bypass import BypassPlan
from hap_hf.names.group import Group
from hap_hf.names.outcome import Footprint, footprint, whole
from hap_hf.names.plan import GroupPlan

_C = TypeVar("_C", bound="type[Currency]")


@dataclass(frozen=True)
class Currency(ABC):
    """What an amount is counted in.

    Attributes:
        name: Under which it is registered, and written to files.
        setting: The setting that asks for it, as messages say it; empty for those without one of their own.
        part: What a share in it is a share of.
    """

    name: ClassVar[str]
    setting: ClassVar[str] = ""
    part: ClassVar[str] = "the prunable part"

    @abstractmethod
    def cost(self, plans: Sequence[GroupPlan]) -> float:
        """Return what some groups cost together after a plan.

        It must be a sum over groups, or over tensors that several groups cut: what a change in one group saves is
        asked for that group and those that share tensors with it, and no others.

        Args:
            plans: Plans of groups of one stage.

        Returns:
            The cost, at least 0, in any unit.
        """

    def unit_cost(self, group: Group) -> float:
        """Return what one unit takes, by which its sensitivity is divided to compare it with others.

        Args:
            group: The unit's group.

        Returns:
            The cost, above 0.
        """
        full = whole([group])
        # Which unit goes makes no difference to the cost.
        one_less = [GroupPlan(group, "p" + full[0].actions[1:])]
        return max(self.cost(full) - self.cost(one_less), _LEAST)

    def in_model(self, groups: Sequence[Group], size: Footprint) -> Self:
        """Return the currency for one model: the same, where only groups have a cost.

        Args:
            groups: The groups that may lose units.
            size: What the whole model takes.

        Returns:
            The currency.
        """
        return self

    def of_model(self, size: Footprint) -> float | None:
        """Return what a whole model costs, of which the groups are a part.

        Args:
            size: What the whole model takes.

        Returns:
            The cost; None where only groups have one.
        """
        return None

    def path_cost(self, bypass: BypassPlan) -> float | None:
        """Return what a low-rank path beside a block costs, in the unit of :meth:`cost`.

        Args:
            bypass: The path.

        Returns:
            The cost, or None where it is not known; then there can be no bypasses.
        """
        return None

    def num_cut(self, keep: float, total: int) -> int | None:
        """Return how many of the least sensitive units go, where ``keep`` alone tells.

        Args:
            keep: Share to keep.
            total: Number of units that compete.

        Returns:
            The number, or None where it has to be searched.
        """
        return None

    def in_round(self, keep: float, implant_ratio: float, share: float, left: float) -> tuple[float, float]:
        """Return what one of several rounds asks for, relative to what is there when it begins.

        After it, ``share`` of what shall go in all is gone, counted in what the dense model had. Implants are set in
        the last round only, so that no implant is scored before it has been trained.

        Args:
            keep: Share to keep in the end.
            implant_ratio: Share of the cut units that is implanted in the end.
            share: Share of the way behind this round, 1 in the last one.
            left: Share of the dense model's cost that is left when the round begins.

        Returns:
            The share to keep of what is left, 1 or above where nothing is left to do, and the share of implants.
        """
        # Both the share to keep by now and what is left are of the dense model, so their quotient is of what is there.
        return (1 - (1 - keep) * share) / left, implant_ratio if share == 1 else 0.0

    def asked(self, keep: float) -> str:
        """Return how people ask for an amount, as in ``target_params=0.5``.

        Args:
            keep: Share to keep.

        Returns:
            The text.
        """
        return f"{self.setting}={keep:.6g}" if self.setting else f"Amount({self.name!r}, {keep:.6g})"


_LEAST = 1e-30


@dataclass(frozen=True)
class Units(Currency):
    """Heads, neurons and channels, each counted as one; what is implanted stays.

    As in the reference code of Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022, the number of
    units below the threshold is what counts, whatever becomes of them.
    """

    name: ClassVar[str] = "units"
    setting: ClassVar[str] = "prune_ratio"

    def cost(self, plans: Sequence[GroupPlan]) -> float:
        """Return the number of units that survive."""
        return float(sum(g.survivors for g in plans))

    def unit_cost(self, group: Group) -> float:
        """Return 1."""
        return 1.0

    def num_cut(self, keep: float, total: int) -> int | None:
        """Return the share that does not stay, rounded down."""
        return floor_share((1 - keep) * total)

    def in_round(self, keep: float, implant_ratio: float, share: float, left: float) -> tuple[float, float]:
        """Return the round's share of units below the threshold, of which the last round implants its part."""
        # In shares of the dense model's units, with r = 1 - keep below the threshold in the end: q r of them are
        # implanted, all in the last round, and (1 - q) r removed, evenly over the rounds. Implants still count as
        # units, and none was set before, so that 1 - left is what has been removed already.
        implants = implant_ratio * (1 - keep) if share == 1 else 0.0
        removed = (1 - implant_ratio) * (1 - keep) * share - (1 - left)
        # Relative to what is there now, as the round's own prune_ratio and implant_ratio are.
        cut = removed + implants
        return 1 - cut / left, min(implants / cut, 1.0) if cut > 0 else 0.0

    def asked(self, keep: float) -> str:
        """Return the share that goes."""
        return f"{self.setting}={1 - keep:.6g}"


@dataclass(frozen=True)
class Params(Currency):
    """Parameters of the slices, implants included."""

    name: ClassVar[str] = "params"
    setting: ClassVar[str] = "target_params"

    def cost(self, plans: Sequence[GroupPlan]) -> float:
        """Return the number of parameters that are left."""
        return footprint(plans).params

    def path_cost(self, bypass: BypassPlan) -> float:
        """Return its number of parameters."""
        return float(bypass.params)

    def unit_cost(self, group: Group) -> float:
        """Return the number of parameters of one unit."""
        return max(1.0, float(group.params_per_unit))

    def of_model(self, size: Footprint) -> float | None:
        """Return the number of parameters."""
        return size.params


@dataclass(frozen=True)
class Macs(Currency):
    """Multiply-accumulates per sample of the example batch, implants and attention products included."""

    name: ClassVar[str] = "macs"
    setting: ClassVar[str] = "target_macs"

    def cost(self, plans: Sequence[GroupPlan]) -> float:
        """Return the number of multiply-accumulates that are left."""
        return footprint(plans).macs

    def path_cost(self, bypass: BypassPlan) -> float:
        """Return its multiply-accumulates."""
        return bypass.macs

    def unit_cost(self, group: Group) -> float:
        """Return the multiply-accumulates of one unit."""
        return max(1.0, group.macs_per_unit)

    def of_model(self, size: Footprint) -> float | None:
        """Return the number of multiply-accumulates."""
        return size.macs


_CURRENCIES: dict[str, type[Currency]] = {}


def register_currency(currency: _C) -> _C:
    """Make a currency known by its name, so that files may name it.

    Args:
        currency: A frozen dataclass derived from :class:`Currency`, with a name of its own.

    Returns:
        The same class, as for a decorator.

    Raises:
        ConfigError: If another currency has the name.
    """
    # With two of one name, a saved config would mean whichever was imported first.
    other = _CURRENCIES.setdefault(currency.name, currency)
    if other is not currency:
        raise ConfigError(f"the name {currency.name!r} is taken by {other.__qualname__}; choose another")
    return currency


for _known in (Units, Params, Macs):
    register_currency(_known)


def currency_of(what: object) -> Currency:
    """Return the currency that a name or the currency itself stands for.

    Args:
        what: ``"params"`` or ``Params()``, for example.

    Returns:
        The currency, with its defaults where it was named.

    Raises:
        ConfigError: If there is none of that name.
    """
    if isinstance(what, Currency):
        return what
    if not isinstance(what, str) or what not in _CURRENCIES:
        raise ConfigError(f"an amount is counted in one of {sorted(_CURRENCIES)} or in a Currency, got {what!r}")
    return _CURRENCIES[what]()


def floor_share(amount: float) -> int:
    """Return ``amount`` rounded down, as the integer it was meant to be: 0.29 of 100 is 29, not 28.

    Args:
        amount: A share times a count.

    Returns:
        The largest integer that is at most a rounding error above ``amount``.
    """
    # 0.29 * 100 is 28.999999999999996 in floats.
    return math.floor(amount + 1e-6)
