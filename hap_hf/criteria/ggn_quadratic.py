"""The curvature along a unit's own weights."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from hap_hf.criteria.criterion import ScoringTask, register_criterion
from hap_hf.criteria.gradients import OutputProbing, half_square, of_model
from hap_hf.criteria.scores import Scores
from hap_hf.criteria.units import UnitWeights
from hap_hf.curvature import times_weights


@register_criterion
@dataclass(frozen=True, kw_only=True)
class GGNQuadratic(OutputProbing):
    r"""Score by w_u^T G w_u / 2, the second-order loss increase of setting the unit's weights to zero.

    Without the assumption of ``ggn`` that curvature is the same in all directions inside a unit. With gradients
    g_n whose second moment is G, as in :func:`~hap_hf.curvature.ggn.estimate_ggn`, it is the mean of ``<g_n, w_u>^2 /
    2``. The weights are those of all matrices of the unit, whatever the coupling.

    Reference: LeCun et al., "Optimal Brain Damage", NeurIPS 1989, for the loss increase; Singh and Alistarh,
    "WoodFisher", NeurIPS 2020, for Fisher matrices in it.
    """

    name: ClassVar[str] = "ggn_quadratic"

    def score(self, task: ScoringTask) -> Scores:
        """Return the scores; see the class."""
        units = UnitWeights.of(task.evidence.model, task.groups)
        # Sums of weight times gradient give <g_n, w_u>, and are squared only when all of a unit's slices are added up.
        return of_model(task, self.name, units, times_weights, partial(half_square, units), self.num_output_probes)
