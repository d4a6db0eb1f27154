"""The relative trace of the empirical Fisher matrix."""

from dataclasses import dataclass, field
from typing import ClassVar

from hap_hf.criteria.criterion import ScoringTask, register_criterion
from hap_hf.criteria.gradients import OfLabels, of_labels, traces
from hap_hf.criteria.scores import Scores
from hap_hf.criteria.units import Coupling
from hap_hf.curvature import squared
from hap_hf.names.checks import member


@register_criterion
@dataclass(frozen=True, kw_only=True)
class EmpiricalFisher(OfLabels):
    r"""Score as ``ggn``, with the squared per-sample gradients of the labels at hand.

    The trace of the empirical Fisher matrix. It needs the loss's gradient only, so any loss will do, but where the
    labels are fitted it vanishes, which the curvature does not.

    Reference: Kunstner et al., "Limitations of the empirical Fisher approximation for natural gradient descent",
    NeurIPS 2019.
    """

    name: ClassVar[str] = "empirical_fisher"

    coupling: Coupling = field(
        default=Coupling.SUM, metadata={"help": "How the slices of a unit are combined: joint, sum or filter."}
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        object.__setattr__(self, "coupling", member(Coupling, "coupling", self.coupling))

    def score(self, task: ScoringTask) -> Scores:
        """Return the scores; see the class."""
        units, reduce = traces(task, self.coupling)
        # The trace over a unit's weights is the sum of its squared gradient entries, in the mean over the samples.
        return of_labels(task, self.name, units, squared, reduce)
