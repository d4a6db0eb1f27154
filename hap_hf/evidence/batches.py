"""Batches as Hugging Face collators give them: on the model's device, fewer samples, how many there are."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hap_hf.errors import BatchError
from hap_hf.host import tree_leaves, tree_map_only

Batch = Mapping[str, Any]
"""Keyword arguments of a model's forward, labels included."""


def as_batch(model: nn.Module, batch: Any, index: int = 0) -> Batch:
    """Return a batch as a mapping: the one door through which batches of users come.

    Args:
        model: The model, of which only the names of its forward's arguments are looked at.
        batch: Keyword arguments of its forward, as a Hugging Face collator gives them, or a pair of inputs and labels,
            as torch's data loaders give it.
        index: Number of the batch, for the message.

    Returns:
        The batch; a pair under the name of the first argument of the model's forward and ``"labels"``.

    Raises:
        BatchError: If it is neither, or holds no tensor.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch):
        named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        first = next((p for p in inspect.signature(model.forward).parameters.values() if p.kind in named), None)
        if first is None:
            raise BatchError(
                f"batch {index}: got a pair, and the forward of {type(model).__name__} names no input that it could go "
                "to; pass a mapping of argument names to tensors"
            )
        return {first.name: batch[0], "labels": batch[1]}
    advice = (
        "pass mappings of argument names to tensors, as a Hugging Face collator gives them, or pairs (inputs, labels)"
    )
    if isinstance(batch, Mapping):
        if any(isinstance(v, Tensor) for v in tree_leaves(dict(batch))):
            return batch
        kinds = sorted({type(v).__name__ for v in batch.values()})
        raise BatchError(
            f"batch {index}: expected tensors in the batch, got a mapping of {sorted(map(str, batch))} to {kinds}; "
            "let a collator make tensors of it, for example transformers.default_data_collator"
        )
    if isinstance(batch, str):
        raise BatchError(f"batch {index}: got the string {batch!r}, as of a single batch; put it in a list: [batch]")
    if isinstance(batch, (tuple, list)):
        got = f"a {type(batch).__name__} of {len(batch)} ({', '.join(type(t).__name__ for t in batch[:4])})"
        raise BatchError(f"batch {index}: expected a mapping or a pair of tensors, got {got}; {advice}")
    raise BatchError(f"batch {index}: expected a mapping, got {type(batch).__name__}; {advice}")


def move_to_model(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``batch`` with its tensors on the device of ``model``.

    Args:
        model: The model, whose first parameter lies on the device that inputs go to.
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
    # As where the patches of all images lie in one long tensor, whose rows are no samples.
    if len(sizes) != 1:
        return dict(batch)
    return {k: v[:most] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}


def shortened(batch: Batch, most: int = 16) -> dict[str, Any] | None:
    """Return a few positions of every text in ``batch``.

    Args:
        batch: Keyword arguments of the model's forward. Texts are what has an integer for each sample and position,
            and whatever else has as many entries along its second dimension.
        most: Number of positions to keep.

    Returns:
        The shorter batch: of each text the positions that the fewest samples pad. None where nothing is long.
    """
    # A length stands for a text: whatever has as many entries along its second dimension is cut in the same places.
    texts = [v for v in batch.values() if isinstance(v, Tensor) and v.dim() == 2 and not v.is_floating_point()]
    starts = {t.shape[1]: 0 for t in texts if t.shape[1] > most}
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] in starts:
        # [windows]: tokens of all samples in each. Texts may be padded on the left, and most of them may end early.
        inside = mask.sum(0).double().unfold(0, most, 1).sum(1)
        starts[mask.shape[1]] = int(inside.argmax())
    if not starts:
        return None

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] not in starts:
            return value
        return value.narrow(1, starts[value.shape[1]], most)

    return {name: cut(value) for name, value in batch.items()}


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
        # A forward that takes any keyword may hand labels on to a part that knows them.
        if "labels" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            batch = {k: v for k, v in batch.items() if k != "labels"}
    return model(**batch)
