"""Square roots of a loss's Hessian with respect to the outputs of the model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hap_hf.curvature.hvp import accumulation_dtype, differentiable_gradient, hvp
from hap_hf.curvature.probes import seeded_generator
from hap_hf.errors import UnsupportedModelError

_MOST_PRODUCTS = 1024
"""Most classes for which a loss of unknown kind is multiplied with each of them."""

_MOST_EIGEN = 2**26
"""Most positions times cubed classes for which blocks are decomposed, which takes seconds."""


@dataclass(frozen=True)
class OutputRoot:
    """A matrix S with ``S S^T = H``, the Hessian of a loss with respect to one output, with one block a position.

    Args:
        apply: Maps a coefficient of each column, ``[*positions, rank]``, to ``S e`` in the shape of the output.
        coefficients: Zeros in the shape, dtype and on the device of the coefficients.
    """

    apply: Callable[[Tensor], Tensor]
    coefficients: Tensor

    def columns(self, num_samples: int) -> Iterator[Tensor]:
        """Yield the columns of S, one column of every sample at a time.

        Args:
            num_samples: Number of samples, to each of which belong as many consecutive positions.

        Yields:
            Tensors in the shape of the output.
        """
        for i in range(self.coefficients.numel() // num_samples):
            chosen = torch.zeros_like(self.coefficients)
            chosen.view(num_samples, -1)[:, i] = 1
            yield self.apply(chosen)


def output_roots(loss: Tensor, outputs: Mapping[str, Tensor]) -> dict[str, OutputRoot]:
    r"""Return a root of the Hessian of ``loss`` with respect to each output.

    The loss must be a sum of terms of which each reads one position of one output, ``[*positions, classes]`` or
    ``[samples, classes, *positions]``: then its Hessian has one block ``H_t`` a position and no others. What the blocks
    look like is not guessed from the model, but read off two Hessian-vector products through the loss alone, with a
    Gaussian v and with ones:

    * elementwise losses (squared error, binary cross entropy) have ``H v = (H 1) * v``, so S is the root of ``H 1``;
    * softmax cross entropy has ``H_t = w_t (diag(p_t) - p_t p_t^T)`` whatever the targets: ignored, shifted, smoothed
      or weighted ones only change w_t, which ``H v`` tells. S has the columns ``sqrt(w_t p_c) (e_c - p_t)``, as
      ``sum_c p_c (e_c - p)(e_c - p)^T = diag(p) - p p^T``; with few classes, scaled eigenvectors instead: one column
      less, and orthogonal ones, so that random signs have less variance;
    * any other loss of few classes has the blocks that one product a class gives, and S their scaled eigenvectors.

    Reference: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
    Computation, 2002, for losses that match their outputs' nonlinearity.

    Args:
        loss: The summed loss, with its graph.
        outputs: Tensors of its graph, by name.

    Returns:
        The roots by name.

    Raises:
        UnsupportedModelError: If the loss is linear in the outputs, not convex in them, or does not split into terms.
    """
    gradient = differentiable_gradient(loss, outputs)
    if not any(g.requires_grad for g in gradient.values()):
        raise UnsupportedModelError(
            "expected a loss with curvature in the model's outputs, got one that is linear in them"
        )
    # Gaussian, so that no wrong kind of block fits by accident; ones alone are sent to zero by any softmax's block.
    generator = seeded_generator("output roots")
    gaussian = {
        name: torch.randn(z.shape, generator=generator, device="cpu").to(z.device, z.dtype)
        for name, z in outputs.items()
    }
    products = hvp(gradient, outputs, gaussian)
    sums = hvp(gradient, outputs, {name: torch.ones_like(z) for name, z in outputs.items()})
    return {
        name: _root(z.detach(), gaussian[name], products[name], sums[name], partial(_blocks, gradient, outputs, name))
        for name, z in outputs.items()
    }


def _root(z: Tensor, v: Tensor, product: Tensor, sums: Tensor, blocks: Callable[[int], Tensor]) -> OutputRoot:
    """Return the root of the first kind that ``product``, H v, fits."""
    # A diagonal H is H 1, so H v = (H 1) * v; any entry beside the diagonal breaks this for a Gaussian v.
    # Relative to H v alone: where all softmaxes are saturated, next to nothing is close to anything.
    if _close(sums * v, product, torch.zeros_like(v), z.dtype):
        return _elementwise(sums)
    for dim in _class_dims(z):
        logits, u, moved = (_classes_last(x, dim) for x in (z, v, product))
        weights = _softmax_weights(logits, u, moved)
        if weights is not None and not _is_few(logits):
            return _softmax(weights, logits, dim)
        if weights is not None:
            p = logits.cpu().double().softmax(-1)
            return _eigen(
                weights.cpu()[..., None, None] * (torch.diag_embed(p) - p[..., None] * p[..., None, :]), z, dim
            )
    for dim in _class_dims(z):
        logits, u, moved = (_classes_last(x, dim) for x in (z, v, product))
        if _is_few(logits) and logits.shape[-1] <= _MOST_PRODUCTS:
            # The blocks are all of H only if they give the product with v: terms that read two positions would not.
            found = blocks(dim)
            if _close((found @ u.to(found.dtype)[..., None])[..., 0], moved, u, z.dtype):
                return _eigen(found.cpu().double(), z, dim)
    raise UnsupportedModelError(
        f"expected a loss that is a sum of terms, each of one position of the outputs {list(z.shape)}, and is "
        "elementwise, softmax cross entropy, or of few classes; got another"
    )


def _class_dims(z: Tensor) -> list[int]:
    """Return along which dimensions classes may lie: the last one, as in texts, or the second, as in segmentations."""
    return [-1, 1] if z.dim() > 2 else [-1]


def _is_few(logits: Tensor) -> bool:
    """Return whether blocks of that many classes, the last dimension, can be decomposed."""
    return logits[..., 0].numel() * logits.shape[-1] ** 3 <= _MOST_EIGEN


def _elementwise(diagonal: Tensor) -> OutputRoot:
    """Return the root of a diagonal Hessian: one column an entry."""
    root = _rooted(diagonal)
    return OutputRoot(lambda e: root * e, torch.zeros_like(root))


def _softmax_weights(logits: Tensor, v: Tensor, product: Tensor) -> Tensor | None:
    """Return w of the blocks ``w (diag(p) - p p^T)``, ``[*positions]``, or None if the blocks are others."""
    p = logits.to(product.dtype).softmax(-1)
    v = v.to(product.dtype)
    of_softmax = p * v - p * (p * v).sum(-1, keepdim=True)
    squares = of_softmax.square().sum(-1)
    # H v = w of_softmax at each position, in least squares: w is the one factor that is not known.
    # A saturated softmax leaves nothing to divide by, and weighs nothing.
    weights = (product * of_softmax).sum(-1) / squares.clamp_min(torch.finfo(squares.dtype).tiny)
    weights = weights.clamp_min(0)  # a loss that is concave in its logits must not pass
    return weights if _close(weights[..., None] * of_softmax, product, v, logits.dtype) else None


def _softmax(weights: Tensor, logits: Tensor, dim: int) -> OutputRoot:
    """Return the root of ``w (diag(p) - p p^T)`` with a column for each class, which takes no decomposition."""
    p = logits.to(weights.dtype).softmax(-1)
    root_p, root_w = p.sqrt(), weights.sqrt()[..., None]

    def apply(e: Tensor) -> Tensor:
        chosen = root_p * e
        # The sum over c of e_c sqrt(w p_c) (e_c - p), in one pass over the classes.
        made: Tensor = root_w * (chosen - p * chosen.sum(-1, keepdim=True))
        return made.movedim(-1, dim)

    return OutputRoot(apply, torch.zeros_like(p).contiguous())


def _blocks(gradient: Mapping[str, Tensor], outputs: Mapping[str, Tensor], name: str, dim: int) -> Tensor:
    """Return the blocks of one output's Hessian, ``[*positions, classes, classes]``, if it has no entries elsewhere."""
    columns = []
    for c in range(_classes_last(outputs[name], dim).shape[-1]):
        # One class of all positions: as positions do not meet in H, this is column c of every block.
        vectors = {n: torch.zeros_like(z) for n, z in outputs.items()}
        _classes_last(vectors[name], dim)[..., c] = 1
        columns.append(_classes_last(hvp(gradient, outputs, vectors)[name], dim))
    return torch.stack(columns, dim=-1)


def _eigen(blocks: Tensor, z: Tensor, dim: int) -> OutputRoot:
    """Return the root of blocks as their eigenvectors times the square roots of their eigenvalues."""
    values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
    root = vectors * _rooted(values)[..., None, :]
    # A block of a softmax has one eigenvalue of zero: a column, and a backward pass, less.
    least = values.amax() * (1e-12 if z.dtype == torch.float64 else 1e-7)
    root = root[..., (values > least).flatten(0, -2).any(0)].to(z.device, accumulation_dtype(z.dtype))

    def apply(e: Tensor) -> Tensor:
        made: Tensor = (root @ e[..., None])[..., 0]
        return made.movedim(-1, dim) if z.dim() > 1 else made.view(z.shape)

    return OutputRoot(apply, torch.zeros_like(root[..., 0, :]).contiguous())


def _rooted(values: Tensor) -> Tensor:
    """Return the square roots of numbers of which none should be negative.

    Raises:
        UnsupportedModelError: If some are, beyond rounding.
    """
    if values.amin() < -max(1e-2 * values.abs().amax().item(), 1e-10):  # of next to nothing, rounding is a large share
        raise UnsupportedModelError(
            "expected a loss that is convex in the model's outputs, got one with negative curvature"
        )
    return values.clamp_min(0).sqrt()


def _classes_last(z: Tensor, dim: int) -> Tensor:
    """Return a view with the dimension of classes last; a number for each position is a class by itself."""
    return z.movedim(dim, -1) if z.dim() > 1 else z[:, None]


def _close(one: Tensor, other: Tensor, v: Tensor, dtype: torch.dtype) -> bool:
    """Return whether two products with ``v`` agree up to the rounding of derivatives in ``dtype``."""
    # Losses are often computed in float32 whatever the outputs' dtype.
    tolerance = 1e-3 if accumulation_dtype(dtype) == dtype else 2e-2
    # Where all softmaxes are saturated, what is left of H v are rounding errors of terms as large as v.
    return bool((one - other).norm() <= tolerance * other.norm() + 1e-3 * tolerance * v.norm())
