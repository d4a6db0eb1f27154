"""The mean loss of a model on batches."""

import math

import torch

from hap_hf.curvature.batch_loss import check_counts, checked_scalar
from hap_hf.evidence.evidence import Evidence


def mean_loss(evidence: Evidence) -> float:
    """Return the mean of all loss terms.

    Args:
        evidence: The model and the batches.

    Returns:
        The mean; infinite where it is not finite.

    Raises:
        BatchError: If there are no batches, or no loss terms in them.
    """
    total, seen, num_terms = torch.zeros((), dtype=torch.float64, device="cpu"), 0, 0
    with evidence.ready({}, "loss", "batch") as tick, torch.no_grad():
        for loss, number in evidence.losses():
            seen, num_terms = seen + 1, num_terms + number
            if number:
                # Each batch's loss is the mean over its own terms, of which it may have more or fewer.
                total += number * checked_scalar(loss(), seen - 1).double().cpu()
            tick()
    counts = torch.tensor([seen, num_terms], device="cpu")
    sums = evidence.processes.summed("losses", {"loss": total, "counts": counts})
    check_counts(*sums["counts"].tolist())
    mean = sums["loss"].item() / sums["counts"][1].item()
    return mean if math.isfinite(mean) else math.inf  # which loses each comparison, where NaN might win
