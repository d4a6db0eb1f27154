"""What the callback scores with: the Trainer's loss, batches of its data, the precision of the config."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from hap_hf.config import HapConfig
from hap_hf.errors import BatchError
from hap_hf.losses import LossFunction
from hap_hf.processes import ALONE, Processes


@contextmanager
def without_autocast(model: nn.Module) -> Generator[None]:
    """Run ``model`` in its own precision inside the block: accelerate puts the training's autocast around its forward.

    Args:
        model: The Trainer's model.

    Yields:
        Nothing.
    """
    patched, original = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    if patched is None or original is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = patched


def trainer_loss(trainer: Trainer) -> LossFunction:
    """Return the loss that ``trainer`` trains with, as a function of a model and a batch.

    Args:
        trainer: The Trainer.

    Returns:
        The mean loss of a batch, with label smoothing or ``compute_loss_func`` as in training.
    """

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        # compute_loss takes the labels out of the mapping it is given.
        value = trainer.compute_loss(model, dict(batch))
        return value[0] if isinstance(value, tuple) else value

    return loss


def scoring_batches(
    dataset: Any,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]],
    batch_size: int,
    config: HapConfig,
    *,
    processes: Processes = ALONE,
) -> Iterator[Mapping[str, Any]]:
    """Yield the training batches that :class:`HessianPruner` scores on.

    A loader of its own, in an order that only ``config.seed`` decides: reading the Trainer's would move its sampler
    and change the training.

    Args:
        dataset: The training data.
        collate_fn: Makes a batch out of samples.
        batch_size: Samples a batch.
        config: Settings; ``seed`` and ``max_batches`` are used.
        processes: The processes that share the batches, whatever their number.

    Yields:
        Batches as the model takes them; the share of this process.

    Raises:
        BatchError: If the data is empty.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        dataset = dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset
        whole = DataLoader(dataset, batch_size=batch_size, collate_fn=collate_fn)
        yield from processes.share(islice(whole, config.max_batches))
        return
    if len(dataset) == 0:
        raise BatchError("expected training data to score on, got an empty dataset")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed)).tolist()
    most = len(order) if config.max_batches is None else config.max_batches * batch_size
    for start in processes.share(range(0, min(len(order), most), batch_size)):
        yield collate_fn([dataset[i] for i in order[start : start + batch_size]])
