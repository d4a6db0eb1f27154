"""The image example: what its runs and its table compute."""

import json
from pathlib import Path

import pytest
import timm
import torch
from image_data import ADAMW, FEW, PRUNE, TRAIN, build_vit, digits_accuracy, num_params, run, write_tiles
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

NOT_TRAINED = ["--num_train_epochs", "0"]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vit(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="module")
def pruned(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    output = tmp_path_factory.mktemp("runs") / "pruned"
    flags = ["--implant_ratio", "0.3", "--num_train_epochs", "6", "--per_device_train_batch_size", "32"]
    flags += ["--max_train_samples", "512"]
    return output, run(vit, output, *TRAIN, *PRUNE, *ADAMW, *flags)


def test_a_run_writes_down_every_stage(pruned: tuple[Path, dict[str, float]]) -> None:
    output, results = pruned
    assert json.loads((output / "all_results.json").read_text()) == results
    for stage in ("dense", "pruned", "recovered", "eval"):
        assert {f"{stage}_accuracy", f"{stage}_loss"} <= set(results)
    assert {"train_runtime", "recovery_runtime", "scoring_seconds", "total_seconds"} <= set(results)
    assert (output / "pruning_report.md").is_file()
    table = (output / "results.md").read_text()
    for cell in (
        f"| dense | {100 * results['dense_accuracy']:.2f}% |",
        f"| fine-tuned, reloaded | {100 * results['eval_accuracy']:.2f}% |",
        f"| {results['pruned_params']:,} | {results['pruned_macs']:,.0f} | {results['pruned_milliseconds']:.2f} |",
    ):
        assert cell in table


def test_the_sizes_are_those_of_the_saved_models(pruned: tuple[Path, dict[str, float]]) -> None:
    output, results = pruned
    assert results["dense_params"] == num_params(output / "dense")
    assert results["pruned_params"] == num_params(output) < results["dense_params"]
    assert results["pruned_macs"] < results["dense_macs"]


def test_the_reloaded_model_is_the_one_that_was_trained(pruned: tuple[Path, dict[str, float]]) -> None:
    _, results = pruned
    assert results["reload_max_difference"] == 0
    assert results["eval_loss"] == results["recovered_loss"]
    assert results["pruned_loss"] != results["dense_loss"]
    assert results["recovered_loss"] != results["pruned_loss"]


def test_the_accuracy_is_that_of_the_saved_models_on_held_out_digits(pruned: tuple[Path, dict[str, float]]) -> None:
    output, results = pruned
    assert results["dense_accuracy"] == pytest.approx(digits_accuracy(output / "dense"))
    assert results["eval_accuracy"] == pytest.approx(digits_accuracy(output))
    assert results["dense_accuracy"] > 0.2


def test_a_trained_model_is_pruned_without_being_trained_again(
    pruned: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    output, results = pruned
    again = run(output / "dense", tmp_path, *TRAIN, *PRUNE, *NOT_TRAINED, "--recovery_epochs", "0")
    assert again["dense_loss"] == pytest.approx(results["dense_loss"], rel=1e-6)
    assert "train_runtime" not in again
    assert again["pruned_loss"] == again["recovered_loss"] == again["eval_loss"] != again["dense_loss"]


def test_a_pruned_model_is_only_evaluated(pruned: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    output, results = pruned
    again = run(output, tmp_path, "--do_eval")
    assert again["eval_loss"] == results["eval_loss"]
    assert not (tmp_path / "config.json").exists()


def test_without_an_amount_it_is_plain_training(vit: Path, tmp_path: Path) -> None:
    results = run(vit, tmp_path, *FEW, *TRAIN)
    assert num_params(tmp_path) == sum(
        p.numel() for p in AutoModelForImageClassification.from_pretrained(vit, num_labels=10).parameters()
    )
    assert results["reload_max_difference"] == 0
    assert not any(name.startswith(("dense", "pruned", "recovered")) for name in results)


def test_a_network_trained_in_bf16_is_reloaded_bit_for_bit(vit: Path, tmp_path: Path) -> None:
    results = run(vit, tmp_path, *FEW, *TRAIN, *PRUNE, "--bf16", "--use_cpu", "--precision", "bf16")
    assert results["reload_max_difference"] == 0
    report = json.loads((tmp_path / "pruning_report.json").read_text())
    assert report["provenance"][0]["settings"]["precision"] == "bf16"


def test_scores_see_augmented_images_and_evaluation_does_not(
    pruned: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    plain, augmented = (
        run(pruned[0] / "dense", tmp_path / name, *FEW, *TRAIN, *PRUNE, *NOT_TRAINED, "--recovery_epochs", "0", *flags)
        for name, flags in (("plain", []), ("augmented", ["--augment"]))
    )
    assert augmented["dense_accuracy"] == plain["dense_accuracy"]
    reports = (json.loads((tmp_path / name / "pruning_report.json").read_text()) for name in ("plain", "augmented"))
    assert len({report["threshold"] for report in reports}) == 2


def test_training_depends_on_augmentation_and_on_the_seed_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    flags = [*FEW, *TRAIN, "--num_train_epochs", "2", "--save_strategy", "epoch"]
    # Four steps an epoch.
    resume = ["--resume_from_checkpoint", str(tmp_path / "a" / "checkpoint-4")]
    plain, augmented, other, again = (
        run("test_resnet", tmp_path / name, *flags, *more)["eval_loss"]
        for name, more in (("a", []), ("b", ["--augment"]), ("c", ["--seed", "1"]), ("d", resume))
    )
    assert len({plain, augmented, other}) == 3
    assert again == plain


def test_a_residual_network_learns_the_digits(tmp_path: Path) -> None:
    results = run("cifar_resnet20", tmp_path, *TRAIN, "--num_train_epochs", "2")
    assert results["eval_accuracy"] > 0.85
    assert results["eval_accuracy"] == pytest.approx(digits_accuracy(tmp_path))
    assert results["reload_max_difference"] == 0


def test_the_channels_of_a_residual_network_are_pruned(tmp_path: Path) -> None:
    few = ["--implant_ratio", "0.3", "--max_train_samples", "128", "--per_device_train_batch_size", "32"]
    results = run("cifar_resnet20", tmp_path, *TRAIN, *PRUNE, *few)
    assert results["pruned_params"] == num_params(tmp_path)
    assert 0.4 < results["prunable_params_kept"] <= 0.5
    assert results["pruned_macs"] < 0.8 * results["dense_macs"]
    assert 0 < results["channels_kept"] < results["channels_before"]
    assert results["channels_implanted"] > 0
    assert results["reload_max_difference"] == 0
    assert results["eval_accuracy"] == pytest.approx(digits_accuracy(tmp_path))


def test_weights_of_a_file_are_those_of_the_model(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = timm.create_model("cifar_resnet20", in_chans=1).eval()
    # The published weights, too, leave the counters of batch norms out.
    save_file({k: v for k, v in expected.state_dict().items() if "num_batches" not in k}, tmp_path / "w.safetensors")
    flags = ["--weights", str(tmp_path / "w.safetensors"), "--learning_rate", "0"]
    run("cifar_resnet20", tmp_path / "out", *FEW, "--do_train", *flags)
    x = torch.rand(2, 1, 8, 8)
    found = AutoModelForImageClassification.from_pretrained(tmp_path / "out").timm_model.conv1(x)
    torch.testing.assert_close(found, expected.conv1(x))


def test_an_untrained_architecture_starts_from_its_own_initial_weights(tmp_path: Path) -> None:
    run("cifar_resnet20", tmp_path, *FEW, "--do_train", "--learning_rate", "0")
    weight = AutoModelForImageClassification.from_pretrained(tmp_path).timm_model.layer3[1].conv1.weight
    # Kaiming's by fan-out, where transformers would draw with 0.02.
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


def test_a_saved_model_says_how_its_images_are_normalised(tmp_path: Path) -> None:
    tiles = write_tiles(tmp_path / "tiles")
    flags = ["--do_train", "--dataset_name", str(tiles), "--image_mean", "0.1", "0.2", "0.3"]
    run("cifar_resnet20", tmp_path / "out", *flags)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = torch.rand(3, 8, 8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.229, 0.224, 0.225])
    expected = (image - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(processor(image)["pixel_values"][0], expected)


def test_published_weights_have_their_published_accuracy(shared_data: Path, tmp_path: Path) -> None:
    weights = shared_data / "cifar10_weights" / "resnet20_akamaster.safetensors"
    flags = ["--dataset_name", str(shared_data / "cifar10"), "--weights", str(weights), "--max_eval_samples", "500"]
    # 91.73% on all 10,000 images, give or take four standard errors of 500.
    assert run("cifar_resnet20", tmp_path, *flags, "--do_eval")["eval_accuracy"] == pytest.approx(0.917, abs=0.05)
