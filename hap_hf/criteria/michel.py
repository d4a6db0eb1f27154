"""Absolute gradients of a mask on what is read of a unit."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from hap_hf.criteria.criterion import ScoringTask, register_criterion
from hap_hf.criteria.gradients import OfLabels, of_labels
from hap_hf.criteria.scores import Scores
from hap_hf.criteria.units import CONSUMING, UnitWeights
from hap_hf.curvature import times_weights


@register_criterion
@dataclass(frozen=True, kw_only=True)
class Michel(OfLabels):
    r"""Score by the mean of ``|dL_n / dm_u|``, divided by its Euclidean norm over the units of the group.

    The mask is that of ``mask_fisher``. The norm makes layers comparable, as the paper does, and is taken as
    known in the standard errors.

    Reference: Michel et al., "Are Sixteen Heads Really Better than One?", NeurIPS 2019.
    """

    name: ClassVar[str] = "michel"

    def score(self, task: ScoringTask) -> Scores:
        """Return the scores; see the class."""
        units = UnitWeights.of(task.evidence.model, task.groups, CONSUMING)
        # Sample by sample, unlike taylor: gradients of opposite signs add up.
        scores = of_labels(task, self.name, units, times_weights, lambda products: units.totals(products).abs())
        # No norm of zero, as where nothing of a layer reaches the loss: its scores are zeros, not NaN.
        norms = {name: x.norm().clamp_min(torch.finfo(x.dtype).tiny) for name, x in scores.sensitivity.items()}
        return replace(
            scores,
            sensitivity={name: x / norms[name] for name, x in scores.sensitivity.items()},
            standard_error={name: x / norms[name] for name, x in scores.standard_error.items()},
        )
