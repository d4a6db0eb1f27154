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
from image_data import CLASSES, FEW, PRUNE, TRAIN, build_vit, load, run, write_image_folder, write_tiles
from run_image_hap import parse
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification

from hap_hf import ConfigError, HapConfig, known_criteria

NOT_TRAINED = ["--num_train_epochs", "0"]


def test_every_setting_is_a_flag_with_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    settings = {f.name for of in (HapConfig, *known_criteria().values()) for f in dataclasses.fields(of)}
    for name in settings - {"amount", "parts"}:
        assert f" --{name} {name.upper()} " in text
    assert "Share of all units below the threshold" in text
    assert "lossless train*.webp and test*.webp" in text
    assert "default: None" not in text


def test_flags_become_the_config_and_the_training(tmp_path: Path) -> None:
    words = "--do_train --seed 7 --prune_ratio 0.25 --method magnitude --precision bf16 --bf16 --use_cpu"
    words += " --progress false --recovery_epochs 3 --recovery_learning_rate 0.5 --learning_rate 0.2"
    words += " --label_smoothing_factor 0.1"
    _, data, pruning, args, config = parse([*words.split(), "--output_dir", str(tmp_path)])
    assert config == HapConfig(prune_ratio=0.25, method="magnitude", precision="bf16", progress=False, seed=7)
    assert (pruning.recovery_epochs, pruning.recovery_learning_rate) == (3, 0.5)
    assert (args.bf16, args.learning_rate, args.label_smoothing_factor, args.seed) == (True, 0.2, 0.1, 7)
    assert (args.optim, args.optim_args, args.lr_scheduler_type, args.num_train_epochs) == (
        "sgd",
        "momentum=0.9",
        "cosine",
        20,
    )
    assert data.dataset_name == "digits"


def test_a_json_file_may_hold_all_flags(tmp_path: Path) -> None:
    values = {"output_dir": "o", "target_macs": 0.5, "do_train": True, "learning_rate": 0.05}
    (tmp_path / "flags.json").write_text(json.dumps(values), encoding="utf-8")
    _, data, _, args, config = parse([str(tmp_path / "flags.json")])
    assert config == HapConfig(target_macs=0.5, seed=args.seed)
    assert (data.dataset_name, args.learning_rate, args.weight_decay) == ("digits", 0.05, 1e-4)


GOOD = {"output_dir": "o", "do_train": "true"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_train_epochs": "0"}, ValueError, "nothing to train"),
        ({"do_train": "false"}, ValueError, "nothing to do: pass --do_train or --do_eval"),
        ({"do_predict": "true"}, ValueError, "there is no --do_predict for images"),
        ({"do_train": "false", "do_eval": "true", "prune_ratio": "0.5"}, ValueError, "pass --do_train"),
        ({"prune_ratio": "0.5", "recovery_epochs": "-1"}, ValueError, "--recovery_epochs must not be negative, got -1"),
        ({"max_eval_samples": "0"}, ValueError, "--max_eval_samples must be at least 1, got 0"),
        ({"image_size": "0"}, ValueError, "--image_size must be at least 1, got 0"),
        ({"image_std": "0"}, ValueError, "--image_std must be above 0, got"),
        ({"model_args": "{"}, ValueError, "--model_args must be a JSON object, got '{': Expecting"),
        ({"model_args": "[1]"}, ValueError, r"--model_args must be a JSON object, got '\[1\]'"),
        ({"train_dir": "none"}, FileNotFoundError, "--train_dir 'none' is no folder"),
        ({"train_dir": ".", "dataset_name": "d"}, ValueError, "got both --dataset_name d and folders"),
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


def test_datasets_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'none/such' is neither digits nor a folder with images, nor can"):
        load("none/such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="neither digits nor a folder with images"):
        load(tmp_path / "empty")


def test_splits_that_are_missing_or_empty_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_image_folder(tmp_path / "files")
    with pytest.raises(ValueError, match=r"expected a split dev to evaluate on, got \['test', 'train'\]; name another"):
        load(folder, eval_split="dev")
    shutil.rmtree(folder / "train")
    assert load(folder, train=False).keys() == {"validation"}
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
    monkeypatch.setattr("run_image_hap.load_dataset", lambda *_, **__: {"test": empty})
    with pytest.raises(ValueError, match="anything: the test split has no images"):
        load("anything", train=False)


@pytest.mark.parametrize(
    ("columns", "named", "message"),
    [
        ({"label": None}, {}, r"expected a column with labels, one of \['label', 'labels', 'fine_label'\], got the"),
        ({"image": None}, {}, r"expected a column with images, one of \['image', 'img'\], got the columns \['label'\]"),
        ({}, {"label_column_name": "y"}, r"--label_column_name 'y' is not among the columns \['image', 'label'\]"),
        ({"image": [3, 4]}, {}, "validation: expected images in column 'image', got Value"),
        ({"label": [0, None]}, {}, r"validation: expected one of the labels \[0\] for every image, got None"),
        ({"label": [0.5, 1.0]}, {}, r"validation: expected one of the labels \[\] for every image, got 0.5"),
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


def test_models_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="--model_name_or_path 'none/such' is neither a folder with a model nor known to timm"
    ):
        run("none/such", tmp_path, *FEW, "--do_eval")
    with pytest.raises(FileNotFoundError, match=r"timm:cifar_resnet21: timm .* has no cifar_resnet21, similar"):
        run("timm:cifar_resnet21", tmp_path, *FEW, "--do_eval")


def test_a_folder_hides_an_architecture_of_the_same_name_but_for_its_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build_vit(tmp_path / "cifar_resnet20", num_labels=10)
    assert "eval_loss" in run("cifar_resnet20", tmp_path / "out", *FEW, "--do_eval")
    with pytest.raises(ValueError, match=r"timm:cifar_resnet20 is not trained, it has no values for bn1\.bias"):
        run("timm:cifar_resnet20", tmp_path / "out", *FEW, "--do_eval")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("cifar_resnet20", num_classes=7).state_dict()
    state["extra"] = state.pop("bn1.weight")
    save_file(state, tmp_path / "w.safetensors")
    several = (
        r"w.safetensors does not fit CifarResNet: bn1.weight is missing; extra is not in the model; "
        r"conv1.weight is \[16, 3, 3, 3\] and the model's \[16, 1, 3, 3\]; linear.bias is \[7\] and .*; check --model"
    )
    for file, error, message in (
        ("w.safetensors", ValueError, several),
        ("none.safetensors", FileNotFoundError, "--weights .*none.safetensors' does not exist"),
        ("w.pth", ValueError, r"--weights must be a .safetensors file, got .*w.pth'"),
    ):
        with pytest.raises(error, match=message):
            run("cifar_resnet20", tmp_path / "out", *FEW, "--do_eval", "--weights", str(tmp_path / file))
    with pytest.raises(ValueError, match="--weights belongs to an untrained architecture of timm, got --model"):
        run(build_vit(tmp_path / "vit"), tmp_path / "out", *FEW, "--do_eval", "--weights", "w.safetensors")


def test_a_model_with_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    vit = build_vit(tmp_path / "vit", num_labels=3)
    with pytest.raises(ValueError, match=r"tells 3 classes apart and the images have 10; pass --ignore_mismatched"):
        run(vit, tmp_path / "out", *FEW, *TRAIN)
    run(vit, tmp_path / "out", *FEW, *TRAIN, "--ignore_mismatched_sizes")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["id2label"]) == 10


def test_a_model_that_was_never_trained_is_not_pruned(tmp_path: Path) -> None:
    message = "cifar_resnet20 is not trained, it has no values for bn1.bias, bn1.num_batches_tracked, .* and more; pass"
    with pytest.raises(ValueError, match=message):
        run("cifar_resnet20", tmp_path / "out", *FEW, *TRAIN, *PRUNE, *NOT_TRAINED)
    message = r"is not trained, it has no values for classifier.bias, classifier.weight; pass --do_train and --num"
    with pytest.raises(ValueError, match=message):
        run(build_vit(tmp_path / "vit"), tmp_path / "out", *FEW, *TRAIN, *PRUNE, *NOT_TRAINED)


def test_channels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tiles = ["--dataset_name", str(write_tiles(tmp_path / "tiles")), "--do_eval"]
    vit = build_vit(tmp_path / "vit", num_labels=3)
    with pytest.raises(ValueError, match=r"vit takes images of 1 channel and these have 3; convert them"):
        run(vit, tmp_path / "out", *tiles)
    with pytest.raises(ValueError, match=r"--image_mean must have 1 value or 3, one for each channel, got"):
        run("cifar_resnet20", tmp_path / "out", *tiles, "--image_mean", "0.1", "0.2")


def test_a_model_with_its_own_order_of_classes_keeps_it(tmp_path: Path) -> None:
    names = {0: "Dog", 1: "Fish", 2: "Bird", 3: "Cat"}
    vit = build_vit(tmp_path / "vit", num_channels=3, id2label=names, label2id={v: k for k, v in names.items()})
    tiles = write_tiles(tmp_path / "tiles")
    found = run(vit, tmp_path / "out", "--dataset_name", str(tiles), "--do_eval")["eval_loss"]
    images = load(tiles, train=False)["validation"]
    x = torch.tensor(np.stack(images["image"]).transpose(0, 3, 1, 2) / 127.5 - 1, dtype=torch.float32)
    labels = torch.tensor([["dog", "fish", "bird", "cat"].index(CLASSES[y]) for y in images["label"]])
    with torch.no_grad():
        model = AutoModelForImageClassification.from_pretrained(vit).eval()
        assert found == pytest.approx(model(x, labels=labels).loss.item(), abs=1e-5)


def test_classes_that_only_agree_in_number_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = {0: "a", 1: "b", 2: "c"}
    vit = build_vit(tmp_path / "vit", num_channels=3, id2label=names, label2id={v: k for k, v in names.items()})
    tiles = ["--dataset_name", str(write_tiles(tmp_path / "tiles")), *TRAIN, "--learning_rate", "0"]
    with caplog.at_level(logging.WARNING, logger="run_image_hap"):
        run(vit, tmp_path / "out", *tiles)
    assert "classes ['a', 'b', 'c'] are taken for the images' ('bird', 'cat', 'dog')" in caplog.text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert tuple(config["id2label"].values()) == CLASSES


@pytest.mark.parametrize(
    ("model", "flags", "size"),
    [
        ("cifar_resnet20", ["--image_size", "16"], 16),
        ("test_vit", [], 160),
        ("test_vit", ["--image_size", "8", "--model_args", '{"patch_size": 2}'], 8),
    ],
)
def test_images_get_the_size_that_a_model_was_made_for(tmp_path: Path, model: str, flags: list[str], size: int) -> None:
    tiles = ["--dataset_name", str(write_tiles(tmp_path / "tiles")), "--max_train_samples", "2", "--do_train"]
    run(model, tmp_path / "out", *tiles, *flags)
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert saved.config.pretrained_cfg["input_size"] == [3, size, size]
    assert saved(torch.rand(1, 3, size, size)).logits.shape == (1, 3)
