"""HAP's criterion: the relative Hessian trace."""

from dataclasses import dataclass, field
from typing import ClassVar

from hap_hf.criteria.criterion import Criterion, ScoringTask, register_criterion
from hap_hf.criteria.probes import Again, Hvp, Probing, by_probes, scores_of
from hap_hf.criteria.scores import Scores
from hap_hf.criteria.units import Coupling, UnitWeights, roles_of


@register_criterion
@dataclass(frozen=True, kw_only=True)
class Hessian(Criterion):
    """Score by the relative Hessian trace, by Hutchinson's estimator.

    Reference: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022; the formula is
    :func:`~hap_hf.criteria.sensitivity.unit_sensitivity`.
    """

    name: ClassVar[str] = "hessian"

    num_probes: int = field(
        default=8,
        metadata={"help": "Hutchinson probes per batch, at least 2; the most of stop_share."},
    )
    stop_share: float | None = field(
        default=None,
        metadata={
            "help": "Draw 4, 8, 16 and so on probes per batch until less than this share of the units lies within two "
            "standard errors of the threshold; None for always num_probes."
        },
    )
    hvp: Hvp = field(
        default=Hvp.DOUBLE_BACKWARD,
        metadata={
            "help": "How products with the Hessian are computed: double_backward, forward_over_reverse or "
            "finite_difference."
        },
    )
    coupling: Coupling = field(
        default=Coupling.SUM, metadata={"help": "How the slices of a unit are combined: joint, sum or filter."}
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        # Making it checks the settings and turns their names into members.
        probing = self._probing()
        object.__setattr__(self, "hvp", probing.hvp)
        object.__setattr__(self, "coupling", probing.coupling)

    def _probing(self) -> Probing:
        return Probing(num_probes=self.num_probes, stop_share=self.stop_share, hvp=self.hvp, coupling=self.coupling)

    def score(self, task: ScoringTask) -> Scores:
        """Return the scores; see the class."""
        units = UnitWeights.of(task.evidence.model, task.groups, roles_of(self.coupling))
        # With stop_share probes are drawn in several rounds, each of which goes through all batches again.
        estimate = by_probes(task, units, self._probing(), Again(task.evidence.losses), "Hessian trace")
        return scores_of(self.name, units, estimate, estimate.trace, estimate.standard_error)
