"""What the callback scores with: the Trainer's loss, batches of its data, the precision of the config."""

import copy
import random
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count, islice
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.data_loader import IterableDatasetShard  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from hap_hf.errors import BatchError, ConfigError
from hap_hf.evidence.losses import LossFunction
from hap_hf.evidence.processes import ALONE, Processes
from hap_hf.trainer.host import forward_without_autocast

_SCORING: ContextVar[bool] = ContextVar("scoring", default=False)


class Drawing(Protocol):
    """Settings of how training data is drawn."""

    @property
    def seed(self) -> int:
        """Seed of the order."""

    @property
    def max_batches(self) -> int | None:
        """Most batches; None for all."""


@contextmanager
def without_autocast(model: nn.Module) -> Generator[None]:
    """Run ``model`` in its own precision inside the block: accelerate puts the training's autocast around its forward.

    Args:
        model: The Trainer's model.
    """
    both = forward_without_autocast(model)
    if both is None:
        yield
        return
    patched, original = both
    model.forward = original
    try:
        yield
    finally:
        model.forward = patched


def trainer_loss(trainer: Trainer) -> LossFunction:
    """Return the loss that ``trainer`` trains with, as a function of a model and a batch.

    Args:
        trainer: The Trainer whose loss it is.

    Returns:
        The mean loss of a batch, with label smoothing, ``compute_loss_func`` or a ``compute_loss`` of the Trainer's own
        as in training, where they are told how many items the batch has.
    """
    own = trainer.compute_loss_func is not None or type(trainer).compute_loss is not Trainer.compute_loss

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        with _one_process(trainer), _scores():
            # Others take the mean themselves, which is the same but for rounding.
            items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)[1] if own else None
            # compute_loss takes the labels out of the mapping it is given.
            value = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
        return value[0] if isinstance(value, tuple) else value

    return loss


@contextmanager
def _scores() -> Generator[None]:
    token = _SCORING.set(True)
    try:
        yield
    finally:
        _SCORING.reset(token)


def is_scoring() -> bool:
    """Return whether the loss that is being computed is one to score units with."""
    return _SCORING.get()


@contextmanager
def _one_process(trainer: Trainer) -> Generator[None]:
    """Let ``trainer`` compute a loss inside the block as if there were no other processes to add theirs."""
    args = trainer.args
    averaged = args.average_tokens_across_devices
    args.average_tokens_across_devices = False
    try:
        yield
    finally:
        args.average_tokens_across_devices = averaged


def scoring_batches(
    dataset: Any,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]],
    batch_size: int,
    config: Drawing,
    *,
    processes: Processes = ALONE,
) -> Iterator[Mapping[str, Any]]:
    """Yield the training batches that :class:`HessianPruner` scores on.

    Their order depends on ``config.seed`` alone, and so do the random numbers that the data or the collator draws. The
    Trainer's own loader is not read, which would move its sampler and change the training. Of a dataset without a
    length a copy is read, from where the dataset is at that moment.

    Args:
        dataset: The training data.
        collate_fn: Makes a batch out of samples.
        batch_size: Samples a batch.
        config: Its ``seed`` and ``max_batches`` are used.
        processes: The processes that share the batches, whatever their number.

    Yields:
        Batches as the model takes them; the share of this process.

    Raises:
        BatchError: If the data is empty.
    """
    if _is_stream(dataset):
        stream = _copy_of(dataset)
        # A loader, too, draws a number when it starts.
        loader = DataLoader(stream, batch_size, collate_fn=collate_fn, generator=torch.Generator())
        with _random_numbers_of(config.seed, 0):
            batches = iter(loader)
        yield from processes.share(islice(_drawn(batches, config.seed), config.max_batches))
        return
    if len(dataset) == 0:
        raise BatchError("expected training data to score on, got an empty dataset")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed)).tolist()
    most = len(order) if config.max_batches is None else config.max_batches * batch_size
    # The number of a batch, and with it its random numbers, is the same whichever process makes it.
    for start in processes.share(range(0, min(len(order), most), batch_size)):
        with _random_numbers_of(config.seed, start // batch_size):
            batch = collate_fn([dataset[i] for i in order[start : start + batch_size]])
        yield batch


def check_training_data(loader: Any, config: Drawing, *, needed: bool = True) -> None:
    """Check that :func:`scoring_batches` can make batches of the training data.

    Args:
        loader: The Trainer's loader.
        config: Its ``max_batches`` is used.
        needed: Whether the training data is what is scored on.

    Raises:
        ConfigError: If the loader does not tell what batches are made of, or a stream cannot be copied or has no end.
    """
    if not needed:
        return
    if getattr(loader, "dataset", None) is None or getattr(loader, "batch_sampler", None) is None:
        raise ConfigError(
            f"the training data is a {type(loader).__name__} that does not make batches of single samples, so "
            "HessianPruner cannot draw some of its own; pass it batches to score on: HessianPruner(config, batches=...)"
        )
    if not _is_stream(loader.dataset):
        return
    if config.max_batches is None:
        raise ConfigError(
            f"max_batches=None asks for all batches of the training data, and {type(loader.dataset).__name__} has no "
            "length and may have no end; set max_batches, or pass HessianPruner(config, batches=...)"
        )
    _copy_of(loader.dataset)


def _is_stream(dataset: Any) -> bool:
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")


def _copy_of(stream: Any) -> Any:
    """Return a copy of a dataset without a length, and not of accelerate's wrapper, which deals out its samples."""
    stream = stream.dataset if isinstance(stream, IterableDatasetShard) else stream
    try:
        return copy.deepcopy(stream)
    except Exception as error:  # whatever objects of the user's raise that can only be read once
        raise ConfigError(
            f"the training data is a {type(stream).__name__} without a length, of which HessianPruner scores on a "
            f"copy, so that the training misses no sample, and it cannot be copied ({error}); keep generators and open "
            "files out of its attributes, or pass HessianPruner(config, batches=...)"
        ) from error


def _drawn(batches: Iterator[Mapping[str, Any]], seed: int) -> Iterator[Mapping[str, Any]]:
    """Yield batches, each drawn with random numbers that depend on ``seed`` and its own number alone."""
    for number in count():
        with _random_numbers_of(seed, number):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextmanager
def _random_numbers_of(seed: int, number: int) -> Generator[None]:
    """Let random numbers inside the block depend on ``seed`` and ``number``, and put back the states from before it.

    Args:
        seed: The config's.
        number: Number of the batch that is made.
    """
    # One number for each batch, out of a stream of the seed: sums of seed and number would meet those of other seeds.
    own = int(torch.randint(2**32, (number + 1,), generator=torch.Generator().manual_seed(seed))[-1])
    python, legacy = random.getstate(), np.random.get_state()  # ruff: ignore[numpy-legacy-random]
    try:
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(own)
            random.seed(own)
            np.random.seed(own)  # ruff: ignore[numpy-legacy-random]
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # ruff: ignore[numpy-legacy-random]
