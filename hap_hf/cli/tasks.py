"""The tasks that a command line can prepare data for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto as known

from hap_hf.cli.images import pictured
from hap_hf.cli.text import IGNORED, Sample, answered, classified, continued, tagged
from hap_hf.errors import ConfigError

Right = Callable[[Any, dict[str, Tensor]], tuple[int, int]]


@dataclass(frozen=True)
class Task:
    """What a model is trained for.

    Args:
        name: As pipelines call it.
        auto: The class that loads such models.
        architectures: Names of their classes.
        types: Model types that have such a class.
        samples: Makes samples of rows.
        collator: Makes a batch of samples, given a tokenizer.
        right: Counts right answers and all, of outputs and a batch.
        metric: What their share is called.
    """

    name: str
    auto: Any
    architectures: frozenset[str]
    types: frozenset[str]
    samples: Callable[[Any, Any, Any, Any], list[Sample]]
    collator: Callable[[Any], Callable[[list[Any]], dict[str, Tensor]]]
    right: Right
    metric: str


def _padded(tokenizer: Any) -> Any:
    return transformers.DataCollatorWithPadding(_padding(tokenizer))


def _padded_tags(tokenizer: Any) -> Any:
    return transformers.DataCollatorForTokenClassification(_padding(tokenizer))


def _padding(tokenizer: Any) -> Any:
    """Return a tokenizer that can fill up the shorter texts of a batch."""
    if tokenizer.pad_token is None:
        raise ConfigError(
            "the tokenizer has no padding token, which batches of texts need; give it the one that the model was "
            "trained with, often tokenizer.pad_token = tokenizer.eos_token, and save it to the model's folder"
        )
    return tokenizer


def _stacked(tokenizer: Any) -> Any:
    return transformers.default_data_collator


def _best(logits: Tensor) -> Tensor:
    """Return the number of the largest output; the largest of those that are no numbers would be the first."""
    if bool(logits.isnan().any()):
        raise ConfigError(
            "the model's outputs are NaN, which are no answers to judge: its weights are damaged, or it was trained "
            "with too high a learning rate; take an earlier checkpoint, or train again with a lower one"
        )
    return logits.argmax(-1)


def _labels(outputs: Any, batch: dict[str, Tensor]) -> tuple[int, int]:
    guess, labels = _best(outputs.logits), batch["labels"]
    counted = labels != IGNORED
    return int((guess == labels)[counted].sum()), int(counted.sum())


def _next_tokens(outputs: Any, batch: dict[str, Tensor]) -> tuple[int, int]:
    guess, labels = _best(outputs.logits)[:, :-1], batch["labels"][:, 1:]
    return int((guess == labels).sum()), labels.numel()


def _spans(outputs: Any, batch: dict[str, Tensor]) -> tuple[int, int]:
    first = _best(outputs.start_logits) == batch["start_positions"]
    last = _best(outputs.end_logits) == batch["end_positions"]
    return int((first & last).sum()), len(first)


def _names(*tables: Any) -> frozenset[str]:
    found: set[str] = set()
    for table in tables:
        for names in table.values():
            found |= {names} if isinstance(names, str) else set(names)
    return frozenset(found)


TASKS = {
    task.name: task
    for task in (
        Task(
            "text-classification",
            transformers.AutoModelForSequenceClassification,
            _names(known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
            frozenset(known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
            classified,
            _padded,
            _labels,
            "accuracy",
        ),
        Task(
            "token-classification",
            transformers.AutoModelForTokenClassification,
            _names(known.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
            frozenset(known.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
            tagged,
            _padded_tags,
            _labels,
            "accuracy of words",
        ),
        Task(
            "question-answering",
            transformers.AutoModelForQuestionAnswering,
            _names(known.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
            frozenset(known.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
            answered,
            _padded,
            _spans,
            "exact match",
        ),
        Task(
            "image-classification",
            transformers.AutoModelForImageClassification,
            _names(known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
            frozenset(known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
            pictured,
            _stacked,
            _labels,
            "accuracy",
        ),
        Task(
            "text-generation",
            transformers.AutoModelForCausalLM,
            _names(known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
            frozenset(known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
            continued,
            _stacked,
            _next_tokens,
            "accuracy of next tokens",
        ),
    )
}


def task_of(config: Any, wanted: str | None) -> Task:
    """Return the task of a model.

    Args:
        config: The model's config.
        wanted: The name that the user gave, if any.

    Returns:
        The task.

    Raises:
        ConfigError: If there is none of that name, or it is none of the model, or the model's class has none.
    """
    if wanted is not None:
        if wanted not in TASKS:
            raise ConfigError(f"--task must be one of {', '.join(TASKS)}, got {wanted!r}")
        kind = getattr(config, "model_type", None)
        if kind not in TASKS[wanted].types and not hasattr(config, "auto_map"):  # code that comes with the model
            fitting = [name for name, task in TASKS.items() if kind in task.types]
            raise ConfigError(
                f"--task {wanted}: there are no models of the type {kind!r} for it, only for "
                f"{', '.join(fitting) or 'other tasks'}"
            )
        return TASKS[wanted]
    classes = getattr(config, "architectures", None) or []
    found = [task for task in TASKS.values() if task.architectures & set(classes)]
    if len(found) != 1:
        raise ConfigError(
            f"the model's config names the class {', '.join(classes) or 'of no task'}, which says no task that is "
            f"known here; say it by --task, one of {', '.join(TASKS)}"
        )
    return found[0]


def share_of_right(task: Task, model: Any, batches: list[dict[str, Tensor]]) -> float:
    """Return the share of right answers of a model.

    Args:
        task: Its task.
        model: The model, which is left in the mode that it is in.
        batches: What to judge by.

    Returns:
        The share.

    Raises:
        ConfigError: If the outputs are no numbers, or nothing in the batches can be judged by.
    """
    right = counted = 0
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                moved = {name: value.to(device) for name, value in batch.items()}
                found = task.right(model(**moved), moved)
                right, counted = right + found[0], counted + found[1]
    finally:
        model.train(training)
    if not counted:
        raise ConfigError(
            "the rows to judge by have no label that the model sees: texts are empty, or cut off before it; raise "
            "--eval-samples or --max-length"
        )
    return right / counted
