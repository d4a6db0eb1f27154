"""How many bits each layer has, in names and numbers, ready for JSON. Values of strangers are checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hap_hf.errors import PlanFormatError
from hap_hf.names.untrusted import MAX_SIZE, dotted_name, fixed_items, member, number, typed

FORMAT_VERSION = 1
MAX_LAYERS = 100_000
FEWEST, MOST = 2, 8
"""Bits that a weight or an activation may have."""


class Rounding(StrEnum):
    """How activations are rounded."""

    ASYMMETRIC = "asymmetric"
    SYMMETRIC = "symmetric"
    PER_TOKEN = "per_token"


class Stored(StrEnum):
    """What a file holds of the weights."""

    CODES = "codes"
    FLOATS = "floats"


@dataclass(frozen=True, slots=True)
class LayerBits:
    """Bits of one layer.

    Args:
        weight: Bits of its weights.
        activation: Bits of its input; None where that stays in floating point.
    """

    weight: int
    activation: int | None


@dataclass(frozen=True, slots=True)
class BitPlan:
    """Bits of all layers that are quantized.

    Args:
        layers: Bits by the name of the module.
        rounding: How activations are rounded.
        stored: What a file holds of the weights.
    """

    layers: Mapping[str, LayerBits]
    rounding: Rounding = Rounding.ASYMMETRIC
    stored: Stored = Stored.CODES

    def renamed(self, rename: Callable[[str], str]) -> "BitPlan":
        """Return the same plan for a model in which modules have other names.

        Args:
            rename: Maps a dotted name to the other one.

        Returns:
            The plan.
        """
        return BitPlan({rename(name): bits for name, bits in self.layers.items()}, self.rounding, self.stored)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "format": FORMAT_VERSION,
            "rounding": self.rounding.value,
            "stored": self.stored.value,
            "layers": {name: [bits.weight, bits.activation] for name, bits in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, data: object) -> "BitPlan":
        """Return the plan that ``to_dict`` described, after checking every value of it.

        Args:
            data: Parsed JSON, from a source that need not be trusted.

        Returns:
            The plan. That it fits a model is checked when it is applied.

        Raises:
            PlanFormatError: If anything is missing, unknown, of the wrong type, out of range or of a newer format.
        """
        entry = typed(data, dict, "bits")
        version = number(entry.get("format"), "bits.format", 1, MAX_SIZE)
        if version > FORMAT_VERSION:
            raise PlanFormatError(
                f"the bits have format {version}, this hap_hf reads up to {FORMAT_VERSION}; upgrade hap_hf"
            )
        if set(entry) != {"format", "rounding", "stored", "layers"}:
            raise PlanFormatError(
                f"bits must hold format, rounding, stored and layers and nothing else, got "
                f"{sorted(str(key)[:40] for key in entry)[:10]}"
            )
        layers = typed(entry["layers"], dict, "bits.layers")
        if not 0 < len(layers) <= MAX_LAYERS:
            raise PlanFormatError(f"bits.layers has {len(layers)} entries, 1 to {MAX_LAYERS} are allowed")
        parsed = {}
        for name, value in layers.items():
            where = f"bits.layers[{str(name)[:40]!r}]"
            weight, activation = fixed_items(value, 2, where)
            parsed[dotted_name(name, where)] = LayerBits(
                number(weight, f"{where} weight", FEWEST, MOST),
                None if activation is None else number(activation, f"{where} activation", FEWEST, MOST),
            )
        rounding = member(entry["rounding"], Rounding, "bits.rounding")
        return cls(parsed, rounding, member(entry["stored"], Stored, "bits.stored"))
