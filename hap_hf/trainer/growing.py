"""Growing regularisation: how units shrink first, while the rest of the model learns to do without."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from hap_hf.config import HapConfig
from hap_hf.errors import ConfigError
from hap_hf.names.bypass import Implants
from hap_hf.names.checks import boolean, member, of_settings, share
from hap_hf.names.setting import setting
from hap_hf.surgery.shrinking import Shrunk
from hap_hf.trainer.schedule import steps_of


@dataclass(frozen=True, kw_only=True)
class GrowingReg:
    r"""How units shrink before they are cut, for ``HessianPruner(config, step=..., regularise=GrowingReg(...))``.

    Units are chosen ``steps`` before the cut. From then on their weights are multiplied by :math:`1 - \eta \lambda`
    after each step, with the learning rate :math:`\eta` and a penalty :math:`\lambda` that grows. Without
    ``increment`` it grows such that the weights would be ``ratio`` times smaller in the end if the loss did not object.

    Reference: Wang et al., "Neural Pruning via Growing Regularization", ICLR 2021: variant 1 is GReg-1, variant 2
    GReg-2, which lets all units shrink first and takes those that the loss defends least. There the penalty is part of
    the gradient (``coupled=True``), is on the weights that make a unit (``on="rows"``), and grows by 1e-4.

    Raises:
        ConfigError: If a value is out of range, or settings contradict each other.
    """

    steps: int | float = setting(0.3, "Optimizer steps from the choice to the cut; below 1, a share of the training.")
    variant: int = setting(1, "1: the units are chosen first. 2: all units shrink first, and magnitude then chooses.")
    ratio: float = setting(1000.0, "How many times smaller the units become; growth ends where this is reached.")
    interval: int = setting(10, "Steps between increments of the penalty.")
    stabilise: float = setting(0.3, "Share of the steps, at their end, in which the penalty stays, in [0, 1).")
    on: Shrunk = setting(
        Shrunk.READ, "What shrinks: read, the weights that read a unit; rows, those that make it, its norms and biases."
    )
    increment: float | None = setting(None, "By how much the penalty grows. By default what leads to the ratio.")
    picking: float = setting(0.3, "With variant 2, share of the steps in which all units shrink, in (0, 1).")
    picking_ratio: float = setting(3.0, "How many times smaller all would become in them without a loss.")
    recover: float = setting(1e-4, "With variant 2, penalty below zero of those that stay, which lets them grow.")
    coupled: bool = setting(False, "Add the penalty to the gradients, as published, rather than shrink the weights.")

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: If one is out of range.
        """
        object.__setattr__(self, "on", member(Shrunk, "on", self.on))
        steps_of("steps", self.steps, None)
        if self.variant not in {1, 2} or isinstance(self.variant, bool):
            raise ConfigError(f"variant must be 1 or 2, for GReg-1 or GReg-2, got {self.variant!r}")
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ConfigError(f"interval must be an integer of at least 1, got {self.interval!r}")
        for name in ("ratio", "picking_ratio"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 < value < math.inf:
                raise ConfigError(f"{name} must be a number above 1, got {value!r}")
        share("stabilise", self.stabilise, "[0, 1)")
        share("picking", self.picking)
        share("recover", self.recover, "[0, 1)")
        boolean("coupled", self.coupled)
        if self.increment is not None and not (
            isinstance(self.increment, (int, float)) and 0 < self.increment < math.inf
        ):
            raise ConfigError(f"increment must be a number above 0, or None, got {self.increment!r}")
        if self.coupled and self.increment is None:
            raise ConfigError(
                "coupled=True needs an increment, as what an optimizer makes of a gradient cannot be told in advance; "
                "the paper's is increment=1e-4"
            )
        if self.variant == 2 and self.picking + self.stabilise >= 1:
            raise ConfigError(
                f"picking={self.picking} and stabilise={self.stabilise} leave no steps in between; lower one of them"
            )

    @classmethod
    def help(cls) -> dict[str, str]:
        """Return what each setting means, by name."""
        return {f.name: f.metadata["help"] for f in fields(cls)}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return {f.name: str(v) if isinstance(v := getattr(self, f.name), Shrunk) else v for f in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the settings that ``to_dict`` described.

        Args:
            values: The settings by name.

        Returns:
            The checked settings.

        Raises:
            ConfigError: If a name is unknown.
        """
        return of_settings(cls, values)


def phases(settings: GrowingReg, steps: int) -> tuple[int, int]:
    """Return how many steps variant 2 lets all units shrink, and how many the penalty then grows.

    Args:
        settings: How units shrink.
        steps: Steps until the cut.

    Returns:
        The two numbers; the rest is for the model to settle.
    """
    growing = steps - math.floor(settings.stabilise * steps)
    picking = math.floor(settings.picking * steps) if settings.variant == 2 else 0
    return picking, growing - picking


def increments(settings: GrowingReg, rates: Sequence[float]) -> tuple[float, float]:
    r"""Return by how much the penalty grows, first while variant 2 chooses and then.

    After step t the weights have shrunk by :math:`\prod_{s \le t} (1 - \eta_s \lambda_s)` where the loss does not
    object, and :math:`\lambda_s` is the increment times the number of increments so far. So the increment that leads
    to a ratio r is at most :math:`\ln r / \sum_s \eta_s n_s`; with a constant learning rate, K steps between
    increments and T steps in all that is about :math:`2 K \ln r / (\eta T^2)`.

    Args:
        settings: How units shrink.
        rates: The learning rate of each step until the cut.

    Returns:
        The two increments.

    Raises:
        ConfigError: If the learning rate is 0 throughout.
    """
    picking, growing = phases(settings, len(rates))
    if settings.increment is not None:
        return settings.increment / 10, settings.increment  # 1e-5 and 1e-4 in the paper

    def solved(ratio: float, some: Sequence[float], first: int) -> float:
        # Increments come at multiples of the interval, counted from the beginning of both phases.
        before = (first - 1) // settings.interval
        total = math.fsum(rate * ((first + t) // settings.interval - before) for t, rate in enumerate(some))
        if not total:
            raise ConfigError(
                "units cannot shrink before the cut, as the learning rate is 0 or the penalty never grows until then; "
                "prune earlier, or lower the interval of GrowingReg"
            )
        return math.log(ratio) / total

    first = solved(settings.picking_ratio, rates[:picking], 0) if picking else 0.0
    return first, solved(settings.ratio, rates[picking : picking + growing], picking)


def regularisation(config: HapConfig, given: GrowingReg | Mapping[str, Any] | None) -> GrowingReg | None:
    """Return the regularisation that a training asks for.

    Args:
        config: How the model is pruned.
        given: The regularisation, or its settings as a checkpoint has them.

    Returns:
        The regularisation; None for none.

    Raises:
        ConfigError: If units cannot shrink with these settings.
    """
    if given is not None and config.implants is Implants.AUTO:
        raise ConfigError(
            "regularise shrinks units that are chosen early, and implants='auto' chooses units together with the paths "
            "beside their blocks when the model is cut; use one of them"
        )
    return GrowingReg.from_dict(given) if isinstance(given, Mapping) else given
