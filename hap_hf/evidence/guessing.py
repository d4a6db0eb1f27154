"""The loss of a model that looks at no input, by which an untrained model is recognised."""

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.mean import mean_loss
from hap_hf.evidence.memory import in_batches_that_fit

logger = logging.getLogger(__name__)

_ENOUGH = 5
"""Labels for each class that was seen, below which their frequencies say little."""
_IGNORED = -100
_NO_BETTER = 0.95
"""Share of the loss of guessing from which on a model has learned next to nothing."""


def loss_of_trained(evidence: Evidence) -> float:
    """Return the mean loss on the batches, with a warning where it is that of guessing.

    Args:
        evidence: The model and the batches.

    Returns:
        The mean; infinite where it is not finite.
    """
    loss, guess = in_batches_that_fit(mean_loss, evidence), loss_of_guessing(evidence)
    if guess is not None and loss >= _NO_BETTER * guess:
        logger.warning(
            "the model's loss on the batches is %.3g, and that of guessing %.3g: scores say little of a model that "
            "has not learned its task; fine-tune it first, and see that the labels are those that it learned. In a "
            "Trainer, HessianPruner(config, epoch=1) prunes after an epoch",
            loss,
            guess,
        )
    return loss


def loss_of_guessing(evidence: Evidence) -> float | None:
    """Return the cross-entropy that a model reaches without looking at its input.

    Where there are enough labels this is the entropy of their frequencies: what a model loses that answers with these.
    With fewer, as of a language model's many tokens, it is that of taking all outputs for equally likely.

    Args:
        evidence: The model and the batches; the labels of all processes count.

    Returns:
        The loss, or None where it is not known: labels that are no class numbers, or one class only.
    """
    given = [b.get("labels") for b in evidence.batches if isinstance(b, Mapping)]
    labels = [label.reshape(-1).cpu() for label in given if isinstance(label, Tensor) and _are_classes(label)]
    own = torch.cat(labels) if labels else torch.zeros(0, dtype=torch.long)
    seen = torch.bincount(own[own >= 0]).double()
    # Processes may have seen labels of different size, and sums need one shape.
    size = int(evidence.processes.summed("classes", {"size": torch.tensor(float(len(seen)))})["size"].item())
    padded = torch.zeros(size, dtype=torch.float64)
    padded[: len(seen)] = seen
    counts = evidence.processes.summed("labels", {"counts": padded})["counts"]
    total, classes = counts.sum().item(), int((counts > 0).sum())
    if classes < 2:
        return None
    if total >= _ENOUGH * classes:
        shares = counts[counts > 0] / total
        return -(shares * shares.log()).sum().item()
    outputs = _num_outputs(evidence.model)
    return math.log(outputs) if outputs else None


def _are_classes(labels: object) -> bool:
    """Return whether labels number classes: integers, of which -100 is none."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype is torch.bool or not labels.numel():
        return False
    return bool(((labels >= 0) | (labels == _IGNORED)).all()) and labels.dim() < 3


def _num_outputs(model: nn.Module) -> int | None:
    """Return how many tokens a language model tells apart, None for other models."""
    found = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(found, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None
