"""Squared gradients of a mask on what is read of a unit."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from hap_hf.criteria.criterion import ScoringTask, register_criterion
from hap_hf.criteria.gradients import OfLabels, half_square, of_labels
from hap_hf.criteria.scores import Scores
from hap_hf.criteria.units import CONSUMING, UnitWeights
from hap_hf.curvature import times_weights


@register_criterion
@dataclass(frozen=True, kw_only=True)
class MaskFisher(OfLabels):
    r"""Score by the mean of ``(dL_n / dm_u)^2 / 2`` over the samples n, with a mask m_u = 1 on what is read of unit u.

    The empirical Fisher information of the mask, halved to be the estimated loss increase of setting it to zero. The
    mask multiplies what all layers read that consume the unit, so ``dL_n / dm_u`` is the inner product of their
    columns with these columns' gradients. L_n is the sum of the sample's loss terms.

    Reference: Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", NeurIPS 2022, whose code in
    repository WoosukKwon/retraining-free-pruning squares the gradients of batches, and not of samples.
    """

    name: ClassVar[str] = "mask_fisher"

    def score(self, task: ScoringTask) -> Scores:
        """Return the scores; see the class."""
        # No mask is put into the model: <columns, their gradients> is the derivative by a factor on what they read.
        units = UnitWeights.of(task.evidence.model, task.groups, CONSUMING)
        return of_labels(task, self.name, units, times_weights, partial(half_square, units))
