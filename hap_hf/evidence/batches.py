"""Batches as Hugging Face collators give them: on the model's device, fewer samples, how many there are."""

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from hap_hf.errors import BatchError
from hap_hf.evidence.samples import part_of, size_of
from hap_hf.host import tree_leaves, tree_map_only

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]
"""Keyword arguments of a model's forward, labels included."""

OWN_OUTPUTS = "outputs of the dense model"
"""Under which a batch without labels carries what the model itself said of it."""


def as_batch(model: nn.Module, batch: Any, index: int = 0) -> Batch:
    """Return a batch as a mapping: the one door through which batches of users come.

    Args:
        model: The model, of which only the names of its forward's arguments are looked at.
        batch: Keyword arguments of its forward, as a Hugging Face collator gives them; inputs alone; or a pair of
            inputs and labels, as torch's data loaders give it. Inputs and labels may be lists with a tensor for each
            sample.
        index: Number of the batch, for the message.

    Returns:
        The batch; inputs under the name of the first argument of the model's forward, and labels as ``"labels"``.

    Raises:
        BatchError: If it is none of these, or holds no tensor.
    """
    parts = list(batch) if isinstance(batch, (tuple, list)) else [batch] if isinstance(batch, Tensor) else []
    if len(parts) in {1, 2} and all(map(_is_part, parts)):
        named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        first = next((p for p in inspect.signature(model.forward).parameters.values() if p.kind in named), None)
        if first is None:
            raise BatchError(
                f"batch {index}: got a {'pair' if len(parts) == 2 else 'tensor'}, and the forward of "
                f"{type(model).__name__} names no input that it could go to; pass a mapping of names to tensors"
            )
        return dict(zip((first.name, "labels"), parts, strict=False))
    given: Batch = as_given(batch, index, mapping=True)
    return given


def as_given(batch: Any, index: int, *, mapping: bool = False) -> Any:
    """Return a batch as it came, checked.

    Args:
        batch: Whatever a data loader gave, for a loss that takes it.
        index: Number of the batch, for the message.
        mapping: Whether only a mapping will do, as where the model itself is called with it.

    Returns:
        The same.

    Raises:
        BatchError: If it cannot be a batch.
    """
    advice = (
        "pass mappings of argument names to tensors, as a Hugging Face collator gives them, pairs (inputs, labels), or "
        "loss_fn=lambda model, batch: ..., which gets batches as they are"
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
    if not mapping:
        return batch
    if isinstance(batch, (tuple, list)):
        got = f"a {type(batch).__name__} of {len(batch)} ({', '.join(type(t).__name__ for t in batch[:4])})"
        raise BatchError(f"batch {index}: expected a mapping or a pair of tensors, got {got}; {advice}")
    raise BatchError(f"batch {index}: expected a mapping, got {type(batch).__name__}; {advice}")


def _is_part(part: Any) -> bool:
    """Return whether something is a tensor, or a list with one for each sample."""
    if isinstance(part, (list, tuple)):
        return bool(part) and all(isinstance(t, Tensor) for t in part)
    return isinstance(part, Tensor)


def move_to_model(model: nn.Module, batch: Any) -> Any:
    """Return ``batch`` with its tensors on the device of ``model``.

    Args:
        model: The model, whose first parameter lies on the device that inputs go to.
        batch: A mapping, which becomes a dictionary, a structure of tuples and lists, or an object with a ``to``.

    Returns:
        A new batch.

    Raises:
        BatchError: If it has no values.
    """
    device = next(model.parameters()).device
    plain = dict(batch) if isinstance(batch, Mapping) else batch
    if device.type != "meta" and any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(plain)):
        raise BatchError("the batch is on the meta device and has no values; make it on the CPU or the model's device")
    if not isinstance(plain, (dict, tuple, list, Tensor)) and hasattr(plain, "to"):
        return plain.to(device)
    return tree_map_only(Tensor, lambda t: t.to(device), plain)


def few_samples(batch: Mapping[str, Any], most: int = 2) -> dict[str, Any]:
    """Return the first samples of ``batch``, where all tensors and lists have as many samples.

    Args:
        batch: Keyword arguments of the model's forward.
        most: Number of samples to keep.

    Returns:
        The smaller batch, or the same one where they disagree on what a sample is.
    """
    sizes = {size for v in batch.values() if (size := size_of(v)) is not None}
    # As where the patches of all images lie in one long tensor, whose rows are no samples.
    return part_of(dict(batch), slice(0, most)) if len(sizes) == 1 else dict(batch)


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
    """Return the number of samples of ``batch``: the leading size of its first tensor, or of a list where it has none.

    Args:
        batch: Keyword arguments of the model's forward.

    Returns:
        The size, 1 where nothing tells.
    """
    tensors = (v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim())
    lists = (size for v in batch.values() if (size := size_of(v)) is not None)
    return next(tensors, next(lists, 1))


def call(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Return the output of ``model`` on what its forward takes of a batch.

    Args:
        model: The model: a transformers one, or any module whose forward names its inputs as the batch does.
        batch: Keyword arguments of its forward, on its device. Others are for the loss, or for people.

    Returns:
        Whatever the model returns.
    """
    left_out = {OWN_OUTPUTS, *unknown_names(model, batch)}
    return model(**{name: value for name, value in batch.items() if name not in left_out})


def unknown_names(model: nn.Module, batch: Mapping[str, Any]) -> list[str]:
    """Return what a batch holds that the forward of ``model`` does not take.

    Args:
        model: The model.
        batch: The batch.

    Returns:
        The names; none where forward takes any keyword, which it may hand on to a part that knows them.
    """
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    return [name for name in batch if name not in parameters and name != OWN_OUTPUTS]


def called_with(model: nn.Module, run: Callable[[], object]) -> Batch | None:
    """Return what ``model`` is called with first, as keyword arguments of its forward.

    Args:
        model: The model.
        run: What calls it; it comes to its end, as it may have changes to take back by then.

    Returns:
        The arguments without their graph; None if it was not called, with no tensor, or with what has no name.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    except Exception as error:  # the loss is the user's, and what is wrong with it is said where it is needed
        logger.debug("the loss failed: %s: %s", type(error).__name__, error)
    finally:
        handle.remove()
    if not calls:
        return None
    signature = inspect.signature(model.forward)
    found: dict[str, Any] = {}
    for name, value in signature.bind(*calls[0][0], **calls[0][1]).arguments.items():
        kind = signature.parameters[name].kind
        if kind in {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}:
            return None
        found.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    detached: dict[str, Any] = tree_map_only(Tensor, Tensor.detach, found)
    return detached if any(isinstance(v, Tensor) for v in tree_leaves(detached)) else None


def raise_does_not_run(model: nn.Module, batch: Mapping[str, Any], error: Exception) -> NoReturn:
    """Raise the error that says that a model does not run on a batch.

    Args:
        model: The model.
        batch: Keyword arguments of its forward.
        error: What its own code raised.

    Raises:
        BatchError: Always, from that one.
    """
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
    said = ", ".join(f"{k} {list(v.shape)} {str(v.dtype).removeprefix('torch.')}" for k, v in tensors.items())
    advice = "pass batches like those it was trained on"
    if any(v.dim() == 0 for v in tensors.values()):
        advice = (
            "that looks like one sample of a dataset; let a loader make batches: torch.utils.data.DataLoader(dataset, "
            "batch_size=8, collate_fn=transformers.default_data_collator)"
        )
    raise BatchError(f"{type(model).__name__} does not run on the first batch, {said}: {error}; {advice}") from error
