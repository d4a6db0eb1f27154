"""How sensitive the loss is to each unit: HAP's relative Hessian trace, and the criteria it has to beat.

A criterion is a function from a :class:`ScoringTask` to :class:`Scores`, and an entry in :data:`METHODS`.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.config import Coupling, HapConfig, Method
from hap_hf.criteria.gradients import (
    by_empirical_fisher,
    by_ggn,
    by_ggn_quadratic,
    by_mask_fisher,
    by_mask_ggn,
    by_mask_gradient,
    by_taylor,
)
from hap_hf.criteria.hessian import by_hessian, by_hessian_split
from hap_hf.criteria.sensitivity import Scores, unit_sensitivity
from hap_hf.criteria.units import UnitWeights, roles_of
from hap_hf.curvature import seeded_generator
from hap_hf.evidence.losses import LossFunction, model_loss
from hap_hf.evidence.memory import in_batches_that_fit
from hap_hf.evidence.processes import ALONE, Processes
from hap_hf.evidence.task import ScoringTask, mean_loss
from hap_hf.names.group import Group

__all__ = ["METHODS", "Scores", "ScoringTask", "UnitWeights", "mean_loss", "score_groups", "unit_sensitivity"]


def score_groups(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Mapping[str, Any]],
    config: HapConfig,
    *,
    loss_fn: LossFunction | None = None,
    processes: Processes = ALONE,
) -> Scores:
    """Return the sensitivity of every unit by ``config.method``; the model is left exactly as found.

    When memory runs out, a warning says so and scoring starts anew with batches cut in halves.

    Args:
        model: The model that the groups were found in.
        groups: Units to score.
        batches: Keyword arguments of the model's forward with labels; the first ``config.max_batches`` are used. Each
            counts by its number of loss terms, see
            :func:`~hap_hf.evidence.losses.count_loss_terms`. The methods ``magnitude``
            and ``random`` need none.
        config: Method, number of probes, precision and seed.
        loss_fn: Mean loss of a model over a batch's loss terms; ``model(**batch).loss`` by default.
        processes: The processes that score together, whose results are the same; ``batches`` are the share of this one.

    Returns:
        Sensitivities with their standard errors.

    Raises:
        BatchError: If there are no batches, they hold no labels or no loss terms, or a single sample does not fit.
        CurvatureError: If a loss or a derivative is not finite, or does not depend on the weights.
        UnsupportedModelError: If there are no groups, they do not fit the model, or the method does not fit the loss.
    """
    start = time.perf_counter()
    if config.method is Method.HESSIAN_SPLIT or (config.method is Method.HESSIAN and config.stop_share is not None):
        batches = list(islice(batches, config.max_batches))  # the same ones each time that they are gone through
    task = ScoringTask(model, groups, batches, config, loss_fn or model_loss, processes)
    scores = in_batches_that_fit(METHODS[config.method], task)
    return replace(scores, seconds=time.perf_counter() - start)


def by_magnitude(task: ScoringTask) -> Scores:
    """Score by the mean square of a unit's weights; needs no batch.

    Args:
        task: What to score and how.

    Returns:
        The scores, without their time.
    """
    units = UnitWeights.of(task.model, task.groups, roles_of(task.config.coupling))
    sensitivity = {}
    for group, slices, norms in zip(units.groups, units.slices, units.squared_norms(), strict=True):
        entries = [s.entries_per_unit for s in slices]
        if task.config.coupling is Coupling.JOINT:
            norms, entries = [torch.stack(norms).sum(0)], [units.num_entries()[group.name]]
        sensitivity[group.name] = torch.stack([norm / n for norm, n in zip(norms, entries, strict=True)]).sum(0)
    return _exact(sensitivity, task)


def by_chance(task: ScoringTask) -> Scores:
    """Score by uniform random numbers, which depend on the seed and the group's name; needs no batch.

    Args:
        task: What to score and how.

    Returns:
        The scores, without their time.
    """
    groups = UnitWeights.of(task.model, task.groups).groups
    return _exact({g.name: _uniform(g, seeded_generator(task.config.seed, g.name)) for g in groups}, task)


def _uniform(group: Group, generator: torch.Generator) -> Tensor:
    return torch.rand(group.num_units, generator=generator, dtype=torch.float64, device="cpu")


def _exact(sensitivity: Mapping[str, Tensor], task: ScoringTask) -> Scores:
    zeros = {name: torch.zeros_like(x) for name, x in sensitivity.items()}
    method = task.config.method.value
    return Scores(sensitivity, zeros, method, num_probes=0, num_batches=0, num_loss_terms=0, seconds=0.0)


METHODS: Mapping[Method, Callable[[ScoringTask], Scores]] = {
    Method.HESSIAN: by_hessian,
    Method.HESSIAN_SPLIT: by_hessian_split,
    Method.GGN: by_ggn,
    Method.GGN_QUADRATIC: by_ggn_quadratic,
    Method.EMPIRICAL_FISHER: by_empirical_fisher,
    Method.TAYLOR: by_taylor,
    Method.MASK_GGN: by_mask_ggn,
    Method.MASK_FISHER: by_mask_fisher,
    Method.MICHEL: by_mask_gradient,
    Method.MAGNITUDE: by_magnitude,
    Method.RANDOM: by_chance,
}
"""How to score, by method; what is returned has no time yet."""
