"""Currencies that count the whole model, and not only what can be removed from it.

Embeddings, norms and the task's head lie in no group. What they cost is known once the model is: a currency of this
file is told by :meth:`~hap_hf.names.currencies.Currency.in_model`, and counts it beside the groups from then on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from hap_hf.errors import ConfigError
from hap_hf.names.currencies import Macs, Params, register_currency
from hap_hf.names.group import Group
from hap_hf.names.outcome import Footprint, whole
from hap_hf.names.plan import GroupPlan


@register_currency
@dataclass(frozen=True)
class ModelParams(Params):
    """Parameters of the whole model, shared ones counted once.

    Args:
        outside: Parameters that lie in no group that may lose units; None until the model is known.
    """

    name: ClassVar[str] = "model_params"
    setting: ClassVar[str] = "target_model_params"
    part: ClassVar[str] = "the whole model"
    outside: float | None = None

    def cost(self, plans: Sequence[GroupPlan]) -> float:
        """Return the number of parameters that are left of the model, if all groups are given."""
        return _known(self.outside, self.setting) + super().cost(plans)

    def in_model(self, groups: Sequence[Group], size: Footprint) -> Self:
        """Return the currency that knows what lies in none of the groups."""
        return replace(self, outside=size.params - Params().cost(whole(groups)))


@register_currency
@dataclass(frozen=True)
class ModelMacs(Macs):
    """Multiply-accumulates of the whole model, per sample of the example batch.

    Args:
        outside: Multiply-accumulates in no group that may lose units; None until the model is known.
    """

    name: ClassVar[str] = "model_macs"
    setting: ClassVar[str] = "target_model_macs"
    part: ClassVar[str] = "the whole model"
    outside: float | None = None

    def cost(self, plans: Sequence[GroupPlan]) -> float:
        """Return the multiply-accumulates that are left of the model, if all groups are given."""
        return _known(self.outside, self.setting) + super().cost(plans)

    def in_model(self, groups: Sequence[Group], size: Footprint) -> Self:
        """Return the currency that knows what lies in none of the groups."""
        # Groups are counted by algebra and the model by running it: where these differ by a little, nothing is outside.
        return replace(self, outside=max(0.0, size.macs - Macs().cost(whole(groups))))


def _known(outside: float | None, setting: str) -> float:
    if outside is None:
        raise ConfigError(
            f"{setting} counts the whole model, of which only the groups are known here; hap_hf.decide looks at the "
            "model, and HapConfig.in_model(groups, measure_size(model, batch)) returns settings that know it"
        )
    return outside
