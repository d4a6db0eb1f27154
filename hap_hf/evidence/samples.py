"""How a batch falls into samples: how many there are, and the same batch with some of them."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from hap_hf.host import tree_leaves, tree_map_only

LABEL_NAMES = ("labels", "label", "targets", "target", "y")
"""What labels are called; all but the first by loaders whose loss is given along."""


def labels_of(batch: Any) -> Any:
    """Return the labels of a batch, as far as its form says which they are.

    Args:
        batch: A mapping with one of the usual names, or a pair of inputs and labels.

    Returns:
        The labels, or None.
    """
    if isinstance(batch, Mapping):
        return next((batch[name] for name in LABEL_NAMES if name in batch), None)
    return batch[-1] if isinstance(batch, tuple) and len(batch) > 1 else None


def num_samples(batch: Any) -> int:
    """Return the number of samples of a batch.

    Args:
        batch: A mapping, a tuple of parts, or a list of samples.

    Returns:
        The leading size of its labels, or the number of entries where they are a list; without labels that of the
        first tensor or list in it. 1 where nothing tells.
    """
    if _is_list_of_samples(batch):
        return len(batch)
    sizes = (size_of(part) for part in (labels_of(batch), *_parts(batch)))
    return next((size for size in sizes if size is not None), 1)


def part_of(batch: Any, rows: slice, *, multiples: bool = False) -> Any:
    """Return some samples of a batch.

    Args:
        batch: A mapping, a tuple of parts, or a list of samples.
        rows: Which samples.
        multiples: Whether what has several times as many rows as there are samples has as many of them for each, as the
            crops of an image or the patches of images of one size.

    Returns:
        A batch of the same form. What has another size, as a table for all samples, goes along whole; a slice keeps
        the dimension of samples.
    """
    size = num_samples(batch)

    def of_tensor(tensor: Tensor) -> Tensor:
        if not tensor.dim():
            return tensor
        each = len(tensor) // size if multiples and size and len(tensor) % size == 0 else 1
        return tensor[rows.start * each : rows.stop * each] if each and len(tensor) == size * each else tensor

    def of_part(part: Any) -> Any:
        if isinstance(part, (list, tuple)) and len(part) == size:
            return part[rows]
        if isinstance(part, Mapping):
            return {name: of_part(value) for name, value in part.items()}
        return tree_map_only(Tensor, of_tensor, part)

    if _is_list_of_samples(batch):
        return batch[rows]
    if isinstance(batch, Mapping):
        return {name: of_part(value) for name, value in batch.items()}
    if not isinstance(batch, (tuple, list)):
        return batch
    parts = [of_part(part) for part in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)  # named tuples take one by one


def _is_list_of_samples(batch: Any) -> bool:
    """Return whether a batch is a list with a mapping for each sample, as no collator has touched it."""
    return isinstance(batch, list) and bool(batch) and all(isinstance(sample, Mapping) for sample in batch)


def _parts(batch: Any) -> Iterator[Any]:
    """Yield the parts of a batch, of which each has something for every sample."""
    yield from batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()


def size_of(part: Any) -> int | None:
    """Return how many samples a part of a batch has.

    Args:
        part: Anything that is in a batch.

    Returns:
        The number, None where it does not tell.
    """
    if isinstance(part, Tensor):
        return part.shape[0] if part.dim() else None
    # Lists of tensors or of what holds tensors: a list of names says nothing of the model's inputs.
    if isinstance(part, (list, tuple)):
        return len(part) if any(isinstance(leaf, Tensor) for leaf in tree_leaves(part)) else None
    values = part.values() if isinstance(part, Mapping) else ()
    return next((size for value in values if (size := size_of(value)) is not None), None)
