"""Hutchinson's estimator of the Hessian traces of many blocks of weights at once."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from hap_hf.curvature.batch_loss import Total, check_counts, checked_loss, of_all_batches
from hap_hf.curvature.hvp import differentiable_gradient, hvp, listed
from hap_hf.curvature.probes import ProbeSource
from hap_hf.errors import CurvatureError

Reduce = Callable[[Mapping[str, Tensor]], Tensor]
"""Maps a value for each weight, by name, to their sums over blocks, ``[num_blocks]``. Must be linear."""

_FIRST_LOOK = 4
"""Probes before the first question whether there are enough: a standard error from fewer is hardly one."""


@dataclass(frozen=True)
class TraceEstimate:
    """Estimated Hessian traces of blocks of weights.

    Args:
        trace: Trace of each block's diagonal block of the Hessian, ``[num_blocks]``, float64 on the CPU.
        standard_error: Standard error of each trace, ``[num_blocks]``. It measures the noise of the probes for the
            batches at hand, not how much other batches would differ.
        num_batches: Number of batches with loss terms.
        num_terms: Number of loss terms in them.
        num_probes: Number of probes for each batch.
        settled: Whether there were enough probes; None if that was not asked.
    """

    trace: Tensor
    standard_error: Tensor
    num_batches: int
    num_terms: int
    num_probes: int
    settled: bool | None = None


class Curvature(Protocol):
    """The second derivatives of one batch's loss."""

    scale: float
    """Loss scale, which is divided out of every product."""

    def product(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``H v`` by name, in float32 (float64 for float64 weights); not finite if the loss scale is too large.

        Args:
            vector: The vector, by name, in the shapes and dtypes of the weights.
        """
        ...

    def rescale(self, scale: float) -> None:
        """Go on with another loss scale.

        Args:
            scale: The loss scale.
        """
        ...


CurvatureOf = Callable[[int, Callable[[], Tensor], Mapping[str, Tensor], float], Curvature]
"""Makes second derivatives out of a batch's index, its loss, the weights and a loss scale."""


class DoubleBackward:
    """The second derivatives of one batch's loss, by a backward pass through the graph of its gradient.

    Args:
        index: Index of the batch, for messages.
        loss_of_batch: Returns its mean loss; called once.
        tensors: Weights, by name, that require gradients.
        scale: Loss scale.
    """

    def __init__(
        self, index: int, loss_of_batch: Callable[[], Tensor], tensors: Mapping[str, Tensor], scale: float
    ) -> None:
        self.index, self.tensors, self.scale = index, tensors, scale
        with torch.enable_grad():
            self.loss = checked_loss(loss_of_batch(), index)
            self.gradient = self._differentiated()

    def product(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``H v``; see :class:`Curvature`.

        Args:
            vector: The vector, by name.

        Returns:
            The product, by name.
        """
        with torch.enable_grad():
            return hvp(self.gradient, self.tensors, vector, self.scale)

    def rescale(self, scale: float) -> None:
        """Go on with another loss scale, from the same loss.

        Args:
            scale: The loss scale.
        """
        self.scale = scale
        with torch.enable_grad():
            self.gradient = self._differentiated()

    def _differentiated(self) -> dict[str, Tensor]:
        try:
            return differentiable_gradient(self.loss, self.tensors, self.scale)
        except CurvatureError as error:
            raise CurvatureError(f"batch {self.index}: {error}") from None


def estimate_traces(
    losses: Iterable[tuple[Callable[[], Tensor], int]],
    tensors: Mapping[str, Tensor],
    reduce: Reduce,
    probes: ProbeSource,
    *,
    num_probes: int,
    loss_scale: float = 1.0,
    on_probe: Callable[[], object] = lambda: None,
    total: Total = of_all_batches,
    curvature: CurvatureOf = DoubleBackward,
    enough: Callable[[TraceEstimate], bool] | None = None,
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
    With ``enough``, which is asked after 4, 8, 16 and so on probes a batch, the batches are gone through anew after
    each answer. How many probes there are changes none of them.

    Reference: Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
    splines", Communications in Statistics - Simulation and Computation, 1990.

    Args:
        losses: For each batch a function that returns its mean loss, called once each time that the batches are gone
            through, and its number of loss terms. A batch without terms is skipped.
        tensors: Weights, by name, that require gradients.
        reduce: Sums values over blocks.
        probes: Source of probes; :func:`~hap_hf.curvature.probes.rademacher` with a seed, or exact ones.
        num_probes: Probes for each batch, at least 2; the most where ``enough`` is given.
        loss_scale: Loss scale at first, a power of two above 1 for float16. It is divided out of every product. If a
            product overflows, the scale is lowered for good and the same probe repeated.
        on_probe: Called after every probe.
        total: Makes sums over all batches out of those over ``losses``.
        curvature: How second derivatives are computed.
        enough: Whether an estimate needs no more probes.

    Returns:
        Traces and their standard errors.

    Raises:
        BatchError: If there are no batches, or no loss terms in them.
        CurvatureError: If a loss or a product is not finite, or the loss does not depend on the weights.
    """
    # An iterator would be used up when the batches are gone through anew.
    batches = list(losses) if enough is not None and isinstance(losses, Iterator) else losses
    moments: dict[int, _Moments] = {}  # by batch, over all probes so far
    drawn = 0
    while True:
        # Doubling: few looks, as each is a chance to stop by luck, and at most half of the probes are too many.
        until = num_probes if enough is None else min(max(2 * drawn, _FIRST_LOOK), num_probes)
        sums: dict[str, Tensor] = {}
        num_batches = num_terms = seen = 0
        for index, (loss_of_batch, terms) in enumerate(batches):
            seen += 1
            if terms == 0:  # its mean loss is 0 / 0 and weighs nothing
                continue
            derivatives = curvature(index, loss_of_batch, tensors, loss_scale)
            own = moments.setdefault(index, _Moments())
            # Numbers of probes go on where they stopped, so the signs are those of a single run to the end.
            for probe in range(drawn, until):
                own.add(_sample(derivatives, index, reduce, probes(index, probe)))
                on_probe()
            loss_scale = derivatives.scale
            sums["trace"] = sums.get("trace", 0) + terms * own.mean.cpu().double()
            # The variance of a mean of n probes: their variance, squares / (n - 1), over n.
            sums["variance"] = sums.get("variance", 0) + terms**2 * own.squares.cpu().double() / (until - 1) / until
            num_batches += 1
            num_terms += terms
            del derivatives  # frees its graph before the next one is built
        # Sums, not means, so that processes with different numbers of terms can add theirs; divided only afterwards.
        whole = total({**sums, "counts": torch.tensor([seen, num_batches, num_terms], device="cpu")})
        seen, num_batches, num_terms = whole["counts"].tolist()
        check_counts(seen, num_terms)
        estimate = TraceEstimate(
            whole["trace"] / num_terms, whole["variance"].sqrt() / num_terms, num_batches, num_terms, until
        )
        if enough is None:
            return estimate
        settled = enough(estimate)
        if settled or until == num_probes:
            return replace(estimate, settled=settled)
        drawn = until


class _Moments:
    """Mean and summed squared deviations of samples, by Welford's recurrence."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), device="cpu")  # which goes with vectors of any device

    def add(self, sample: Tensor) -> None:
        """Take one more sample into account."""
        self.count += 1
        deviation = sample - self.mean
        self.mean = self.mean + deviation / self.count
        # The deviation from the old mean times that from the new one. A sum of squares less a squared sum would cancel.
        self.squares = self.squares + deviation * (sample - self.mean)


def _sample(derivatives: Curvature, batch: int, reduce: Reduce, probe: Mapping[str, Tensor]) -> Tensor:
    """Return the sums of ``v * H v`` over blocks, at the largest loss scale that does not overflow."""
    while True:
        product = derivatives.product(probe)
        product = {name: probe[name].to(hv.dtype) * hv for name, hv in product.items()}
        sample = reduce(product)
        if torch.isfinite(sample).all():
            return sample
        if derivatives.scale <= 1:
            culprits = [name for name, hv in product.items() if not torch.isfinite(hv).all()]
            raise CurvatureError(
                f"batch {batch}: expected finite second derivatives, got NaN or infinities in "
                f"{listed(culprits) or 'sums over units'}; look for extreme weights or inputs, or score in fp32"
            )
        # The same probe again: leaving out those that overflow would leave out the largest samples.
        derivatives.rescale(max(derivatives.scale / 4, 1.0))
