"""The part of the Hessian that the Gauss-Newton matrix leaves out, as the Hessian of another loss."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from hap_hf.curvature.batch_loss import checked_loss
from hap_hf.curvature.hvp import accumulation_dtype
from hap_hf.curvature.outputs import last_before_loss, recorded_outputs
from hap_hf.errors import CurvatureError

Losses = Iterable[tuple[Callable[[], Tensor], int]]
"""For each batch a function that returns its mean loss, and its number of loss terms."""


class LinearisedLosses:
    r"""Losses made linear in the model's outputs, whose Hessian is what the Gauss-Newton matrix G leaves of H.

    With outputs z(w), the loss L(z) and its gradient ``c = dL/dz``,

        H = J^T (d^2 L / dz^2) J + sum_k c_k d^2 z_k / dw^2 = G + R,

    and R is the Hessian of ``w -> <c, z(w)>`` with c held constant. So its products and traces come from the same code
    and at the same cost as those of H, with no product with G. R is exactly zero for models that are linear in the
    weights, and tr(R) for those that are piecewise linear in each of them, as networks with ReLU are.

    tr(G) and an estimate of tr(R) give tr(H) with the variance of Hutchinson's estimator for R instead of H, which
    counts entries off the diagonal. In R these mean out as the c of many samples do: a net of 20 weights fitted to its
    labels had less than a twentieth of the variance. But on a small BERT trained to the noise of its labels,
    ``||R v|| / ||G v||`` was 14, 8 and 1.6 for batches of 32, 256 and 2048 samples, and the noise that of H.

    Reference: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
    Computation, 2002, for the decomposition.

    Args:
        model: The model that the losses run; its outputs are recorded while they do.
        losses: The losses of batches, as functions that run the model.
        tensors: Weights, by name, that require gradients.
        loss_scale: Loss scale at first, a power of two above 1 for float16, so that c does not vanish. It is lowered
            while c overflows, and divided out again.
    """

    def __init__(
        self, model: nn.Module, losses: Losses, tensors: Mapping[str, Tensor], loss_scale: float = 1.0
    ) -> None:
        self.model, self.losses, self.tensors, self.loss_scale = model, losses, tensors, loss_scale

    def __iter__(self) -> Iterator[tuple[Callable[[], Tensor], int]]:
        """Iterate over the linearised losses of the batches.

        Each is expanded at the weights of its first call.

        Yields:
            The function, and the number of loss terms.
        """
        for index, (loss, num_terms) in enumerate(self.losses):
            yield _Linearised(self, index, loss), num_terms


class _Linearised:
    """The linearised loss of one batch."""

    def __init__(self, owner: LinearisedLosses, index: int, loss: Callable[[], Tensor]) -> None:
        self.owner, self.index, self.loss = owner, index, loss
        self.slopes: list[Tensor] | None = None

    def __call__(self) -> Tensor:
        """Return its value, with its graph.

        Raises:
            CurvatureError: If the loss or its gradient is not finite, or does not depend on the weights.
            UnsupportedModelError: If the loss is not computed from the model's outputs.
        """
        with recorded_outputs(self.owner.model) as found:
            loss = checked_loss(self.loss(), self.index)
        outputs = last_before_loss(loss, found, self.owner.tensors)
        # Kept from the first call: differences move the weights between calls, and c must not move with them.
        if self.slopes is None:
            self.slopes = self._slopes(loss, outputs)
        # In the dtype of c: half precision would not hold a sum over all outputs of a batch.
        products = [(c * z.to(c.dtype)).sum() for c, z in zip(self.slopes, outputs, strict=True)]
        return torch.stack(products).sum()

    def _slopes(self, loss: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        """Return the gradient c of the loss with respect to the outputs, as constants."""
        scale = self.owner.loss_scale
        wide = loss.to(accumulation_dtype(loss.dtype))
        while True:
            # The graph is kept for another attempt at a lower scale.
            found = torch.autograd.grad(wide * scale, outputs, retain_graph=True)
            slopes = [c.to(accumulation_dtype(c.dtype)) / scale for c in found]
            if all(torch.isfinite(c).all() for c in slopes):
                return [c.detach() for c in slopes]
            if scale <= 1:
                raise CurvatureError(
                    f"batch {self.index}: expected finite gradients of the model's outputs, got NaN or infinities; "
                    "look for extreme weights or inputs, or score in fp32"
                )
            scale = max(scale / 4, 1.0)
