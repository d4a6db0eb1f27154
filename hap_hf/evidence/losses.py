"""The loss of a model on batches of a Hugging Face collator, and over how many terms it is a mean."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hap_hf.errors import BatchError
from hap_hf.evidence.batches import call, move_to_model
from hap_hf.evidence.precision import Precision
from hap_hf.evidence.samples import LABEL_NAMES, labels_of, num_samples
from hap_hf.model.state import restart_random_numbers

LossFunction = Callable[[nn.Module, Any], Tensor]
"""Returns the mean loss of a model on a batch, a scalar with its graph."""

IGNORED_LABEL = -100
_AUTOCAST = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


class Terms(StrEnum):
    """Over what the mean is that a loss takes of a batch."""

    COUNTED = "counted"
    """Labels that are not -100, or samples: see :func:`count_loss_terms`."""
    SAMPLES = "samples"
    """Samples, whatever their labels are."""
    ONE = "one"
    """Nothing: it is a sum over the samples."""


def batch_losses(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    precision: Precision,
    *,
    terms: Terms = Terms.COUNTED,
    seed: int = 0,
) -> Iterator[tuple[Callable[[], Tensor], int]]:
    """Yield for each batch a function that computes its loss, and the number of loss terms.

    Args:
        model: The model, whose first parameter lies on the device that batches go to.
        batches: What the loss takes, on any device.
        loss_fn: Mean loss of the model on a batch.
        precision: Arithmetic of the forward pass. Backward passes run in the dtypes that the forward pass chose.
        terms: What counts as a term.
        seed: Seed of the random numbers that the model or the loss may draw: the same ones in each call.

    Yields:
        The function and the number.
    """
    device = next(model.parameters()).device
    autocast = partial(
        torch.autocast, device.type, dtype=_AUTOCAST.get(precision), enabled=precision is not Precision.FP32
    )

    def loss_of(batch: Any) -> Tensor:
        # Two calls of one loss must differ by what is done to the model alone.
        restart_random_numbers(model, seed)
        with autocast():
            return loss_fn(model, batch)

    shifted = shifts_labels(model)
    for batch in batches:  # moved one by one, as all of them together need not fit on the device
        moved = move_to_model(model, batch)
        yield partial(loss_of, moved), num_terms(moved, terms, shifted=shifted)


def shifts_labels(model: nn.Module) -> bool:
    """Return whether a model compares token t with the logits of token t - 1.

    Args:
        model: Any model.

    Returns:
        True for causal language models, which transformers, too, tells by the class's name.
    """
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def num_terms(batch: Any, terms: Terms, *, shifted: bool = False) -> int:
    """Return over how many terms the mean loss of a batch is taken.

    Args:
        batch: What the loss takes.
        terms: What counts as a term.
        shifted: As for :func:`count_loss_terms`.

    Returns:
        The number.
    """
    if terms is Terms.COUNTED:
        return count_loss_terms(batch, shifted=shifted)
    return num_samples(batch) if terms is Terms.SAMPLES else 1


def model_loss(model: nn.Module, batch: Mapping[str, Any], *, several: bool | None = None) -> Tensor:
    """Return the loss that a Hugging Face model computes when the batch holds labels.

    Of a module that returns nothing but logits it is the cross-entropy: with integer labels, one a sample or one a
    position, with shares of the classes, or class by class where a sample may have several.

    Args:
        model: The model, which is run on the batch with its labels.
        batch: Keyword arguments of its forward.
        several: Whether a sample may have several classes, for floating-point labels, see
            :func:`hap_hf.evidence.settling.with_default_loss`; None where the labels do not tell.

    Returns:
        The scalar loss.

    Raises:
        BatchError: If the model returned none.
    """
    output = call(model, batch)
    labels = batch.get("labels")
    loss = loss_in(output, labels)
    if loss is None and isinstance(labels, Tensor) and (logits := logits_in(output)) is not None:
        loss = _cross_entropy(logits, labels, several)
    if loss is not None:
        return loss
    name = type(model).__name__
    if labels is None:
        near = [key for key in batch if key != "labels" and (key in LABEL_NAMES or "label" in key)]
        rename = f" (is {near[0]!r} meant? Call it 'labels')" if near else ""
        reason = f"the batches hold no labels{rename}; add them, or pass loss_fn"
    elif isinstance(labels, Tensor) and isinstance(output, Tensor):
        reason = (
            f"it returned a tensor of shape {list(output.shape)}, and which loss compares that with {labels.dtype} "
            f"labels of shape {list(labels.shape)} is not known; pass loss_fn=lambda model, batch: ..."
        )
    else:
        reason = (
            "it computes none of its labels; use the class with the task's head, such as AutoModelForSequence"
            "Classification, or pass loss_fn=lambda model, batch: ..."
        )
    raise BatchError(f"{name} returned no loss for a batch with {sorted(batch)}: {reason}")


def loss_in(output: Any, labels: Any) -> Tensor | None:
    """Return the loss that a model computed, None where it computed none.

    Args:
        output: What the model returned: a mapping or object with a loss, as those of transformers, or a tuple that
            begins with a scalar, as ``Trainer`` allows it.
        labels: The labels that it was given, if any.

    Returns:
        The loss.
    """
    if isinstance(output, tuple) and not hasattr(output, "loss"):
        loss = output[0] if output and labels is not None else None
        return loss if isinstance(loss, Tensor) and not loss.dim() else None
    # Model outputs of transformers are mappings; other libraries return objects with attributes.
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def logits_in(output: Any) -> Tensor | None:
    """Return the logits among what a model returned.

    Args:
        output: A tensor, or a mapping with ``"logits"``, or with ``"out"`` as torchvision has it.

    Returns:
        The logits, None where there are none.
    """
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out"))
    return output if isinstance(output, Tensor) else None


def _cross_entropy(logits: Tensor, labels: Tensor, several: bool | None) -> Tensor | None:
    """Return the cross-entropy of logits, None where shapes and labels do not tell which one it is."""
    if labels.is_floating_point():
        if labels.shape != logits.shape or several is None:
            return None
        if several:
            return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return functional.cross_entropy(logits, labels.to(logits.dtype))
    if labels.dtype is torch.bool or logits.dim() != labels.dim() + 1:
        return None
    last = logits.shape[:-1] == labels.shape
    second = logits.dim() > 2 and (logits.shape[0], *logits.shape[2:]) == labels.shape
    if last == second:  # neither, or both and nothing tells which
        return None
    if last:
        logits, labels = logits.flatten(0, -2), labels.flatten()
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)


def count_loss_terms(batch: Any, *, shifted: bool = False) -> int:
    """Return over how many terms the mean loss of a batch is taken, if it is that of its labels.

    Integer labels: those that are not -100, one a sample or one a token. Floating-point labels (regression, several
    labels a sample): the samples. Lists, and without labels, as for question answering: the samples. A mean over
    several values a sample has proportionally more terms, which changes no weight.

    Args:
        batch: Keyword arguments of a model's forward, or what a loss takes.
        shifted: Whether the loss compares each token with the next, so that the first label of each row does not count.

    Returns:
        The number of terms.

    Example:
        >>> count_loss_terms({"labels": torch.tensor([[5, 2, -100], [7, -100, -100]])})
        3
    """
    labels = labels_of(batch)
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        counted = labels[..., 1:] if shifted and labels.dim() > 1 else labels
        return int((counted != IGNORED_LABEL).sum())
    return num_samples(batch)
