"""Scoring in batches that fit in memory."""

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from operator import length_hint
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from hap_hf.errors import BatchError
from hap_hf.evidence.task import ScoringTask, num_samples

T = TypeVar("T")

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What the messages of plain ``RuntimeError`` say, by whichever allocator."""


def in_batches_that_fit(criterion: Callable[[ScoringTask], T], task: ScoringTask) -> T:
    """Return what ``criterion`` makes of ``task``, starting anew with batches cut in halves when memory runs out.

    Each part counts by its own number of loss terms, so the scores are those of smaller batches from the beginning.
    They estimate the same, unless the loss of a sample depends on the other samples of its batch.

    Args:
        criterion: How to score, or what else there is to measure.
        task: What to score, on what.

    Returns:
        What it makes of it.

    Raises:
        BatchError: If memory runs out on a single sample, or on a batch that cannot be cut or not be drawn again.
        RuntimeError: Whatever else the criterion raises.
        MemoryError: If memory runs out while no batch is at hand.
    """
    most: int | None = None
    known = task.processes.num_exchanges
    while True:
        parts = _Parts(task.batches, task.config.max_batches, most)
        limited = task.config if most is None else replace(task.config, max_batches=None)  # which counts whole batches
        try:
            return criterion(replace(task, batches=parts, config=limited))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or parts.current is None:
                raise
            if task.processes.num_exchanges > known:  # others go on from there, and would wait for the rest
                raise
            most = _half(task, parts.current, error)
            logger.warning(
                "out of memory while scoring a batch of %d samples; starting anew with at most %d a batch (%s)",
                num_samples(parts.current),
                most,
                str(error).partition("\n")[0],
            )
        # Only here are the frames of the failed attempt gone, and the tensors in them.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocator raised ``error`` because there was no memory left.

    Args:
        error: Any exception.

    Returns:
        True for torch's and Python's own kinds and for plain errors whose message says so.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def _half(task: ScoringTask, batch: Mapping[str, Any], error: Exception) -> int:
    """Return half the number of samples of ``batch``, rounded up.

    Args:
        task: What is scored.
        batch: The batch that did not fit.
        error: What the allocator said.

    Returns:
        The number of samples.

    Raises:
        BatchError: If the batch cannot be cut, or the batches cannot be drawn again.
    """
    size = num_samples(batch)
    if size == 1:
        raise BatchError(
            "out of memory while scoring a single sample, so no smaller batch is left to try; use shorter or smaller "
            "samples, precision='bf16', a method without second derivatives (method='taylor'), or exclude some groups"
        ) from error
    sizes = {t.shape[0] for t in tree_leaves(dict(batch)) if isinstance(t, Tensor) and t.dim()}
    if not sizes <= {1, size}:
        raise BatchError(
            f"out of memory while scoring a batch of {size} samples, which cannot be cut in halves as its tensors have "
            f"{sorted(sizes)} rows; pass smaller batches"
        ) from error
    if isinstance(task.batches, Iterator):
        raise BatchError(
            f"out of memory while scoring a batch of {size} samples, and the batches come from an iterator, which "
            "cannot be started anew to cut them in halves; pass a list, a DataLoader, or smaller batches"
        ) from error
    return (size + 1) // 2


class _Parts:
    """Batches cut into parts.

    Args:
        batches: The batches.
        max_batches: How many of them to use; None for all.
        most: Most samples of a part; None to leave batches whole.
    """

    def __init__(self, batches: Iterable[Mapping[str, Any]], max_batches: int | None, most: int | None) -> None:
        self.batches, self.max_batches, self.most = batches, max_batches, most
        self.current: Mapping[str, Any] | None = None

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Iterate over the parts, and remember the current one."""
        for batch in islice(self.batches, self.max_batches):
            for part in [batch] if self.most is None else _cut(batch, self.most):
                self.current = part
                yield part
        self.current = None

    def __length_hint__(self) -> int:
        """Return the number of batches where it is known."""
        return length_hint(self.batches) if self.most is None else 0


def _cut(batch: Mapping[str, Any], most: int) -> Iterator[Mapping[str, Any]]:
    size = num_samples(batch)
    for start in range(0, size, most):
        part: dict[str, Any] = tree_map_only(Tensor, partial(_rows, size, slice(start, start + most)), dict(batch))
        yield part


def _rows(size: int, rows: slice, tensor: Tensor) -> Tensor:
    return tensor[rows] if tensor.dim() and tensor.shape[0] == size else tensor
