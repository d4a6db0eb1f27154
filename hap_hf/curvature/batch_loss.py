"""Checks around derivatives: that a loss can be differentiated, and that there were batches with loss terms."""

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from hap_hf.errors import BatchError, CurvatureError


def checked_scalar(loss: object, batch: int) -> Tensor:
    """Return ``loss`` if it is a scalar, finite or not.

    Args:
        loss: What a loss function returned.
        batch: Index of the batch, for messages.

    Returns:
        The loss.

    Raises:
        CurvatureError: If it is no scalar tensor.
    """
    if not isinstance(loss, Tensor) or loss.dim():
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        advice = "return its mean" if isinstance(loss, Tensor) else "return its loss, as in model(**batch).loss"
        raise CurvatureError(f"batch {batch}: expected the loss to be a scalar tensor, got {got}; {advice}")
    return loss


def checked_loss(loss: object, batch: int) -> Tensor:
    """Return ``loss`` if it can be differentiated.

    Args:
        loss: What a loss function returned.
        batch: Index of the batch, for messages.

    Returns:
        The loss, a finite scalar with its graph.

    Raises:
        CurvatureError: If it is no scalar tensor, not finite, or does not depend on the weights.
    """
    # Autograd would refuse these too, but without the number of the batch, and what is infinite not at all.
    loss = checked_scalar(loss, batch)
    value = loss.item()
    if not math.isfinite(value):
        raise CurvatureError(
            f"batch {batch}: expected a finite loss, got {value}; look for extreme weights or inputs, or for "
            "labels of which none counts"
        )
    if not loss.requires_grad:
        raise CurvatureError(
            f"batch {batch}: expected a loss that depends on the weights, got one without a graph; was it "
            "detached, or computed under torch.no_grad()?"
        )
    return loss


Total = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Maps sums over some batches, by name, to the sums over all batches, of which others may hold the rest."""


def of_all_batches(own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the sums as they are: there are no other batches.

    Args:
        own: Sums by name.

    Returns:
        The same.
    """
    return own


def check_counts(num_batches: int, num_terms: int) -> None:
    """Check that there was something to take a mean over.

    Args:
        num_batches: Number of batches that came.
        num_terms: Number of loss terms in them.

    Raises:
        BatchError: If either is zero.
    """
    if num_batches == 0:  # first, as no batches have no terms either
        raise BatchError("expected at least one batch, got none; was the iterator used up? Pass a list or a DataLoader")
    if num_terms == 0:
        raise BatchError(f"expected loss terms in the batches, got {num_batches} with none; are all labels -100?")
