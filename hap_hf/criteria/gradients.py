"""Criteria from the gradients of single samples: the generalised Gauss-Newton matrix, Fisher matrices, masks."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hap_hf.criteria.sensitivity import Scores
from hap_hf.criteria.units import CONSUMING, UnitWeights, roles_of
from hap_hf.curvature import (
    Marginals,
    ReduceSamples,
    SampleEstimate,
    Statistic,
    Wanted,
    estimate_fisher,
    estimate_ggn,
    squared,
    times_weights,
)
from hap_hf.evidence.task import ScoringTask


def by_ggn(task: ScoringTask) -> Scores:
    r"""Score by the relative trace of the generalised Gauss-Newton matrix G, tr(G_uu) ||w_u||^2 / (2 n_u).

    HAP's formula with G for H. Near a minimum the two agree, but the trace of G is a plain sum of squared per-sample
    gradients: no random probe mixes other blocks into it, and it is never negative.

    References: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022, for the formula;
    :func:`~hap_hf.curvature.ggn.estimate_ggn` for the matrix.

    Args:
        task: What to score, on what and how.

    Returns:
        The scores, without their time.
    """
    units, reduce = _traces(task)
    return _of_model(task, units, squared, reduce)


def by_empirical_fisher(task: ScoringTask) -> Scores:
    r"""Score as :func:`by_ggn`, with the squared per-sample gradients of the labels at hand.

    The trace of the empirical Fisher matrix. It needs the loss's gradient only, so any loss will do, but where the
    labels are fitted it vanishes, which the curvature does not.

    Reference: Kunstner et al., "Limitations of the empirical Fisher approximation for natural gradient descent",
    NeurIPS 2019.

    Args:
        task: What to score, on what and how.

    Returns:
        The scores, without their time.
    """
    units, reduce = _traces(task)
    return _of_labels(task, units, squared, reduce)


def by_ggn_quadratic(task: ScoringTask) -> Scores:
    r"""Score by w_u^T G w_u / 2, the second-order loss increase of setting the unit's weights to zero.

    Without the assumption of :func:`by_ggn` that curvature is the same in all directions inside a unit. With gradients
    g_n whose second moment is G, as in :func:`~hap_hf.curvature.ggn.estimate_ggn`, it is the mean of ``<g_n, w_u>^2 /
    2``. The weights are those of all matrices of the unit, whatever the coupling.

    Reference: LeCun et al., "Optimal Brain Damage", NeurIPS 1989, for the loss increase; Singh and Alistarh,
    "WoodFisher", NeurIPS 2020, for Fisher matrices in it.

    Args:
        task: What to score, on what and how.

    Returns:
        The scores, without their time.
    """
    units = UnitWeights.of(task.model, task.groups)
    return _of_model(task, units, times_weights, partial(_half_square, units))


def by_taylor(task: ScoringTask) -> Scores:
    r"""Score by the first-order change of the loss, ``|<g, w_u>|`` with the gradient g of the mean loss.

    The absolute value where the paper has the square: the same ranking, in units of the loss. The gradient is that of
    all batches together, so that their size does not matter, where the paper averages over training steps.

    Reference: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, with the sum over
    a unit's weights inside the square, as for the paper's gates.

    Args:
        task: What to score, on what and how.

    Returns:
        The scores, without their time.
    """
    units = UnitWeights.of(task.model, task.groups)
    scores = _of_labels(task, units, times_weights, units.totals)
    return replace(scores, sensitivity={name: x.abs() for name, x in scores.sensitivity.items()})


def by_mask_ggn(task: ScoringTask) -> Scores:
    r"""Score by the second-order loss increase of a mask m_u on what is read of unit u, ``d^2 L / dm_u^2 / 2``.

    Removing a unit and setting its mask from 1 to 0 are the same, so this is w_u^T G w_u / 2 with w_u the columns that
    read the unit, and G the generalised Gauss-Newton matrix: :func:`by_mask_fisher` with the curvature of the loss in
    place of the squared gradients of the labels at hand, which vanish where the labels are fitted.

    References: Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", NeurIPS 2022, for the mask;
    :func:`~hap_hf.curvature.ggn.estimate_ggn` for the matrix.

    Args:
        task: What to score, on what and how.

    Returns:
        The scores, without their time.
    """
    units = UnitWeights.of(task.model, task.groups, CONSUMING)
    return _of_model(task, units, times_weights, partial(_half_square, units))


def by_mask_fisher(task: ScoringTask) -> Scores:
    r"""Score by the mean of ``(dL_n / dm_u)^2 / 2`` over the samples n, with a mask m_u = 1 on what is read of unit u.

    The empirical Fisher information of the mask, halved to be the estimated loss increase of setting it to zero. The
    mask multiplies what all layers read that consume the unit, so ``dL_n / dm_u`` is the inner product of their
    columns with these columns' gradients. L_n is the sum of the sample's loss terms.

    Reference: Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", NeurIPS 2022, whose code in
    repository WoosukKwon/retraining-free-pruning squares the gradients of batches, and not of samples.

    Args:
        task: What to score, on what and how.

    Returns:
        The scores, without their time.
    """
    units = UnitWeights.of(task.model, task.groups, CONSUMING)
    return _of_labels(task, units, times_weights, partial(_half_square, units))


def by_mask_gradient(task: ScoringTask) -> Scores:
    r"""Score by the mean of ``|dL_n / dm_u|``, divided by its Euclidean norm over the units of the group.

    The mask is that of :func:`by_mask_fisher`. The norm makes layers comparable, as the paper does, and is taken as
    known in the standard errors.

    Reference: Michel et al., "Are Sixteen Heads Really Better than One?", NeurIPS 2019.

    Args:
        task: What to score, on what and how.

    Returns:
        The scores, without their time.
    """
    units = UnitWeights.of(task.model, task.groups, CONSUMING)
    scores = _of_labels(task, units, times_weights, lambda products: units.totals(products).abs())
    norms = {name: x.norm().clamp_min(torch.finfo(x.dtype).tiny) for name, x in scores.sensitivity.items()}
    return replace(
        scores,
        sensitivity={name: x / norms[name] for name, x in scores.sensitivity.items()},
        standard_error={name: x / norms[name] for name, x in scores.standard_error.items()},
    )


def _traces(task: ScoringTask) -> tuple[UnitWeights, ReduceSamples]:
    """Return the weights that count, and what makes sensitivities of sums of squared gradients."""
    coupling = task.config.coupling
    units = UnitWeights.of(task.model, task.groups, roles_of(coupling))
    return units, partial(units.totals, factors=units.trace_factors(coupling))


def _half_square(units: UnitWeights, products: Marginals) -> Tensor:
    return units.totals(products).square() / 2


def _of_model(task: ScoringTask, units: UnitWeights, statistic: Statistic, reduce: ReduceSamples) -> Scores:
    """Return a mean over gradients whose second moment is the generalised Gauss-Newton matrix."""
    num_probes = task.config.num_output_probes
    with task.ready(units.tensors, task.config.method.value, "batch") as tick:
        estimate = estimate_ggn(
            task.model,
            task.samples(),
            Wanted(units.tensors, units.dims(), statistic),
            reduce,
            task.signs,
            num_probes=num_probes,
            loss_scale=task.loss_scale(units.tensors),
            on_batch=tick,
            total=task.total,
        )
    return _scores(task, units, estimate, num_probes or 0)


def _of_labels(task: ScoringTask, units: UnitWeights, statistic: Statistic, reduce: ReduceSamples) -> Scores:
    """Return a mean over the gradients of the samples' own losses."""
    with task.ready(units.tensors, task.config.method.value, "batch") as tick:
        estimate = estimate_fisher(
            task.model,
            task.samples(),
            Wanted(units.tensors, units.dims(), statistic),
            reduce,
            loss_scale=task.loss_scale(units.tensors),
            on_batch=tick,
            total=task.total,
        )
    return _scores(task, units, estimate, 0)


def _scores(task: ScoringTask, units: UnitWeights, estimate: SampleEstimate, num_probes: int) -> Scores:
    return Scores(
        units.by_group(estimate.mean),
        units.by_group(estimate.standard_error),
        task.config.method.value,
        num_probes=num_probes,
        num_batches=estimate.num_batches,
        num_loss_terms=estimate.num_terms,
        seconds=0.0,
    )
