"""Processes that prune copies of one model together, each with its own share of the batches."""

import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hap_hf.errors import DistributedError, HapError
from hap_hf.host import tree_map_only

T = TypeVar("T")


@dataclass(frozen=True)
class _Message:
    """What a process says in an exchange.

    Args:
        stage: Where it is.
        value: What it has to say.
        error: Kind and text of the error that it failed with, if it did.
    """

    stage: str
    value: Any = None
    error: tuple[type[HapError], str] | None = None


class Processes:
    """All processes that prune together, as one of them sees them.

    Batch number b of all batches belongs to process ``b % size``. What is a sum over batches is summed over the
    processes, so that all of them go on with the same numbers, which are those of a single process up to rounding.

    Processes that wait for one that failed would wait forever. So each exchange begins with a message from every
    process, one that fails sends its error instead of its next message, and all raise at the same exchange. Everything
    between two exchanges that may fail in one process alone belongs into an :meth:`agreeing` block.

    Args:
        rank: Number of this process.
        size: Number of processes; nothing is exchanged where it is 1.
        device: Device whose tensors the processes can exchange.

    Attributes:
        num_exchanges: How often the others have heard of this process.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank = rank
        self.size = size
        self.num_exchanges = 0
        self._device = torch.device(device)
        self._known: BaseException | None = None  # what all others raise, too

    def share(self, batches: Iterable[T]) -> Iterator[T]:
        """Return the batches that belong to this process.

        Args:
            batches: The batches of all processes, in the same order in each.

        Returns:
            Every ``size``-th of them.
        """
        return islice(batches, self.rank, None, self.size)

    def number(self, index: int) -> int:
        """Return the number that a batch of this process has among the batches of all.

        Args:
            index: Its index in the share of this process.

        Returns:
            The number.
        """
        return index * self.size + self.rank

    def gather(self, stage: str, value: T) -> list[T]:
        """Return what each process has to say.

        Args:
            stage: What it is about, for messages.
            value: What this process says; anything that can be pickled, and small.

        Returns:
            The values by rank.

        Raises:
            HapError: If another process failed; of the kind that it failed with.
        """
        return self._exchange(_Message(stage, value))

    def summed(self, stage: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return sums over all processes.

        Args:
            stage: What they are, for messages.
            values: What this process has, by name. A name that it does not have counts as zero.

        Returns:
            The sums of all names that any process has, on the device of the value where this process has one.

        Raises:
            DistributedError: If the processes have tensors of different shapes or dtypes.
        """
        if self.size == 1:
            return dict(values)
        everyone = self.gather(stage, {name: (tuple(v.shape), v.dtype) for name, v in values.items()})
        kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for kind in (item for had in everyone for item in had.items()):
            if kinds.setdefault(*kind) != kind[1]:
                raise DistributedError(
                    f"{stage}: expected the same shape and dtype of {kind[0]} in all processes, got "
                    f"{kinds[kind[0]]} and {kind[1]}; give every process the same model"
                )
        sums = {}
        # All processes must reduce the same tensors in the same order, also those of which they have no part.
        for name in sorted(kinds):
            shape, dtype = kinds[name]
            own = values.get(name, torch.zeros(shape, dtype=dtype, device=self._device))
            # A copy, as the reduction writes into it.
            total = own.detach().to(self._device, copy=True).contiguous()
            dist.all_reduce(total)
            sums[name] = total.to(own.device)
        return sums

    def first(self, stage: str, value: T | None) -> T | None:
        """Return what the first process has.

        Args:
            stage: What it is, for messages.
            value: What this process has; ignored in all but the first.

        Returns:
            The value of process 0, with its tensors on the CPU where it came from another process.
        """
        if self.size == 1:
            return value
        own = tree_map_only(Tensor, Tensor.cpu, dict(value) if isinstance(value, Mapping) else value)
        found = self.gather(stage, own if self.rank == 0 else None)[0]
        return value if self.rank == 0 else found

    def adopt_first_(self, stage: str, tensors: Iterable[Tensor]) -> None:
        """Fill tensors with the values that they have in the first process.

        Args:
            stage: What they are, for messages.
            tensors: The tensors, of the same shapes and dtypes and in the same order in every process.
        """
        if self.size == 1:
            return
        tensors = list(tensors)
        self.check_same(stage, {str(i): (t.shape, t.dtype) for i, t in enumerate(tensors)}, "give all the same model")
        with torch.no_grad():
            for tensor in (t for t in tensors if t.numel()):
                # As bytes, which every backend can send.
                data = tensor.detach().to(self._device, copy=True).contiguous()
                dist.broadcast(data.view(-1).view(torch.uint8), src=0)
                tensor.copy_(data)

    def check_same(self, what: str, values: Mapping[str, Any], advice: str) -> None:
        """Check that all processes have the same values.

        Args:
            what: What they are, for messages.
            values: The values by name; they can be pickled and compared, and are small.
            advice: What to do where they differ.

        Raises:
            DistributedError: If they differ; the message names what does.
        """
        everyone = self.gather(what, dict(values))
        names = dict.fromkeys(name for had in everyone for name in had)
        missing = object()  # None may be a value
        differ = [n for n in names if any(had.get(n, missing) != everyone[0].get(n, missing) for had in everyone)]
        if differ:
            more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
            raise DistributedError(
                f"expected the same {what} in all {self.size} processes, got different values of "
                f"{', '.join(differ[:5])}{more}; {advice}"
            )

    def check_same_tensors(self, what: str, tensors: Mapping[str, Tensor], advice: str) -> None:
        """Check that tensors are the same, bit by bit, in all processes.

        Args:
            what: What they are, for messages.
            tensors: The tensors by name.
            advice: What to do where they differ.
        """
        if self.size > 1:
            self.check_same(what, {name: _digest(t) for name, t in tensors.items()}, advice)

    @contextmanager
    def agreeing(self, stage: str) -> Generator[None]:
        """Let all processes raise at the end of the block, if one of them raises in it.

        Args:
            stage: What happens in the block, for messages.

        Yields:
            Nothing; every process must come to the end of the block, where they hear of each other.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            # An error that came out of an exchange inside the block is known to all, and none waits for this one.
            if error is not self._known:
                kind = type(error) if isinstance(error, HapError) else DistributedError
                text = str(error) if isinstance(error, HapError) else f"{type(error).__name__}: {error}"
                self._known = error
                self._exchange(_Message(stage, error=(kind, text)))
            raise
        # Also where all went well: the others wait for a message, and theirs may tell of an error.
        self._exchange(_Message(stage))

    def _exchange(self, message: _Message) -> list[Any]:
        """Return the values of all messages by rank, or raise what another process failed with."""
        if self.size == 1:
            return [message.value]
        messages: list[Any] = [None] * self.size
        self.num_exchanges += 1
        try:
            dist.all_gather_object(messages, message)
        except Exception as error:
            self._known = error  # there is no way left to tell anyone
            raise
        failed = [(rank, m.error) for rank, m in enumerate(messages) if m.error is not None]
        # Whoever failed goes on to raise its own error, which has the traceback.
        if message.error is None and failed:
            rank, (kind, text) = failed[0]
            self._known = kind(f"process {rank} of {self.size} failed: {text}")
            raise self._known
        # With different stages the values are answers to different questions, whatever their types.
        stages = sorted({m.stage for m in messages})
        if len(stages) > 1 and not failed:
            self._known = DistributedError(
                f"expected all {self.size} processes at the same point, got some at each of {stages}; start every "
                "process with the same script, settings and model"
            )
            raise self._known
        return [m.value for m in messages]


def _digest(tensor: Tensor) -> str:
    """Return a short text that two tensors share only if their shapes and bytes are equal."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return f"{tuple(tensor.shape)} {hashlib.blake2b(data.numpy().data, digest_size=16).hexdigest()}"


ALONE = Processes()
"""A process by itself."""
