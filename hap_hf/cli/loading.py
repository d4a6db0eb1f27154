"""A model with what reads its data, from a folder or the Hub."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError

from hap_hf.checkpoint.headers import check_is_no_file
from hap_hf.cli.tasks import Task, task_of
from hap_hf.cli.told import reason
from hap_hf.errors import ConfigError, HapError


@dataclass(frozen=True)
class Loaded:
    """A model with what it needs to read its data.

    Args:
        model: The model.
        processor: Its tokenizer or image processor; None for images without one.
        task: Its task.
    """

    model: Any
    processor: Any
    task: Task


def load(model: str, task: str | None) -> Loaded:
    """Load a model, and its tokenizer or image processor.

    Args:
        model: A folder or a name on the Hub.
        task: Name of the task, or None to read it from the config.

    Returns:
        Both, and the task.

    Raises:
        ConfigError: If there is no such folder, the config says no task, or something that the model needs is missing.
    """
    return load_as(model, task_of(config_of(model), task))


def load_as(model: str, task: Task) -> Loaded:
    """Load a model for a task that is known.

    Args:
        model: A folder or a name on the Hub.
        task: The task.

    Returns:
        The model, and its tokenizer or image processor, which is read first.

    Raises:
        ConfigError: If one of them is not there or cannot be read.
    """
    processor = processor_of(model, task)
    loaded = model_of(model, task)
    if getattr(processor, "pad_token_id", None) is not None and getattr(loaded.config, "pad_token_id", 0) is None:
        # Classifiers of texts that read from left to right look for the last token before it.
        loaded.config.pad_token_id = processor.pad_token_id
    return Loaded(loaded, processor, task)


def config_of(model: str) -> Any:
    """Return the config of a model.

    Args:
        model: A folder or a name on the Hub.

    Returns:
        The config.

    Raises:
        ConfigError: If there is no such folder, and nothing of that name could be read from the Hub.
    """
    check_is_no_file(model)
    there = Path(model).is_dir()
    # What looks like a path would be looked for on the Hub.
    if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not there:
        raise ConfigError(f"there is no folder {model!r}")
    try:
        return transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        if there:
            raise ConfigError(f"{model} holds no model that can be read: {error}") from error
        raise ConfigError(f"there is no folder {model!r}, and it could not be read from the Hub: {error}") from error


def model_of(model: str, task: Task) -> Any:
    """Return the model of a folder or of the Hub.

    Args:
        model: A folder or a name on the Hub.
        task: Its task.

    Returns:
        The model.

    Raises:
        ConfigError: If a package is missing, or it is no model of the task, or its files are damaged.
        HapError: If it is a pruned checkpoint whose plan and weights do not go together.
    """
    try:
        return task.auto.from_pretrained(model)
    except HapError:
        raise
    except ImportError as error:
        extra = ': pip install "hap_hf[timm]"' if "timm" in str(error) else ""
        raise ConfigError(f"{model} needs a package that is not installed{extra} ({reason(error)})") from error
    except SafetensorError as error:
        raise ConfigError(f"the weights of {model} are damaged; copy or download them again ({error})") from error
    # What transformers raises on a class that does not fit, and torch on a file that is none or not whole.
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{model} could not be loaded for {task.name}: {reason(error)}") from error


def processor_of(model: str, task: Task) -> Any:
    """Return what reads the data of a model.

    Args:
        model: A folder or a name on the Hub.
        task: Its task.

    Returns:
        The tokenizer or image processor; None for images without one.

    Raises:
        ConfigError: If a model of texts comes without a tokenizer.
    """
    if task.name == "image-classification":
        try:
            return transformers.AutoImageProcessor.from_pretrained(model)  # type: ignore[no-untyped-call]
        except (OSError, ValueError):  # models that were trained without one have none
            return None
    advice = (
        "save the one that the model was trained with to the same folder: AutoTokenizer.from_pretrained(...)"
        ".save_pretrained(...)"
    )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"the tokenizer of {model} could not be read: {reason(error)}; {advice}") from error
    # Where no file says the words, transformers makes a tokenizer of special tokens, and every word is unknown to it.
    special = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    if len(tokenizer.get_vocab().keys() - special) < 2:
        raise ConfigError(f"{model} has no tokenizer, only a model, and texts could not be read; {advice}")
    return tokenizer
