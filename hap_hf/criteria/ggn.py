"""The relative trace of the generalised Gauss-Newton matrix."""

from dataclasses import dataclass, field
from typing import ClassVar

from hap_hf.criteria.criterion import ScoringTask, register_criterion
from hap_hf.criteria.gradients import OutputProbing, of_model, traces
from hap_hf.criteria.scores import Scores
from hap_hf.criteria.units import Coupling
from hap_hf.curvature import squared
from hap_hf.names.checks import member


@register_criterion
@dataclass(frozen=True, kw_only=True)
class GGN(OutputProbing):
    r"""Score by the relative trace of the generalised Gauss-Newton matrix G, tr(G_uu) ||w_u||^2 / (2 n_u).

    HAP's formula with G for H. Near a minimum the two agree, but the trace of G is a plain sum of squared per-sample
    gradients: no random probe mixes other blocks into it, and it is never negative.

    References: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022, for the formula;
    :func:`~hap_hf.curvature.ggn.estimate_ggn` for the matrix.
    """

    name: ClassVar[str] = "ggn"

    coupling: Coupling = field(
        default=Coupling.SUM, metadata={"help": "How the slices of a unit are combined: joint, sum or filter."}
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        object.__setattr__(self, "coupling", member(Coupling, "coupling", self.coupling))
        super().__post_init__()

    def score(self, task: ScoringTask) -> Scores:
        """Return the scores; see the class."""
        units, reduce = traces(task, self.coupling)
        # As for a Fisher matrix, tr(G_uu) is the mean of the unit's squared gradient entries.
        return of_model(task, self.name, units, squared, reduce, self.num_output_probes)
