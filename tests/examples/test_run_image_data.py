"""The image example: the images it reads and what it makes of them."""

import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from image_data import CLASSES, build_vit, load, pictures, pixels_of, run, write_image_folder, write_tiles
from run_image_hap import DataTrainingArguments, load_images, transforms_of
from transformers import AutoModelForImageClassification


def in_order(images: Dataset) -> list[tuple[str, bytes]]:
    """Return class and pixels of each image in an order that does not depend on how they were stored."""
    names = images.features["label"].names
    return sorted((names[y], x.tobytes()) for x, y in zip(pixels_of(images), images["label"], strict=True))


def expected(split: str, side: int = 8) -> list[tuple[str, bytes]]:
    images, labels = pictures({"train": 24, "test": 12}[split], seed=len(split), side=side)
    return sorted((CLASSES[y], x.tobytes()) for x, y in zip(images, labels, strict=True))


@pytest.mark.parametrize("columns", [2, 4, 12])
def test_tiles_are_read_in_row_major_order_however_wide_the_sheets_are(tmp_path: Path, columns: int) -> None:
    found = load(write_tiles(tmp_path / "tiles", columns=columns))
    for split, name, count in (("train", "train", 24), ("validation", "test", 12)):
        images, labels = pictures(count, seed=len(name))
        assert np.array_equal(pixels_of(found[split]), images)
        assert found[split]["label"][:] == labels.tolist()
        assert tuple(found[split].features["label"].names) == CLASSES


def test_tiles_without_names_are_numbered(tmp_path: Path) -> None:
    found = load(write_tiles(tmp_path / "tiles", classes=False))
    assert found["validation"].features["label"].names == ["0", "1", "2"]


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
        assert [in_order(found[split]) for split in ("train", "validation")] == [expected("train"), expected("test")]


def test_folders_of_each_split_may_be_anywhere(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "files")
    places = DataTrainingArguments(train_dir=str(folder / "train"), validation_dir=str(folder / "test"))
    found = load_images(places, ["train", "validation"], cache_dir=str(tmp_path / "cache"))
    assert [in_order(found[split]) for split in ("train", "validation")] == [expected("train"), expected("test")]


def test_columns_and_split_may_be_named(tmp_path: Path) -> None:
    first = Dataset.from_dict({"image": [None], "label": [0]})
    images = [PIL.Image.fromarray(x) for x in pictures(4)[0]]
    second = Dataset.from_dict({"view": images, "coarse": [5, 5, 9, 9], "label": [0, 1, 2, 3]})
    DatasetDict({"test": first, "held_out": second}).save_to_disk(tmp_path / "d")
    named = {"image_column_name": "view", "label_column_name": "coarse", "eval_split": "held_out"}
    found = load(tmp_path / "d", train=False, **named)["validation"]
    assert found["label"][:] == [0, 0, 1, 1]
    assert found.features["label"].names == ["5", "9"]


def test_validation_images_come_before_test_images(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "files")
    shutil.copytree(folder / "test", folder / "validation")
    (folder / "validation" / "dog" / "02.png").unlink()
    assert len(load(folder)["validation"]) == 11
    assert len(load(folder, eval_split="test")["validation"]) == 12


def test_some_images_are_drawn_from_all_classes_and_always_the_same(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "files")
    first, second = (load(folder, max_train_samples=12, max_eval_samples=5) for _ in range(2))
    assert len(first["train"]) == 12
    assert len(first["validation"]) == 5
    assert len(set(first["train"]["label"])) == 3
    assert np.array_equal(pixels_of(first["train"]), pixels_of(second["train"]))
    assert set(in_order(first["train"])) <= set(expected("train"))


def test_images_are_resized_and_those_of_different_sizes_only_where_a_size_is_given(tmp_path: Path) -> None:
    images = [PIL.Image.fromarray(x) for x in pictures(3)[0]]
    images[1] = images[1].resize((6, 9))
    data = {"image": images, "label": ["a", "b", "c"]}
    DatasetDict({"test": Dataset.from_dict(data)}).save_to_disk(tmp_path / "d")
    evaluation = ["--dataset_name", str(tmp_path / "d"), "--do_eval"]
    message = r"got 8 x 8 in row 0 of validation and 6 x 9 in row 1 of validation; pass --image_size"
    with pytest.raises(ValueError, match=message):
        run("cifar_resnet20", tmp_path / "out", *evaluation)
    vit = build_vit(tmp_path / "vit", num_channels=3, image_size=6, num_labels=3)
    found = run(vit, tmp_path / "out", *evaluation)["eval_loss"]  # the model says the size
    x = np.stack([np.asarray(i.resize((6, 6), PIL.Image.Resampling.BILINEAR)) for i in images]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        model = AutoModelForImageClassification.from_pretrained(vit).eval()
        loss = model(torch.tensor(x / 127.5 - 1, dtype=torch.float32), labels=torch.arange(3)).loss
    assert found == pytest.approx(loss.item(), abs=1e-4)


def test_grey_images_get_as_many_channels_as_the_model_takes(tmp_path: Path) -> None:
    grey = [PIL.Image.fromarray(x[..., 0]) for x in pictures(4)[0]]
    data = Dataset.from_dict({"image": grey, "label": [0, 1, 0, 1]})
    DatasetDict({"test": data}).save_to_disk(tmp_path / "d")
    for channels in (1, 3):
        vit = build_vit(tmp_path / f"vit{channels}", num_channels=channels, num_labels=2)
        found = run(vit, tmp_path / "out", "--dataset_name", str(tmp_path / "d"), "--do_eval")["eval_loss"]
        x = torch.tensor(np.stack(grey) / 127.5 - 1, dtype=torch.float32)[:, None].expand(-1, channels, -1, -1)
        with torch.no_grad():
            model = AutoModelForImageClassification.from_pretrained(vit).eval()
            assert found == pytest.approx(model(x, labels=torch.tensor([0, 1, 0, 1])).loss.item(), abs=1e-5)


def test_pixels_are_scaled_and_normalised_for_each_channel() -> None:
    image = PIL.Image.fromarray(np.array([[[0, 51, 255]]], dtype=np.uint8))
    made = transforms_of([1, 1], [0.5, 0.2, 0.25], [0.5, 0.1, 0.25])(image)
    torch.testing.assert_close(made.flatten(), torch.tensor([-1.0, 0.0, 3.0]))


def shifts(image: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Return every crop of an image, ``[side, side, channels]``, that lies on black with 4 more pixels around."""
    side, _, channels = image.shape
    canvas = np.zeros((side + 8, side + 8, channels), dtype=np.uint8)
    canvas[4:-4, 4:-4] = image
    return {(i, j): canvas[i : i + side, j : j + side] for i in range(9) for j in range(9)}


@pytest.mark.parametrize("mirror", [False, True])
def test_augmented_images_are_shifted_over_black_and_mirrored_only_if_asked(mirror: bool) -> None:
    image = pictures(1, side=5)[0][0] // 2 + 64
    possible = [*shifts(image).values()]
    if mirror:
        possible += [crop[:, ::-1] for crop in possible]
    make = transforms_of([5, 5], [0.0] * 3, [1.0] * 3, shift=True, mirror=mirror)
    made = torch.stack([make(PIL.Image.fromarray(image)) for _ in range(2000)]).flatten(1)
    crops = torch.stack([torch.tensor(crop.transpose(2, 0, 1) / 255).flatten() for crop in possible])
    closest = torch.cdist(made.double(), crops).min(1)
    assert closest.values.max() < 1e-5
    assert len(closest.indices.unique()) == len(possible)
