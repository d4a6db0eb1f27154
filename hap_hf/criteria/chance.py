"""Random scores: the floor that a criterion must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hap_hf.criteria.criterion import Criterion, ScoringTask, register_criterion
from hap_hf.criteria.magnitude import of_weights
from hap_hf.criteria.scores import Scores
from hap_hf.criteria.units import UnitWeights
from hap_hf.curvature import seeded_generator


@register_criterion
@dataclass(frozen=True, kw_only=True)
class Random(Criterion):
    """Score by uniform random numbers, which depend on the seed and the group's name; needs no batch."""

    name: ClassVar[str] = "random"
    needs_batches: ClassVar[bool] = False

    def score(self, task: ScoringTask) -> Scores:
        """Return the scores; see the class."""
        groups, seed = UnitWeights.of(task.evidence.model, task.groups).groups, task.evidence.seed
        # Drawn by name, so that a group's scores do not change with the groups that are scored beside it.
        return of_weights(
            self.name,
            {
                g.name: torch.rand(
                    g.num_units, generator=seeded_generator(seed, g.name), dtype=torch.float64, device="cpu"
                )
                for g in groups
            },
        )
