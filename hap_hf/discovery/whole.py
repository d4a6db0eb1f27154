"""What stays whole, and why: for whoever reads a report."""

from dataclasses import dataclass

from hap_hf.names.group import Kind


@dataclass(frozen=True)
class LeftWhole:
    """Layers or units that could not be shown to be removable.

    Args:
        names: Layers, or groups as they would have been called.
        reason: Why they stay, in words.
        kind: What their units would have been; None where that is not known.
    """

    names: tuple[str, ...]
    reason: str
    kind: Kind | None = None

    def __str__(self) -> str:
        """Return a sentence with the first few names."""
        more = f" and {len(self.names) - 3} more" if len(self.names) > 3 else ""
        return f"{', '.join(self.names[:3])}{more}: {self.reason}"
