"""What was quantized, what stayed in floating point and why, and how large the file is."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hap_hf.names.bits import BitPlan


@dataclass(frozen=True)
class BitReport:
    """What :func:`~hap_hf.bits.quantize.quantize_` did.

    Args:
        plan: Bits of every quantized layer.
        left: Why a layer with weights stayed in floating point, by its name.
        bytes_before: Bytes of all weights in floating point.
        bytes_after: Bytes of the same in a file, packed, with scales and ranges.
        seconds: How long it took.
    """

    plan: BitPlan
    left: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    seconds: float

    def __str__(self) -> str:
        """Return it in a few lines."""
        widths = Counter((bits.weight, bits.activation) for bits in self.plan.layers.values())
        shown = ", ".join(f"{n} with {w} bits, inputs {a or 'in floating point'}" for (w, a), n in widths.most_common())
        part = self.bytes_after / max(self.bytes_before, 1)
        lines = [
            f"{len(self.plan.layers)} layers quantized: {shown}",
            f"bytes in a file: {self.bytes_before:,} -> {self.bytes_after:,} ({part:.1%})",
        ]
        for reason, count in Counter(self.left.values()).most_common():
            first = next(name for name, why in self.left.items() if why == reason)
            lines.append(f"left in floating point: {count} ({reason}), as {first}")
        return "\n".join(lines)

    def to_log(self) -> dict[str, float]:
        """Return the numbers for a Trainer's log."""
        return {
            "quantized_layers": len(self.plan.layers),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "bits": self.plan.to_dict(),
            "left": dict(self.left),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "seconds": self.seconds,
        }
