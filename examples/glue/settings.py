"""The command line: run_glue.py's flags, and one flag for each setting of ``HapConfig``."""

import dataclasses
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from glue.tasks import TASKS
from hap_hf import HapConfig

_SHARED = {"seed"}  # TrainingArguments has a flag of this name; scoring uses its value


def _flag(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model and tokenizer to start from."""

    model_name_or_path: str = field(metadata={"help": "Model name on the Hub, or a local folder; pruned models too."})
    config_name: str | None = _flag("Config name or folder where it is not the model's.")
    tokenizer_name: str | None = _flag("Tokenizer name or folder where it is not the model's.")
    cache_dir: str | None = _flag("Where to keep what is downloaded and the prepared data.")
    model_revision: str = _flag("Branch, tag or commit of the model on the Hub.", "main")
    token: str | None = _flag("Access token for the Hub; by default the one that `hf auth login` stored.")
    trust_remote_code: bool = _flag("Run modelling code from the model's repository.", False)
    ignore_mismatched_sizes: bool = _flag("Give the model a new head where the stored one has other labels.", False)


@dataclass
class DataArguments:
    """What to train and evaluate on."""

    task_name: str | None = _flag(f"GLUE task: {', '.join(TASKS)}. Sets columns, labels and metric.")
    dataset_name: str | None = _flag("Dataset name on the Hub, or a local folder, in place of GLUE's.")
    dataset_config_name: str | None = _flag("Configuration of that dataset.")
    train_file: str | None = _flag("Local csv, tsv, json, jsonl or parquet file with training data.")
    validation_file: str | None = _flag("Local file with validation data.")
    validation_mismatched_file: str | None = _flag("Local file with MNLI's mismatched validation data.")
    test_file: str | None = _flag("Local file with test data.")
    test_mismatched_file: str | None = _flag("Local file with MNLI's mismatched test data.")
    metric_path: str | None = _flag("Local copy of the metric that evaluate.load('glue') fetches from the Hub.")
    max_seq_length: int = _flag("Longer inputs are cut to this many tokens.", 128)
    pad_to_max_length: bool = _flag("Pad everything to max_seq_length, not each batch to its longest input.", False)
    overwrite_cache: bool = _flag("Tokenize again even where the result is cached.", False)
    max_train_samples: int | None = _flag("Use the first so many training samples only.")
    max_eval_samples: int | None = _flag("Use the first so many validation samples only.")
    max_predict_samples: int | None = _flag("Use the first so many test samples only.")

    @property
    def files(self) -> dict[str, str]:
        """The local files that were named, by split."""
        named = {name.removesuffix("_file"): value for name, value in vars(self).items() if name.endswith("_file")}
        return {split: file for split, file in named.items() if file is not None}

    def __post_init__(self) -> None:
        """Check that the flags name some data and do not contradict each other.

        Raises:
            ValueError: If they do not, or do.
        """
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in TASKS:
                raise ValueError(f"--task_name must be one of {', '.join(TASKS)}, got {self.task_name!r}")
        elif self.dataset_name is None and not self.files:
            raise ValueError(
                "no data: pass --task_name (one of "
                f"{', '.join(TASKS)}), --dataset_name, or local files as --train_file and --validation_file"
            )
        if self.dataset_name is not None and self.files:
            raise ValueError(
                f"got both --dataset_name {self.dataset_name} and local files {self.files}; pass one of them"
            )
        second = sorted(split for split in self.files if split.endswith("_mismatched"))
        if second and self.task_name != "mnli":
            raise ValueError(f"--{second[0]}_file belongs to --task_name mnli, got --task_name {self.task_name}")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"--{name} must be at least 1, got {count}")


def _descriptions() -> dict[str, str]:
    """Return what HapConfig's docstring says of each of its fields."""
    text = inspect.getdoc(HapConfig) or ""
    entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", text, flags=re.MULTILINE)
    return {name: " ".join(words.split()).replace("%", "%%") for name, words in entries}


def _pruning_fields() -> list[tuple[str, Any, Any]]:
    """Return HapConfig's fields in the types that a command line can express."""
    described = _descriptions()
    result: list[tuple[str, Any, Any]] = []
    for f in dataclasses.fields(HapConfig):
        if f.name in _SHARED:
            continue
        metadata = {"help": described.get(f.name, "")}
        if isinstance(f.default, tuple):
            values = [str(v) for v in f.default]
            result.append((f.name, list[str], field(default_factory=values.copy, metadata=metadata)))
        else:
            result.append((f.name, f.type, field(default=f.default, metadata=metadata)))
    return result


_HapFlags: Any = dataclasses.make_dataclass("_HapFlags", _pruning_fields())


@dataclass
class PruningArguments(_HapFlags):
    """How much to prune, when, and how long to train afterwards; without an amount nothing is pruned."""

    prune_step: int | None = _flag("Prune after so many steps of the recovery training, not before its first.")
    prune_epoch: int | None = _flag("Prune after so many epochs of it.")
    num_rounds: int = _flag("Prune in so many rounds, the amount rising to its target, each scored anew.", 1)
    round_interval: int = _flag("Steps (with prune_step) or epochs between rounds.", 1)
    recovery_epochs: float = _flag("Epochs of the training in which the model is pruned; 0: prune only.", 1.0)
    recovery_learning_rate: float | None = _flag("Its learning rate; learning_rate by default.")

    def to_config(self, seed: int) -> HapConfig | None:
        """Return the settings as a HapConfig.

        Args:
            seed: Seed of probes and random scores.

        Returns:
            The config, or None where every pruning flag was left alone.

        Raises:
            ConfigError: If a value is out of range or no amount is among the flags that were set.
        """
        if all(getattr(self, f.name) == _default(f) for f in dataclasses.fields(self)):
            return None
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(HapConfig) if f.name not in _SHARED}
        return HapConfig(**values, seed=seed)


def _default(f: "dataclasses.Field[Any]") -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


Settings = tuple[ModelArguments, DataArguments, PruningArguments, TrainingArguments]


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Return the settings that a command line gives.

    Args:
        argv: The arguments, by default the program's; a single ``.json`` file may hold them all.

    Returns:
        Model, data, pruning and training settings.

    Raises:
        ValueError: If flags are missing or contradict each other.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser([ModelArguments, DataArguments, PruningArguments, TrainingArguments])
    if len(words) == 1 and words[0].endswith(".json"):
        settings = parser.parse_json_file(str(Path(words[0]).resolve()))
    else:
        settings = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    _, _, pruning, args = settings
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("nothing to do: pass --do_train, --do_eval or --do_predict")
    prunes = pruning.to_config(args.seed)
    if prunes is not None and not args.do_train:
        raise ValueError(
            "pruning takes place in a training: pass --do_train, with --num_train_epochs 0 for a fine-tuned model"
        )
    if args.do_train and prunes is None and args.num_train_epochs <= 0 and args.max_steps <= 0:
        raise ValueError(
            f"nothing to train: got --num_train_epochs {args.num_train_epochs} and no amount to prune (--prune_ratio, "
            "--target_params or --target_macs)"
        )
    if pruning.recovery_epochs < 0:
        raise ValueError(f"--recovery_epochs must not be negative, got {pruning.recovery_epochs}")
    return settings
