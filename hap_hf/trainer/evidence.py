"""What a training lets its model be scored on, and what has to be out of the way meanwhile."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, cast

from torch import nn
from transformers import Trainer

from hap_hf.config import HapConfig
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.losses import LossFunction
from hap_hf.trainer.compiled import uncompiled
from hap_hf.trainer.distributed import pruning_together
from hap_hf.trainer.scoring import scoring_batches, trainer_loss, without_autocast


@contextmanager
def training_evidence(
    trainer: Trainer,
    config: HapConfig,
    loader: Any,
    given: Iterable[Mapping[str, Any]] | None,
    loss_fn: LossFunction | None,
    *,
    tell: bool = True,
) -> Generator[tuple[Evidence, HapConfig]]:
    """Let the model of a training be scored, and pruned, inside the block.

    Callbacks of the Trainer that have a method ``before_pruning`` are told first.

    Args:
        trainer: The Trainer, in the middle of a training.
        config: How much to prune and how.
        loader: Its training data.
        given: Batches to score on instead of the training data.
        loss_fn: Loss to score with instead of the Trainer's.
        tell: Whether to tell these callbacks: not where the model is only looked at.

    Yields:
        What is measured on, and the settings as they are for this process.
    """
    model = cast(nn.Module, trainer.model)
    for callback in trainer.callback_handler.callbacks if tell else ():
        if hasattr(callback, "before_pruning"):
            callback.before_pruning(trainer)
    with uncompiled(trainer), without_autocast(model), pruning_together(trainer, model) as processes:
        if given is None:
            size = trainer.args.train_batch_size
            batches = scoring_batches(loader.dataset, loader.collate_fn, size, config, processes=processes)
        else:
            batches = processes.share(islice(given, config.max_batches))
        if not trainer.state.is_local_process_zero or trainer.args.disable_tqdm:
            config = replace(config, progress=False)
        with processes.agreeing("drawing batches"):
            evidence = config.evidence(model, batches, loss_fn=loss_fn or trainer_loss(trainer), processes=processes)
        yield evidence, config


def look_ahead(
    trainer: Trainer,
    config: HapConfig,
    loader: Any,
    given: Iterable[Mapping[str, Any]] | None,
    loss_fn: LossFunction | None,
    check: Callable[[Evidence, HapConfig], None],
) -> None:
    """Raise what a round would raise before it scores: by then training steps would be lost.

    Args:
        trainer: The Trainer, at the beginning of a training.
        config: How much to prune and how.
        loader: Its training data, of which one batch is drawn.
        given: Batches to score on instead of the training data.
        loss_fn: Loss to score with instead of the Trainer's.
        check: What is called with the evidence and the settings, and raises.
    """
    one = replace(config, max_batches=1, progress=False)
    found = training_evidence(trainer, one, loader, given, loss_fn, tell=False)
    with found as (evidence, settings), evidence.processes.agreeing("a look at the model"):
        check(evidence, settings)


def kept(batches: Iterable[Any] | None, most: int | None) -> Iterable[Any] | None:
    """Return batches that each round, and a look before the first one, can begin anew with.

    Args:
        batches: What was handed in, perhaps an iterator.
        most: How many of it are used.

    Returns:
        A list in place of an iterator.
    """
    return list(islice(batches, most)) if isinstance(batches, Iterator) else batches
