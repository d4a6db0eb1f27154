"""HAP's criterion with the Gauss-Newton matrix taken out of the Hessian, for less noise."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from hap_hf.criteria.criterion import ScoringTask, register_criterion
from hap_hf.criteria.gradients import OutputProbing
from hap_hf.criteria.probes import Again, Hvp, Probing, by_probes, check_attention, scores_of
from hap_hf.criteria.scores import Scores
from hap_hf.criteria.units import UnitWeights, roles_of
from hap_hf.curvature import LinearisedLosses, Wanted, estimate_ggn, rademacher, squared


@register_criterion
@dataclass(frozen=True, kw_only=True)
class HessianSplit(OutputProbing, Probing):
    r"""Score by the relative Hessian trace, as ``hessian``, with ``tr(H_uu) = tr(G_uu) + tr(R_uu)``.

    The first trace, of the generalised Gauss-Newton matrix, is a sum of squared per-sample gradients, and only the
    second one is left to Hutchinson's probes: see :func:`~hap_hf.curvature.ggn.estimate_ggn` and
    :class:`~hap_hf.curvature.remainder.LinearisedLosses`. Unbiased for the Hessian whatever the number of probes, at
    the outputs or at the weights, with less noise than by probes alone where R is smaller than H, off its diagonal too.

    Signs at the outputs and probes of the weights are independent, so squared standard errors add up: that of the first
    trace, from the spread over the samples, and that of the second, from the probes. ``stop_share`` looks at the
    latter alone, as more probes leave the other as it is.

    References: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022, for the formula; Schraudolph,
    "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation, 2002, for H = G + R.
    """

    name: ClassVar[str] = "hessian_split"
    by_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the settings."""
        Probing.__post_init__(self)
        OutputProbing.__post_init__(self)

    def score(self, task: ScoringTask) -> Scores:
        """Return the scores; see the class."""
        evidence = task.evidence
        units = UnitWeights.of(evidence.model, task.groups, roles_of(self.coupling))
        scale = evidence.loss_scale(units.tensors)
        # Checked now, and not after the first trace, which takes long.
        if self.hvp is not Hvp.FINITE_DIFFERENCE:
            check_attention(evidence.model)

        def signs(like: Mapping[str, Tensor], batch: int, probe: int) -> Mapping[str, Tensor]:
            # Negative numbers, as the streams of the others are those of the probes of the weights.
            return rademacher(like, evidence.seed, -1 - evidence.processes.number(batch), probe)

        with evidence.ready(units.tensors, "Gauss-Newton trace", "batch") as tick:
            ggn = estimate_ggn(
                evidence.model,
                evidence.samples(),
                Wanted(units.tensors, units.dims(), squared),
                partial(units.totals, factors=units.trace_factors(self.coupling)),
                signs,
                num_probes=self.num_output_probes,
                loss_scale=scale,
                on_batch=tick,
                total=evidence.total,
            )
        # The Hessian of these losses is R. The trace of G goes along, as `stop_share` is about the sum of both.
        losses = LinearisedLosses(evidence.model, Again(evidence.losses), units.tensors, scale)
        rest = by_probes(task, units, self, losses, "trace of the remainder", ggn.mean)
        error = (ggn.standard_error.square() + rest.standard_error.square()).sqrt()
        return scores_of(self.name, units, rest, ggn.mean + rest.trace, error)
