"""Scoring in batches that fit in memory."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from hap_hf.errors import BatchError
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.facts import Facts
from hap_hf.evidence.samples import num_samples

T = TypeVar("T")

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What the messages of plain ``RuntimeError`` say, by whichever allocator."""


def in_batches_that_fit(measure: Callable[[Evidence], T], evidence: Evidence) -> T:
    """Return what ``measure`` makes of ``evidence``, starting anew with batches cut in halves when memory runs out.

    Each part counts by its own number of loss terms, so the results are those of smaller batches from the beginning.
    They estimate the same, unless the loss of a sample depends on the other samples of its batch.

    Args:
        measure: A function that scores, or measures something else.
        evidence: What to measure on.

    Returns:
        What ``measure`` returns.

    Raises:
        BatchError: If memory runs out on a single sample, or on a batch that cannot be cut.
        RuntimeError: Whatever else ``measure`` raises.
        MemoryError: If memory runs out while no batch is at hand.
    """
    most: int | None = None
    known = evidence.processes.num_exchanges  # what was exchanged before need not be exchanged anew
    while True:
        parts = _Parts(evidence.batches, evidence.facts, most)
        try:
            return measure(replace(evidence, batches=parts))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or parts.current is None:
                raise
            if evidence.processes.num_exchanges > known:  # others go on from there, and would wait for the rest
                raise
            most = _half(parts.current, evidence.facts, error)
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


def _half(batch: Any, facts: Facts, error: Exception) -> int:
    """Return half the number of samples of ``batch``, rounded up.

    Raises:
        BatchError: If the batch cannot be cut.
    """
    size = num_samples(batch)
    if size == 1:
        raise BatchError(
            "out of memory while scoring a single sample, so no smaller batch is left to try; use shorter or smaller "
            "samples, precision='bf16', a method without second derivatives (method='taylor'), or exclude some groups"
        ) from error
    if not facts.adds_up:
        raise BatchError(
            f"out of memory while scoring a batch of {size} samples, which cannot be cut in halves as its loss is not "
            "made up of those of its samples; pass smaller batches"
        ) from error
    return (size + 1) // 2


class _Parts(Sequence[Any]):
    """Batches cut into parts, which remember the one that is being measured on.

    Args:
        batches: The batches as they were given.
        facts: How they fall into samples.
        most: Most samples of a part; None to leave batches whole.
    """

    def __init__(self, batches: Sequence[Any], facts: Facts, most: int | None) -> None:
        self._parts = [part for batch in batches for part in ([batch] if most is None else _cut(batch, facts, most))]
        self.current: Any = None

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the parts, and remember the current one."""
        for part in self._parts:
            self.current = part
            yield part
        self.current = None  # smaller batches would not help against what fails from here on

    def __len__(self) -> int:
        """Return the number of parts."""
        return len(self._parts)

    def __getitem__(self, index: Any) -> Any:
        """Return a part, or several."""
        return self._parts[index]


def _cut(batch: Any, facts: Facts, most: int) -> Iterator[Any]:
    """Yield parts of a batch with at most so many samples."""
    for start in range(0, num_samples(batch), most):
        yield facts.part_of(batch, slice(start, start + most))
