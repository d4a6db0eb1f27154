"""The ``quantization_config`` entry of a pruned model's ``config.json``."""

from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hap_hf.errors import PlanFormatError
from hap_hf.names.bits import BitPlan
from hap_hf.names.plan import PruningPlan

QUANT_METHOD = "hap_hf"
QUANT_METHODS = (QUANT_METHOD, "hap")
"""The method's name in files: that of the package, for whoever meets it without, and the one of plans of format 1."""


class HapPlanConfig(QuantizationConfigMixin):
    """The ``quantization_config`` entry of a pruned model's ``config.json``.

    Args:
        plan: Everything that was done to the model since it was dense.
        bits: Bits of its quantized layers, if it has any.
    """

    quant_method: Any = QUANT_METHOD

    def __init__(self, plan: PruningPlan, bits: BitPlan | None = None) -> None:
        """Hold the plan and the bits."""
        self.plan, self.bits = plan, bits

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return the entry that ``to_dict`` described, after checking every value of it.

        Args:
            config_dict: The parsed JSON entry, from a source that need not be trusted.
            return_unused_kwargs: Also return ``kwargs``; part of transformers' interface.
            **kwargs: Never used here.

        Returns:
            The entry, and ``kwargs`` where asked for.

        Raises:
            PlanFormatError: If an entry is missing, unknown or malformed.
        """
        if not {"quant_method", "plan"} <= set(config_dict) <= {"quant_method", "plan", "library", "bits"}:
            raise PlanFormatError(
                "the quantization_config of a pruned model must hold quant_method, plan and bits, no more, got "
                f"{sorted(str(key)[:40] for key in config_dict)[:10]}; take config.json from the save of the weights"
            )
        bits = config_dict.get("bits")
        entry = cls(PruningPlan.from_dict(config_dict["plan"]), None if bits is None else BitPlan.from_dict(bits))
        return (entry, kwargs) if return_unused_kwargs else entry

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as plain JSON values."""
        bits = {} if self.bits is None else {"bits": self.bits.to_dict()}
        return {"quant_method": QUANT_METHOD, "plan": self.plan.to_dict(), **bits}
