"""What the criteria share that draw probes of the Hessian."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from hap_hf.criteria.criterion import Criterion, ScoringTask
from hap_hf.criteria.scores import Scores
from hap_hf.criteria.stopping import few_undecided
from hap_hf.criteria.units import Coupling, UnitWeights
from hap_hf.curvature import (
    CurvatureOf,
    DoubleBackward,
    FiniteDifference,
    ForwardOverReverse,
    Losses,
    TraceEstimate,
    estimate_traces,
)
from hap_hf.errors import UnsupportedModelError
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.memory import is_out_of_memory
from hap_hf.evidence.precision import Precision
from hap_hf.evidence.rehearsal import projection_weights
from hap_hf.host import attention_of
from hap_hf.model.state import renew_caches
from hap_hf.names.checks import at_least, member, share

# fp32 means the weights' own dtype, whatever that is: float64's resolution is below all, so that theirs counts.
_ARITHMETIC = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16, Precision.FP32: torch.float64}


class Hvp(StrEnum):
    """How products with the Hessian are computed."""

    DOUBLE_BACKWARD = "double_backward"
    """A backward pass through the gradient's graph: exact; attention must be eager or SDPA."""
    FORWARD_OVER_REVERSE = "forward_over_reverse"
    """The gradient in dual numbers: as exact and slower, without that graph; attention must be eager or SDPA."""
    FINITE_DIFFERENCE = "finite_difference"
    """Differences of gradients: approximate; any attention kernel, checkpointed activations."""


@dataclass(frozen=True, kw_only=True)
class Probing(Criterion):
    """The settings of Hutchinson's estimator, checked: a criterion that draws probes derives from it."""

    by_samples: ClassVar[bool] = False

    num_probes: int = field(
        default=8,
        metadata={"help": "Hutchinson probes per batch, at least 2; the most of stop_share."},
    )
    stop_share: float | None = field(
        default=None,
        metadata={
            "help": "Draw 4, 8, 16 and so on probes per batch until less than this share of the units lies within two "
            "standard errors of the threshold; None for always num_probes."
        },
    )
    hvp: Hvp = field(
        default=Hvp.DOUBLE_BACKWARD,
        metadata={
            "help": "How products with the Hessian are computed: double_backward, forward_over_reverse or "
            "finite_difference."
        },
    )
    coupling: Coupling = field(
        default=Coupling.SUM, metadata={"help": "How the slices of a unit are combined: joint, sum or filter."}
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        at_least("num_probes", self.num_probes, 2)
        if self.stop_share is not None:
            share("stop_share", self.stop_share)
        object.__setattr__(self, "hvp", member(Hvp, "hvp", self.hvp))
        object.__setattr__(self, "coupling", member(Coupling, "coupling", self.coupling))

    def try_out(self, evidence: Evidence) -> None:
        """Compute one product with the Hessian of the first batch's loss.

        Args:
            evidence: What will be scored on.

        Raises:
            CurvatureError: If there is none.
            MemoryError: Never, nor others for want of memory: scoring goes on with smaller batches.
            RuntimeError: Whatever else autograd raises.
            UnsupportedModelError: If attention runs on a kernel for which that is not known.
        """
        exact = self.hvp is not Hvp.FINITE_DIFFERENCE
        if exact:
            check_attention(evidence.model)
        weights = projection_weights(evidence.model)
        first = replace(evidence, batches=evidence.batches[:1])
        try:
            with evidence.ready(weights, "looking at the loss", "batch", twice=exact, checkpointed=not exact):
                for loss, _ in (pair for pair in first.losses() if pair[1]):
                    curvature = _curvature(evidence, self.hvp)(0, loss, weights, evidence.loss_scale(weights))
                    curvature.product(evidence.signs(weights, 0, 0))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise


def by_probes(
    task: ScoringTask,
    units: UnitWeights,
    probing: Probing,
    losses: Losses,
    title: str,
    known: Tensor | float = 0.0,
) -> TraceEstimate:
    """Return what probes say of the sensitivities.

    Args:
        task: What to score, on what.
        units: The weights that count.
        probing: How many probes, and how.
        losses: The losses of the batches, which can be gone through again.
        title: What the progress bar is called.
        known: What is added to the sensitivities to tell when it is enough.

    Returns:
        The sensitivities of all units with their standard errors.
    """
    evidence, factors = task.evidence, units.trace_factors(probing.coupling)
    few = None  # without an amount there is no threshold beside which a unit could be undecided
    if probing.stop_share is not None and task.amount is not None:
        few = few_undecided(units.groups, task.amount, task.per, probing.stop_share)
    enough: Callable[[TraceEstimate], bool] | None = None
    if few is not None:
        enough = lambda estimate: few(known + estimate.trace, estimate.standard_error)  # ruff: ignore[lambda-assignment]
    exact = probing.hvp is not Hvp.FINITE_DIFFERENCE
    if exact:
        check_attention(evidence.model)
    # Finite differences take any attention kernel, and checkpoints; exact products take neither.
    with evidence.ready(units.tensors, title, "probe", probing.num_probes, twice=exact, checkpointed=not exact) as tick:
        return estimate_traces(
            losses,
            units.tensors,
            # Linear in the products, so that standard errors are those of the sensitivities.
            lambda products: units.totals(units.marginals(products), factors),
            partial(evidence.signs, units.tensors),
            num_probes=probing.num_probes,
            loss_scale=evidence.loss_scale(units.tensors),
            on_probe=tick,
            total=evidence.total,
            curvature=_curvature(evidence, probing.hvp),
            enough=enough,
        )


def scores_of(method: str, units: UnitWeights, estimate: TraceEstimate, mean: Tensor, error: Tensor) -> Scores:
    """Return scores with the counts of an estimate.

    Args:
        method: Name of the criterion.
        units: The weights that count.
        estimate: What the probes said.
        mean: Sensitivity of each unit, ``[num_units of all groups]``.
        error: Their standard errors, likewise.

    Returns:
        The scores, without their time.
    """
    return Scores(
        units.by_group(mean),
        units.by_group(error),
        method,
        num_probes=estimate.num_probes,
        num_batches=estimate.num_batches,
        num_loss_terms=estimate.num_terms,
        seconds=0.0,
        settled=estimate.settled,
    )


@dataclass(frozen=True)
class Again:
    """Losses that can be gone through several times."""

    start: Callable[[], Iterator[tuple[Callable[[], Tensor], int]]]

    def __iter__(self) -> Iterator[tuple[Callable[[], Tensor], int]]:
        """Go through them once more."""
        return self.start()


def _curvature(evidence: Evidence, how: Hvp) -> CurvatureOf:
    """Return what makes products with the Hessian, told to renew what modules keep of weights where it changes them."""
    changed = partial(renew_caches, evidence.model)
    if how is Hvp.FINITE_DIFFERENCE:
        resolution = torch.finfo(_ARITHMETIC[evidence.precision]).eps
        return partial(FiniteDifference, resolution=resolution, changed=changed)
    if how is Hvp.FORWARD_OVER_REVERSE:
        return partial(ForwardOverReverse, model=evidence.model, changed=changed)
    return DoubleBackward


def check_attention(model: nn.Module) -> None:
    """Check that attention can be differentiated twice.

    Args:
        model: The model whose loss is to be differentiated twice.

    Raises:
        UnsupportedModelError: If it runs on a kernel for which that is not known.
    """
    # Foreign kernels return gradients without a graph: their curvature would be missing, and nothing would tell.
    for module in model.modules():
        attention = attention_of(getattr(module, "config", None))
        if attention not in {None, "eager", "sdpa"}:
            raise UnsupportedModelError(
                f"{type(module).__name__} uses attention {attention!r}, which may not be differentiable twice; call "
                "model.set_attn_implementation('sdpa') or load the model with attn_implementation='sdpa', or set "
                "hvp='finite_difference' in the criterion"
            )
