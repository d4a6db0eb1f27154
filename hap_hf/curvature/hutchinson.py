"""Hutchinson's estimator of the Hessian traces of many blocks of weights at once."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hap_hf.curvature.batch_loss import check_counts, checked_loss
from hap_hf.curvature.hvp import differentiable_gradient, hvp, listed
from hap_hf.curvature.probes import ProbeSource
from hap_hf.errors import CurvatureError

Reduce = Callable[[Mapping[str, Tensor]], Tensor]
"""Maps a value for each weight, by name, to their sums over blocks, ``[num_blocks]``. Must be linear."""


@dataclass(frozen=True)
class TraceEstimate:
    """Estimated Hessian traces of blocks of weights.

    Args:
        trace: Trace of each block's diagonal block of the Hessian, ``[num_blocks]``, float64 on the CPU.
        standard_error: Standard error of each trace, ``[num_blocks]``. It measures the noise of the probes for the
            batches at hand, not how much other batches would differ.
        num_batches: Number of batches with loss terms.
        num_terms: Number of loss terms in them.
    """

    trace: Tensor
    standard_error: Tensor
    num_batches: int
    num_terms: int


def estimate_traces(
    losses: Iterable[tuple[Callable[[], Tensor], int]],
    tensors: Mapping[str, Tensor],
    reduce: Reduce,
    probes: ProbeSource,
    *,
    num_probes: int,
    loss_scale: float = 1.0,
    on_probe: Callable[[], object] = lambda: None,
) -> TraceEstimate:
    r"""Return the Hessian trace of every block, with one Hessian-vector product a probe for all blocks together.

    For a Rademacher probe v over all weights and a block u, ``t_u = sum_{i in u} v_i (H v)_i``. As ``E v_i v_j`` is 1
    for i = j and else 0,

        E t_u = sum_{i in u} sum_j H_ij E v_i v_j = sum_{i in u} H_ii = tr(H_uu).

    As the products ``v_i v_j`` over pairs i < j are uncorrelated with mean 0 and variance 1,

        Var t_u = 2 sum_{i != j in u} H_ij^2 + sum_{i in u, j not in u} H_ij^2.

    A batch's loss is the mean of its n_b loss terms, so the Hessian of the whole is ``sum_b w_b H_b`` with
    ``w_b = n_b / sum n_b``; traces add up in the same way, and squared standard errors with ``w_b^2``, as every batch
    has probes of its own.

    Cost: one forward and one backward pass a batch, and one backward pass through both a probe. Products are reduced
    where they are computed; of all probes only the running mean and squared deviation, ``[num_blocks]``, are kept.

    Reference: Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
    splines", Communications in Statistics - Simulation and Computation, 1990.

    Args:
        losses: For each batch a function that returns its mean loss, called once, and its number of loss terms. A batch
            without terms is skipped.
        tensors: Weights, by name, that require gradients.
        reduce: Sums values over blocks.
        probes: Source of probes; :func:`~hap_hf.curvature.probes.rademacher` with a seed, or exact ones.
        num_probes: Probes for each batch, at least 2.
        loss_scale: Loss scale at first, a power of two above 1 for float16. It is divided out of every product. If a
            product overflows, the scale is lowered for good and the same probe repeated.
        on_probe: Called after every probe.

    Returns:
        Traces and their standard errors.

    Raises:
        BatchError: If there are no batches, or no loss terms in them.
        CurvatureError: If a loss or a product is not finite, or the loss does not depend on the weights.
    """
    trace = variance = torch.zeros((), device="cpu")
    num_batches = num_terms = seen = 0
    for index, (loss_of_batch, terms) in enumerate(losses):
        seen += 1
        if terms == 0:  # its mean loss is 0 / 0 and weighs nothing
            continue
        batch = _Batch(index, loss_of_batch, tensors, loss_scale)
        mean, squares = batch.moments(reduce, probes, num_probes, on_probe)
        loss_scale = batch.scale
        trace = trace + terms * mean
        variance = variance + terms**2 * squares / (num_probes - 1) / num_probes
        num_batches += 1
        num_terms += terms
        del batch  # frees its graph before the next one is built
    check_counts(seen, num_terms)
    return TraceEstimate(trace / num_terms, variance.sqrt() / num_terms, num_batches, num_terms)


class _Batch:
    """The loss of one batch with the graph of its gradient."""

    def __init__(
        self, index: int, loss_of_batch: Callable[[], Tensor], tensors: Mapping[str, Tensor], scale: float
    ) -> None:
        self.index, self.tensors, self.scale = index, tensors, scale
        with torch.enable_grad():
            self.loss = checked_loss(loss_of_batch(), index)
            self.gradient = self._differentiated()

    def moments(
        self, reduce: Reduce, probes: ProbeSource, num_probes: int, on_probe: Callable[[], object]
    ) -> tuple[Tensor, Tensor]:
        """Return the mean and the summed squared deviations of the probes, by Welford's recurrence."""
        mean = squares = torch.zeros((), device="cpu")  # a scalar of the CPU goes with vectors of any device
        for p in range(num_probes):
            sample = self._sample(reduce, probes(self.index, p))
            deviation = sample - mean
            mean = mean + deviation / (p + 1)
            squares = squares + deviation * (sample - mean)
            on_probe()
        return mean.cpu().double(), squares.cpu().double()

    def _sample(self, reduce: Reduce, probe: Mapping[str, Tensor]) -> Tensor:
        while True:
            with torch.enable_grad():
                product = hvp(self.gradient, self.tensors, probe, self.scale)
            product = {name: probe[name].to(hv.dtype) * hv for name, hv in product.items()}
            sample = reduce(product)
            if torch.isfinite(sample).all():
                return sample
            if self.scale <= 1:
                culprits = [name for name, hv in product.items() if not torch.isfinite(hv).all()]
                raise CurvatureError(
                    f"batch {self.index}: expected finite second derivatives, got NaN or infinities in "
                    f"{listed(culprits) or 'sums over units'}; look for extreme weights or inputs, or score in fp32"
                )
            self.scale = max(self.scale / 4, 1.0)
            with torch.enable_grad():
                self.gradient = self._differentiated()

    def _differentiated(self) -> dict[str, Tensor]:
        try:
            return differentiable_gradient(self.loss, self.tensors, self.scale)
        except CurvatureError as error:
            raise CurvatureError(f"batch {self.index}: {error}") from None
