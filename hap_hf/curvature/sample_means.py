"""Means over samples of statistics of their gradients, with standard errors."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from hap_hf.curvature.batch_loss import Total, check_counts
from hap_hf.curvature.forward import Directions, Forward, SampleBatch
from hap_hf.curvature.hvp import accumulation_dtype, listed
from hap_hf.curvature.input_watch import InputListener
from hap_hf.curvature.layer_watch import LayerWatch
from hap_hf.curvature.layers import NotPerSampleError
from hap_hf.curvature.marginals import Marginals, Wanted, squared
from hap_hf.curvature.sums import add_to_
from hap_hf.errors import CurvatureError

logger = logging.getLogger(__name__)

ReduceSamples = Callable[[Marginals], Tensor]
"""Maps the statistics of each sample's gradient to a number for each sample and block, ``[samples, num_blocks]``."""


@dataclass(frozen=True)
class SampleEstimate:
    """A mean over loss terms, to which each sample contributes a number for each block.

    Args:
        mean: Sum over all samples divided by the number of loss terms, ``[num_blocks]``, float64 on the CPU.
        standard_error: Its standard error, ``[num_blocks]``, from the spread over the samples: how much other samples
            and other random signs would change it. Infinite for a single sample.
        num_batches: Number of batches with loss terms.
        num_terms: Number of loss terms in them.
        num_samples: Number of samples in them.
    """

    mean: Tensor
    standard_error: Tensor
    num_batches: int
    num_terms: int
    num_samples: int


_NUM_CHECKED = 4
"""Most samples of the first batch that are compared with the same samples alone."""


@dataclass
class Watchable:
    """Whether the layers of a model tell samples apart, for all estimates on the same model and batches.

    Args:
        answer: None until it was checked.
    """

    answer: bool | None = None


class SampleMeans:
    """Adds up statistics of the per-sample gradients of some batches.

    Args:
        model: The model, ready for derivatives.
        wanted: What is asked of the gradients.
        reduce: Turns that into a number for each sample and block.
        directions: Yields, for a forward pass, where the backward passes start.
        loss_scale: Scale of the gradients at first.
        watchable: What an estimate before this one found out.
        listener: Is told what layers read, of batches whose samples are differentiated together.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Wanted,
        reduce: ReduceSamples,
        directions: Directions,
        loss_scale: float,
        watchable: Watchable | None = None,
        listener: InputListener | None = None,
    ) -> None:
        self.model, self.wanted, self.reduce = model, wanted, reduce
        self.directions, self.scale = directions, loss_scale
        self.degree = 2 if wanted.statistic is squared else 1
        self.watchable, self.listener = watchable or Watchable(), listener

    def over(self, batches: Iterable[SampleBatch], on_batch: Callable[[], object], total: Total) -> SampleEstimate:
        """Return the mean; see :func:`~hap_hf.curvature.ggn.estimate_ggn`.

        Args:
            batches: The batches, gone through once.
            on_batch: Called after every batch.
            total: Makes sums over all batches out of those over ``batches``.

        Returns:
            The mean with its standard error.
        """
        seen = num_batches = num_terms = num_samples = 0
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            seen += 1
            if batch.num_terms:
                values = self._values(batch, index).cpu().double()  # [samples, num_blocks]
                sums["values"] = sums.get("values", 0) + values.sum(0)
                sums["squares"] = sums.get("squares", 0) + values.square().sum(0)
                num_batches += 1
                num_terms += batch.num_terms
                num_samples += len(values)
            on_batch()
        whole = total({**sums, "counts": torch.tensor([seen, num_batches, num_terms, num_samples], device="cpu")})
        seen, num_batches, num_terms, num_samples = whole["counts"].tolist()
        check_counts(seen, num_terms)
        summed, squares = whole["values"], whole["squares"]
        # The variance of a sum of n samples is n times theirs, (squares - sum^2 / n) / (n - 1).
        spread = (squares - summed.square() / num_samples).clamp_min(0) * num_samples / max(num_samples - 1, 1)
        error = spread.sqrt() if num_samples > 1 else torch.full_like(summed, torch.inf)
        return SampleEstimate(summed / num_terms, error / num_terms, num_batches, num_terms, num_samples)

    def _values(self, batch: SampleBatch, index: int) -> Tensor:
        """Return the values of all samples of a batch, ``[samples, num_blocks]``, in the faster way that is right."""
        if self.watchable.answer is not False:
            try:
                return self._together(batch, index)
            except NotPerSampleError as obstacle:
                self.watchable.answer = False  # for all batches to come, as the model is the same
                logger.warning("every sample is differentiated alone, which is slow: %s", obstacle)
        return torch.cat(list(self._one_by_one(batch, index)))

    def _together(self, batch: SampleBatch, index: int) -> Tensor:
        """Return the values of all samples from the same backward passes."""
        total = torch.zeros(())
        weights: dict[int, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        with LayerWatch(self.model, self.wanted, self.listener) as watch:
            with watch.recording():
                forward = Forward(self.model, batch, self.wanted, index)
            for factor, vectors in self.directions(forward):
                sums, values = self._finite(forward, vectors, partial(watch.marginals, batch.num_samples))
                # Once for each estimate, on the first direction: what is wrong with the layers is wrong with all.
                if self.watchable.answer is None:
                    self._check(batch, forward, vectors, sums, watch.tolerance)
                    self.watchable.answer = True
                total = total.to(values) + factor * values
                for i, x in watch.read_weights.items():
                    add_to_(weights, i, factor / self.scale**2 * x)
                for path, x in watch.read_gradients.items():
                    add_to_(gradients, path, factor / self.scale**2 * x)
            if self.listener is not None:
                # Inputs that no backward pass reached weigh nothing.
                every = [
                    weights[i].detach() if i in weights else r.weights(torch.zeros_like(r.x))
                    for i, r in enumerate(watch.read)
                ]
                self.listener.hear(index, batch.num_rows, watch.read, every, gradients)
        return total

    def _one_by_one(self, batch: SampleBatch, index: int) -> Iterator[Tensor]:
        """Yield the values of each sample from backward passes of its own, ``[1, num_blocks]``."""
        for n in range(batch.num_samples):
            single = batch.single(n)
            if not single.num_terms:  # its mean loss is 0 / 0 and weighs nothing
                yield torch.zeros_like(self.reduce(self.wanted.zeros(1)))
                continue
            forward = Forward(self.model, single, self.wanted, index, n)
            parts = [f * self._finite(forward, vectors, self._plain)[1] for f, vectors in self.directions(forward)]
            yield torch.stack(parts).sum(0)

    def _finite(
        self, forward: Forward, vectors: Sequence[Tensor] | None, differentiate: Callable[..., Marginals]
    ) -> tuple[Marginals, Tensor]:
        """Return the statistics and what ``reduce`` makes of them, at the largest loss scale that does not overflow."""
        while True:
            sums = differentiate(*forward.pulled_back(vectors, self.scale))
            for _ in range(self.degree if self.scale != 1 else 0):  # the square of the scale may be too large
                sums = {key: x / self.scale for key, x in sums.items()}
            values = self.reduce(sums)
            if torch.isfinite(values).all():
                return sums, values
            if self.scale <= 1:
                culprits = [name for (name, _), x in sums.items() if not torch.isfinite(x).all()]
                raise CurvatureError(
                    f"batch {forward.index}: expected finite gradients, got NaN or infinities in "
                    f"{listed(culprits) or 'sums over units'}; look for extreme weights or inputs, or score in fp32"
                )
            self.scale = max(self.scale / 4, 1.0)

    def _plain(self, targets: Sequence[Tensor], vectors: Sequence[Tensor]) -> Marginals:
        """Return the statistics of a single sample, by autograd alone."""
        tensors = self.wanted.tensors
        gradients = torch.autograd.grad(
            targets, list(tensors.values()), vectors, retain_graph=True, materialize_grads=True
        )
        sums: Marginals = {}
        for (name, t), gradient in zip(tensors.items(), gradients, strict=True):
            sums.update(self.wanted.of_gradients(name, gradient[None].to(accumulation_dtype(t.dtype))))
        return sums

    def _check(
        self, batch: SampleBatch, forward: Forward, vectors: list[Tensor] | None, sums: Marginals, tolerance: float
    ) -> None:
        """Compare the statistics of the samples with the largest ones with those of the same samples alone.

        Rounding may switch a ReLU of one sample; what is wrong differs for every sample.

        Raises:
            NotPerSampleError: If a tensor's statistics differ for each of them.
        """
        # The samples with the largest statistics: zeros agree whatever is mixed up.
        strength = torch.stack([x.abs().sum(1).cpu() for x in sums.values()]).sum(0)
        singles = ((n, batch.single(n)) for n in strength.argsort(descending=True).tolist())
        differ = set(sums)
        for n, single in islice(((n, single) for n, single in singles if single.num_terms), _NUM_CHECKED):
            alone = Forward(self.model, single, self.wanted, forward.index, n)
            own = None if vectors is None else rows_of_sample(vectors, n, batch.num_samples, alone)
            truth, _ = self._finite(alone, own, self._plain)
            # A gradient that is zero but for rounding, as of a key's bias, has no relative error to speak of.
            floor = 1e-6 * max(x.norm().item() for x in truth.values())
            # A tensor is cleared by one sample that agrees.
            differ = {
                key
                for key, x in truth.items()
                if key in differ and (sums[key][n] - x[0]).norm().item() > tolerance * x.norm().item() + floor
            }
            if not differ:
                return
        if culprits := sorted({name for name, _ in differ}):
            raise NotPerSampleError(
                f"{listed(culprits)} has another gradient for a sample in a batch than for the sample alone; "
                "samples do not lie along the first dimension, or are mixed"
            )


def rows_of_sample(vectors: Sequence[Tensor], n: int, num_samples: int, alone: Forward) -> list[Tensor]:
    """Return the part of some vectors that belongs to sample n.

    Args:
        vectors: A vector for each output of a batch.
        n: Index of the sample.
        num_samples: Number of samples in the batch.
        alone: The forward pass of the sample alone.

    Returns:
        The vectors for the outputs of the sample alone.

    Raises:
        NotPerSampleError: If the outputs of the sample alone have another size.
    """
    sizes = [z.numel() * num_samples for z in alone.outputs]
    if sizes != [v.numel() for v in vectors]:
        raise NotPerSampleError("the model's outputs do not lie along a first dimension of samples")
    return [v.reshape(num_samples, -1)[n] for v in vectors]
