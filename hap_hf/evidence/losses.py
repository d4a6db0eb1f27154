"""The loss of a model on batches of a Hugging Face collator, and over how many terms it is a mean."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hap_hf.errors import BatchError
from hap_hf.evidence.batches import call, move_to_model
from hap_hf.evidence.precision import Precision

LossFunction = Callable[[nn.Module, Mapping[str, Any]], Tensor]
"""Returns the mean loss of a model on a batch, a scalar with its graph."""

IGNORED_LABEL = -100
_AUTOCAST = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


def batch_losses(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], loss_fn: LossFunction, precision: Precision
) -> Iterator[tuple[Callable[[], Tensor], int]]:
    """Yield for each batch a function that computes its loss, and the number of loss terms.

    Args:
        model: The model, whose first parameter lies on the device that batches go to.
        batches: Keyword arguments of its forward, on any device.
        loss_fn: Mean loss of the model on a batch.
        precision: Arithmetic of the forward pass. Backward passes run in the dtypes that the forward pass chose.

    Yields:
        The function and the number.
    """
    device = next(model.parameters()).device
    autocast = partial(
        torch.autocast, device.type, dtype=_AUTOCAST.get(precision), enabled=precision is not Precision.FP32
    )

    def loss_of(batch: Mapping[str, Any]) -> Tensor:
        with autocast():
            return loss_fn(model, batch)

    shifted = shifts_labels(model)
    for batch in batches:  # moved one by one, as all of them together need not fit on the device
        moved = move_to_model(model, batch)
        yield partial(loss_of, moved), count_loss_terms(moved, shifted=shifted)


def shifts_labels(model: nn.Module) -> bool:
    """Return whether a model compares token t with the logits of token t - 1.

    Args:
        model: Any model.

    Returns:
        True for causal language models, which transformers, too, tells by the class's name.
    """
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the loss that a Hugging Face model computes when the batch holds labels.

    Of a module that returns nothing but logits, ``[batch, classes]``, it is the cross-entropy with integer labels.

    Args:
        model: The model, which is run on the batch with its labels.
        batch: Keyword arguments of its forward.

    Returns:
        The scalar loss.

    Raises:
        BatchError: If the model returned none.
    """
    output = call(model, batch)
    labels = batch.get("labels")
    if (
        isinstance(output, Tensor)
        and isinstance(labels, Tensor)
        and (output.dim(), labels.dim()) == (2, 1)
        and not labels.is_floating_point()
    ):
        return functional.cross_entropy(output, labels, ignore_index=IGNORED_LABEL)
    # Model outputs of transformers are mappings; other libraries return objects with attributes.
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        name = type(model).__name__
        if labels is None:
            near = [key for key in batch if "label" in key or key in {"target", "targets", "y"}]
            rename = f" (is {near[0]!r} meant? Call it 'labels')" if near else ""
            reason = f"the batches hold no labels{rename}; add them, or pass loss_fn"
        else:
            reason = (
                "it computes none of its labels; use the class with the task's head, such as AutoModelForSequence"
                "Classification, or pass loss_fn=lambda model, batch: ..."
            )
        raise BatchError(f"{name} returned no loss for a batch with {sorted(batch)}: {reason}")
    return loss


def count_loss_terms(batch: Mapping[str, Any], *, shifted: bool = False) -> int:
    """Return over how many terms the mean loss of a batch is taken.

    Integer labels: those that are not -100, one a sample or one a token. Floating-point labels (regression, several
    labels a sample): the samples, ``labels.shape[0]``. Without ``"labels"``, as for question answering: the samples of
    the first tensor. A mean over several values a sample has proportionally more terms, which changes no weight.

    Args:
        batch: Keyword arguments of a model's forward.
        shifted: Whether the loss compares each token with the next, so that the first label of each row does not count.

    Returns:
        The number of terms.

    Example:
        >>> count_loss_terms({"labels": torch.tensor([[5, 2, -100], [7, -100, -100]])})
        3
    """
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        counted = labels[..., 1:] if shifted and labels.dim() > 1 else labels
        return int((counted != IGNORED_LABEL).sum())
    tensors = [labels, *batch.values()]  # labels first, if they are a tensor
    return next((t.shape[0] for t in tensors if isinstance(t, Tensor) and t.dim()), 1)
