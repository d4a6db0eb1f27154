"""A model, its data and how to judge it: what pruning and sweeping begin with."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import transformers
from torch import Tensor

from hap_hf.cli.data import rows_of
from hap_hf.cli.labels import SEVERAL
from hap_hf.cli.loading import config_of, load_as
from hap_hf.cli.tasks import Task, share_of_right, task_of
from hap_hf.errors import ConfigError

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Given:
    """What the user said of model and data; see the flags of the commands.

    Args:
        model: A folder or a name on the Hub.
        data: See :func:`hap_hf.cli.data.rows_of`.
        task: Name of the task, or None to read it from the config.
        text_column: Columns with text.
        label_column: Column with labels.
        image_column: Column with images.
        held_out: Split to judge by.
        max_length: Tokens of a text.
        batch_size: Samples of a batch.
        max_batches: Batches to score on; 0 for all.
        eval_samples: Rows to judge by.
        seed: Seed of all.
    """

    model: str
    data: str
    task: str | None = None
    text_column: list[str] = field(default_factory=list)
    label_column: str | None = None
    image_column: str | None = None
    held_out: str | None = None
    max_length: int | None = None
    batch_size: int = 8
    max_batches: int = 8
    eval_samples: int = 500
    seed: int = 0


@dataclass(frozen=True)
class Setup:
    """A model and what it is measured on.

    Args:
        model: The model.
        processor: Its tokenizer or image processor; None for images without one.
        task: Its task.
        samples: To score and train on.
        collate: Makes a batch of samples.
        batches: To score on.
        judge: Returns the share of right answers; None of a model with one output.
    """

    model: Any
    processor: Any
    task: Task
    samples: list[Any]
    collate: Callable[[list[Any]], Batch]
    batches: list[Batch]
    judge: Callable[[Any], float] | None


def set_up(given: Given, *, train_on_all: bool = False) -> Setup:
    """Load what the user named.

    Args:
        given: What the user said.
        train_on_all: Whether all rows are wanted as samples, or those to score on.

    Returns:
        The model and what it is measured on.

    Raises:
        ConfigError: If it does not go together.
    """
    transformers.set_seed(given.seed)
    config = config_of(given.model)
    task = task_of(config, given.task)
    if getattr(config, "problem_type", None) == "multi_label_classification":
        raise ConfigError(f"the model's config has the problem_type multi_label_classification, and {SEVERAL}")
    rows = rows_of(given.data, held_out=given.held_out, seed=given.seed)
    loaded = load_as(given.model, task)
    model, processor, collate = loaded.model, loaded.processor, task.collator(loaded.processor)
    wanted = None if train_on_all or not given.max_batches else given.max_batches * given.batch_size
    given = replace(given, max_length=given.max_length or _longest(config, processor, task))
    samples = task.samples(_first(rows.train, wanted, task), model, processor, given)
    held_out = task.samples(_first(rows.held_out, given.eval_samples, task), model, processor, given)
    held_out = held_out[: given.eval_samples]
    _check_tokens([*samples, *held_out], config)
    scored = samples if wanted is None and not given.max_batches else samples[: given.max_batches * given.batch_size]
    judged_by = _in_batches(held_out, collate, given.batch_size)
    judge = None if getattr(config, "num_labels", 2) == 1 else partial(share_of_right, task, batches=judged_by)
    return Setup(model, processor, task, samples, collate, _in_batches(scored, collate, given.batch_size), judge)


def _check_tokens(samples: list[Any], config: Any) -> None:
    """Check that the model has all tokens; with the tokenizer of another model it may not."""
    known = getattr(config.get_text_config(), "vocab_size", None)
    highest = max((max(s["input_ids"], default=0) for s in samples if "input_ids" in s), default=0)
    if isinstance(known, int) and highest >= known:
        raise ConfigError(
            f"the tokenizer makes the token {highest} of the data, and the model has {known} tokens; save the one that "
            "the model was trained with to its folder"
        )


def _longest(config: Any, processor: Any, task: Task) -> int:
    """Return how many tokens a text may have: what the model takes, and no more than is usual."""
    usual = 128 if task.name == "text-generation" else 512
    known = (getattr(processor, "model_max_length", usual), getattr(config, "max_position_embeddings", usual))
    return int(min(usual, *known))


def _first(rows: Any, number: int | None, task: Task) -> Any:
    # A row of running text is a part of a sample, or several.
    if number is None or task.name == "text-generation":
        return rows
    return rows.select(range(min(number, len(rows))))


def _in_batches(samples: list[Any], collate: Callable[[list[Any]], Batch], size: int) -> list[Batch]:
    return [dict(collate(samples[i : i + size])) for i in range(0, len(samples), size)]
