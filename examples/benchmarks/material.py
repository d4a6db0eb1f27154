"""Texts and images that models of benchmarks are trained, scored and evaluated on."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import timm
import torch
from datasets import load_dataset
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

import hap_hf  # noqa: F401 (makes the CIFAR architectures known to timm)

Batch = Mapping[str, Any]
Collate = Callable[[list[Any]], Batch]
READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
HUB_NAMES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}


def flag(text: str, default: Any = None) -> Any:
    """Return a dataclass field that becomes a flag with a description."""
    return field(default=default, metadata={"help": text})


@dataclass
class MaterialArguments:
    """Which model, and which texts or images."""

    model_name_or_path: str = flag("Hub name or folder; for images also an architecture of timm.", "cifar_resnet20")
    task_name: str | None = flag("GLUE task, whose data the Hub has where no files are given.")
    train_file: str | None = flag("Local csv, json or parquet file: columns with text, and label.")
    validation_file: str | None = flag("Local file with texts to evaluate on.")
    max_seq_length: int = flag("Longer texts are cut to this many tokens.", 128)
    dataset_name: str = flag("Images: digits, cifar10, cifar100, a name on the Hub or a folder.", "digits")
    weights: str | None = flag("Safetensors file with trained weights of the timm architecture.")
    augment: bool = flag("Shift and mirror images to train and to score on.", False)
    max_train_samples: int | None = flag("Train and score on so many samples only.")
    max_eval_samples: int | None = flag("Evaluate on so many samples only.")
    cache_dir: str | None = flag("Where to keep what is downloaded and the prepared data.")


@dataclass(frozen=True)
class Material:
    """A model and what it learns from.

    Args:
        model: The model.
        train: Samples to train and to score on.
        evaluation: Samples to evaluate on.
        collate: Makes batches to evaluate on.
        collate_training: Makes batches to train and to score on.
    """

    model: PreTrainedModel
    train: Sequence[Any]
    evaluation: Sequence[Any]
    collate: Collate
    collate_training: Collate


def texts(own: MaterialArguments) -> Material:
    """Return a text classifier and texts; the columns with strings are what it reads, ``label`` holds numbers."""
    if own.train_file is not None:
        files = {"train": own.train_file, "validation": own.validation_file}
        data = load_dataset(READERS[Path(own.train_file).suffix], data_files=files, cache_dir=own.cache_dir)
    else:
        data = load_dataset("nyu-mll/glue", own.task_name, cache_dir=own.cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(own.model_name_or_path)
    columns = [name for name, feature in data["train"].features.items() if "string" in str(feature.dtype)][:2]

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(*(rows[name] for name in columns), max_length=own.max_seq_length, truncation=True)
        return {**encoded, "labels": rows["label"]}

    splits = {}
    for split, most in (("train", own.max_train_samples), ("validation", own.max_eval_samples)):
        rows = data[split].select(range(min(most or len(data[split]), len(data[split]))))
        splits[split] = rows.map(encode, batched=True, remove_columns=rows.column_names)
    model = AutoModelForSequenceClassification.from_pretrained(
        own.model_name_or_path, num_labels=1 + max(data["train"]["label"]), dtype="float32"
    )
    collate = DataCollatorWithPadding(tokenizer)
    return Material(model, splits["train"], splits["validation"], collate, collate)


def images(own: MaterialArguments) -> Material:
    """Return an image classifier and images, which are kept in memory as bytes."""
    (x, y), (eval_x, eval_y) = (
        _some(*_pixels(own, split), most)
        for split, most in (("train", own.max_train_samples), ("test", own.max_eval_samples))
    )
    channels, num_labels = x.shape[1], 1 + int(y.max())
    if timm.is_model(own.model_name_or_path) and not Path(own.model_name_or_path).exists():
        model = _architecture(own, num_labels, x.shape[1:])
    else:
        config = AutoConfig.from_pretrained(own.model_name_or_path)
        model = AutoModelForImageClassification.from_pretrained(own.model_name_or_path, config=config)
    stored = getattr(model.config, "pretrained_cfg", None) or {}
    mean, std = (torch.tensor(stored.get(what, [0.5] * channels))[:, None, None] for what in ("mean", "std"))

    def collate(samples: list[tuple[Tensor, Tensor]]) -> Batch:
        pixels = torch.stack([image for image, _ in samples]).float() / 255
        return {"pixel_values": (pixels - mean) / std, "labels": torch.stack([label for _, label in samples])}

    def collate_training(samples: list[tuple[Tensor, Tensor]]) -> Batch:
        return collate([(_augmented(image), label) for image, label in samples] if own.augment else samples)

    return Material(model, [*zip(x, y, strict=True)], [*zip(eval_x, eval_y, strict=True)], collate, collate_training)


def _architecture(own: MaterialArguments, num_labels: int, shape: Sequence[int]) -> PreTrainedModel:
    """Return an architecture of timm for images ``[channels, height, width]``, with weights of a file if one is named.

    Args:
        own: Which architecture, and which file.
        num_labels: Number of classes.
        shape: Channels, height and width of the images.

    Returns:
        The model.
    """
    described = timm.models.get_pretrained_cfg(own.model_name_or_path).to_dict()
    fits = len(described["mean"]) == shape[0]
    mean, std = (described[what] if fits else [0.5] * shape[0] for what in ("mean", "std"))
    config = TimmWrapperConfig(
        architecture=own.model_name_or_path,
        model_args={"in_chans": shape[0]},
        num_labels=num_labels,
        pretrained_cfg={"input_size": [*shape], "mean": [*mean], "std": [*std]},
    )
    config.problem_type = "single_label_classification"
    model = TimmWrapperForImageClassification(config)
    fresh = timm.create_model(own.model_name_or_path, num_classes=num_labels, in_chans=shape[0]).state_dict()
    # The counters of batch norms may be missing.
    model.timm_model.load_state_dict(fresh | (load_file(own.weights) if own.weights is not None else {}))
    return model


def _pixels(own: MaterialArguments, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of a split as bytes, ``[num_images, height, width]`` with channels behind, and their labels."""
    folder = Path(own.dataset_name)
    if own.dataset_name == "digits":
        digits = load_digits()
        rows = train_test_split(range(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target)
        chosen = rows[split == "test"]
        return np.round(digits.images[chosen] * 255 / 16).astype(np.uint8), digits.target[chosen]
    if any(folder.glob("test*.webp")):  # sheets of square tiles, in row-major order
        sheets = sorted(folder.glob(f"{split}*.webp"), key=lambda file: (len(file.name), file.name))
        labels = np.load(folder / f"labels_{split}.npy").astype(np.int64)
        return np.concatenate([_tiles(sheet, len(labels) // len(sheets)) for sheet in sheets]), labels
    data = load_dataset(HUB_NAMES.get(own.dataset_name, own.dataset_name), split=split, cache_dir=own.cache_dir)
    image, label = (
        next(name for name in usual if name in data.column_names)
        for usual in (("image", "img"), ("label", "labels", "fine_label"))
    )
    return np.stack([np.asarray(picture.convert("RGB")) for picture in data[image]]), np.array(data[label])


def _tiles(file: Path, count: int) -> np.ndarray:
    with PIL.Image.open(file) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    side = math.isqrt(pixels.shape[0] * pixels.shape[1] // count)
    return pixels.reshape(-1, side, pixels.shape[1] // side, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)


def _some(pixels: np.ndarray, labels: np.ndarray, most: int | None) -> tuple[Tensor, Tensor]:
    """Return at most so many images, ``[num_images, channels, height, width]``, drawn with a fixed seed, and labels."""
    x = torch.from_numpy(pixels)
    x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:most].sort().values
    return x[chosen], torch.from_numpy(labels)[chosen]


def _augmented(image: Tensor) -> Tensor:
    """Return an image that is shifted by up to 4 pixels over black and, in colour, mirrored or not."""
    channels, height, width = image.shape
    top, left, mirror = (int(torch.randint(most, ())) for most in (9, 9, 2 if channels == 3 else 1))
    shifted = F.pad(image, (4, 4, 4, 4))[:, top : top + height, left : left + width]
    return shifted.flip(2) if mirror else shifted
