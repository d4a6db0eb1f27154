"""Data of GLUE's tasks or of one's own, from the Hub or from local files, as tokenized splits."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, load_dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from glue.settings import DataArguments
from glue.tasks import TASKS

logger = logging.getLogger(__name__)

HUB_NAME = "nyu-mll/glue"
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_splits(data: DataArguments, wanted: Iterable[str], **hub: Any) -> dict[str, Dataset]:
    """Return the splits that a run needs.

    Args:
        data: Where the data is: GLUE on the Hub, another dataset or local files.
        wanted: Splits that must be there, of ``train``, ``validation`` and ``test``.
        **hub: ``cache_dir`` and ``token`` for ``datasets.load_dataset``.

    Returns:
        The wanted splits, and MNLI's ``validation_mismatched`` and ``test_mismatched`` where they belong to one.

    Raises:
        ValueError: If a wanted split is missing, or a file is of an unknown type.
        FileNotFoundError: If a local file does not exist.
    """
    if data.files:
        found = {split: _load_file(split, file, **hub) for split, file in data.files.items()}
    else:
        name, config = data.dataset_name, data.dataset_config_name
        loaded = (
            load_dataset(name, config, **hub) if name is not None else load_dataset(HUB_NAME, data.task_name, **hub)
        )
        found = {split.removesuffix("_matched"): dataset for split, dataset in loaded.items()}
    wanted = tuple(wanted)
    for split in wanted:
        if split not in found:
            source = "--dataset_name" if data.dataset_name is not None else f"--{split}_file"
            raise ValueError(f"this run needs a {split} split and {sorted(found)} were given; name it with {source}")
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_predict_samples}
    result = {}
    for split, dataset in found.items():
        base = split.removesuffix("_mismatched")
        if base in wanted:
            if not len(dataset):
                raise ValueError(f"the {split} split has no rows")
            limit = limits[base]
            result[split] = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
    return result


def _load_file(split: str, file: str, **hub: Any) -> Dataset:
    path = Path(file)
    if path.suffix not in READERS:
        raise ValueError(f"--{split}_file must end in one of {', '.join(READERS)}, got {file!r}")
    if not path.is_file():
        raise FileNotFoundError(f"--{split}_file {file!r} does not exist")
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    logger.info("%s data from %s", split, path)
    return load_dataset(READERS[path.suffix], data_files={split: str(path)}, split=split, **options, **hub)


def text_columns(splits: Mapping[str, Dataset], task_name: str | None) -> tuple[str, ...]:
    """Return the names of the text columns.

    Args:
        splits: The splits.
        task_name: The GLUE task, or None for data of one's own: then ``sentence1`` and ``sentence2``, or the
            first one or two columns with strings that are not the label.

    Returns:
        One or two names.

    Raises:
        ValueError: If a split lacks one of them.
    """
    if task_name is not None:
        columns = TASKS[task_name].columns
    else:
        features = next(iter(splits.values())).features
        texts = [name for name, f in features.items() if name != "label" and "string" in str(getattr(f, "dtype", ""))]
        pair = ("sentence1", "sentence2")
        columns = pair if set(pair) <= set(texts) else tuple(texts[:2])
    for split, dataset in splits.items():
        missing = [name for name in columns if name not in dataset.column_names]
        if missing or not columns:
            expected = f"the text columns {list(columns)}" if columns else "a column with text"
            raise ValueError(f"{split}: expected {expected}, got the columns {dataset.column_names}; rename them")
    return columns


def label_names(splits: Mapping[str, Dataset], task_name: str | None, config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the names of the labels in the order of the model's outputs.

    A model that was fine-tuned on these labels keeps its own order, so that its head still means the same.

    Args:
        splits: The splits.
        task_name: The GLUE task, or None for data of one's own, which is a regression where its labels are floats.
        config: The model's config.

    Returns:
        The names; none for regression.

    Raises:
        ValueError: If a split lacks labels, or all of them are the same.
    """
    labelled = {split: dataset for split, dataset in splits.items() if not split.startswith("test")}
    for split, dataset in labelled.items():
        _check_labelled(split, dataset, unknown=(None,) if task_name is None else (None, -1))
    known = [str(config.id2label[i]) for i in range(config.num_labels)]
    if task_name is not None:
        names = TASKS[task_name].labels
    elif not labelled:
        names = tuple(known) if config.num_labels > 1 else ()  # prediction only: the model says what it predicts
    else:
        features = [dataset.features["label"] for dataset in labelled.values()]
        if any("float" in str(getattr(f, "dtype", "")) for f in features):
            return ()
        first = features[0]
        values = {value for dataset in labelled.values() for value in dataset.unique("label")}
        names = tuple(first.names) if isinstance(first, ClassLabel) else tuple(map(str, sorted(values)))
    if names and {name.casefold() for name in names} <= {name.casefold() for name in known}:
        return tuple(known)
    if len(names) == 1:
        raise ValueError(f"expected at least two different labels, got only {names[0]!r}")
    return names


def _check_labelled(split: str, dataset: Dataset, unknown: tuple[Any, ...]) -> None:
    if "label" not in dataset.column_names:
        raise ValueError(f"{split}: expected a column 'label', got the columns {dataset.column_names}")
    missing = [row for row, value in enumerate(dataset["label"]) if value in unknown or value != value]
    if missing:
        raise ValueError(
            f"{split}: {len(missing)} of {len(dataset)} rows have no label, the first of them row {missing[0]} with "
            f"{dataset[missing[0]]['label']}; remove them, or pass the file as --test_file"
        )


def tokenize(
    splits: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: tuple[str, ...],
    names: tuple[str, ...],
    data: DataArguments,
) -> dict[str, Dataset]:
    """Return the splits as token ids and ``labels``.

    Args:
        splits: The splits.
        tokenizer: The model's tokenizer.
        columns: Names of the text columns.
        names: Names of the labels in the model's order; none for regression.
        data: Task, lengths and padding.

    Returns:
        The splits with the columns that the model takes, ``labels`` among them except in test splits.

    Raises:
        ValueError: If a text is missing or a label is none of ``names``.
    """
    length = min(data.max_seq_length, tokenizer.model_max_length)
    if length < data.max_seq_length:
        logger.warning("max_seq_length is %d and the tokenizer's limit %d; using that", data.max_seq_length, length)
    number_of = {name.casefold(): number for number, name in enumerate(names)}

    def encode(rows: dict[str, list[Any]], split: str, in_order: tuple[str, ...]) -> dict[str, list[Any]]:
        for name in columns:
            if not all(isinstance(text, str) for text in rows[name]):
                wrong = next(text for text in rows[name] if not isinstance(text, str))
                raise ValueError(f"{split}: expected text in column {name!r}, got {wrong!r}; fill or remove such rows")
        texts = [rows[name] for name in columns]
        padding = "max_length" if data.pad_to_max_length else False
        encoded = dict(tokenizer(*texts, padding=padding, max_length=length, truncation=True))
        if not split.startswith("test"):
            encoded["labels"] = [_label(value, in_order, number_of, split) for value in rows["label"]]
        return encoded

    result = {}
    for split, dataset in splits.items():
        feature = dataset.features.get("label")
        if data.task_name is not None:
            in_order = TASKS[data.task_name].labels
        else:
            in_order = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
        result[split] = dataset.map(
            encode,
            batched=True,
            fn_kwargs={"split": split, "in_order": in_order},
            remove_columns=dataset.column_names,
            load_from_cache_file=not data.overwrite_cache,
            desc=f"Tokenizing {split}",
        )
    return result


def _label(value: Any, in_order: tuple[str, ...], number_of: Mapping[str, int], split: str) -> float | int:
    # For regression itself, otherwise the place of its name among the model's outputs.
    if not number_of:
        if isinstance(value, str):
            raise ValueError(f"{split}: expected numbers as labels of a regression, got {value!r}")
        return float(value)
    name = str(value)
    if in_order and not isinstance(value, str):
        name = in_order[int(value)] if value in range(len(in_order)) else name
    if name.casefold() not in number_of:
        known = f"{list(in_order)} or their numbers" if in_order else f"{list(number_of)}"
        raise ValueError(f"{split}: unknown label {value!r}; expected one of {known}")
    return number_of[name.casefold()]
