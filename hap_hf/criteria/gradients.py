"""What criteria share that take means over the gradients of single samples."""

from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from hap_hf.criteria.criterion import Criterion, ScoringTask
from hap_hf.criteria.scores import Scores
from hap_hf.criteria.units import Coupling, UnitWeights, roles_of
from hap_hf.curvature import (
    Marginals,
    ReduceSamples,
    SampleEstimate,
    Statistic,
    Wanted,
    estimate_fisher,
    estimate_ggn,
)
from hap_hf.errors import BatchError, UnsupportedModelError
from hap_hf.evidence.evidence import Evidence
from hap_hf.names.checks import at_least


@dataclass(frozen=True, kw_only=True)
class OutputProbing(Criterion):
    """The setting of :func:`of_model`, checked: a criterion that goes back from the outputs derives from it too."""

    num_output_probes: int | None = field(
        default=1,
        metadata={
            "help": "Backward passes per batch, each from random signs at the model's outputs; None for as many as "
            "there are outputs, which is exact."
        },
    )

    def __post_init__(self) -> None:
        """Check the setting."""
        if self.num_output_probes is not None:
            at_least("num_output_probes", self.num_output_probes, 1)

    def suited(self, evidence: Evidence) -> Criterion:
        """Return this criterion; see :meth:`Criterion.suited`.

        Raises:
            UnsupportedModelError: If the loss has no curvature in the model's outputs that could be used.
        """
        if evidence.facts.no_curvature is not None:
            raise UnsupportedModelError(f"{evidence.facts.no_curvature}; use method='mask_fisher', {_GRADIENTS}")
        return super().suited(evidence)


class OfLabels(Criterion):
    """A criterion that is made of the gradients of the labels at hand."""

    def suited(self, evidence: Evidence) -> Criterion:
        """Return this criterion; see :meth:`Criterion.suited`.

        Raises:
            BatchError: If there are no labels.
        """
        if evidence.facts.own_outputs:
            raise BatchError(
                f"the batches hold no labels, and without any every gradient that {self.name} is made of is zero; use "
                "the default, method='reconstruction', or add labels"
            )
        return super().suited(evidence)


_GRADIENTS = "which takes the gradients of any loss"


def traces(task: ScoringTask, coupling: Coupling) -> tuple[UnitWeights, ReduceSamples]:
    """Return the weights that count, and what makes sensitivities of sums of squared gradients.

    Args:
        task: What to score.
        coupling: How the slices of a unit are combined.

    Returns:
        The weights, and a function from sums of squares to ``[samples, num_units of all groups]``.
    """
    units = UnitWeights.of(task.evidence.model, task.groups, roles_of(coupling))
    # HAP's formula is linear in the trace, so each sample's share of it can be scaled before the mean is taken.
    return units, partial(units.totals, factors=units.trace_factors(coupling))


def half_square(units: UnitWeights, products: Marginals) -> Tensor:
    """Return half the squared inner product of each unit's weights and gradient, for each sample.

    Args:
        units: The weights that make up each unit.
        products: Sums of weight times gradient by weight and dimension, ``[samples, size]``.

    Returns:
        The numbers, ``[samples, num_units of all groups]``.
    """
    return units.totals(products).square() / 2  # [samples, units]


def of_model(
    task: ScoringTask,
    method: str,
    units: UnitWeights,
    statistic: Statistic,
    reduce: ReduceSamples,
    num_output_probes: int | None,
) -> Scores:
    """Return a mean over gradients whose second moment is the generalised Gauss-Newton matrix.

    Args:
        task: What to score, on what.
        method: Name of the criterion.
        units: The weights that count.
        statistic: What of each gradient is summed.
        reduce: Makes of the sums a number for each sample and unit.
        num_output_probes: Backward passes per batch; None for as many as there are outputs.

    Returns:
        The scores, without their time.
    """
    evidence = task.evidence
    with evidence.ready(units.tensors, method, "batch") as tick:
        estimate = estimate_ggn(
            evidence.model,
            evidence.samples(),
            Wanted(units.tensors, units.dims(), statistic),
            reduce,
            evidence.signs,
            num_probes=num_output_probes,
            loss_scale=evidence.loss_scale(units.tensors),
            on_batch=tick,
            total=evidence.total,
            watchable=task.watchable,
            listener=task.listener,
        )
    # None means from every output in turn, with nothing random: then there are no probes to count.
    return _scores(method, units, estimate, num_output_probes or 0)


def of_labels(
    task: ScoringTask, method: str, units: UnitWeights, statistic: Statistic, reduce: ReduceSamples
) -> Scores:
    """Return a mean over the gradients of the samples' own losses; see :func:`of_model`.

    Args:
        task: What to score, on what.
        method: Name of the criterion.
        units: The weights that count.
        statistic: What of each gradient is summed.
        reduce: Makes of the sums a number for each sample and unit.

    Returns:
        The scores, without their time.
    """
    evidence = task.evidence
    with evidence.ready(units.tensors, method, "batch") as tick:
        estimate = estimate_fisher(
            evidence.model,
            evidence.samples(),
            Wanted(units.tensors, units.dims(), statistic),
            reduce,
            loss_scale=evidence.loss_scale(units.tensors),
            on_batch=tick,
            total=evidence.total,
            watchable=task.watchable,
        )
    return _scores(method, units, estimate, 0)


def _scores(method: str, units: UnitWeights, estimate: SampleEstimate, num_probes: int) -> Scores:
    """Return the scores of an estimate, group by group."""
    return Scores(
        units.by_group(estimate.mean),
        units.by_group(estimate.standard_error),
        method,
        num_probes=num_probes,
        num_batches=estimate.num_batches,
        num_loss_terms=estimate.num_terms,
        seconds=0.0,
    )
