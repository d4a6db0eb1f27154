"""Reaching an amount in several rounds: how much of what is left each round takes."""

from dataclasses import dataclass
from enum import StrEnum

from hap_hf.config import HapConfig
from hap_hf.errors import ConfigError
from hap_hf.names.amount import Amount


class Ramp(StrEnum):
    """How the share that is gone rises over rounds."""

    LINEAR = "linear"
    """By the same amount each time."""
    CUBIC = "cubic"
    """Most at first, less and less then."""


@dataclass(frozen=True)
class Round:
    """One of several rounds.

    Args:
        number: Number of the round, from 1.
        total: Number of rounds.
        start: What could be pruned before the first round, in the currency of the amount; None in the first.
        ramp: How the share that is gone rises.
    """

    number: int = 1
    total: int = 1
    start: float | None = None
    ramp: str = Ramp.LINEAR

    @property
    def share(self) -> float:
        """Share of the way that is behind this round: i/n for round i of n, or 1 - (1 - i/n)^3.

        Reference for the cubic one: Zhu and Gupta, "To prune, or not to prune", 2017, equation 1. It takes most at the
        beginning, where most can go, and leaves the last rounds little.
        """
        way = self.number / self.total
        return way if self.ramp == Ramp.LINEAR else 1 - (1 - way) ** 3


def check_rounds(config: HapConfig, num_rounds: int) -> HapConfig:
    """Return the settings, if what they ask for can be reached in several rounds.

    Args:
        config: The settings for all rounds together.
        num_rounds: Number of rounds.

    Returns:
        The same settings.

    Raises:
        ConfigError: If parts have shares of their own, of which each round would have to know what they began with.
    """
    if config.parts and num_rounds > 1:
        raise ConfigError(f"parts={dict(config.parts)} takes one round, got num_rounds={num_rounds}; set num_rounds=1")
    return config


def config_of_round(config: HapConfig, place: Round, now: float) -> HapConfig:
    """Return the settings of one round, relative to the model as it is at that moment.

    The share that is gone rises as the round's ramp says, counted in what the dense model had. Implants are set in the
    last round only, so that no implant is scored before it has been trained.

    Args:
        config: The settings for all rounds together.
        place: Which round it is.
        now: What can be pruned now, in the currency of the amount.

    Returns:
        The settings to hand to the pipeline.

    Raises:
        ConfigError: If earlier rounds already took more than the target, or parts have shares of their own.
    """
    if place.total == 1:
        return config
    check_rounds(config, place.total)
    # Shares are always of the dense model, so that rounding in one round is made up for in the next.
    asked, start = config.asked, now if place.start is None else place.start
    if not start:  # groups that cost nothing, of which the choice of units has more to say
        return config
    keep, implant_ratio = asked.what.in_round(asked.keep, config.implant_ratio, place.share, now / start)
    if keep >= 1:
        raise ConfigError(
            f"round {place.number} has nothing left to remove: earlier rounds, or the model as it came, already went "
            f"beyond its share of {asked}; use fewer rounds"
        )
    # Whatever setting asked for it, the amount of a round is one in the same currency.
    return config.with_amount(Amount(asked.what, max(keep, 1e-9)), implant_ratio=implant_ratio)
