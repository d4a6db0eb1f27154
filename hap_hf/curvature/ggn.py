"""The trace of the generalised Gauss-Newton matrix, and other means of per-sample gradients."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from hap_hf.curvature.batch_loss import Total, of_all_batches
from hap_hf.curvature.forward import Direction, Directions, Forward, SampleBatch
from hap_hf.curvature.input_watch import InputListener
from hap_hf.curvature.layers import NotPerSampleError
from hap_hf.curvature.marginals import Wanted
from hap_hf.curvature.sample_means import ReduceSamples, SampleEstimate, SampleMeans, Watchable
from hap_hf.errors import UnsupportedModelError

SignSource = Callable[[Mapping[str, Tensor], int, int], Mapping[str, Tensor]]
"""Draws a sign for every entry of some tensors, given the index of a batch and of a probe."""

# Each is a backward pass for every batch; the outputs of a language model are far more.
_MOST_COLUMNS = 4096


def estimate_ggn(
    model: nn.Module,
    batches: Iterable[SampleBatch],
    wanted: Wanted,
    reduce: ReduceSamples,
    signs: SignSource,
    *,
    num_probes: int | None = 1,
    loss_scale: float = 1.0,
    on_batch: Callable[[], object] = lambda: None,
    total: Total = of_all_batches,
    watchable: Watchable | None = None,
    listener: InputListener | None = None,
) -> SampleEstimate:
    r"""Return a mean over gradients whose second moment is the generalised Gauss-Newton matrix (GGN).

    Let ``z_t`` be the model's outputs at position t, from which the mean of N loss terms is computed, ``J_t`` their
    Jacobian with respect to the weights, and ``H_t`` the Hessian of the term with respect to them. The GGN is

        G = 1/N sum_t J_t^T H_t J_t,

    the Hessian without the curvature of the network itself, which vanishes for linear networks and fades at a minimum.
    It is positive semidefinite. For softmax cross entropy and squared error it is the Fisher matrix.

    With a root ``S_t S_t^T = H_t`` (:func:`~hap_hf.curvature.output_root.output_roots`) and independent random signs
    e_t, one backward pass from ``v_t = S_t e_t`` gives each sample n, whether it has one position or many, a gradient
    ``g_n = sum_{t in n} J_t^T v_t``. Signs of different positions are uncorrelated, and so are the v_t:

        E g_n g_n^T = sum_{t in n} J_t^T H_t J_t,    hence    1/N sum_n E ||g_n,u||^2 = tr(G_uu)

    without any probe in the space of the weights: no cross terms between samples or blocks. The gradient of the
    log-likelihood of a label sampled from the model's own prediction has the same second moment, but where the model is
    sure its variance is that of a rare event. Signs have none at all where S_t has a single column, as for two classes.

    Cost: one forward pass, and for each probe one backward pass that computes no gradients of weights. Two samples of
    the first batch are computed once more, alone: where the layers do not agree with these (a weight used outside its
    layer, samples that are mixed or do not lie along the first dimension), every sample is computed alone, which is
    slow, and logged.

    References: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
    Computation, 2002; Martens, "New insights and perspectives on the natural gradient method", JMLR 2020; Dangel et
    al., "BackPACK: Packing more into backprop", ICLR 2020.

    Args:
        model: The model, ready for derivatives: see :func:`~hap_hf.model.state.preserved`.
        batches: The batches. Those without loss terms are skipped.
        wanted: The weights, and what is asked of their gradients.
        reduce: Turns that into a number for each sample and block. For a second moment of something linear, as of
            gradients times weights, it squares that itself.
        signs: Source of signs; :func:`~hap_hf.curvature.probes.rademacher` with a seed.
        num_probes: Backward passes for each batch, with signs of their own; None for one a column of S_t, exactly.
        loss_scale: Scale of the gradients at first, a power of two above 1 for float16, and divided out again. If
            a result overflows, the scale is lowered for good and the same backward pass repeated.
        on_batch: Called after every batch.
        total: Makes sums over all batches out of those over ``batches``.
        watchable: Whether samples have to be compared with the same samples alone, or were by an earlier estimate.
        listener: Is told what layers read, of batches whose samples are differentiated together.

    Returns:
        The mean.

    Raises:
        BatchError: If there are no batches, or no loss terms in them.
        CurvatureError: If a loss or a gradient is not finite, or the loss does not depend on the weights.
        UnsupportedModelError: If the loss is not computed from the model's outputs, or its Hessian is of unknown kind.
    """
    directions = ggn_directions(signs, num_probes)
    means = SampleMeans(model, wanted, reduce, directions, loss_scale, watchable, listener)
    return means.over(batches, on_batch, total)


def ggn_directions(signs: SignSource, num_probes: int | None) -> Directions:
    """Return the vectors v_t of :func:`estimate_ggn`, from which backward passes start.

    Args:
        signs: Source of signs.
        num_probes: Number of backward passes for each forward pass; None for one a column of S_t.

    Returns:
        The vectors by forward pass.
    """
    return partial(_signed, signs, num_probes) if num_probes else _columns


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[SampleBatch],
    wanted: Wanted,
    reduce: ReduceSamples,
    *,
    loss_scale: float = 1.0,
    on_batch: Callable[[], object] = lambda: None,
    total: Total = of_all_batches,
    watchable: Watchable | None = None,
) -> SampleEstimate:
    """Return a mean over the samples' own gradients, those of the sums of their loss terms.

    The mean of their squares is the empirical Fisher matrix, which uses the labels at hand where the Fisher matrix has
    the model's prediction. They are not the same, and at a minimum that fits every label the empirical one vanishes.

    Reference: Kunstner et al., "Limitations of the empirical Fisher approximation for natural gradient descent",
    NeurIPS 2019.

    Args:
        model: As for :func:`estimate_ggn`, and so are all others.
        batches: The batches, of any loss that is a mean of terms of single samples.
        wanted: The weights, and what is asked of their gradients.
        reduce: Turns that into a number for each sample and block.
        loss_scale: Scale of the gradients at first.
        on_batch: Called after every batch.
        total: Makes sums over all batches out of those over ``batches``.
        watchable: As for :func:`estimate_ggn`.

    Returns:
        The mean.

    Raises:
        BatchError: If there are no batches, or no loss terms in them.
        CurvatureError: If a loss or a gradient is not finite, or the loss does not depend on the weights.
    """
    return SampleMeans(model, wanted, reduce, loss_gradient, loss_scale, watchable).over(batches, on_batch, total)


def loss_gradient(forward: Forward) -> Iterator[Direction]:
    """Yield the one direction that stands for the gradient of the summed loss terms.

    Args:
        forward: A forward pass.

    Yields:
        The direction.
    """
    yield 1.0, None


def _signed(signs: SignSource, num_probes: int, forward: Forward) -> Iterator[Direction]:
    """Yield v = S e for independent random signs e, each to count by one over the number of them."""
    coefficients = {str(i): root.coefficients for i, root in enumerate(forward.roots)}
    for probe in range(num_probes):
        # Samples that are computed alone must not share signs, which would make their noise add up.
        drawn = signs(coefficients, forward.index, forward.sample * num_probes + probe)
        yield 1 / num_probes, [root.apply(drawn[str(i)]) for i, root in enumerate(forward.roots)]


def _columns(forward: Forward) -> Iterator[Direction]:
    """Yield the columns of S in turn, whose gradients have exactly the second moment that signs have on average."""
    rest = [root.coefficients.numel() % forward.num_samples for root in forward.roots]
    if any(rest):
        raise NotPerSampleError("the model's outputs do not lie along a first dimension of samples")
    # Samples do not meet in a gradient, so one pass takes the i-th column of all of them.
    num_columns = sum(root.coefficients.numel() for root in forward.roots) // forward.num_samples
    if num_columns > _MOST_COLUMNS:
        raise UnsupportedModelError(
            f"the exact trace takes a backward pass for each of a sample's {num_columns} outputs, and at most "
            f"{_MOST_COLUMNS} are made; set num_output_probes to a number"
        )
    for i, root in enumerate(forward.roots):
        for column in root.columns(forward.num_samples):
            # Outputs one after the other: H has no block between two of them.
            yield 1.0, [column if k == i else torch.zeros_like(z) for k, z in enumerate(forward.outputs)]
