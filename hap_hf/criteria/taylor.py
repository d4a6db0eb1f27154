"""The first-order change of the loss."""

from dataclasses import dataclass, replace
from typing import ClassVar

from hap_hf.criteria.criterion import ScoringTask, register_criterion
from hap_hf.criteria.gradients import OfLabels, of_labels
from hap_hf.criteria.scores import Scores
from hap_hf.criteria.units import UnitWeights
from hap_hf.curvature import times_weights


@register_criterion
@dataclass(frozen=True, kw_only=True)
class Taylor(OfLabels):
    r"""Score by the first-order change of the loss, ``|<g, w_u>|`` with the gradient g of the mean loss.

    The absolute value where the paper has the square: the same ranking, in units of the loss. The gradient is that of
    all batches together, so that their size does not matter, where the paper averages over training steps.

    Reference: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, with the sum over
    a unit's weights inside the square, as for the paper's gates.
    """

    name: ClassVar[str] = "taylor"

    def score(self, task: ScoringTask) -> Scores:
        """Return the scores; see the class."""
        units = UnitWeights.of(task.evidence.model, task.groups)
        scores = of_labels(task, self.name, units, times_weights, units.totals)
        # After the mean, not before: samples whose gradients cancel leave the loss as it is to first order.
        return replace(scores, sensitivity={name: x.abs() for name, x in scores.sensitivity.items()})
