"""The image example: its flags, its models, and what it says to bad input."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from datasets import Dataset, DatasetDict
from image_data import CLASSES, FEW, PRUNE, build_vit, load, run, write_image_folder, write_tiles
from images.models import load_model
from images.settings import ModelArguments, parse
from safetensors.torch import save_file

import hap_hf.cifar  # noqa: F401 (makes its architectures known to timm)
from hap_hf import HapConfig
from hap_hf.errors import ConfigError


def test_every_setting_is_a_flag_with_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(HapConfig):
        assert f"--{'score_precision' if field.name == 'precision' else field.name} " in text
    assert "Share of all units below the threshold" in text
    assert "lossless train*.webp and test*.webp" in text


def test_flags_become_the_config_and_the_training(tmp_path: Path) -> None:
    words = "--seed 7 --prune_ratio 0.25 --method magnitude --score_precision bf16 --precision bf16 --no_progress"
    words += " --finetune_epochs 3 --finetune_learning_rate 0.5 --learning_rate 0.2 --label_smoothing 0.1 --nesterov"
    settings = parse([*words.split(), "--output_dir", str(tmp_path)])
    assert settings.config == HapConfig(prune_ratio=0.25, method="magnitude", precision="bf16", progress=False, seed=7)
    assert (settings.pruning.recovery_epochs, settings.pruning.recovery_learning_rate) == (3, 0.5)
    args = settings.training.to_training_arguments()
    assert (args.bf16, args.learning_rate, args.label_smoothing_factor, args.seed) == (True, 0.2, 0.1, 7)
    optimizer, options = settings.training.optimizer()
    assert (optimizer, options) == (torch.optim.SGD, {"momentum": 0.9, "nesterov": True})


def test_a_json_file_may_hold_all_flags(tmp_path: Path) -> None:
    (tmp_path / "flags.json").write_text(json.dumps({"output_dir": "o", "target_macs": 0.5}), encoding="utf-8")
    settings = parse([str(tmp_path / "flags.json")])
    assert settings.config == HapConfig(target_macs=0.5)
    assert settings.images.dataset == "digits"


def test_without_an_amount_there_is_no_config() -> None:
    assert parse(["--output_dir", "o", "--no_progress", "--finetune_epochs", "2"]).config is None


GOOD = {"output_dir": "o"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epochs": "-1"}, ValueError, "--epochs must be at least 0, got -1"),
        ({"finetune_epochs": "-1"}, ValueError, "--finetune_epochs must be at least 0, got -1"),
        ({"batch_size": "0"}, ValueError, "--batch_size must be at least 1, got 0"),
        ({"max_eval_samples": "0"}, ValueError, "--max_eval_samples must be at least 1, got 0"),
        ({"image_size": "0"}, ValueError, "--image_size must be at least 1, got 0"),
        ({"image_std": "0"}, ValueError, "--image_std must be above 0, got"),
        ({"model_args": "{"}, ValueError, "--model_args must be a JSON object, got '{': Expecting"),
        ({"model_args": "[1]"}, ValueError, r"--model_args must be a JSON object, got '\[1\]'"),
        ({"nesterov": "true", "momentum": "0"}, ValueError, "--nesterov needs --momentum above 0"),
        ({"prune_ratio": "1.5"}, ConfigError, r"prune_ratio must lie in \[0, 1\), got 1.5"),
        ({"implant_ratio": "0.5"}, ConfigError, "expected exactly one of prune_ratio"),
        ({"num_rounds": "2"}, ConfigError, "expected exactly one of prune_ratio"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(
    changes: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        parse([word for name, value in {**GOOD, **changes}.items() for word in (f"--{name}", value)])


def test_half_precision_that_the_machine_cannot_train_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--precision fp16 needs a GPU and there is none; use bf16 or fp32"):
        parse(["--output_dir", "o", "--precision", "fp16"])


def test_datasets_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--dataset 'none/such' is neither digits nor a folder with images"):
        load("none/such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="neither digits nor a folder with images"):
        load(tmp_path / "empty")


def test_splits_that_are_missing_or_empty_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_image_folder(tmp_path / "files")
    with pytest.raises(ValueError, match=r"expected a split dev to evaluate on, got \['test', 'train'\]; name another"):
        load(folder, eval_split="dev")
    shutil.rmtree(folder / "train")
    assert load(folder, train=False).keys() == {"test"}
    with pytest.raises(ValueError, match=r"expected a split train, got \['test'\]"):
        load(folder)
    features = Dataset.from_dict({"image": [PIL.Image.new("L", (8, 8))], "label": [0]}).features
    empty = Dataset.from_dict({"image": [], "label": []}, features=features)
    DatasetDict({"test": empty}).save_to_disk(tmp_path / "arrow")
    (tmp_path / "parquet").mkdir()
    empty.to_parquet(tmp_path / "parquet" / "test.parquet")
    for name in ("arrow", "parquet"):
        with pytest.raises(ValueError, match=rf"{name}' cannot be read .*, which a split without rows has not"):
            load(tmp_path / name, train=False)
    monkeypatch.setattr("images.data.load_dataset", lambda *_, **__: {"test": empty})
    with pytest.raises(ValueError, match="anything: the test split has no images"):
        load("anything", train=False)


@pytest.mark.parametrize(
    ("columns", "named", "message"),
    [
        ({"label": None}, {}, r"expected a column with labels, one of \['label', 'labels', 'fine_label'\], got the"),
        ({"image": None}, {}, r"expected a column with images, one of \['image', 'img'\], got the columns \['label'\]"),
        ({}, {"label_column": "y"}, r"--label_column 'y' is not among the columns \['image', 'label'\]"),
        ({"image": [3, 4]}, {}, "test: expected images in column 'image', got Value"),
        ({"label": [0, None]}, {}, r"test: expected one of the labels \[0\] for every image, got None"),
        ({"label": [0.5, 1.0]}, {}, r"test: expected one of the labels \[\] for every image, got 0.5"),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    tmp_path: Path, columns: dict[str, Any], named: dict[str, str], message: str
) -> None:
    good = {"image": [PIL.Image.new("RGB", (8, 8))] * 2, "label": [0, 1]}
    table = {name: values for name, values in (good | columns).items() if values is not None}
    DatasetDict({"test": Dataset.from_dict(table)}).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "d", train=False, **named)


def test_an_image_that_is_missing_is_refused(tmp_path: Path) -> None:
    images = [PIL.Image.new("RGB", (8, 8)), None]
    DatasetDict({"test": Dataset.from_dict({"image": images, "label": [0, 1]})}).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match="expected an image in every row of column 'image', got none in row 1"):
        load(tmp_path / "d", train=False)


def test_tile_sheets_that_do_not_fit_their_labels_are_refused(tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "tiles")
    np.save(folder / "labels_test.npy", np.full(12, 3))
    with pytest.raises(ValueError, match=r"labels_test.npy: expected labels from 0 to 2, got 3 to 3"):
        load(folder)
    np.save(folder / "labels_test.npy", np.zeros(11, int))
    with pytest.raises(ValueError, match="11 labels and 1 sheets, one of them with 32 x 24 pixels, do not make square"):
        load(folder)
    np.save(folder / "labels_test.npy", np.zeros(0, int))
    with pytest.raises(ValueError, match="the test split has no images"):
        load(folder)
    (folder / "labels_test.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected test\*.webp and labels_test.npy, got \['labels_train.npy'"):
        load(folder)


def test_models_that_do_not_exist_are_refused() -> None:
    images = load("digits", max_train_samples=1, max_eval_samples=1)
    with pytest.raises(
        FileNotFoundError, match="--model 'none/such' is neither a folder with a model nor known to timm"
    ):
        load_model(ModelArguments(model="none/such"), images)
    with pytest.raises(FileNotFoundError, match=r"timm:cifar_resnet21: timm .* has no cifar_resnet21, similar"):
        load_model(ModelArguments(model="timm:cifar_resnet21"), images)


def test_a_folder_hides_an_architecture_of_the_same_name_but_for_its_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build_vit(tmp_path / "cifar_resnet20", num_labels=10)
    images = load("digits", max_eval_samples=1)
    assert type(load_model(ModelArguments(model="cifar_resnet20"), images).model).__name__.startswith("ViT")
    assert type(load_model(ModelArguments(model="timm:cifar_resnet20"), images).model).__name__.startswith("Timm")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    images = load("digits", max_eval_samples=1)
    state = timm.create_model("cifar_resnet20", num_classes=7).state_dict()
    state["extra"] = state.pop("bn1.weight")
    save_file(state, tmp_path / "w.safetensors")
    message = (
        r"w.safetensors does not fit CifarResNet: bn1.weight is missing; extra is not in the model; "
        r"conv1.weight is \[16, 3, 3, 3\] and the model's \[16, 1, 3, 3\]; linear.bias is \[7\] and .*; check --model"
    )
    with pytest.raises(ValueError, match=message):
        load_model(ModelArguments(model="cifar_resnet20", weights=str(tmp_path / "w.safetensors")), images)
    for file, error, message in (
        ("none.safetensors", FileNotFoundError, "--weights .*none.safetensors' does not exist"),
        ("w.pth", ValueError, r"--weights must be a .safetensors file, got .*w.pth'"),
    ):
        with pytest.raises(error, match=message):
            load_model(ModelArguments(model="cifar_resnet20", weights=str(tmp_path / file)), images)


def test_weights_of_a_file_belong_to_architectures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--weights belongs to an untrained architecture of timm, got --model"):
        run(build_vit(tmp_path / "vit"), tmp_path / "out", "--weights", "w.safetensors")


def test_a_model_with_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    vit = build_vit(tmp_path / "vit", num_labels=3)
    with pytest.raises(ValueError, match=r"tells 3 classes apart and the images have 10; pass --ignore_mismatched"):
        run(vit, tmp_path / "out", *FEW)
    run(vit, tmp_path / "out", *FEW, "--ignore_mismatched_sizes")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["id2label"]) == 10


def test_a_model_that_was_never_trained_is_not_pruned(tmp_path: Path) -> None:
    message = "cifar_resnet20 is not trained, it has no values for bn1.bias, bn1.num_batches_tracked, .* and more; pass"
    with pytest.raises(ValueError, match=message):
        run("cifar_resnet20", tmp_path / "out", *FEW, *PRUNE, "--epochs", "0")
    message = r"is not trained, it has no values for classifier.bias, classifier.weight; pass --epochs above 0"
    with pytest.raises(ValueError, match=message):
        run(build_vit(tmp_path / "vit"), tmp_path / "out", *FEW, *PRUNE, "--epochs", "0")


def test_colour_images_are_refused_by_a_model_for_grey_ones(tmp_path: Path) -> None:
    images = load(write_tiles(tmp_path / "tiles"))
    vit = build_vit(tmp_path / "vit", num_labels=3)
    with pytest.raises(ValueError, match=r"vit takes images of 1 channel and these have 3; convert them"):
        load_model(ModelArguments(model=str(vit)), images)


def test_statistics_for_another_number_of_channels_are_refused() -> None:
    images = load("digits", max_eval_samples=1)
    with pytest.raises(ValueError, match=r"--image_mean must have 1 value or 1, one for each channel, got"):
        load_model(ModelArguments(model="cifar_resnet20", image_mean=[0.1, 0.2]), images)


def test_a_model_with_its_own_order_of_classes_keeps_it(tmp_path: Path) -> None:
    names = {0: "Dog", 1: "Fish", 2: "Bird", 3: "Cat"}
    vit = build_vit(tmp_path / "vit", num_channels=3, id2label=names, label2id={v: k for k, v in names.items()})
    images = load(write_tiles(tmp_path / "tiles"))
    loaded = load_model(ModelArguments(model=str(vit)), images)
    before, after = images["test"], loaded.images["test"]
    assert [after.names[y].lower() for y in after.labels] == [before.names[y] for y in before.labels]
    assert loaded.model.config.id2label == names
    assert loaded.model.classifier.out_features == 4


def test_classes_that_only_agree_in_number_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = {0: "a", 1: "b", 2: "c"}
    vit = build_vit(tmp_path / "vit", num_channels=3, id2label=names, label2id={v: k for k, v in names.items()})
    with caplog.at_level(logging.WARNING, logger="images.models"):
        loaded = load_model(ModelArguments(model=str(vit)), load(write_tiles(tmp_path / "tiles")))
    assert "classes ['a', 'b', 'c'] are taken for the images' ('bird', 'cat', 'dog')" in caplog.text
    assert tuple(loaded.model.config.id2label.values()) == CLASSES


def test_images_get_the_size_that_a_checkpoint_was_made_for(tmp_path: Path) -> None:
    images = load(write_tiles(tmp_path / "tiles"))
    vit = build_vit(tmp_path / "vit", num_channels=3, num_labels=3, image_size=12)
    assert load_model(ModelArguments(model=str(vit)), images).preprocessing.size == (12, 12)
    assert load_model(ModelArguments(model="cifar_resnet20"), images).preprocessing.size == (8, 8)
    assert load_model(ModelArguments(model="cifar_resnet20", image_size=16), images).preprocessing.size == (16, 16)
    assert load_model(ModelArguments(model="test_vit"), images).preprocessing.size == (160, 160)
    small = ModelArguments(model="test_vit", image_size=8, model_args='{"patch_size": 2}')
    assert load_model(small, images).model(torch.rand(1, 3, 8, 8)).logits.shape == (1, 3)
