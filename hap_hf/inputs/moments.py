"""Second moments of what layers read, weighted by how much it reaches the loss."""

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from hap_hf.curvature import (
    Directions,
    Forward,
    ReadInput,
    Wanted,
    accumulation_dtype,
    ggn_directions,
    loss_gradient,
    squared,
)
from hap_hf.curvature.batch_loss import check_counts
from hap_hf.curvature.hvp import listed
from hap_hf.curvature.input_watch import branch, gradient_moment
from hap_hf.curvature.sums import add_to_
from hap_hf.errors import CurvatureError
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.processes import Processes
from hap_hf.layers.projection import channel_dim, on_input


def weighted_moments(
    evidence: Evidence, paths: Collection[str], num_output_probes: int | None = 1
) -> dict[str, Tensor]:
    r"""Return ``sum_t w_t z_t z_t^T`` for the inputs ``z_t = (x_t, 1)`` of some layers, over all their positions t.

    The weight is ``w_t = E ||dL/dx_t||^2`` with the vectors of the generalised Gauss-Newton matrix in place of the
    loss's gradient: the trace of the block of the curvature that belongs to the layer's input at this position. Padding
    and whatever else does not reach the loss count for nothing, and in the last layer of a classifier that reads its
    first token only that token does. Where the loss has no curvature in the model's outputs, the gradient itself takes
    the place of these vectors.

    Reference: :func:`~hap_hf.curvature.ggn.estimate_ggn` for the vectors; Martens and Grosse, "Optimizing Neural
    Networks with Kronecker-factored Approximate Curvature", ICML 2015, for taking inputs and curvature apart, there
    without weights.

    Args:
        evidence: The model, the batches, and how they are computed.
        paths: Names of linear layers and convolutions.
        num_output_probes: Backward passes per batch; None for as many as there are outputs.

    Returns:
        For each layer that was called, and whose input reaches the loss, the sums over the even and over the odd ones
        of all samples, ``[2, inputs + 1, inputs + 1]``.

    Raises:
        BatchError: If there are no batches, or no loss terms in them.
        CurvatureError: If a derivative is not finite.
        UnsupportedModelError: As for :func:`~hap_hf.curvature.ggn.estimate_ggn`, where the loss was not tried.
    """
    moments = Moments(paths, evidence.processes)
    measure_moments(evidence, moments, num_output_probes)
    return moments.total()[0]


def measure_moments(evidence: Evidence, moments: "Moments", num_output_probes: int | None = 1) -> None:
    """Do what :func:`weighted_moments` does, with sums that can do more.

    Args:
        evidence: The model, the batches, and how they are computed.
        moments: Is told what the layers read.
        num_output_probes: Backward passes per batch; None for as many as there are outputs.

    Raises:
        BatchError: If there are no batches, or no loss terms in them.
        CurvatureError: If a derivative is not finite.
        UnsupportedModelError: As for :func:`~hap_hf.curvature.ggn.estimate_ggn`, where the loss was not tried.
    """
    model, paths = evidence.model, moments.paths
    weights = {f"{path}.weight": model.get_submodule(path).get_parameter("weight") for path in paths}
    # Without output curvature the gradients of the labels at hand stand in for it.
    curved = evidence.facts.no_curvature is None
    directions = ggn_directions(evidence.signs, num_output_probes) if curved else loss_gradient
    scale, seen, num_terms = evidence.loss_scale(weights), 0, 0
    with evidence.ready(weights, "compensation", "batch") as tick:
        for index, batch in enumerate(evidence.samples()):
            seen, num_terms = seen + 1, num_terms + batch.num_terms
            if batch.num_terms:
                with _watched(model, paths) as read:
                    forward = Forward(model, batch, Wanted(weights, {}, squared), index)
                found, gradients, scale = _at_inputs(forward, directions, read, scale, moments.gradients_at)
                moments.hear(index, batch.num_rows, read, found, gradients)
            tick()
    counts = evidence.processes.summed(
        "numbers of loss terms", {"counts": torch.tensor([seen, num_terms], device="cpu")}
    )
    check_counts(*counts["counts"].tolist())


class Moments:
    """Adds up the moments of :func:`weighted_moments`, of inputs that it is told of.

    Args:
        paths: Names of the layers.
        processes: The processes that measure together.
        gradients_at: Names of those at whose inputs second moments of the gradients are added up, too.
    """

    def __init__(self, paths: Collection[str], processes: Processes, gradients_at: Collection[str] = ()) -> None:
        self.paths, self.gradients_at, self._processes = paths, gradients_at, processes
        self._sums: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._num_batches = 0

    def hear(
        self,
        index: int,
        num_samples: int,
        read: Sequence[ReadInput],
        weights: Sequence[Tensor],
        gradients: Mapping[str, Tensor],
    ) -> None:
        """Add what was read in one batch.

        Args:
            index: Index of the batch in the share of this process.
            num_samples: Number of its samples, also of those without a loss of their own: halves only keep together
                what resembles each other.
            read: The inputs, call by call.
            weights: For each the weight of its positions, in its shape with one channel.
            gradients: The moments of the gradients by name of the layer, where they are wanted.
        """
        # With one sample a batch, as language models are often fed, the batches take turns.
        parity = self._processes.number(index) % 2 if num_samples == 1 else 0
        self._num_batches += 1
        for r, w in zip(read, weights, strict=True):
            _add(self._sums, r, w, num_samples, parity)
        for path, moment in gradients.items():
            add_to_(self._gradients, path, moment)

    def total(self) -> tuple[dict[str, Tensor], int]:
        """Return the sums over the batches of all processes by name of the layer, and the number of these batches."""
        count = self._processes.summed("numbers of batches", {"batches": torch.tensor([self._num_batches])})
        return dict(self._processes.summed("layer inputs", self._sums)), int(count["batches"])

    def total_gradients(self) -> dict[str, Tensor]:
        """Return the sums of ``g g^T`` over the gradients at inputs, ``[inputs, inputs]``, by name of the layer."""
        return dict(self._processes.summed("gradients at layer inputs", self._gradients))


@contextmanager
def _watched(model: nn.Module, paths: Collection[str]) -> Generator[list[ReadInput]]:
    """Note what the layers read inside the block."""
    seen: list[ReadInput] = []

    def note(path: str, x: Tensor) -> Tensor:
        own = branch(x)
        seen.append(ReadInput(path, own, channel_dim(model.get_submodule(path))))
        return own

    handles = [on_input(model.get_submodule(path), partial(note, path)) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _at_inputs(
    forward: Forward, directions: Directions, read: Sequence[ReadInput], scale: float, gradients_at: Collection[str]
) -> tuple[list[Tensor], dict[str, Tensor], float]:
    """Return what gradients say at each input, and the loss scale that did not overflow.

    Args:
        forward: The forward pass in which the inputs were noted, with its graph.
        directions: Yields where the backward passes of this forward pass start.
        read: The inputs, at their places in the graph.
        scale: Loss scale to begin with.
        gradients_at: Names of layers of which moments are wanted.

    Returns:
        The weight of each position, in the shape of the input with one channel; the moments of the gradients by name of
        the layer; and the scale.

    Raises:
        CurvatureError: If a gradient is not finite.
    """
    while True:
        found = [torch.zeros_like(r.x.narrow(r.channels, 0, 1), dtype=accumulation_dtype(r.x.dtype)) for r in read]
        moments: dict[str, Tensor] = {}
        for factor, vectors in directions(forward):
            targets, starts = forward.pulled_back(vectors, scale)
            grads = torch.autograd.grad(targets, [r.x for r in read], starts, retain_graph=True, allow_unused=True)
            for total, r, grad in zip(found, read, grads, strict=True):
                if grad is None:
                    continue
                # Unscaled before it is squared, which would double the exponent of the scale.
                unscaled = grad.to(total.dtype) / scale
                total += factor * r.weights(unscaled)
                if r.path in gradients_at:
                    add_to_(moments, r.path, factor * gradient_moment(unscaled, r.channels))
        if all(torch.isfinite(w).all() for w in found):
            return [w.detach() for w in found], moments, scale
        if scale <= 1:
            culprits = [r.path for r, w in zip(read, found, strict=True) if not torch.isfinite(w).all()]
            raise CurvatureError(
                f"batch {forward.index}: expected finite gradients, got NaN or infinities in the inputs of "
                f"{listed(culprits)}; look for extreme weights or inputs, or score in fp32"
            )
        scale = max(scale / 4, 1.0)


def _add(sums: dict[str, Tensor], read: ReadInput, weights: Tensor, num_samples: int, parity: int) -> None:
    """Add the moments of one call to those of even and of odd samples.

    Args:
        sums: Sums so far, by name of the layer.
        read: The input of the call.
        weights: Weight of each of its positions, in its shape with one channel.
        num_samples: Number of samples in the batch.
        parity: 0 if its first sample counts as even, 1 if as odd.
    """
    x = read.x.detach().to(weights.dtype)
    # Each z with the root of its weight, so that z z^T has the weight.
    z = torch.cat([x, torch.ones_like(weights)], read.channels) * weights.sqrt()
    z = z.movedim(read.channels, -1)  # [rows, ..., inputs + 1]
    rows = max(len(z) // num_samples, 1)  # of the first dimension, for each sample
    # By samples and not by positions: positions of one sample resemble each other, and one half would know the other.
    halves = [z[torch.arange(len(z)) // rows % 2 == half] for half in (parity, 1 - parity)]
    moment = torch.stack([half.flatten(0, -2).T @ half.flatten(0, -2) for half in halves])
    add_to_(sums, read.path, moment)
