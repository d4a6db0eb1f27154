"""The command line: model, images and training, and one flag for each setting of ``HapConfig``."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from glue.settings import PruningArguments
from transformers import HfArgumentParser, TrainingArguments

from hap_hf import HapConfig

# As in run_glue_hap.py but for the names: here --precision is that of training, and fine-tuning has flags of its own.
_RENAMED = {"precision": "score_precision"}
_LEFT_OUT = {"recovery_epochs", "recovery_learning_rate"}


def _flag(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


def _choice(text: str, *choices: str) -> Any:
    return field(default=choices[0], metadata={"help": text, "choices": list(choices)})


@dataclass
class ModelArguments:
    """Which model to start from, and what its images look like."""

    model: str = _flag(
        "A transformers image classifier, by its name on the Hub or a local folder, pruned ones too; or an untrained "
        "architecture of timm: cifar_resnet20, cifar_resnet56 and so on, resnet18, or timm:NAME where a folder has the "
        "same name.",
        "cifar_resnet20",
    )
    weights: str | None = _flag("Safetensors file with trained weights of the timm architecture.")
    model_args: str | None = _flag("""Arguments of the timm architecture as JSON, such as '{"patch_size": 2}'.""")
    image_size: int | None = _flag(
        "Resize images to this height and width; by default to what the model was made for, or not at all where it "
        "takes any size."
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of each channel, of values in [0, 1]; by default the model's."}
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "Standard deviation of each channel; by default the model's."}
    )
    ignore_mismatched_sizes: bool = _flag("Give the model a new head where the stored one has other classes.", False)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If one is out of range, or ``model_args`` is no JSON object.
        """
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--image_size must be at least 1, got {self.image_size}")
        if self.image_std is not None and not all(value > 0 for value in self.image_std):
            raise ValueError(f"--image_std must be above 0, got {self.image_std}")
        self.timm_args()

    def timm_args(self) -> dict[str, Any]:
        """Return ``model_args`` as a dict.

        Returns:
            The arguments by name.

        Raises:
            ValueError: If they are no JSON object.
        """
        try:
            values = json.loads(self.model_args or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"--model_args must be a JSON object, got {self.model_args!r}: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"--model_args must be a JSON object, got {self.model_args!r}")
        return values


@dataclass
class ImageArguments:
    """Which images to train and evaluate on."""

    dataset: str = _flag(
        "digits (scikit-learn's, 8 x 8 and grey, no download), cifar10 or cifar100, another name on the Hub, or a "
        "local folder: with parquet or arrow files, written by save_to_disk, with a sub-folder for each split and in "
        "it one for each class, or of tile sheets: lossless train*.webp and test*.webp, each a grid of square images "
        "in row-major order, labels_train.npy, labels_test.npy and, for the names, meta.json with 'classes'.",
        "digits",
    )
    image_column: str | None = _flag("Column with the images; found by its type where not given.")
    label_column: str | None = _flag("Column with the labels; label, labels or fine_label where not given.")
    eval_split: str | None = _flag("Split to evaluate on; validation where not given, or else test.")
    max_train_samples: int | None = _flag("Train on so many images only, drawn at random, always the same ones.")
    max_eval_samples: int | None = _flag("Evaluate on so many images only, drawn likewise.")
    cache_dir: str | None = _flag("Where to keep what is downloaded and the prepared data.")

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If one is out of range.
        """
        for name in ("max_train_samples", "max_eval_samples"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"--{name} must be at least 1, got {count}")


@dataclass
class TrainArguments:
    """How to train, before and after pruning; the learning rate falls along a cosine."""

    output_dir: str = field(metadata={"help": "Folder for models, reports and results."})
    epochs: float = _flag("Epochs of dense training; 0 for a model that is trained already.", 20.0)
    batch_size: int = _flag("Images a step, and a scoring batch.", 128)
    eval_batch_size: int = _flag("Images a batch of the evaluation.", 256)
    learning_rate: float = _flag("Learning rate of the dense training, at its start.", 0.1)
    finetune_epochs: float = _flag("Epochs of the training in which the model is pruned; 0: prune only.", 10.0)
    finetune_learning_rate: float = _flag("Learning rate of that training, at its start.", 0.01)
    optim: str = _choice("Optimizer; adamw suits transformers, with a much lower learning rate.", "sgd", "adamw")
    momentum: float = _flag("Momentum of SGD.", 0.9)
    nesterov: bool = _flag("Use Nesterov's momentum in SGD.", False)
    weight_decay: float = _flag("Weight decay of all weights but biases.", 1e-4)
    label_smoothing: float = _flag("Label smoothing, in training and scoring.", 0.0)
    augment: bool = _flag("Shift images to train and to score on by up to 4 pixels and mirror half of them.", False)
    precision: str = _choice("Arithmetic of training and evaluation.", "fp32", "bf16", "fp16")
    seed: int = _flag("Seed of initial weights, order of the images, augmentation, probes and random scores.", 0)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If one is out of range, or the machine cannot train in ``precision``.
        """
        lowest = {"batch_size": 1, "eval_batch_size": 1, "epochs": 0, "finetune_epochs": 0, "seed": 0}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"--{name} must be at least {low}, got {getattr(self, name)}")
        if self.nesterov and not self.momentum:
            raise ValueError("--nesterov needs --momentum above 0, got 0")
        if self.precision == "fp16" and not torch.accelerator.is_available():
            raise ValueError("--precision fp16 needs a GPU and there is none; use bf16 or fp32")

    def to_training_arguments(self, *, progress: bool = False) -> TrainingArguments:
        """Return the Trainer's arguments for the dense training.

        Args:
            progress: Whether to show progress bars.

        Returns:
            The arguments.
        """
        on_gpu = torch.accelerator.is_available()
        return TrainingArguments(
            output_dir=self.output_dir,
            num_train_epochs=self.epochs,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.eval_batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            lr_scheduler_type="cosine",
            label_smoothing_factor=self.label_smoothing,
            bf16=self.precision == "bf16",
            fp16=self.precision == "fp16",
            max_grad_norm=0.0,  # as the published recipes for CIFAR, which do not clip
            seed=self.seed,
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=not progress,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            remove_unused_columns=False,
        )

    def optimizer(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Return the Trainer's ``optimizer_cls_and_kwargs``, all but the learning rate."""
        if self.optim == "adamw":
            return torch.optim.AdamW, {}
        return torch.optim.SGD, {"momentum": self.momentum, "nesterov": self.nesterov}


def _pruning_fields() -> list[tuple[str, Any, Any]]:
    """Return run_glue_hap.py's flags for pruning, under the names they have here."""
    result: list[tuple[str, Any, Any]] = []
    for f in dataclasses.fields(PruningArguments):
        if f.name not in _LEFT_OUT:
            default = {"default": f.default} if f.default_factory is dataclasses.MISSING else {}
            factory = {} if default else {"default_factory": f.default_factory}
            result.append((_RENAMED.get(f.name, f.name), f.type, field(**default, **factory, metadata=f.metadata)))
    return result


PruneArguments: Any = dataclasses.make_dataclass("PruneArguments", _pruning_fields())
PruneArguments.__doc__ = "How much to prune and when; without an amount nothing is pruned."


def _to_pruning(flags: Any, training: TrainArguments) -> tuple[PruningArguments, HapConfig | None]:
    """Return the settings that run_glue_hap.py's stages take; the config is None where nothing is to be pruned."""
    names = {f.name: _RENAMED.get(f.name, f.name) for f in dataclasses.fields(PruningArguments)}
    values = {name: getattr(flags, flag) for name, flag in names.items() if name not in _LEFT_OUT}
    pruning = PruningArguments(**values)
    untouched = pruning == PruningArguments(progress=pruning.progress)  # --no_progress is of use without pruning too
    config = None if untouched else pruning.to_config(training.seed)
    recovery = {
        "recovery_epochs": training.finetune_epochs,
        "recovery_learning_rate": training.finetune_learning_rate,
    }
    return dataclasses.replace(pruning, **recovery), config


@dataclass(frozen=True)
class Settings:
    """Everything that a command line says.

    Args:
        model: Which model to start from.
        images: Which images to use.
        training: How to train.
        pruning: When to prune, and how long to train afterwards.
        config: How much to prune and how; None where nothing is to be pruned.
    """

    model: ModelArguments
    images: ImageArguments
    training: TrainArguments
    pruning: PruningArguments
    config: HapConfig | None


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Return the settings that a command line gives.

    Args:
        argv: The arguments, by default the program's; a single ``.json`` file may hold them all.

    Returns:
        The settings.

    Raises:
        ValueError: If flags are missing or contradict each other.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser([ModelArguments, ImageArguments, PruneArguments, TrainArguments])
    if len(words) == 1 and words[0].endswith(".json"):
        parsed = parser.parse_json_file(str(Path(words[0]).resolve()))
    else:
        parsed = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    model, images, flags, training = parsed
    return Settings(model, images, training, *_to_pruning(flags, training))
