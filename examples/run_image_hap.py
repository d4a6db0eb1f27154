r"""Train an image classifier, prune it, fine-tune it and read it back.

This is transformers' ``run_image_classification.py``, section by section and flag by flag, with what pruning adds:
every setting of ``hap_hf.HapConfig`` is a flag of the same name, and a second training follows the first. Models are
image classifiers of transformers or architectures of timm, among them those that CIFAR has in the pruning literature
(``cifar_resnet20``, ``cifar_resnet56`` and more); images are CIFAR, images of one's own or, without any download,
scikit-learn's digits. Defaults of the training are those of the published recipes for CIFAR: SGD without clipping, on a
learning rate that falls along a cosine. A run has these stages:

1. ``--do_train`` trains the dense model for ``--num_train_epochs`` and saves it (to ``OUTPUT_DIR/dense`` if it is
   pruned afterwards). ``--num_train_epochs 0`` leaves this out, for ``--weights`` or a checkpoint that are trained.
2. With an amount (``--prune_ratio``, ``--target_params`` or ``--target_macs``) a second training follows, of
   ``--recovery_epochs`` epochs, in which ``HessianPruner`` prunes the model: before the first step, or after
   ``--prune_step`` steps or ``--prune_epoch`` epochs, in ``--num_rounds`` rounds. ``--distill``, ``--grow`` and
   ``--rounds`` help it to recover. Without an amount nothing is pruned. With ``--quantize int8``
   the last epoch trains with rounded weights and activations, and integers are saved.
3. ``AutoModelForImageClassification.from_pretrained`` reads the model back from ``OUTPUT_DIR``. Its logits are compared
   with those of the model that was trained, bit for bit, and the time it takes with that of the dense model.
4. ``--do_eval`` evaluates the dense model, the pruned model before and after recovery, and, as ``eval_*``, the model
   that was read back.

``--resume_from_checkpoint`` goes on with the first training, or, with ``--num_train_epochs 0``, with the second.
``OUTPUT_DIR/all_results.json`` holds every metric, size and time, ``results.md`` a table of them and
``pruning_report.md`` what was cut. Everything works on local files without a network:

    python examples/run_image_hap.py --do_train --do_eval --target_params 0.5 --implant_ratio 0.2 \
        --output_dir runs/digits

    python examples/run_image_hap.py --model_name_or_path cifar_resnet56 --dataset_name cifar10 --augment \
        --do_train --do_eval --num_train_epochs 160 --target_params 0.3 --recovery_epochs 80 \
        --recovery_learning_rate 0.02 --output_dir runs/resnet56
"""

import argparse
import copy
import dataclasses
import io
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import timm
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, Resize, ToTensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hap_hf import Distill, GrowingReg, HapConfig, HessianPruner, Kind, QuantizeAware, measure_size
from hap_hf.arguments import config_of, pruning_arguments

logger = logging.getLogger("run_image_hap")

RECIPE = {
    "num_train_epochs": 20.0,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 256,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.1,
    "lr_scheduler_type": "cosine",
    "weight_decay": 1e-4,
    "max_grad_norm": 0.0,
    "logging_strategy": "epoch",
    "save_strategy": "no",
    "report_to": "none",
    "remove_unused_columns": False,
}
"""What the Trainer's arguments are where no flag says otherwise."""
HUB_NAMES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
GREY = {"1", "L", "LA"}
LATENCY_BATCH = 256


def flag(text: str, default: Any = None) -> Any:
    """Return a dataclass field that becomes a flag with a description."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model to start from, and what its images look like."""

    model_name_or_path: str = flag(
        "A transformers image classifier, by its name on the Hub or a local folder, pruned ones too; or an untrained "
        "architecture of timm: cifar_resnet20, cifar_resnet56 and so on, resnet18, or timm:NAME where a folder has the "
        "same name.",
        "cifar_resnet20",
    )
    weights: str | None = flag("Safetensors file with trained weights of the timm architecture.")
    model_args: str | None = flag("""Arguments of the timm architecture as JSON, such as '{"patch_size": 2}'.""")
    cache_dir: str | None = flag("Where to keep what is downloaded and the prepared data.")
    model_revision: str = flag("Branch, tag or commit of the model on the Hub.", "main")
    token: str | None = flag("Access token for the Hub; by default the one that `hf auth login` stored.")
    trust_remote_code: bool = flag("Run modelling code from the model's repository.", False)
    ignore_mismatched_sizes: bool = flag("Give the model a new head where the stored one has other classes.", False)
    image_size: int | None = flag(
        "Resize images to this height and width; by default to what the model was made for, or not at all where it "
        "takes any size."
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of each channel, of values in [0, 1]; by default the model's."}
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "Standard deviation of each channel; by default the model's."}
    )

    def __post_init__(self) -> None:
        """Check the values."""
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--image_size must be at least 1, got {self.image_size}")
        if self.image_std is not None and not all(value > 0 for value in self.image_std):
            raise ValueError(f"--image_std must be above 0, got {self.image_std}")
        try:
            self.timm_args: dict[str, Any] = json.loads(self.model_args or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"--model_args must be a JSON object, got {self.model_args!r}: {error}") from None
        if not isinstance(self.timm_args, dict):
            raise ValueError(f"--model_args must be a JSON object, got {self.model_args!r}")


@dataclass
class DataTrainingArguments:
    """Which images to train and evaluate on."""

    dataset_name: str | None = flag(
        "digits (scikit-learn's, 8 x 8 and grey, no download; the default), cifar10 or cifar100, another name on the "
        "Hub, or a local folder: with parquet or arrow files, written by save_to_disk, with a sub-folder for each "
        "split and in it one for each class, or of tile sheets: lossless train*.webp and test*.webp, each a grid of "
        "square images in row-major order, labels_train.npy, labels_test.npy and, for the names, meta.json with "
        "'classes'."
    )
    dataset_config_name: str | None = flag("Configuration of that dataset.")
    train_dir: str | None = flag("Folder with training images, in a sub-folder for each class, in place of a dataset.")
    validation_dir: str | None = flag("Folder with images to evaluate on.")
    image_column_name: str | None = flag("Column with the images; found by its name or type where not given.")
    label_column_name: str | None = flag("Column with the labels; found by its name or type where not given.")
    eval_split: str | None = flag("Split to evaluate on; validation where not given, or else test.")
    max_train_samples: int | None = flag("Train on so many images only, drawn at random, always the same ones.")
    max_eval_samples: int | None = flag("Evaluate on so many images only, drawn likewise.")
    augment: bool = flag(
        "Shift images to train and to score on by up to 4 pixels, and mirror half of those in colour.", False
    )

    def __post_init__(self) -> None:
        """Check the values."""
        folders = {"train": self.train_dir, "validation": self.validation_dir}
        self.folders = {split: folder for split, folder in folders.items() if folder is not None}
        if self.dataset_name is not None and self.folders:
            raise ValueError(
                f"got both --dataset_name {self.dataset_name} and folders {self.folders}; pass one of them"
            )
        for split, folder in self.folders.items():
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"--{split}_dir {folder!r} is no folder")
        if self.dataset_name is None and not self.folders:
            self.dataset_name = "digits"
        for name in ("max_train_samples", "max_eval_samples"):
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
    recovery_epochs: float = flag("Epochs of the training in which the model is pruned; 0: prune only.", 10.0)
    recovery_learning_rate: float | None = flag("Its learning rate at its start; a tenth of learning_rate by default.")

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
        usage="run_image_hap.py --output_dir FOLDER [flags], or a file of them: flags.json",
        description=__doc__,
        epilog="Flags are those of the model, of the data, of pruning and of transformers.TrainingArguments.",
        formatter_class=Help,
    )
    parser.set_defaults(**RECIPE)
    if len(words) == 1 and words[0].endswith(".json"):
        parsed = parser.parse_dict(RECIPE | json.loads(Path(words[0]).read_text(encoding="utf-8")))
    else:
        parsed = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    model_args, data_args, pruning_args, training_args = parsed
    config = None
    if pruning_args != PruningArguments():
        config = config_of(pruning_args, seed=training_args.seed)
    if training_args.do_predict:
        raise ValueError("there is no --do_predict for images; evaluate on any split with --do_eval and --eval_split")
    if not (training_args.do_train or training_args.do_eval):
        raise ValueError("nothing to do: pass --do_train or --do_eval")
    if config is not None and not training_args.do_train:
        raise ValueError(
            "pruning takes place in a training: pass --do_train, with --num_train_epochs 0 for a trained model"
        )
    if training_args.do_train and config is None and max(training_args.num_train_epochs, training_args.max_steps) <= 0:
        raise ValueError(
            f"nothing to train: got --num_train_epochs {training_args.num_train_epochs} and no amount to prune "
            "(--prune_ratio, --target_params or --target_macs)"
        )
    return model_args, data_args, pruning_args, training_args, config


def load_images(data_args: DataTrainingArguments, wanted: Sequence[str], **hub: Any) -> dict[str, Dataset]:
    """Return the images from wherever they are.

    Args:
        data_args: Where that is.
        wanted: Splits, of ``train`` and ``validation``.
        **hub: ``cache_dir`` and ``token`` for ``datasets.load_dataset``.

    Returns:
        The splits with the columns ``image`` and ``label``, which have the same classes.

    Raises:
        ValueError: If a split, a column, an image or a label is missing.
        FileNotFoundError: If there is no such dataset.
    """
    name = data_args.dataset_name or ", ".join(data_args.folders.values())
    folder = Path(name)
    if name == "digits" and not folder.exists():
        digits = load_digits()
        pixels = np.round(digits.images * 255 / 16).astype(np.uint8)
        # The same ones to evaluate on, whatever the seed.
        rows = train_test_split(range(len(pixels)), test_size=0.2, random_state=0, stratify=digits.target)
        names = [str(digit) for digit in digits.target_names]
        found = {
            split: to_dataset(pixels[r], digits.target[r], names)
            for split, r in zip(("train", "test"), rows, strict=True)
        }
    elif folder.is_dir() and any(folder.glob("test*.webp")):
        found = {split: load_tiles(folder, split) for split in ("train", "test") if split != "train" or split in wanted}
    else:
        try:
            if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
                stored = load_from_disk(name)
                found = dict(stored) if isinstance(stored, DatasetDict) else {str(stored.split or "train"): stored}
            elif data_args.folders:
                files = {split: f"{path}/**" for split, path in data_args.folders.items()}
                found = load_dataset("imagefolder", data_files=files, **hub)
            else:
                source = name if folder.is_dir() else HUB_NAMES.get(name, name)
                found = load_dataset(source, data_args.dataset_config_name, **hub)
        except (FileNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(
                f"{name!r} is neither digits nor a folder with images, nor can the Hub be asked for it: {error}"
            ) from error
        except (IndexError, ValueError) as error:
            raise ValueError(
                f"{name!r} cannot be read ({error}); expected images in every split, which a split without rows has not"
            ) from error

    # Splits
    evaluated = ["validation", "test"] if data_args.eval_split is None else [data_args.eval_split]
    options = {"train": ["train"], "validation": evaluated}
    result = {}
    for split in wanted:
        present = [option for option in options[split] if option in found]
        if not present:
            purpose = " to evaluate on" if split == "validation" else ""
            raise ValueError(
                f"{name}: expected a split {' or '.join(options[split])}{purpose}, got {sorted(found)}"
                f"{'; name another with --eval_split' if purpose else ''}"
            )
        result[split] = found[present[0]]
        if not len(result[split]):
            raise ValueError(f"{name}: the {present[0]} split has no images")

    # Columns
    features = next(iter(result.values())).features
    columns = {}
    for what, named, usual, kind in (
        ("image", data_args.image_column_name, IMAGE_COLUMNS, Image),
        ("label", data_args.label_column_name, LABEL_COLUMNS, ClassLabel),
    ):
        if named is not None and named not in features:
            raise ValueError(f"--{what}_column_name {named!r} is not among the columns {list(features)}")
        typed = [column for column, feature in features.items() if isinstance(feature, kind)]
        candidates = [named] if named is not None else [column for column in usual if column in features] or typed
        if not candidates:
            raise ValueError(
                f"expected a column with {what}s, one of {list(usual)}, got the columns {list(features)}; name it with "
                f"--{what}_column_name"
            )
        columns[what] = candidates[0]
    for split, dataset in result.items():
        if not set(columns.values()) <= set(dataset.column_names):
            raise ValueError(f"{split}: expected the columns {list(columns.values())}, got {dataset.column_names}")

    # Classes: their names, and a number for every label that occurs
    labels = {split: dataset[columns["label"]][:] for split, dataset in result.items()}
    feature = features[columns["label"]]
    if isinstance(feature, ClassLabel):
        names, number_of = feature.names, {number: number for number in range(feature.num_classes)}
    else:
        values = {value for some in labels.values() for value in some if isinstance(value, (str, int))}
        in_order = sorted(values, key=lambda value: (isinstance(value, str), value))
        names, number_of = [str(value) for value in in_order], {value: number for number, value in enumerate(in_order)}
    for split, some in labels.items():
        wrong = [value for value in some if not isinstance(value, (str, int)) or value not in number_of]
        if wrong:
            known = list(number_of)[:10]
            raise ValueError(f"{split}: expected one of the labels {known} for every image, got {wrong[0]!r}")

    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    for split, dataset in result.items():
        feature = dataset.features[columns["image"]]
        # Parquet files that other programs wrote hold bytes and say nothing of images.
        if not isinstance(feature, Image) and not (isinstance(feature, dict) and "bytes" in feature):
            raise ValueError(
                f"{split}: expected images in column {columns['image']!r}, got {feature}; name another column"
            )
        numbers = [number_of[value] for value in labels[split]]
        dataset = dataset.select_columns([columns["image"]]).rename_columns({columns["image"]: "image"})
        dataset = dataset.add_column("label", numbers)
        dataset = dataset.cast(Features({"image": Image(), "label": ClassLabel(names=list(names))}))
        missing = [row for row, image in enumerate(undecoded(dataset)) if image is None]
        if missing:
            raise ValueError(
                f"{split}: expected an image in every row of column {columns['image']!r}, got none in row {missing[0]}"
            )
        limit = limits[split]
        if limit is not None and limit < len(dataset):  # at random, as folders are sorted by class
            chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:limit]
            dataset = dataset.select(chosen.sort().values.tolist())
        result[split] = dataset
    return result


def load_tiles(folder: Path, split: str) -> Dataset:
    """Return the images of all tile sheets of a split; how large a tile is follows from how many there are.

    Args:
        folder: Folder with ``train*.webp`` and ``test*.webp``, each a grid of square images in row-major order,
            ``labels_train.npy``, ``labels_test.npy`` and, where the classes have names, ``meta.json`` with ``classes``.
        split: ``train`` or ``test``.

    Returns:
        The images.

    Raises:
        FileNotFoundError: If sheets or labels are missing.
        ValueError: If labels and tiles do not fit together.
    """
    sheets = sorted(folder.glob(f"{split}*.webp"), key=lambda file: (len(file.name), file.name))
    label_file, meta = folder / f"labels_{split}.npy", folder / "meta.json"
    if not sheets or not label_file.is_file():
        found = sorted(file.name for file in folder.iterdir())
        raise FileNotFoundError(f"{folder}: expected {split}*.webp and {label_file.name}, got {found}")
    labels = np.load(label_file, allow_pickle=False).astype(np.int64).flatten()
    if not len(labels):
        raise ValueError(f"the {split} split has no images: {label_file} is empty")
    if meta.is_file():
        names = json.loads(meta.read_text(encoding="utf-8"))["classes"]
    else:  # both splits count, so that they have the same classes
        highest = max(np.load(file, allow_pickle=False).max(initial=0) for file in folder.glob("labels_*.npy"))
        names = [str(number) for number in range(int(highest) + 1)]
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(
            f"{label_file}: expected labels from 0 to {len(names) - 1}, got {labels.min()} to {labels.max()}"
        )
    tiles = []
    for file in sheets:
        with PIL.Image.open(file) as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
        height, width, _ = pixels.shape
        side = math.isqrt(height * width * len(sheets) // len(labels))
        if not side or height % side or width % side or height * width * len(sheets) != side**2 * len(labels):
            raise ValueError(
                f"{file}: {len(labels)} labels and {len(sheets)} sheets, one of them with {width} x {height} pixels, "
                "do not make square tiles; expected as many tiles on every sheet and one label for each"
            )
        grid = pixels.reshape(height // side, side, width // side, side, 3)
        tiles.append(grid.swapaxes(1, 2).reshape(-1, side, side, 3))
    return to_dataset(np.concatenate(tiles), labels, names)


def to_dataset(pixels: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Dataset:
    """Return images in memory, ``[num_images, height, width]`` or ``[num_images, height, width, 3]``, as a dataset."""
    images = []
    for array in pixels:
        PIL.Image.fromarray(array).save(file := io.BytesIO(), "PPM")  # encoded and decoded in no time
        images.append({"bytes": file.getvalue(), "path": None})
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def undecoded(dataset: Dataset) -> Sequence[Any]:
    """Return the images as bytes or paths, None where there is none."""
    return dataset.cast_column("image", Image(decode=False))["image"][:]


def load_timm_model(
    name: str, model_args: ModelArguments, names: Sequence[str], channels: int, size: Sequence[int]
) -> tuple[nn.Module, set[str]]:
    """Return an architecture of timm in transformers' wrapper, with its own initial weights or those of a file.

    Args:
        name: Name of the architecture.
        model_args: What else was said of the model.
        names: Names of the classes.
        channels: Channels of the images.
        size: Height and width of the images.

    Returns:
        The model, and the names of the weights that came from nowhere.
    """
    described = timm.models.get_pretrained_cfg(name).to_dict()
    fixed = {"img_size": tuple(size)} if described.get("fixed_input_size", False) else {}
    timm_args = {"in_chans": channels, **fixed, **model_args.timm_args}
    in_chans = timm_args["in_chans"]
    mean, std = (
        per_channel(f"image_{what}", getattr(model_args, f"image_{what}"), described[what], in_chans)
        for what in ("mean", "std")
    )
    config = TimmWrapperConfig(
        architecture=name,
        model_args=timm_args,
        num_labels=len(names),
        # What AutoImageProcessor reads of a saved model.
        pretrained_cfg={
            "input_size": [in_chans, *size],
            "mean": mean,
            "std": std,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        },
    )
    model = TimmWrapperForImageClassification(config)
    if model_args.weights is None:
        # The wrapper draws all weights alike; timm knows how each architecture wants them.
        weights = timm.create_model(name, num_classes=len(names), **timm_args).state_dict()
        model.timm_model.load_state_dict(weights)
        return model, set(weights)
    file, wanted = Path(model_args.weights), model.timm_model.state_dict()
    if file.suffix != ".safetensors":
        raise ValueError(f"--weights must be a .safetensors file, got {str(file)!r}; save others anew with safetensors")
    if not file.is_file():
        raise FileNotFoundError(f"--weights {str(file)!r} does not exist")
    # The counters of batch norms, which nothing reads, may be missing.
    weights = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked")} | load_file(file)
    problems = [f"{key} is missing" for key in wanted if key not in weights]
    problems += [f"{key} is not in the model" for key in weights if key not in wanted]
    problems += [
        f"{key} is {list(value.shape)} and the model's {list(wanted[key].shape)}"
        for key, value in weights.items()
        if key in wanted and value.shape != wanted[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"--weights {file} does not fit {type(model.timm_model).__name__}: {shown}{more}; check "
            "--model_name_or_path, --model_args and the classes and channels of the images"
        )
    model.timm_model.load_state_dict(weights)
    return model, set()


def per_channel(name: str, given: Sequence[float] | None, stored: Sequence[float] | None, channels: int) -> list[float]:
    """Return a value for each channel: those of a flag, or the model's where they fit, or a half."""
    if given is not None and len(given) not in {1, channels}:
        raise ValueError(f"--{name} must have 1 value or {channels}, one for each channel, got {list(given)}")
    values = list(given or (stored if stored is not None and len(stored) == channels else [0.5]))
    return values * (channels // len(values))


def transforms_of(
    size: Sequence[int], mean: Sequence[float], std: Sequence[float], *, shift: bool = False, mirror: bool = False
) -> Compose:
    """Return what makes of an image what a model takes.

    Args:
        size: Height and width.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
        shift: Whether to augment images as is usual for CIFAR: to move them by up to 4 pixels over black.
        mirror: Whether to mirror half of those, too; a mirrored digit is another sign, or none.

    Returns:
        The transforms.
    """
    augment = [RandomCrop(size, padding=4), *([RandomHorizontalFlip()] if mirror else [])] if shift else []
    return Compose([Resize(size), *augment, ToTensor(), Normalize(mean, std)])


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


def latencies(models: Mapping[str, nn.Module], pixel_values: Tensor, repeats: int = 11) -> dict[str, float]:
    """Return the median milliseconds of a forward pass of each model, measured in turns on the same batch."""
    times: dict[str, list[float]] = {name: [] for name in models}
    wait = (lambda: None) if pixel_values.device.type == "cpu" else torch.accelerator.synchronize
    with torch.inference_mode():
        for turn in range(repeats + 2):
            for name, model in models.items():
                wait()
                start = time.perf_counter()
                model(pixel_values=pixel_values)
                wait()
                if turn >= 2:  # the first turns warm caches up
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def to_markdown(results: Mapping[str, float]) -> str:
    """Return the results of a pruning run as a table in markdown."""
    lines = [["", "accuracy", "loss", "parameters", "MACs an image", "ms a batch"], ["---", *["---:"] * 5]]
    for name, stage, size in (
        ("dense", "dense", "dense"),
        ("right after pruning", "pruned", "pruned"),
        ("fine-tuned, reloaded", "eval", "pruned"),
    ):
        # A training that was resumed after pruning does not say what came right after it.
        cells = [f"{100 * results[key]:.2f}%" if (key := f"{stage}_accuracy") in results else ""]
        cells += [f"{results[key]:.4f}" if (key := f"{stage}_loss") in results else ""]
        cells += [f"{results[f'{size}_params']:,.0f}", f"{results[f'{size}_macs']:,.0f}"]
        lines.append([name, *cells, f"{results[f'{size}_milliseconds']:.2f}" if stage != "pruned" else ""])
    left = (results[f"pruned_{what}"] / results[f"dense_{what}"] for what in ("params", "macs", "milliseconds"))
    lines.append(["left", "", "", *(f"{share:.1%}" for share in left)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the stages that the command line asks for.

    Args:
        argv: The arguments, by default the program's.

    Returns:
        What ``all_results.json`` holds.

    Raises:
        ValueError: If the flags, the images or the model do not fit together.
        FileNotFoundError: If there is no such model or dataset.
    """
    # Arguments
    start = time.perf_counter()
    model_args, data_args, pruning_args, training_args, config = parse(argv)
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"  # there it does nothing but warn
    output_dir, model_name = Path(training_args.output_dir), model_args.model_name_or_path

    # Logging
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    log_level = training_args.get_process_log_level()
    transformers.utils.logging.set_verbosity(log_level)
    datasets.utils.logging.set_verbosity(log_level)
    for name in ("run_image_hap", "hap_hf"):
        logging.getLogger(name).setLevel(logging.INFO if training_args.log_level == "passive" else log_level)

    set_seed(training_args.seed)  # before the model is made

    # Data
    hub = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    used = {"train": training_args.do_train, "validation": training_args.do_eval}
    raw_datasets = load_images(data_args, [split for split, is_used in used.items() if is_used], **hub)
    labels = next(iter(raw_datasets.values())).features["label"].names
    outputs = [*range(len(labels))]  # of the model, one for each label
    modes, places = set(), {}
    for split, dataset in raw_datasets.items():
        for row, image in enumerate(undecoded(dataset)):
            with PIL.Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])) as picture:
                modes.add(picture.mode)
                places.setdefault((picture.height, picture.width), f"row {row} of {split}")
        logger.info("%s: %d images, %d classes", split, len(dataset), len(labels))
    channels = 1 if modes <= GREY else 3

    def own_size() -> tuple[int, int]:
        """Return height and width of the images."""
        if len(places) > 1:
            text = " and ".join(f"{width} x {height} in {place}" for (height, width), place in [*places.items()][:2])
            raise ValueError(f"expected images of one size, got {text}; pass --image_size to resize them all")
        return next(iter(places))

    # Model: an architecture of timm, or a checkpoint of transformers
    source = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    size = [model_args.image_size] * 2 if model_args.image_size is not None else None
    image_processor = None
    timm_name = model_name.removeprefix("timm:")
    if timm_name != model_name or (not Path(model_name).exists() and timm.is_model(timm_name)):
        if not timm.is_model(timm_name):
            similar = timm.list_models(f"*{timm_name}*")[:8]
            raise FileNotFoundError(
                f"--model_name_or_path {model_name}: timm {timm.__version__} has no {timm_name}, similar: {similar}"
            )
        described = timm.models.get_pretrained_cfg(timm_name).to_dict()
        size = size or (described["input_size"][1:] if described.get("fixed_input_size", False) else own_size())
        model, untrained = load_timm_model(timm_name, model_args, labels, channels, size)
        stored = model.config.pretrained_cfg
        mean, std, in_channels = stored["mean"], stored["std"], len(stored["mean"])
    else:
        for name in ("weights", "model_args"):
            if getattr(model_args, name) is not None:
                raise ValueError(
                    f"--{name} belongs to an untrained architecture of timm, got --model_name_or_path {model_name}"
                )
        try:
            model_config = AutoConfig.from_pretrained(model_name, **source)
        except OSError as error:
            raise FileNotFoundError(
                f"--model_name_or_path {model_name!r} is neither a folder with a model nor known to timm, nor can it "
                f"be loaded from the Hub ({str(error).splitlines()[0]})"
            ) from error
        known = [str(model_config.id2label[number]) for number in range(model_config.num_labels)]
        has_head = any("ForImageClassification" in name for name in model_config.architectures or ())
        if has_head and not model_args.ignore_mismatched_sizes:
            own, wanted = [name.casefold() for name in known], [name.casefold() for name in labels]
            if len({*own}) == len(known) and {*wanted} <= {*own}:
                # A model that was trained on these classes keeps its order: its head means the same.
                labels, outputs = known, [own.index(name) for name in wanted]
            elif len(known) != len(labels):
                raise ValueError(
                    f"{model_name} tells {len(known)} classes apart and the images have {len(labels)}; pass "
                    "--ignore_mismatched_sizes to give it a new head"
                )
            elif not all(name.startswith("LABEL_") for name in known):
                logger.warning(
                    "the model's classes %s are taken for the images' %s, in this order", known, tuple(labels)
                )
        model_config.num_labels = len(labels)
        model, info = AutoModelForImageClassification.from_pretrained(
            model_name,
            config=model_config,
            dtype="float32",  # whatever it is stored in: optimizer steps get lost in half precision
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
            output_loading_info=True,
            **source,
        )
        untrained = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        try:
            image_processor = AutoImageProcessor.from_pretrained(model_name, **source)
        except OSError:  # it has none
            image_processor = None
        stored = getattr(image_processor, "data_config", None)
        if stored is not None:  # a model of timm, whose config says it all
            in_channels, *made_for = stored["input_size"]
            mean, std, image_processor = stored["mean"], stored["std"], None
        else:
            in_channels = getattr(model_config, "num_channels", 3)
            mean, std = (getattr(image_processor, f"image_{what}", None) for what in ("mean", "std"))
            made_for = getattr(model_config, "image_size", None)
            for box in (getattr(image_processor, "crop_size", None), getattr(image_processor, "size", None)):
                if made_for is None and box:
                    made_for = [box["height"], box["width"]] if "height" in box else box.get("shortest_edge")
            made_for = [made_for, made_for] if isinstance(made_for, int) else made_for
        size = size or made_for or own_size()
        mean = per_channel("image_mean", model_args.image_mean, mean, in_channels)
        std = per_channel("image_std", model_args.image_std, std, in_channels)
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: number for number, label in enumerate(labels)}
    model.config.problem_type = "single_label_classification"
    if channels > in_channels:
        raise ValueError(
            f"{model_name} takes images of {in_channels} channel and these have {channels}; convert them to grey"
        )
    trains = training_args.do_train and max(training_args.num_train_epochs, training_args.max_steps) > 0
    if untrained and not trains:
        names = sorted(untrained)
        raise ValueError(
            f"{model_name} is not trained, it has no values for {', '.join(names[:3])}"
            f"{' and more' if len(names) > 3 else ''}; pass --do_train and --num_train_epochs above 0, or --weights"
        )

    # Preprocess. Scores, compensation and the statistics of batch norms come from images as the training sees them:
    # those of a network that was trained on shifted images describe shifted images, and it does worse by those of
    # others.
    val_transforms = transforms_of(size, mean, std)
    train_transforms = transforms_of(size, mean, std, shift=data_args.augment, mirror=channels == 3)

    def preprocess(transforms: Compose) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
        def of_examples(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
            pictures = [image.convert("L" if in_channels == 1 else "RGB") for image in examples["image"]]
            return {
                "pixel_values": [transforms(picture) for picture in pictures],
                "labels": [outputs[label] for label in examples["label"]],
            }

        return of_examples

    train_dataset, eval_dataset = None, None
    if training_args.do_train:
        train_dataset = raw_datasets["train"].with_transform(preprocess(train_transforms))
    if training_args.do_eval:
        eval_dataset = raw_datasets["validation"].with_transform(preprocess(val_transforms))
    shown = raw_datasets["validation" if training_args.do_eval else "train"].with_transform(preprocess(val_transforms))
    few = default_data_collator([shown[n] for n in range(min(LATENCY_BATCH, len(shown)))])

    # Metrics
    def compute_metrics(p: EvalPrediction) -> dict[str, float]:
        logits = p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions  # others are hidden states
        return {"accuracy": float(np.mean(np.argmax(logits, axis=-1) == p.label_ids))}

    # Trainer: one for the dense model, one that prunes, and one for the model that is read back
    def trainer_of(args: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
        return Trainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics,
            processing_class=image_processor,
            data_collator=default_data_collator,
            callbacks=list(callbacks),
        )

    def metrics_of(trainer: Trainer, stage: str) -> dict[str, float]:
        return trainer.evaluate(metric_key_prefix=stage) if training_args.do_eval else {}

    def size_of(trainer: Trainer, stage: str) -> dict[str, float]:
        """Return parameters, and multiply-accumulates an image."""
        size = measure_size(trainer.model, {name: value[:1] for name, value in few.items()})
        return {f"{stage}_params": size.params, f"{stage}_macs": size.macs}

    results: dict[str, float] = {}

    # Train the dense model
    dense_dir = output_dir if config is None else output_dir / "dense"
    if training_args.do_train:
        args = training_args
        if config is not None:
            args = dataclasses.replace(training_args, output_dir=str(dense_dir), push_to_hub=False)
        trainer = trainer_of(args)
        if trains:
            outcome = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
            trainer.save_state()
            results |= {name: value for name, value in outcome.metrics.items() if name.startswith("train_")}
        trainer.save_model()

    # Prune, and train again
    if config is not None:
        rate = pruning_args.recovery_learning_rate
        args = dataclasses.replace(
            training_args,
            num_train_epochs=pruning_args.recovery_epochs,
            max_steps=-1,
            learning_rate=rate if rate is not None else training_args.learning_rate / 10,
        )
        pruner = HessianPruner(config, **pruning_args.timing)
        after = AfterPruning(pruner, lambda: results.update(metrics_of(trainer, "pruned")))
        rounding = pruning_args.rounding()
        helpers = [Distill()] if pruning_args.distill else []
        trainer = trainer_of(args, [pruner, *helpers, after, *rounding])
        results |= metrics_of(trainer, "dense") | size_of(trainer, "dense")
        outcome = trainer.train(resume_from_checkpoint=None if trains else training_args.resume_from_checkpoint)
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
    pixel_values = few["pixel_values"].to(training_args.device)
    if training_args.do_train:
        trained, model = model, AutoModelForImageClassification.from_pretrained(output_dir).to(training_args.device)
        trained.__dict__.pop("forward", None)  # accelerate leaves its autocast around the forward of what it trained
        with torch.no_grad():
            a, b = (some.eval()(pixel_values=pixel_values).logits for some in (trained.to(model.device), model))
        results["reload_max_difference"] = (a - b).abs().max().item()
        if results["reload_max_difference"]:
            logger.warning("the logits of the model that was read back differ by %g", results["reload_max_difference"])
    if config is not None:
        folders = {"dense": dense_dir, "pruned": output_dir}
        models = {name: AutoModelForImageClassification.from_pretrained(folder) for name, folder in folders.items()}
        models = {name: some.to(training_args.device).eval() for name, some in models.items()}
        results |= {f"{name}_milliseconds": value for name, value in latencies(models, pixel_values).items()}
        results["latency_batch_size"] = len(pixel_values)

    # Evaluate
    trainer = trainer_of(training_args)
    results |= metrics_of(trainer, "eval")

    results["total_seconds"] = time.perf_counter() - start
    if trainer.is_world_process_zero():
        output_dir.mkdir(parents=True, exist_ok=True)
        file = output_dir / "all_results.json"
        file.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if config is not None and training_args.do_eval:
            text = to_markdown(results)
            (output_dir / "results.md").write_text(text, encoding="utf-8")
            print(text)
        shown = ("accuracy", "params", "macs", "milliseconds", "seconds")
        summary = [f"{name} {value:.6g}" for name, value in results.items() if any(word in name for word in shown)]
        logger.info("results in %s: %s", file, ", ".join(summary))
    return results


if __name__ == "__main__":
    main()
