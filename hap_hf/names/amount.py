"""How much is asked for, and the currency that it is counted in."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hap_hf.errors import ConfigError
from hap_hf.names.checks import plain_json
from hap_hf.names.currencies import Currency, Units, currency_of
from hap_hf.names.group import Group
from hap_hf.names.outcome import Footprint, whole


@dataclass(frozen=True)
class Amount:
    """How much is to be left.

    Args:
        what: What it is counted in, or the name of it.
        keep: Share of what all selected groups cost that stays, in (0, 1); 1 is allowed for ``units``.

    Raises:
        ConfigError: If the share is out of range or the name unknown.

    Example:
        >>> Amount("params", 0.5).after(0.25)
        Amount(what=Params(), keep=0.875)
    """

    what: Currency
    keep: float

    def __init__(self, what: Currency | str, keep: float) -> None:
        # A name is allowed where a currency is kept, so the dataclass has no __init__ of its own, and it is frozen.
        object.__setattr__(self, "what", currency_of(what))
        object.__setattr__(self, "keep", keep)
        if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
            raise ConfigError(f"an amount keeps a share in (0, 1), got {keep!r}; 0.5 keeps half")
        if keep == 1 and not isinstance(self.what, Units):
            raise ConfigError(f"an amount of {self.what.name} keeps a share in (0, 1), got 1; 0.5 keeps half")

    def after(self, share: float) -> "Amount":
        """Return the amount that is left when a share of the way is done.

        Args:
            share: Share of what is to go, in [0, 1].

        Returns:
            The amount.
        """
        return Amount(self.what, 1 - (1 - self.keep) * share)

    def limit(self, groups: Iterable[Group]) -> float:
        """Return what groups may cost together.

        Args:
            groups: All groups that the amount is about.

        Returns:
            The cost.
        """
        return self.keep * self.what.cost(whole(groups))

    def in_model(self, groups: Sequence[Group], size: Footprint) -> "Amount":
        """Return the amount for one model, where it counts all of it; the same for others.

        Args:
            groups: All groups that the amount is about.
            size: What the whole model takes.

        Returns:
            The amount.

        Raises:
            ConfigError: If what can never be removed is more than is to be left.
        """
        what = self.what.in_model(groups, size)
        if what == self.what:
            return self
        least = what.cost([]) / what.cost(whole(groups))
        if least >= self.keep:
            raise ConfigError(
                f"{self} cannot be reached: {least:.1%} of the model are embeddings, norms, its head and what else is "
                f"in no group that may lose units; ask for more than {math.ceil(1e4 * least) / 1e4}"
            )
        return Amount(what, self.keep)

    def in_both_terms(self, groups: Iterable[Group], size: Footprint) -> tuple[float, float] | None:
        """Return the amount as a share of what can be pruned, and as one of the whole model.

        Args:
            groups: All groups that the amount is about.
            size: What the whole model takes.

        Returns:
            Both shares; None where a model has no cost in this currency.
        """
        members = list(groups)
        what, total, full = self.what.in_model(members, size), self.what.of_model(size), whole(members)
        # Without groups there is what lies outside of them, in a currency that counts it.
        outside, all_of_it = what.cost([]), what.cost(full)
        part = all_of_it - outside
        if not total or not part:
            return None
        left = self.keep * all_of_it - outside
        return left / part, (total - part + left) / total

    def __str__(self) -> str:
        """Return how people ask for it, as in ``target_params=0.5``."""
        return self.what.asked(self.keep)

    def to_dict(self) -> dict[str, Any]:
        """Return the amount as plain JSON values."""
        return {
            "what": {"name": self.what.name, **{k: plain_json(v) for k, v in asdict(self.what).items()}},
            "keep": self.keep,
        }

    @classmethod
    def from_dict(cls, values: object) -> "Amount":
        """Return the amount that ``to_dict`` described.

        Args:
            values: Parsed JSON.

        Returns:
            The amount, with the currency's settings.

        Raises:
            ConfigError: If they are no amount, or the currency is unknown here.
        """
        if (
            not isinstance(values, Mapping)
            or set(values) != {"what", "keep"}
            or not isinstance(values["what"], Mapping)
        ):
            raise ConfigError(f"expected an amount as {{'what': {{'name': ...}}, 'keep': ...}}, got {values!r}")
        settings = dict(values["what"])
        currency = type(currency_of(settings.pop("name", None)))
        try:
            return cls(currency(**settings), values["keep"])
        except TypeError as error:
            raise ConfigError(
                f"{currency.name} is no currency with the settings {sorted(settings)}: {error}"
            ) from error


def fewest_cut(cost: Callable[[int], float], limit: float, most: int) -> int:
    """Return the smallest number of cut units with which the rest fits, by bisection.

    Args:
        cost: What is left when so many of the least sensitive units go; falls as more do.
        limit: What it may be.
        most: Largest number, which is known to fit.

    Returns:
        The number, at least 1.
    """
    # Throughout, `high` is known to fit, so that the result does even where the cost does not fall evenly.
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) > limit else (low, middle)
    return high
