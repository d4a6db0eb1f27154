r"""Fine-tune a text classifier on GLUE or on data of your own, prune it, fine-tune it again and read it back.

This is transformers' ``run_glue.py``, section by section and flag by flag, with what pruning adds: every setting of
``hap_hf.HapConfig`` is a flag of the same name, and a second training follows the first. A run has these stages:

1. ``--do_train`` fine-tunes the dense model for ``--num_train_epochs`` and saves it (to ``OUTPUT_DIR/dense`` if it is
   pruned afterwards). ``--num_train_epochs 0`` leaves this out, for a model that is fine-tuned already.
2. With an amount (``--prune_ratio``, ``--target_params`` or ``--target_macs``) a second training follows, of
   ``--recovery_epochs`` epochs, in which ``HessianPruner`` prunes the model: before the first step, or after
   ``--prune_step`` steps or ``--prune_epoch`` epochs, in ``--num_rounds`` rounds. ``--distill``, ``--grow`` and
   ``--rounds`` help it to recover. Without an amount this is plain fine-tuning. With ``--quantize int8``
   the last epoch trains with rounded weights and activations, and integers are saved.
3. ``--do_eval`` evaluates the dense model, the pruned model before and after recovery, and, as ``eval_*``, the model
   that ``AutoModelForSequenceClassification.from_pretrained`` reads back from ``OUTPUT_DIR``.
4. ``--do_predict`` writes predictions for the test data.

``--resume_from_checkpoint`` goes on with the first training, or, with ``--num_train_epochs 0``, with the second.
``OUTPUT_DIR/all_results.json`` holds every metric, size and time. Everything works on local files without a network:

    python examples/run_glue_hap.py --model_name_or_path ./my-bert --task_name mrpc \
        --train_file mrpc_train.parquet --validation_file mrpc_validation.parquet \
        --do_train --do_eval --num_train_epochs 3 --per_device_train_batch_size 16 --learning_rate 5e-5 \
        --target_params 0.5 --implant_ratio 0.2 --max_batches 8 --recovery_epochs 2 --output_dir runs/mrpc
"""

import argparse
import copy
import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import transformers
from datasets import ClassLabel, load_dataset
from huggingface_hub import constants
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hap_hf import Distill, GrowingReg, HapConfig, HessianPruner, Kind, QuantizeAware, measure_size
from hap_hf.arguments import config_of, pruning_arguments

logger = logging.getLogger("run_glue_hap")

PAIR = ("sentence1", "sentence2")
TASK_TO_KEYS = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": PAIR,
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": PAIR,
    "sst2": ("sentence",),
    "stsb": PAIR,
    "wnli": PAIR,
}
"""Names of a task's one or two text columns."""
TASK_TO_LABELS = {
    "cola": ("unacceptable", "acceptable"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qnli": ("entailment", "not_entailment"),
    "qqp": ("not_duplicate", "duplicate"),
    "rte": ("entailment", "not_entailment"),
    "sst2": ("negative", "positive"),
    "stsb": (),
    "wnli": ("not_entailment", "entailment"),
}
"""Names of a task's labels in the order of their numbers; none for a regression."""
TASK_TO_METRICS = {
    "cola": ("matthews_correlation",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
}
"""Metrics of the tasks that have others than accuracy."""
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def flag(text: str, default: Any = None) -> Any:
    """Return a dataclass field that becomes a flag with a description."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model and tokenizer to start from."""

    model_name_or_path: str = field(metadata={"help": "Model name on the Hub, or a local folder; pruned models too."})
    config_name: str | None = flag("Config name or folder where it is not the model's.")
    tokenizer_name: str | None = flag("Tokenizer name or folder where it is not the model's.")
    cache_dir: str | None = flag("Where to keep what is downloaded and the prepared data.")
    model_revision: str = flag("Branch, tag or commit of the model on the Hub.", "main")
    token: str | None = flag("Access token for the Hub; by default the one that `hf auth login` stored.")
    trust_remote_code: bool = flag("Run modelling code from the model's repository.", False)
    ignore_mismatched_sizes: bool = flag("Give the model a new head where the stored one has other labels.", False)


@dataclass
class DataTrainingArguments:
    """What to train and evaluate on."""

    task_name: str | None = flag(f"GLUE task: {', '.join(TASK_TO_KEYS)}. Sets columns, labels and metric.")
    dataset_name: str | None = flag("Dataset name on the Hub, or a local folder, in place of GLUE's.")
    dataset_config_name: str | None = flag("Configuration of that dataset.")
    train_file: str | None = flag("Local csv, tsv, json, jsonl or parquet file with training data.")
    validation_file: str | None = flag("Local file with validation data.")
    validation_mismatched_file: str | None = flag("Local file with MNLI's mismatched validation data.")
    test_file: str | None = flag("Local file with test data.")
    test_mismatched_file: str | None = flag("Local file with MNLI's mismatched test data.")
    metric_path: str | None = flag("Local copy of the metric that evaluate.load('glue') fetches from the Hub.")
    max_seq_length: int = flag("Longer inputs are cut to this many tokens.", 128)
    pad_to_max_length: bool = flag("Pad everything to max_seq_length, not each batch to its longest input.", False)
    overwrite_cache: bool = flag("Tokenize again even where the result is cached.", False)
    max_train_samples: int | None = flag("Use the first so many training samples only.")
    max_eval_samples: int | None = flag("Use the first so many validation samples only.")
    max_predict_samples: int | None = flag("Use the first so many test samples only.")

    @property
    def files(self) -> dict[str, str]:
        """The local files that were named, by split."""
        named = {name.removesuffix("_file"): value for name, value in vars(self).items() if name.endswith("_file")}
        return {split: file for split, file in named.items() if file is not None}

    def __post_init__(self) -> None:
        """Check that the flags name some data and do not contradict each other."""
        tasks = ", ".join(TASK_TO_KEYS)
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in TASK_TO_KEYS:
                raise ValueError(f"--task_name must be one of {tasks}, got {self.task_name!r}")
        elif self.dataset_name is None and not self.files:
            raise ValueError(
                f"no data: pass --task_name (one of {tasks}), --dataset_name, or local files as --train_file and "
                "--validation_file"
            )
        if self.dataset_name is not None and self.files:
            raise ValueError(
                f"got both --dataset_name {self.dataset_name} and local files {self.files}; pass one of them"
            )
        second = sorted(split for split in self.files if split.endswith("_mismatched"))
        if second and self.task_name != "mnli":
            raise ValueError(f"--{second[0]}_file belongs to --task_name mnli, got --task_name {self.task_name}")
        for split, file in self.files.items():
            if Path(file).suffix not in READERS:
                raise ValueError(f"--{split}_file must end in one of {', '.join(READERS)}, got {file!r}")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"--{name} must be at least 1, got {count}")


WEIGHT_BITS = {"int8": 8, "int4": 4}


@dataclass
class PruningArguments(pruning_arguments("seed")):  # TrainingArguments has a seed, which scoring uses too
    """How much to prune, when, and how long to train afterwards; without an amount nothing is pruned."""

    prune_step: int | None = flag("Prune after so many steps of the recovery training, not before its first.")
    prune_epoch: int | None = flag("Prune after so many epochs of it.")
    num_rounds: int = flag("Prune in so many rounds, the amount rising to its target, each scored anew.", 1)
    round_interval: int = flag("Steps (with prune_step) or epochs between rounds.", 1)
    rounds: int | None = flag(
        "In place of these four: so many rounds over the first half of the recovery, most in the first ones; in the "
        "second half the structure stays."
    )
    grow: int | None = flag(
        "Let units shrink before they are cut: 1 chooses them first, 2 by what shrinking all reveals (GReg-1, GReg-2). "
        "The cut comes after half of the recovery where nothing else says when."
    )
    distill: bool = flag("Learn from the dense model as well as from the labels.", False)
    recovery_epochs: float = flag("Epochs of the training in which the model is pruned; 0: prune only.", 1.0)
    recovery_learning_rate: float | None = flag("Its learning rate; learning_rate by default.")

    quantize: str | None = flag("int8 or int4: round weights to so many bits and activations to 8, after pruning.")
    quantize_epoch: int | None = flag(
        "Round after so many epochs of the recovery training; before its last by default."
    )

    def __post_init__(self) -> None:
        """Check the values."""
        if self.recovery_epochs < 0:
            raise ValueError(f"--recovery_epochs must not be negative, got {self.recovery_epochs}")
        if self.quantize is not None and self.quantize not in WEIGHT_BITS:
            raise ValueError(f"--quantize must be one of {', '.join(WEIGHT_BITS)}, got {self.quantize!r}")
        if self.quantize_epoch is not None and self.quantize is None:
            raise ValueError(f"--quantize_epoch {self.quantize_epoch} has a meaning only with --quantize")
        if (self.rounds or self.grow or self.distill) and not self.recovery_epochs:
            raise ValueError("--rounds, --grow and --distill take place in the recovery, got --recovery_epochs 0")
        if self.rounds and (self.prune_step, self.prune_epoch, self.num_rounds) != (None, None, 1):
            raise ValueError("--rounds says when to prune, so leave out --prune_step, --prune_epoch and --num_rounds")
        if self.grow and self.prune_epoch is not None:
            raise ValueError("--grow needs a cut that is counted in steps: pass --prune_step, --rounds or neither")

    @property
    def timing(self) -> dict[str, Any]:
        """Return when and how the callback prunes."""
        if self.rounds:
            share = 0.5 / self.rounds
            result = {"step": share, "interval": share, "num_rounds": self.rounds, "ramp": "cubic"}
        else:
            step = 0.5 if self.grow and self.prune_step is None else self.prune_step
            result = {"step": step, "epoch": self.prune_epoch, "num_rounds": self.num_rounds}
            result["interval"] = self.round_interval
        if self.grow:
            result["regularise"] = GrowingReg(variant=self.grow, steps=result["step"])
        return result

    def rounding(self) -> list[QuantizeAware]:
        """Return the callback that rounds, if there is to be one."""
        if self.quantize is None:
            return []
        epoch = self.quantize_epoch if self.quantize_epoch is not None else math.ceil(self.recovery_epochs) - 1
        return [QuantizeAware({"weight_bits": WEIGHT_BITS[self.quantize]}, epoch=epoch if epoch > 0 else None)]


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling of a flag, and its default where there is one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [flag for flag in action.option_strings if "-" not in flag.strip("-")]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


Arguments = tuple[ModelArguments, DataTrainingArguments, PruningArguments, TrainingArguments, HapConfig | None]


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Return the settings that a command line gives; a single ``.json`` file may hold them all.

    Args:
        argv: The arguments, by default the program's.

    Returns:
        Model, data, pruning and training settings, and how to prune; None where nothing is to be pruned.

    Raises:
        ValueError: If flags are missing or contradict each other.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        [ModelArguments, DataTrainingArguments, PruningArguments, TrainingArguments],
        usage="run_glue_hap.py --model_name_or_path MODEL --output_dir FOLDER [flags], or a file of them: flags.json",
        description=__doc__,
        epilog="Flags are those of the model, of the data, of pruning and of transformers.TrainingArguments.",
        formatter_class=Help,
    )
    if len(words) == 1 and words[0].endswith(".json"):
        parsed = parser.parse_json_file(str(Path(words[0]).resolve()))
    else:
        parsed = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    model_args, data_args, pruning_args, training_args = parsed
    config = None
    if pruning_args != PruningArguments():
        config = config_of(pruning_args, seed=training_args.seed)
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("nothing to do: pass --do_train, --do_eval or --do_predict")
    if config is not None and not training_args.do_train:
        raise ValueError(
            "pruning takes place in a training: pass --do_train, with --num_train_epochs 0 for a fine-tuned model"
        )
    if training_args.do_train and config is None and max(training_args.num_train_epochs, training_args.max_steps) <= 0:
        raise ValueError(
            f"nothing to train: got --num_train_epochs {training_args.num_train_epochs} and no amount to prune "
            "(--prune_ratio, --target_params or --target_macs)"
        )
    return model_args, data_args, pruning_args, training_args, config


LOCAL_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda predicted, truth: accuracy_score(truth, predicted),
    "f1": lambda predicted, truth: f1_score(truth, predicted),
    "matthews_correlation": lambda predicted, truth: matthews_corrcoef(truth, predicted),
    "mse": lambda predicted, truth: mean_squared_error(truth, predicted),
    "pearson": lambda predicted, truth: pearsonr(predicted, truth)[0],
    "spearmanr": lambda predicted, truth: spearmanr(predicted, truth)[0],
}


def make_compute_metrics(
    task_name: str | None, *, is_regression: bool, metric_path: str | None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the function with which a Trainer turns logits into metrics.

    GLUE's come from ``evaluate`` or, where the Hub is out of reach, from scikit-learn and SciPy.

    Args:
        task_name: The GLUE task, or None for data of one's own: accuracy, or mean squared error for a regression.
        is_regression: Whether the model predicts a number.
        metric_path: Local copy of the ``evaluate`` metric, in place of the Hub's.

    Returns:
        The function; several metrics have their mean beside them, as ``combined_score``.
    """
    names: tuple[str, ...] = ("mse",) if is_regression else ("accuracy",)
    metric = None
    if task_name is not None:
        names = TASK_TO_METRICS.get(task_name, ("accuracy",))
        offline = metric_path is None and constants.HF_HUB_OFFLINE
        if offline:
            evaluate.config.HF_EVALUATE_OFFLINE = True  # evaluate obeys only a switch of its own
        try:
            metric = evaluate.load(metric_path or "glue", task_name)
        except OSError as error:
            if metric_path is not None:
                raise
            reason = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else str(error).splitlines()[0]
            logger.warning(
                "the metric evaluate.load('glue', %r) is out of reach (%s); %s computed by scikit-learn and SciPy "
                "instead",
                task_name,
                reason,
                " and ".join(names),
            )

    def compute_metrics(p: EvalPrediction) -> dict[str, float]:
        logits = p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions  # others are hidden states
        predicted = np.squeeze(logits, axis=-1) if is_regression else np.argmax(logits, axis=-1)
        if metric is not None:
            result = metric.compute(predictions=predicted, references=p.label_ids)
        else:
            result = {name: LOCAL_METRICS[name](predicted, p.label_ids) for name in names}
        result = {name: float(value) for name, value in result.items()}
        if len(result) > 1:
            result["combined_score"] = float(np.mean(list(result.values())))
        return result

    return compute_metrics


class AfterPruning(TrainerCallback):
    """Calls a function once, right after the last round of a pruner.

    Args:
        pruner: The pruner, which must come before this one in the Trainer's callbacks.
        action: The function.
    """

    def __init__(self, pruner: HessianPruner, action: Callable[[], None]) -> None:
        self.pruner = pruner
        self.action: Callable[[], None] | None = action

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Call the function if it is time."""
        if self.action is not None and self.pruner.finished:
            action, self.action = self.action, None
            action()

    on_epoch_end = on_step_end

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Call the function if it is time; not if a checkpoint has the rounds behind it, for it has been trained on."""
        if state.global_step and self.pruner.finished:
            self.action = None
        self.on_step_end()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the stages that the command line asks for.

    Args:
        argv: The arguments, by default the program's.

    Returns:
        What ``all_results.json`` holds.

    Raises:
        ValueError: If the flags, the data or the model do not fit together.
        FileNotFoundError: If a local file does not exist.
    """
    # Arguments
    start = time.perf_counter()
    model_args, data_args, pruning_args, training_args, config = parse(argv)
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"  # there it does nothing but warn
    output_dir, task_name = Path(training_args.output_dir), data_args.task_name

    # Logging
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    log_level = training_args.get_process_log_level()
    transformers.utils.logging.set_verbosity(log_level)
    datasets.utils.logging.set_verbosity(log_level)
    for name in ("run_glue_hap", "hap_hf"):
        logging.getLogger(name).setLevel(logging.INFO if training_args.log_level == "passive" else log_level)

    set_seed(training_args.seed)  # before the model is made

    # Data: local files, a dataset of one's own, or GLUE from the Hub. MNLI has two parts of some splits.
    hub = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    if data_args.files:
        raw_datasets = {}
        for split, file in data_args.files.items():
            if not Path(file).is_file():
                raise FileNotFoundError(f"--{split}_file {file!r} does not exist")
            logger.info("%s data from %s", split, file)
            options = {**hub, "sep": "\t"} if file.endswith(".tsv") else hub
            reader = READERS[Path(file).suffix]
            raw_datasets[split] = load_dataset(reader, data_files={split: file}, split=split, **options)
    elif data_args.dataset_name is not None:
        raw_datasets = load_dataset(data_args.dataset_name, data_args.dataset_config_name, **hub)
    else:
        raw_datasets = load_dataset("nyu-mll/glue", task_name, **hub)
    raw_datasets = {split.removesuffix("_matched"): dataset for split, dataset in raw_datasets.items()}

    used = {
        "train": (training_args.do_train, data_args.max_train_samples),
        "validation": (training_args.do_eval, data_args.max_eval_samples),
        "test": (training_args.do_predict, data_args.max_predict_samples),
    }
    for split, (is_used, _) in used.items():
        if is_used and split not in raw_datasets:
            source = "--dataset_name" if data_args.dataset_name is not None else f"--{split}_file"
            raise ValueError(
                f"this run needs a {split} split and {sorted(raw_datasets)} were given; name it with {source}"
            )
    for split, dataset in [*raw_datasets.items()]:
        is_used, limit = used.get(split.removesuffix("_mismatched"), (False, None))
        if not is_used:
            del raw_datasets[split]
        elif not len(dataset):
            raise ValueError(f"the {split} split has no rows")
        elif limit is not None:
            raw_datasets[split] = dataset.select(range(min(limit, len(dataset))))

    # Columns: those of the task, or sentence1 and sentence2, or the first one or two with text.
    if task_name is not None:
        sentence_keys = TASK_TO_KEYS[task_name]
    else:
        features = next(iter(raw_datasets.values())).features
        texts = [name for name, f in features.items() if name != "label" and "string" in str(getattr(f, "dtype", ""))]
        sentence_keys = PAIR if set(PAIR) <= set(texts) else tuple(texts[:2])
    labelled = {split: dataset for split, dataset in raw_datasets.items() if not split.startswith("test")}
    for split, dataset in raw_datasets.items():
        if not sentence_keys or not set(sentence_keys) <= set(dataset.column_names):
            expected = f"the text columns {list(sentence_keys)}" if sentence_keys else "a column with text"
            raise ValueError(f"{split}: expected {expected}, got the columns {dataset.column_names}; rename them")
        if split in labelled and "label" not in dataset.column_names:
            raise ValueError(f"{split}: expected a column 'label', got the columns {dataset.column_names}")

    # Labels. A number that is none, and GLUE's -1, mean that there is no label.
    for split, dataset in labelled.items():
        values = dataset["label"][:]
        missing = [n for n, v in enumerate(values) if v is None or v != v or (task_name is not None and v == -1)]
        if missing:
            raise ValueError(
                f"{split}: {len(missing)} of {len(dataset)} rows have no label, the first of them row {missing[0]} "
                f"with {values[missing[0]]}; remove them, or pass the file as --test_file"
            )
    source = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    model_config = AutoConfig.from_pretrained(model_args.config_name or model_args.model_name_or_path, **source)
    known = tuple(str(model_config.id2label[n]) for n in range(model_config.num_labels))
    features = [dataset.features["label"] for dataset in labelled.values()]
    if task_name is not None:
        label_list = TASK_TO_LABELS[task_name]
    elif not labelled:
        label_list = known if len(known) > 1 else ()  # prediction only: the model says what it predicts
    elif any("float" in str(getattr(f, "dtype", "")) for f in features):
        label_list = ()
    elif isinstance(features[0], ClassLabel):
        label_list = tuple(features[0].names)
    else:
        label_list = tuple(map(str, sorted({value for dataset in labelled.values() for value in dataset["label"]})))
    is_regression = not label_list
    if label_list and {name.casefold() for name in label_list} <= {name.casefold() for name in known}:
        label_list = known  # a model that was fine-tuned on these labels keeps its order: its head means the same
    if len(label_list) == 1:
        raise ValueError(f"expected at least two different labels, got only {label_list[0]!r}")

    # Model and tokenizer
    model_config.num_labels = len(label_list) or 1
    model_config.problem_type = "regression" if is_regression else "single_label_classification"
    if not is_regression:
        model_config.id2label = dict(enumerate(label_list))
        model_config.label2id = {name: number for number, name in enumerate(label_list)}
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path, **source)
    if tokenizer.pad_token is None:  # as in most decoders
        tokenizer.pad_token = tokenizer.eos_token
        model_config.pad_token_id = tokenizer.pad_token_id
    model, info = AutoModelForSequenceClassification.from_pretrained(
        model_args.model_name_or_path,
        config=model_config,
        dtype="float32",  # whatever it is stored in: optimizer steps get lost in half precision
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        output_loading_info=True,
        **source,
    )
    untrained = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}

    # Preprocess
    max_seq_length = min(data_args.max_seq_length, tokenizer.model_max_length)
    if max_seq_length < data_args.max_seq_length:
        logger.warning(
            "max_seq_length is %d and the tokenizer's limit %d; using that", data_args.max_seq_length, max_seq_length
        )
    padding = "max_length" if data_args.pad_to_max_length else False
    label_to_id = {name.casefold(): number for number, name in enumerate(label_list)}

    def number_of(value: Any, in_order: tuple[str, ...], split: str) -> float | int:
        """Return a label as the model takes it: the place of its name among the outputs, or the number itself."""
        if is_regression:
            if isinstance(value, str):
                raise ValueError(f"{split}: expected numbers as labels of a regression, got {value!r}")
            return float(value)
        name = in_order[value] if not isinstance(value, str) and value in range(len(in_order)) else str(value)
        if name.casefold() not in label_to_id:
            expected = f"{list(in_order)} or their numbers" if in_order else f"{list(label_to_id)}"
            raise ValueError(f"{split}: unknown label {value!r}; expected one of {expected}")
        return label_to_id[name.casefold()]

    def preprocess_function(examples: dict[str, list[Any]], split: str, in_order: tuple[str, ...]) -> dict[str, Any]:
        for key in sentence_keys:
            wrong = [text for text in examples[key] if not isinstance(text, str)]
            if wrong:
                raise ValueError(
                    f"{split}: expected text in column {key!r}, got {wrong[0]!r}; fill or remove such rows"
                )
        texts = [examples[key] for key in sentence_keys]
        result = dict(tokenizer(*texts, padding=padding, max_length=max_seq_length, truncation=True))
        if split in labelled:
            result["labels"] = [number_of(value, in_order, split) for value in examples["label"]]
        return result

    splits = {}
    for split, dataset in raw_datasets.items():
        feature = dataset.features.get("label")
        named = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
        splits[split] = dataset.map(
            preprocess_function,
            batched=True,
            fn_kwargs={"split": split, "in_order": named if task_name is None else TASK_TO_LABELS[task_name]},
            remove_columns=dataset.column_names,
            load_from_cache_file=not data_args.overwrite_cache,
            desc=f"Tokenizing {split}",
        )

    # Metrics
    compute_metrics = make_compute_metrics(task_name, is_regression=is_regression, metric_path=data_args.metric_path)

    # Trainer: one for the dense model, one that prunes, and one for the model that is read back
    data_collator = default_data_collator if data_args.pad_to_max_length else DataCollatorWithPadding(tokenizer)

    def trainer_of(args: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
        return Trainer(
            model=model,
            args=args,
            train_dataset=splits.get("train"),
            eval_dataset=splits.get("validation"),
            compute_metrics=compute_metrics,
            processing_class=tokenizer,
            data_collator=data_collator,
            callbacks=list(callbacks),
        )

    def metrics_of(trainer: Trainer, stage: str) -> dict[str, float]:
        """Return the metrics on the validation data; those of MNLI's mismatched part end in ``_mm``."""
        result: dict[str, float] = {}
        for split, suffix in (("validation", ""), ("validation_mismatched", "_mm")):
            if split in splits:
                metrics = trainer.evaluate(splits[split], metric_key_prefix=stage)
                result |= {f"{name}{suffix}": v for name, v in metrics.items() if name.startswith(f"{stage}_")}
        return result

    def size_of(trainer: Trainer, stage: str) -> dict[str, float]:
        """Return parameters, and multiply-accumulates a sample of the first batch."""
        batch = next(iter(trainer.get_eval_dataloader(splits.get("validation", splits["train"]))))
        size = measure_size(trainer.model, batch)
        return {f"{stage}_params": size.params, f"{stage}_macs": size.macs}

    results: dict[str, float] = {}

    # Train the dense model
    fine_tunes = training_args.do_train and max(training_args.num_train_epochs, training_args.max_steps) > 0
    if untrained and not fine_tunes:
        raise ValueError(
            f"{model_args.model_name_or_path} is not fine-tuned, it has no values for {', '.join(sorted(untrained))}; "
            "pass --do_train and --num_train_epochs above 0"
        )
    if fine_tunes:
        args = training_args
        if config is not None:
            args = dataclasses.replace(training_args, output_dir=str(output_dir / "dense"), push_to_hub=False)
        trainer = trainer_of(args)
        outcome = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
        results |= {name: value for name, value in outcome.metrics.items() if name.startswith("train_")}

    # Prune, and train again
    if config is not None:
        rate = pruning_args.recovery_learning_rate
        args = dataclasses.replace(
            training_args,
            num_train_epochs=pruning_args.recovery_epochs,
            max_steps=-1,
            learning_rate=rate if rate is not None else training_args.learning_rate,
        )
        pruner = HessianPruner(config, **pruning_args.timing)
        after = AfterPruning(pruner, lambda: results.update(metrics_of(trainer, "pruned")))
        rounding = pruning_args.rounding()
        helpers = [Distill()] if pruning_args.distill else []
        trainer = trainer_of(args, [pruner, *helpers, after, *rounding])
        results |= metrics_of(trainer, "dense") | size_of(trainer, "dense")
        outcome = trainer.train(resume_from_checkpoint=None if fine_tunes else training_args.resume_from_checkpoint)
        results["recovery_runtime"] = outcome.metrics["train_runtime"]
        results |= metrics_of(trainer, "recovered") | size_of(trainer, "pruned")
        trainer.save_model()
        trainer.save_state()
        first, last = pruner.reports[0], pruner.reports[-1]
        for callback in rounding:
            results |= {"quantized_layers": len(callback.report.plan.layers)} if callback.report is not None else {}
        results["pruned_bytes"] = sum(file.stat().st_size for file in output_dir.glob("*.safetensors"))
        results["prunable_params_kept"] = last.prunable_after.params / first.prunable_before.params
        results["scoring_seconds"] = sum(report.seconds["scoring"] for report in pruner.reports)
        for kind in Kind:
            groups = sum(group.kind is kind for group in last.groups)
            if groups:
                before, (_, kept, implanted) = first.units(kind)[0], last.units(kind)
                results |= {f"{kind}_groups": groups, f"{kind}_before": before, f"{kind}_kept": kept}
                results[f"{kind}_implanted"] = implanted
    if training_args.do_train and training_args.push_to_hub:
        trainer.push_to_hub()

    # Read back: from here on only the files count
    if training_args.do_train:
        model = AutoModelForSequenceClassification.from_pretrained(output_dir)

    # Evaluate
    trainer = trainer_of(training_args)
    if training_args.do_eval:
        results |= metrics_of(trainer, "eval")

    # Predict
    for split, suffix in (("test", ""), ("test_mismatched", "-mm")):
        if split in splits:
            logits = trainer.predict(splits[split], metric_key_prefix="predict").predictions
            logits = logits[0] if isinstance(logits, tuple) else logits
            if is_regression:
                answers = [f"{value:.3f}" for value in np.squeeze(logits, axis=-1)]
            else:
                answers = [label_list[number] for number in np.argmax(logits, axis=-1)]
            rows = ["index\tprediction", *(f"{number}\t{answer}" for number, answer in enumerate(answers))]
            file = output_dir / f"predict_results_{task_name or 'text'}{suffix}.txt"
            if trainer.is_world_process_zero():
                file.write_text("\n".join(rows) + "\n", encoding="utf-8")

    results["total_seconds"] = time.perf_counter() - start
    if trainer.is_world_process_zero():
        file = output_dir / "all_results.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shown = ("accuracy", "f1", "correlation", "pearson", "spearmanr", "mse", "params", "macs", "seconds")
        summary = [f"{name} {value:.6g}" for name, value in results.items() if any(word in name for word in shown)]
        logger.info("results in %s: %s", file, ", ".join(summary))
    return results


if __name__ == "__main__":
    main()
