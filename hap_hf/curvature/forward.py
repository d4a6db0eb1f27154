"""A forward pass of a batch whose samples can be told apart, and where backward passes from it start."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from hap_hf.curvature.batch_loss import checked_loss
from hap_hf.curvature.hvp import accumulation_dtype
from hap_hf.curvature.marginals import Wanted
from hap_hf.curvature.output_root import OutputRoot, output_roots
from hap_hf.curvature.outputs import last_before_loss, recorded_outputs


@dataclass(frozen=True)
class SampleBatch:
    """A batch whose samples can be told apart.

    Args:
        loss: Runs the model on it and returns the mean of its loss terms. Called once.
        num_terms: Number of these terms.
        num_samples: Number of samples.
        single: Returns the batch of one of its samples alone.
        num_listed: Number of samples that its tensors hold, where these have no losses of their own and it counts as
            a single one.
    """

    loss: Callable[[], Tensor]
    num_terms: int
    num_samples: int
    single: Callable[[int], "SampleBatch"]
    num_listed: int | None = None

    @property
    def num_rows(self) -> int:
        """Number of samples that its tensors hold."""
        return self.num_listed or self.num_samples


class Forward:
    """The loss of a batch, or of one sample alone, with its graph.

    Args:
        model: The model that the batch's loss runs.
        batch: The batch, computed once here.
        wanted: The weights that the loss depends on.
        index: Index of the batch.
        sample: Index of the sample; 0 for a whole batch.
    """

    def __init__(self, model: nn.Module, batch: SampleBatch, wanted: Wanted, index: int, sample: int = 0) -> None:
        self.wanted, self.index, self.sample = wanted, index, sample
        self.num_samples, self.num_terms = batch.num_samples, batch.num_terms
        with recorded_outputs(model) as self._found, torch.enable_grad():
            loss = checked_loss(batch.loss(), index)
            # The sum of the terms: a sample's gradient then does not depend on how many others are in the batch.
            self.loss = loss.to(accumulation_dtype(loss.dtype)) * self.num_terms

    @cached_property
    def outputs(self) -> list[Tensor]:
        """The tensors that the loss is computed from."""
        return last_before_loss(self.loss, self._found, self.wanted.tensors)

    @cached_property
    def roots(self) -> list[OutputRoot]:
        """A root of the Hessian of the summed loss terms with respect to each of the outputs."""
        with torch.enable_grad():
            return list(output_roots(self.loss, {f"output {i}": z for i, z in enumerate(self.outputs)}).values())

    def pulled_back(self, vectors: Sequence[Tensor] | None, scale: float) -> tuple[list[Tensor], list[Tensor]]:
        """Return what a backward pass starts from.

        Args:
            vectors: A vector for each output; None for the gradient of the summed loss terms.
            scale: Factor on the vectors.

        Returns:
            Tensors, and a vector for each.
        """
        if vectors is None:
            return [self.loss], [torch.full_like(self.loss, scale)]
        return self.outputs, [(scale * v).to(z.dtype).view(z.shape) for v, z in zip(vectors, self.outputs, strict=True)]


Direction = tuple[float, list[Tensor] | None]
"""A factor, and a vector for each output, or None for the gradient of the loss."""

Directions = Callable[[Forward], Iterator[Direction]]
"""Yields, for a forward pass, where the backward passes start."""
