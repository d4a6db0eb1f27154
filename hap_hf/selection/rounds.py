"""Reaching an amount in several rounds: how much of what is left each round takes."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hap_hf.config import HapConfig
from hap_hf.errors import ConfigError
from hap_hf.names.footprint import whole_footprint
from hap_hf.names.group import Group


@dataclass(frozen=True)
class Amounts:
    """How much can be pruned.

    Args:
        units: Number of units.
        params: Parameters in their slices.
        macs: Multiply-accumulates per sample.
    """

    units: int
    params: int
    macs: float

    @classmethod
    def of(cls, groups: Iterable[Group]) -> "Amounts":
        """Return the amounts of ``groups`` together.

        Args:
            groups: Any groups.

        Returns:
            What they hold together.
        """
        members = list(groups)
        whole = whole_footprint(members)
        return cls(sum(g.num_units for g in members), round(whole.params), whole.macs)


def config_of_round(config: HapConfig, number: int, num_rounds: int, start: Amounts, now: Amounts) -> HapConfig:
    """Return the settings of one round, relative to the model as it is at that moment.

    The share that is gone rises linearly: after round i of n it is i/n of the target, counted in what the dense model
    had. Implants are set in the last round only, so that no implant is scored before it has been trained.

    Args:
        config: The settings for all rounds together.
        number: Number of the round, from 1.
        num_rounds: Number of rounds.
        start: What could be pruned before the first round.
        now: What can be pruned now.

    Returns:
        The settings to hand to the pipeline.

    Raises:
        ConfigError: If earlier rounds already took more than the target.
    """
    if num_rounds == 1:
        return config
    last = number == num_rounds
    share = number / num_rounds
    if config.prune_ratio is not None:
        implants = config.implant_ratio * config.prune_ratio * start.units
        removed = (1 - config.implant_ratio) * config.prune_ratio * start.units * share - (start.units - now.units)
        cut = removed + implants if last else removed
        _check_left(cut, config, number)
        # A rounding error of 1e-9 units must not cost a whole one.
        ratio = min((cut + 1e-6) / now.units, 1 - 1e-9)
        return replace(config, prune_ratio=ratio, implant_ratio=min(implants / cut, 1.0) if last else 0.0)
    implant_ratio = config.implant_ratio if last else 0.0
    if config.target_params is not None:
        kept = (1 - (1 - config.target_params) * share) * start.params / now.params
        _check_left(1 - kept, config, number)
        return replace(config, target_params=kept, implant_ratio=implant_ratio)
    kept = (1 - (1 - (config.target_macs or 0.0)) * share) * start.macs / now.macs
    _check_left(1 - kept, config, number)
    return replace(config, target_macs=kept, implant_ratio=implant_ratio)


def _check_left(amount: float, config: HapConfig, number: int) -> None:
    if amount <= 0:
        raise ConfigError(
            f"round {number} has nothing left to remove: earlier rounds, or the model as it came, already went beyond "
            f"its share of {config.prune_ratio or config.target_params or config.target_macs}; use fewer rounds"
        )
