"""The mean square of a unit's weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hap_hf.criteria.criterion import Criterion, ScoringTask, register_criterion
from hap_hf.criteria.scores import Scores
from hap_hf.criteria.units import Coupling, UnitWeights, roles_of
from hap_hf.names.checks import member


@register_criterion
@dataclass(frozen=True, kw_only=True)
class Magnitude(Criterion):
    """Score by the squared norm of a unit's weights over their number; needs no batch."""

    name: ClassVar[str] = "magnitude"
    needs_batches: ClassVar[bool] = False

    coupling: Coupling = field(
        default=Coupling.SUM, metadata={"help": "How the slices of a unit are combined: joint, sum or filter."}
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        object.__setattr__(self, "coupling", member(Coupling, "coupling", self.coupling))

    def score(self, task: ScoringTask) -> Scores:
        """Return the scores; see the class."""
        units = UnitWeights.of(task.evidence.model, task.groups, roles_of(self.coupling))
        sensitivity = {}
        for group, slices, norms in zip(units.groups, units.slices, units.squared_norms(), strict=True):
            entries = [s.entries_per_unit for s in slices]
            # All slices are one vector: norms and numbers of entries are added up before the division.
            if self.coupling is Coupling.JOINT:
                norms, entries = [torch.stack(norms).sum(0)], [units.num_entries()[group.name]]
            sensitivity[group.name] = torch.stack([norm / n for norm, n in zip(norms, entries, strict=True)]).sum(0)
        return of_weights(self.name, sensitivity)


def of_weights(method: str, sensitivity: Mapping[str, Tensor]) -> Scores:
    """Return exact scores that took no batch.

    Args:
        method: Name of the criterion.
        sensitivity: Sensitivities by group, ``[num_units]``.

    Returns:
        The scores.
    """
    zeros = {name: torch.zeros_like(x) for name, x in sensitivity.items()}
    return Scores(sensitivity, zeros, method, num_probes=0, num_batches=0, num_loss_terms=0, seconds=0.0)
