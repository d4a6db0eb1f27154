"""Curvature along a mask on what is read of a unit."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from hap_hf.criteria.criterion import Criterion, ScoringTask, register_criterion
from hap_hf.criteria.gradients import OutputProbing, half_square, of_model
from hap_hf.criteria.mask_fisher import MaskFisher
from hap_hf.criteria.scores import Scores
from hap_hf.criteria.units import CONSUMING, UnitWeights
from hap_hf.curvature import times_weights
from hap_hf.evidence.evidence import Evidence


@register_criterion
@dataclass(frozen=True, kw_only=True)
class MaskGGN(OutputProbing):
    r"""Score by the second-order loss increase of a mask m_u on what is read of unit u, ``d^2 L / dm_u^2 / 2``.

    Removing a unit and setting its mask from 1 to 0 are the same, so this is w_u^T G w_u / 2 with w_u the columns that
    read the unit, and G the generalised Gauss-Newton matrix: ``mask_fisher`` with the curvature of the loss in
    place of the squared gradients of the labels at hand, which vanish where the labels are fitted. They stand in for
    it, and a warning says so, where the loss has no curvature in the model's outputs that could be used: losses that
    compare the samples of a batch, CTC, what is resized inside of the loss.

    References: Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", NeurIPS 2022, for the mask;
    :func:`~hap_hf.curvature.ggn.estimate_ggn` for the matrix.
    """

    name: ClassVar[str] = "mask_ggn"
    # This criterion's own recipe; the others are used as they were published.
    passes: ClassVar[int] = 4
    per_cost: ClassVar[bool] = True
    compensates: ClassVar[bool] = True
    listened_to: ClassVar[bool] = True

    def suited(self, evidence: Evidence) -> Criterion:
        """Return this criterion, or the one of squared gradients where the loss has no curvature in the outputs.

        Args:
            evidence: What will be scored on, tried.

        Returns:
            The criterion.
        """
        return super().suited(evidence) if evidence.facts.no_curvature is None else MaskFisher().suited(evidence)

    def score(self, task: ScoringTask) -> Scores:
        """Return the scores; see the class."""
        # As in mask_fisher, the columns stand for the mask: a factor on what they read is a factor on them.
        units = UnitWeights.of(task.evidence.model, task.groups, CONSUMING)
        return of_model(task, self.name, units, times_weights, partial(half_square, units), self.num_output_probes)
