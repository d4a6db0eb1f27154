"""Batches as Hugging Face collators give them: on the model's device, fewer samples, how many there are."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def as_mapping(model: nn.Module, batch: Any) -> Any:
    """Return a pair of inputs and labels, as torch's data loaders give it, under the names that the model expects.

    Args:
        model: The model.
        batch: A pair of tensors, or anything else.

    Returns:
        The pair as a mapping from the first argument of the model's forward and from ``"labels"``; anything else as it
        is.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch):
        first = next(iter(inspect.signature(model.forward).parameters))
        return {first: batch[0], "labels": batch[1]}
    return batch


def move_to_model(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``batch`` with its tensors on the device of ``model``.

    Args:
        model: The model.
        batch: Keyword arguments of its forward.

    Returns:
        A new mapping.
    """
    device = next(model.parameters()).device
    moved: dict[str, Any] = tree_map_only(Tensor, lambda t: t.to(device), dict(batch))
    return moved


def few_samples(batch: Mapping[str, Any], most: int = 2) -> dict[str, Any]:
    """Return the first samples of ``batch``, where every tensor has as many samples.

    Args:
        batch: Keyword arguments of the model's forward.
        most: Number of samples to keep.

    Returns:
        The smaller batch, or the same one where the tensors disagree on what a sample is.
    """
    sizes = {v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim()}
    if len(sizes) != 1:
        return dict(batch)
    return {k: v[:most] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of samples of ``batch``: the leading size of its first tensor.

    Args:
        batch: Keyword arguments of the model's forward.

    Returns:
        The size, 1 where there is no tensor.
    """
    return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim()), 1)


def call(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Return the output of ``model`` on a batch, of which a forward without ``labels`` gets the rest.

    Args:
        model: The model: a transformers one, or any module whose forward names its inputs as the batch does.
        batch: Keyword arguments of its forward, on its device.

    Returns:
        Whatever the model returns.
    """
    if "labels" in batch:
        parameters = inspect.signature(model.forward).parameters
        if "labels" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            batch = {k: v for k, v in batch.items() if k != "labels"}
    return model(**batch)
