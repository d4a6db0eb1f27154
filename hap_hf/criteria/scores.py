"""What scoring returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """How sensitive the loss is to the removal of each unit.

    Args:
        sensitivity: For each group, by name, the sensitivity of its units, ``[num_units]``, float64 on the CPU.
        standard_error: Standard error of each sensitivity, ``[num_units]``; zero where the method is exact. For
            ``hessian`` it is the noise of the probes, for the batches at hand; for methods by gradients of samples the
            spread over the samples, how much others would change the result; for ``hessian_split`` both together.
        method: How the sensitivities were estimated.
        num_probes: Random probes for each batch; 0 where the method has none.
        num_batches: Batches that were used.
        num_loss_terms: Loss terms in these batches.
        seconds: Wall-clock time.
        settled: Whether there were enough probes for ``stop_share``, rather than as many as are allowed; None where
            that was not asked.
        gone_in: For each group the pass in which a unit went, from 1; 0 for those of the last pass, ``[num_units]``.
            Units of an earlier pass rank below all of later ones, whatever their sensitivity. Empty after one pass.
    """

    sensitivity: Mapping[str, Tensor]
    standard_error: Mapping[str, Tensor]
    method: str
    num_probes: int
    num_batches: int
    num_loss_terms: int
    seconds: float
    settled: bool | None = None
    gone_in: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def negative_share(self) -> float:
        """Share of all units whose sensitivity is negative: noise of the probes, or a loss that is not at a minimum."""
        every = torch.cat(list(self.sensitivity.values()))
        return (every < 0).double().mean().item()
