"""HAP's criterion: the relative Hessian trace."""

from dataclasses import dataclass
from typing import ClassVar

from hap_hf.criteria.criterion import ScoringTask, register_criterion
from hap_hf.criteria.probes import Again, Probing, by_probes, scores_of
from hap_hf.criteria.scores import Scores
from hap_hf.criteria.units import UnitWeights, roles_of


@register_criterion
@dataclass(frozen=True, kw_only=True)
class Hessian(Probing):
    """Score by the relative Hessian trace, by Hutchinson's estimator.

    Reference: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022; the formula is
    :func:`~hap_hf.criteria.sensitivity.unit_sensitivity`.
    """

    name: ClassVar[str] = "hessian"

    def score(self, task: ScoringTask) -> Scores:
        """Return the scores; see the class."""
        units = UnitWeights.of(task.evidence.model, task.groups, roles_of(self.coupling))
        # With stop_share probes are drawn in several rounds, each of which goes through all batches again.
        estimate = by_probes(task, units, self, Again(task.evidence.losses), "Hessian trace")
        return scores_of(self.name, units, estimate, estimate.trace, estimate.standard_error)
