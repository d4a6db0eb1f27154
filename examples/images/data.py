"""The images of a run: from scikit-learn, from local folders or from the Hub."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset, load_from_disk
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from images.samples import Images
from images.settings import ImageArguments
from images.tiles import is_tile_folder, load_tiles

logger = logging.getLogger(__name__)

HUB_NAMES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
EVAL_SPLITS = ("validation", "test")
_GREY = {"1", "L", "LA"}


def load_images(arguments: ImageArguments, *, train: bool, size: int | None = None) -> dict[str, Images]:
    """Return the images to evaluate on, as ``test``, and those to train and score on, as ``train``.

    Args:
        arguments: Where the images are.
        train: Whether ``train`` is needed.
        size: Height and width to which images are brought where they differ among themselves.

    Returns:
        The splits, with the same classes and image sizes.

    Raises:
        ValueError: If a split, a column or a label is missing, or images differ in size.
        FileNotFoundError: If there is no such dataset.
    """
    folder = Path(arguments.dataset)
    if folder.is_dir() and is_tile_folder(folder):
        found = {split: load_tiles(folder, split) for split in (("train", "test") if train else ("test",))}
    elif arguments.dataset == "digits" and not folder.exists():
        found = _digits()
    else:
        found = _convert(_splits(_load(arguments), arguments, train=train), arguments, size)
    limits = {"train": arguments.max_train_samples, "test": arguments.max_eval_samples}
    result = {split: found[split].sample(limits[split]) for split in (("train", "test") if train else ("test",))}
    for split, images in result.items():
        logger.info("%s: %d images, %s, %d classes", split, len(images), _text(images.shape), len(images.names))
    return result


def _text(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]} x {shape[2]} {'grey' if shape[0] == 1 else 'RGB'}"


def _digits() -> dict[str, Images]:
    """Return scikit-learn's digits: four fifths to train, one to evaluate on, the same ones whatever the seed."""
    data = load_digits()
    pixels = torch.from_numpy(data.images * 255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(data.target).long()
    names = tuple(map(str, data.target_names))
    rows = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=data.target)
    return {split: Images(pixels[r], labels[r], names) for split, r in zip(("train", "test"), rows, strict=True)}


def _load(arguments: ImageArguments) -> Mapping[str, Dataset]:
    name = arguments.dataset
    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            stored = load_from_disk(name)
            return stored if isinstance(stored, DatasetDict) else {str(stored.split or "train"): stored}
        return load_dataset(name if folder.is_dir() else HUB_NAMES.get(name, name), cache_dir=arguments.cache_dir)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"--dataset {name!r} is neither digits nor a folder with images, nor can the Hub be asked for it: {error}"
        ) from error
    except (IndexError, ValueError) as error:
        raise ValueError(
            f"--dataset {name!r} cannot be read ({error}); expected images in every split, which a split without rows "
            "has not"
        ) from error


def _splits(found: Mapping[str, Dataset], arguments: ImageArguments, *, train: bool) -> dict[str, Dataset]:
    wanted = (arguments.eval_split,) if arguments.eval_split is not None else EVAL_SPLITS
    test = next((split for split in wanted if split in found), None)
    if test is None:
        raise ValueError(
            f"{arguments.dataset}: expected a split {' or '.join(wanted)} to evaluate on, got {sorted(found)}; name "
            "another with --eval_split"
        )
    if train and "train" not in found:
        raise ValueError(f"{arguments.dataset}: expected a split train, got {sorted(found)}")
    named = {"train": "train", "test": test} if train else {"test": test}
    for split in named.values():
        if not len(found[split]):
            raise ValueError(f"{arguments.dataset}: the {split} split has no images")
    return {split: found[name] for split, name in named.items()}


def _convert(splits: Mapping[str, Dataset], arguments: ImageArguments, size: int | None) -> dict[str, Images]:
    first = next(iter(splits.values()))
    image_column = _column(first, arguments.image_column, IMAGE_COLUMNS, "image", lambda f: isinstance(f, Image))
    label_column = _column(first, arguments.label_column, LABEL_COLUMNS, "label", lambda f: isinstance(f, ClassLabel))
    for split, dataset in splits.items():
        missing = {image_column, label_column} - set(dataset.column_names)
        if missing:
            raise ValueError(f"{split}: expected the columns {sorted(missing)}, got {dataset.column_names}")
    values = {split: dataset[label_column][:] for split, dataset in splits.items()}
    names, number_of = _classes(values, first.features[label_column])
    labels = {split: torch.tensor([_number(v, number_of, split) for v in values[split]]) for split in splits}
    pixels = _pixels({split: _pictures(dataset, image_column, split) for split, dataset in splits.items()}, size)
    return {split: Images(pixels[split], labels[split], names) for split in splits}


def _column(dataset: Dataset, given: str | None, usual: Iterable[str], what: str, fits: Any) -> str:
    if given is not None:
        if given not in dataset.column_names:
            raise ValueError(f"--{what}_column {given!r} is not among the columns {dataset.column_names}")
        return given
    typed = [name for name, feature in dataset.features.items() if fits(feature)]
    named = [name for name in usual if name in dataset.column_names]
    candidates = named or typed
    if not candidates:
        raise ValueError(
            f"expected a column with {what}s, one of {list(usual)}, got the columns {dataset.column_names}; name it "
            f"with --{what}_column"
        )
    return candidates[0]


def _classes(values: Mapping[str, list[Any]], feature: Any) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Return the names of the classes, and the number of each label that occurs."""
    if isinstance(feature, ClassLabel):
        return tuple(feature.names), {number: number for number in range(feature.num_classes)}
    occurring = {value for labels in values.values() for value in labels if isinstance(value, (str, int))}
    in_order = sorted(occurring, key=lambda value: (isinstance(value, str), value))
    return tuple(map(str, in_order)), {value: number for number, value in enumerate(in_order)}


def _number(value: Any, number_of: Mapping[Any, int], split: str) -> int:
    if not isinstance(value, (str, int)) or value not in number_of:
        raise ValueError(f"{split}: expected one of the labels {list(number_of)[:10]} for every image, got {value!r}")
    return number_of[value]


def _pictures(dataset: Dataset, column: str, split: str) -> list[PIL.Image.Image]:
    feature = dataset.features[column]
    if not isinstance(feature, Image):
        # Parquet files that other programs wrote hold bytes and say nothing of images.
        if not isinstance(feature, dict) or "bytes" not in feature:
            raise ValueError(f"{split}: expected images in column {column!r}, got {feature}; name another column")
        dataset = dataset.cast_column(column, Image())
    pictures = dataset[column][:]
    missing = next((row for row, picture in enumerate(pictures) if picture is None), None)
    if missing is not None:
        raise ValueError(f"{split}: expected an image in every row of column {column!r}, got none in row {missing}")
    return pictures


def _pixels(pictures: Mapping[str, list[PIL.Image.Image]], size: int | None) -> dict[str, torch.Tensor]:
    """Return the images of each split as bytes, ``[num_images, channels, height, width]``, all of one size and mode."""
    first = next(iter(pictures.values()))[0].size
    other = next(((s, row, p.size) for s, ps in pictures.items() for row, p in enumerate(ps) if p.size != first), None)
    if other is not None and size is None:
        split, row, (width, height) = other
        raise ValueError(
            f"expected images of one size, got {first[0]} x {first[1]} pixels in the first row and {width} x {height} "
            f"in row {row} of {split}; pass --image_size to resize them all"
        )
    grey = all(picture.mode in _GREY for ps in pictures.values() for picture in ps)

    def pixels_of(picture: PIL.Image.Image) -> np.ndarray:
        converted = picture.convert("L" if grey else "RGB")
        return np.asarray(converted if other is None else converted.resize((size, size), PIL.Image.Resampling.BILINEAR))

    stacked = {split: torch.from_numpy(np.stack(list(map(pixels_of, ps)))) for split, ps in pictures.items()}
    return {split: x[:, None] if grey else x.permute(0, 3, 1, 2).contiguous() for split, x in stacked.items()}
