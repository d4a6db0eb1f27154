"""The image example: the images it reads and the batches it makes of them."""

import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from image_data import CLASSES, load, pictures, write_image_folder, write_tiles
from images.samples import Images, Preprocessing


def in_order(images: Images) -> list[tuple[str, bytes]]:
    """Return class and pixels of each image in an order that does not depend on how they were stored."""
    return sorted((images.names[y], x.numpy().tobytes()) for x, y in zip(images.pixels, images.labels, strict=True))


def expected(split: str, side: int = 8) -> list[tuple[str, bytes]]:
    images, labels = pictures({"train": 24, "test": 12}[split], seed=len(split), side=side)
    channels_first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return sorted((CLASSES[y], x.tobytes()) for x, y in zip(channels_first, labels, strict=True))


@pytest.mark.parametrize("columns", [2, 4, 12])
def test_tiles_are_read_in_row_major_order_however_wide_the_sheets_are(tmp_path: Path, columns: int) -> None:
    folder = write_tiles(tmp_path / "tiles", columns=columns)
    found = load(folder)
    for split, count in (("train", 24), ("test", 12)):
        images, labels = pictures(count, seed=len(split))
        assert np.array_equal(found[split].pixels.permute(0, 2, 3, 1).numpy(), images)
        assert found[split].labels.tolist() == labels.tolist()
        assert found[split].names == CLASSES


def test_tiles_without_names_are_numbered(tmp_path: Path) -> None:
    assert load(write_tiles(tmp_path / "tiles", classes=False))["test"].names == ("0", "1", "2")


def test_every_kind_of_folder_gives_the_same_images(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "files")
    loaded = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    loaded.save_to_disk(tmp_path / "arrow")
    (tmp_path / "parquet").mkdir()
    (tmp_path / "plain").mkdir()
    for split, dataset in loaded.items():
        dataset.to_parquet(tmp_path / "parquet" / f"{split}.parquet")
        # As other programs write it: bytes, and names in place of numbers, without a word on features.
        table = pyarrow.parquet.read_table(tmp_path / "parquet" / f"{split}.parquet")
        names = pyarrow.array([CLASSES[label] for label in table["label"].to_pylist()])
        table = pyarrow.table({"img": table["image"], "labels": names})
        pyarrow.parquet.write_table(table, tmp_path / "plain" / f"{split}.parquet")
    for name in ("files", "arrow", "parquet", "plain"):
        found = load(tmp_path / name)
        assert [in_order(found[split]) for split in ("train", "test")] == [expected("train"), expected("test")]


def test_columns_and_split_may_be_named(tmp_path: Path) -> None:
    first = Dataset.from_dict({"image": [None], "label": [0]})
    images = [PIL.Image.fromarray(x) for x in pictures(4)[0]]
    second = Dataset.from_dict({"view": images, "coarse": [5, 5, 9, 9], "label": [0, 1, 2, 3]})
    DatasetDict({"test": first, "held_out": second}).save_to_disk(tmp_path / "d")
    named = {"image_column": "view", "label_column": "coarse", "eval_split": "held_out"}
    found = load(tmp_path / "d", train=False, **named)["test"]
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.names == ("5", "9")


def test_validation_images_come_before_test_images(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "files")
    shutil.copytree(folder / "test", folder / "validation")
    (folder / "validation" / "dog" / "02.png").unlink()
    assert len(load(folder)["test"]) == 11
    assert len(load(folder, eval_split="test")["test"]) == 12


def test_grey_images_stay_grey(tmp_path: Path) -> None:
    grey = [PIL.Image.fromarray(x[..., 0]) for x in pictures(4)[0]]
    DatasetDict({"test": Dataset.from_dict({"image": grey, "label": [0, 1, 0, 1]})}).save_to_disk(tmp_path / "d")
    found = load(tmp_path / "d", train=False)["test"]
    assert found.shape == (1, 8, 8)
    assert np.array_equal(found.pixels[:, 0].numpy(), pictures(4)[0][..., 0])


def test_some_images_are_drawn_from_all_classes_and_always_the_same(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "files")
    first, second = (load(folder, max_train_samples=12, max_eval_samples=5) for _ in range(2))
    assert len(first["train"]) == 12
    assert len(first["test"]) == 5
    assert len(first["train"].labels.unique()) == 3
    assert torch.equal(first["train"].pixels, second["train"].pixels)
    assert set(in_order(first["train"])) <= set(expected("train"))


def test_images_of_different_sizes_are_resized_where_a_size_is_given(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "files")
    PIL.Image.new("RGB", (6, 9), (10, 20, 30)).save(folder / "test" / "dog" / "zz.png")
    with pytest.raises(
        ValueError, match=r"got 8 x 8 pixels in the first row and 6 x 9 in row 12 of test; pass --image"
    ):
        load(folder)
    found = load(folder, size=8)["test"]
    assert found.pixels[-1].flatten(1).unique(dim=1).flatten().tolist() == [10, 20, 30]
    assert set(in_order(found)) > set(expected("test"))


def test_batches_are_scaled_resized_and_normalised() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    images = Images(pixels, torch.tensor([3, 1]), ("a",))
    batch = Preprocessing((0.5, 0.25), (0.5, 0.25), (2, 2))([images[0], images[1]])
    assert batch["pixel_values"].shape == (2, 2, 2, 2)  # grey in two channels
    assert batch["pixel_values"][:, :, 0, 0].tolist() == [[-1, -1], [1, 3]]
    assert batch["labels"].tolist() == [3, 1]


def shifts(image: torch.Tensor, black: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
    """Return every crop of an image, ``[channels, side, side]``, that lies on a canvas with 4 more pixels around."""
    channels, side, _ = image.shape
    canvas = black[:, None, None].expand(channels, side + 8, side + 8).clone()
    canvas[:, 4:-4, 4:-4] = image
    return {(i, j): canvas[:, i : i + side, j : j + side] for i in range(9) for j in range(9)}


@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_images_are_shifted_over_black_and_mirrored_only_in_colour(channels: int) -> None:
    mean = torch.tensor([0.2, 0.3, 0.4])[:channels]
    make = Preprocessing(tuple(mean.tolist()), (0.5,) * channels, (5, 5))
    x = torch.rand(channels, 5, 5)
    possible = {(*place, False): crop for place, crop in shifts(x, -mean / 0.5).items()}
    if channels == 3:
        possible |= {(*place, True): crop.flip(2) for (*place, _), crop in possible.items()}
    made = make.augment(x.expand(3000, -1, -1, -1)).flatten(1)
    crops = torch.stack([crop.flatten() for crop in possible.values()])
    closest = torch.cdist(made.double(), crops.double()).min(1)
    assert closest.values.max() < 1e-5
    assert len(closest.indices.unique()) == len(possible)
