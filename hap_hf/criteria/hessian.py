"""HAP's criterion: the relative Hessian trace, by probes alone or with the Gauss-Newton matrix taken out of it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hap_hf.config import Hvp, Precision
from hap_hf.criteria.sensitivity import Scores
from hap_hf.criteria.stopping import few_undecided
from hap_hf.criteria.units import UnitWeights, roles_of
from hap_hf.curvature import (
    CurvatureOf,
    DoubleBackward,
    FiniteDifference,
    ForwardOverReverse,
    LinearisedLosses,
    Losses,
    TraceEstimate,
    Wanted,
    estimate_ggn,
    estimate_traces,
    rademacher,
    squared,
)
from hap_hf.errors import UnsupportedModelError
from hap_hf.evidence.task import ScoringTask
from hap_hf.model.state import renew_caches

_ARITHMETIC = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16, Precision.FP32: torch.float64}


def by_hessian(task: ScoringTask) -> Scores:
    """Score by the relative Hessian trace, by Hutchinson's estimator; see :func:`unit_sensitivity`.

    Args:
        task: What to score, on what and how.

    Returns:
        The scores, without their time.
    """
    units = UnitWeights.of(task.model, task.groups, roles_of(task.config.coupling))
    estimate = _by_probes(task, units, _Again(task.losses), "Hessian trace")
    return _scores(task, units, estimate, estimate.trace, estimate.standard_error)


def by_hessian_split(task: ScoringTask) -> Scores:
    r"""Score by the relative Hessian trace, as :func:`by_hessian`, with ``tr(H_uu) = tr(G_uu) + tr(R_uu)``.

    The first trace, of the generalised Gauss-Newton matrix, is a sum of squared per-sample gradients, and only the
    second one is left to Hutchinson's probes: see :func:`~hap_hf.curvature.ggn.estimate_ggn` and
    :class:`~hap_hf.curvature.remainder.LinearisedLosses`. Unbiased for the Hessian whatever the number of probes, at
    the outputs or at the weights, with less noise than by probes alone where R is smaller than H, off its diagonal too.

    Signs at the outputs and probes of the weights are independent, so squared standard errors add up: that of the first
    trace, from the spread over the samples, and that of the second, from the probes. ``stop_share`` looks at the
    latter alone, as more probes leave the other as it is.

    References: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022, for the formula; Schraudolph,
    "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation, 2002, for H = G + R.

    Args:
        task: What to score, on what and how; the batches are gone through several times.

    Returns:
        The scores, without their time.
    """
    config = task.config
    units = UnitWeights.of(task.model, task.groups, roles_of(config.coupling))
    scale = task.loss_scale(units.tensors)
    _check_attention(task)

    def signs(like: Mapping[str, Tensor], batch: int, probe: int) -> Mapping[str, Tensor]:
        # Negative numbers, as the streams of the others are those of the probes of the weights.
        return rademacher(like, config.seed, -1 - task.processes.number(batch), probe)

    with task.ready(units.tensors, "Gauss-Newton trace", "batch") as tick:
        ggn = estimate_ggn(
            task.model,
            task.samples(),
            Wanted(units.tensors, units.dims(), squared),
            partial(units.totals, factors=units.trace_factors(config.coupling)),
            signs,
            num_probes=config.num_output_probes,
            loss_scale=scale,
            on_batch=tick,
            total=task.total,
        )
    losses = LinearisedLosses(task.model, _Again(task.losses), units.tensors, scale)
    rest = _by_probes(task, units, losses, "trace of the remainder", ggn.mean)
    error = (ggn.standard_error.square() + rest.standard_error.square()).sqrt()
    return _scores(task, units, rest, ggn.mean + rest.trace, error)


def _by_probes(
    task: ScoringTask, units: UnitWeights, losses: Losses, title: str, known: Tensor | float = 0.0
) -> TraceEstimate:
    """Return what probes say of the sensitivities, where ``known`` is added to them to tell when it is enough."""
    config = task.config
    factors = units.trace_factors(config.coupling)
    few = few_undecided(units.groups, config)
    enough: Callable[[TraceEstimate], bool] | None = None
    if few is not None:
        enough = lambda estimate: few(known + estimate.trace, estimate.standard_error)  # ruff: ignore[lambda-assignment]
    _check_attention(task)
    twice = config.hvp is not Hvp.FINITE_DIFFERENCE
    with task.ready(units.tensors, title, "probe", config.num_probes, twice=twice) as tick:
        return estimate_traces(
            losses,
            units.tensors,
            # Linear in the products, so that standard errors are those of the sensitivities.
            lambda products: units.totals(units.marginals(products), factors),
            partial(task.signs, units.tensors),
            num_probes=config.num_probes,
            loss_scale=task.loss_scale(units.tensors),
            on_probe=tick,
            total=task.total,
            curvature=_curvature(task),
            enough=enough,
        )


@dataclass(frozen=True)
class _Again:
    """Losses that can be gone through several times."""

    start: Callable[[], Iterator[tuple[Callable[[], Tensor], int]]]

    def __iter__(self) -> Iterator[tuple[Callable[[], Tensor], int]]:
        return self.start()


def _curvature(task: ScoringTask) -> CurvatureOf:
    changed = partial(renew_caches, task.model)
    if task.config.hvp is Hvp.FINITE_DIFFERENCE:
        resolution = torch.finfo(_ARITHMETIC[task.config.precision]).eps
        return partial(FiniteDifference, resolution=resolution, changed=changed)
    if task.config.hvp is Hvp.FORWARD_OVER_REVERSE:
        return partial(ForwardOverReverse, model=task.model, changed=changed)
    return DoubleBackward


def _check_attention(task: ScoringTask) -> None:
    if task.config.hvp is Hvp.FINITE_DIFFERENCE:
        return
    # Foreign kernels return gradients without a graph: their curvature would be missing, and nothing would tell.
    for module in task.model.modules():
        attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if attention not in {None, "eager", "sdpa"}:
            raise UnsupportedModelError(
                f"{type(module).__name__} uses attention {attention!r}, which may not be differentiable twice; call "
                "model.set_attn_implementation('sdpa') or load the model with attn_implementation='sdpa', or set "
                "hvp='finite_difference'"
            )


def _scores(task: ScoringTask, units: UnitWeights, estimate: TraceEstimate, mean: Tensor, error: Tensor) -> Scores:
    return Scores(
        units.by_group(mean),
        units.by_group(error),
        task.config.method.value,
        num_probes=estimate.num_probes,
        num_batches=estimate.num_batches,
        num_loss_terms=estimate.num_terms,
        seconds=0.0,
        settled=estimate.settled,
    )
