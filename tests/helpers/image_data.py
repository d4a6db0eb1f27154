"""Tiny images, folders and models for the tests of the image example."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import run_image_hap
import torch
from datasets import Dataset
from run_image_hap import DataTrainingArguments, load_images
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

CLASSES = ("bird", "cat", "dog")


def pictures(count: int, seed: int = 0, side: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Return random RGB images, ``[count, side, side, 3]``, and labels of three classes that all occur."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return images, np.arange(count) % len(CLASSES)


def write_tiles(folder: Path, *, columns: int = 4, side: int = 8, sheets: int = 2, classes: bool = True) -> Path:
    """Write 24 training images on two sheets and 12 test images on one."""
    folder.mkdir()
    for split, count, parts in (("train", 24, sheets), ("test", 12, 1)):
        images, labels = pictures(count, seed=len(split), side=side)
        np.save(folder / f"labels_{split}.npy", labels.astype(np.uint8))
        for number, part in enumerate(np.split(images, parts), 1):
            rows = [np.concatenate(list(part[i : i + columns]), axis=1) for i in range(0, len(part), columns)]
            name = f"{split}_{number}.webp" if parts > 1 else f"{split}.webp"
            PIL.Image.fromarray(np.concatenate(rows)).save(folder / name, lossless=True)
    if classes:
        (folder / "meta.json").write_text(json.dumps({"classes": CLASSES}), encoding="utf-8")
    return folder


def write_image_folder(folder: Path, *, side: int = 8) -> Path:
    """Write the images of ``write_tiles`` as files, sorted by class as such folders are."""
    for split, count in (("train", 24), ("test", 12)):
        for number, (image, label) in enumerate(zip(*pictures(count, seed=len(split), side=side), strict=True)):
            place = folder / split / CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(image).save(place / f"{number:02}.png")
    return folder


def build_vit(folder: Path, **config: Any) -> Path:
    """Save a tiny ViT for 8 x 8 grey images, without a head unless its labels are among ``config``."""
    torch.manual_seed(0)
    small = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 2}
    model = ViTForImageClassification(
        ViTConfig(**{**small, "num_attention_heads": 4, "intermediate_size": 32, **config})
    )
    (model if {"num_labels", "id2label"} & set(config) else model.vit).save_pretrained(folder)
    return folder


def run(model: Path | str, output: Path, *more: str) -> dict[str, float]:
    """Run the example; two flags give one training, with more of them another model, data or stages."""
    common = {"model_name_or_path": model, "output_dir": output, "cache_dir": output / "cache", "num_train_epochs": 1}
    words = [word for name, value in common.items() for word in (f"--{name}", str(value))]
    return run_image_hap.main([*words, "--disable_tqdm", "true", *more])


TRAIN = ["--do_train", "--do_eval"]
PRUNE = ["--target_params", "0.5", "--max_batches", "2", "--recovery_epochs", "1", "--progress", "false"]
FEW = ["--max_train_samples", "128", "--max_eval_samples", "64", "--per_device_train_batch_size", "32"]
ADAMW = ["--optim", "adamw_torch", "--learning_rate", "3e-3"]


def load(folder: Path | str, *, train: bool = True, **more: Any) -> dict[str, Dataset]:
    """Return the images of a dataset; prepared data is kept beside a folder."""
    cache = str(Path(folder).parent / "cache") if Path(folder).exists() else None
    wanted = ["train", "validation"] if train else ["validation"]
    return load_images(DataTrainingArguments(dataset_name=str(folder), **more), wanted, cache_dir=cache)


def pixels_of(images: Dataset) -> np.ndarray:
    """Return bytes, ``[num_images, height, width, 3]``, or without the last dimension of grey images."""
    return np.stack([np.asarray(image) for image in images["image"]])


def num_params(folder: Path) -> int:
    return sum(p.numel() for p in AutoModelForImageClassification.from_pretrained(folder).parameters())


def digits_accuracy(folder: Path) -> float:
    """Return a saved model's accuracy on the digits that are held out, computed without the example."""
    data = load_digits()
    _, test = train_test_split(np.arange(len(data.target)), test_size=0.2, random_state=0, stratify=data.target)
    pixels = torch.tensor(np.round(data.images[test] * 255 / 16) / 255, dtype=torch.float32)[:, None]
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(folder).eval()((pixels - 0.5) / 0.5).logits
    return float((logits.argmax(-1).numpy() == data.target[test]).mean())
