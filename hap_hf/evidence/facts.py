"""What is known of a loss on the batches at hand, once it was tried."""

from dataclasses import dataclass
from typing import Any

from hap_hf.evidence.losses import Terms
from hap_hf.evidence.samples import part_of


@dataclass(frozen=True)
class Facts:
    """What was found out of a loss by trying, see :func:`~hap_hf.evidence.rehearsal.rehearsed`.

    Args:
        tried: Whether the samples of the batches were tried.
        adds_up: Whether the loss of a batch is the mean, or the sum, of those of its samples.
        terms: Over what it is a mean.
        multiples: Whether what has several times as many rows as there are samples is cut along with them.
        no_curvature: Why the loss has no curvature in the model's outputs that could be used; None where it has.
        own_outputs: Whether the batches hold no labels, and the model's own outputs stand in for them.
    """

    tried: bool = False
    adds_up: bool = True
    terms: Terms = Terms.COUNTED
    multiples: bool = False
    no_curvature: str | None = None
    own_outputs: bool = False

    def part_of(self, batch: Any, rows: slice) -> Any:
        """Return some samples of a batch.

        Args:
            batch: What the loss takes.
            rows: Which samples.

        Returns:
            The smaller batch.
        """
        return part_of(batch, rows, multiples=self.multiples)
