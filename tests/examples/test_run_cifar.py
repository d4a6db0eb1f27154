"""The image example: what its runs and its table compute."""

import json
from pathlib import Path

import pytest
import timm
import torch
from benchmarks import cifar_table
from image_data import ADAMW, FEW, PRUNE, build_vit, digits_accuracy, num_params, run, write_tiles
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hap_hf.cifar  # noqa: F401 (makes its architectures known to timm)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vit(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="module")
def pruned(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    output = tmp_path_factory.mktemp("runs") / "pruned"
    return output, run(vit, output, *PRUNE, *ADAMW, "--implant_ratio", "0.3", "--epochs", "4", "--batch_size", "32")


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
    again = run(output / "dense", tmp_path, *PRUNE, *ADAMW, "--epochs", "0", "--finetune_epochs", "0")
    assert again["dense_loss"] == pytest.approx(results["dense_loss"], rel=1e-6)
    assert "train_runtime" not in again
    assert again["pruned_loss"] == again["recovered_loss"] == again["eval_loss"] != again["dense_loss"]


def test_a_pruned_model_is_only_evaluated(pruned: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    output, results = pruned
    again = run(output, tmp_path, "--epochs", "0")
    assert again["eval_loss"] == results["eval_loss"]
    assert not (tmp_path / "config.json").exists()


def test_without_an_amount_it_is_plain_training(vit: Path, tmp_path: Path) -> None:
    results = run(vit, tmp_path, *FEW)
    assert num_params(tmp_path) == sum(
        p.numel() for p in AutoModelForImageClassification.from_pretrained(vit, num_labels=10).parameters()
    )
    assert results["reload_max_difference"] == 0
    assert not any(name.startswith(("dense", "pruned", "recovered")) for name in results)


def test_a_network_trained_in_bf16_is_reloaded_bit_for_bit(vit: Path, tmp_path: Path) -> None:
    results = run(vit, tmp_path, *FEW, *PRUNE, "--precision", "bf16", "--score_precision", "bf16")
    assert results["reload_max_difference"] == 0
    report = json.loads((tmp_path / "pruning_report.json").read_text())
    assert report["provenance"]["precision"] == "bf16"


def test_scores_see_augmented_images_and_evaluation_does_not(
    pruned: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    plain, augmented = (
        run(pruned[0] / "dense", tmp_path / name, *FEW, *PRUNE, "--epochs", "0", "--finetune_epochs", "0", *flags)
        for name, flags in (("plain", []), ("augmented", ["--augment"]))
    )
    assert augmented["dense_accuracy"] == plain["dense_accuracy"]
    reports = (json.loads((tmp_path / name / "pruning_report.json").read_text()) for name in ("plain", "augmented"))
    assert len({report["threshold"] for report in reports}) == 2


def test_training_depends_on_augmentation_and_on_the_seed(vit: Path, tmp_path: Path) -> None:
    plain, augmented, other, again = (
        run(vit, tmp_path / name, *FEW, "--dataset", "digits", "--seed", seed, *flags)["eval_loss"]
        for name, seed, flags in (("a", "0", []), ("b", "0", ["--augment"]), ("c", "1", []), ("d", "0", []))
    )
    assert len({plain, augmented, other}) == 3
    assert again == plain


def test_a_residual_network_learns_the_digits(tmp_path: Path) -> None:
    results = run("cifar_resnet20", tmp_path, "--epochs", "2")
    assert results["eval_accuracy"] > 0.85
    assert results["eval_accuracy"] == pytest.approx(digits_accuracy(tmp_path))
    assert results["reload_max_difference"] == 0


def test_the_channels_of_a_residual_network_are_pruned(tmp_path: Path) -> None:
    results = run("cifar_resnet20", tmp_path, *PRUNE, "--implant_ratio", "0.3", "--max_train_samples", "512")
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
    run("cifar_resnet20", tmp_path / "out", *FEW, *flags)
    x = torch.rand(2, 1, 8, 8)
    found = AutoModelForImageClassification.from_pretrained(tmp_path / "out").timm_model.conv1(x)
    torch.testing.assert_close(found, expected.conv1(x))


def test_an_untrained_architecture_starts_from_its_own_initial_weights(tmp_path: Path) -> None:
    run("cifar_resnet20", tmp_path, *FEW, "--learning_rate", "0")
    weight = AutoModelForImageClassification.from_pretrained(tmp_path).timm_model.layer3[1].conv1.weight
    # Kaiming's by fan-out, where transformers would draw with 0.02.
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


def test_a_saved_model_says_how_its_images_are_normalised(tmp_path: Path) -> None:
    tiles = write_tiles(tmp_path / "tiles")
    run("cifar_resnet20", tmp_path / "out", "--dataset", str(tiles), "--image_mean", "0.1", "0.2", "0.3")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = torch.rand(3, 8, 8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.229, 0.224, 0.225])
    expected = (image - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(processor(image)["pixel_values"][0], expected)


def test_published_weights_have_their_published_accuracy(shared_data: Path, tmp_path: Path) -> None:
    weights = shared_data / "cifar10_weights" / "resnet20_akamaster.safetensors"
    flags = ["--dataset", str(shared_data / "cifar10"), "--weights", str(weights), "--max_eval_samples", "1000"]
    # 91.73% on all 10,000 images, give or take four standard errors of 1,000.
    assert run("cifar_resnet20", tmp_path, *flags, "--epochs", "0")["eval_accuracy"] == pytest.approx(0.917, abs=0.035)


def test_the_table_has_a_line_for_each_way_and_is_not_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--work_dir", str(tmp_path / "table"), "--threads", "1", "--no_progress"]
    words += [*FEW, *PRUNE[2:], "--keep", "0.6", "--implant_ratio", "0.4", "--methods", "hessian", "random"]
    words += ["--seeds", "0", "1", "--epochs", "1", "--finetune_epochs", "1"]
    text = cifar_table.main(words)
    rows = [json.loads(row) for row in (tmp_path / "table" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 1 + 2 * 2 * 2
    for row in rows[1:]:
        results = row["results"]
        assert 0.4 < results["kept"] <= 0.6
        assert results["params"] < rows[0]["results"]["params"]
        assert results["macs"] < rows[0]["results"]["macs"]
    assert any(row["results"]["recalibrated"] != row["results"]["pruned"] for row in rows[1:])
    assert any(row["results"]["finetuned"] != row["results"]["recalibrated"] for row in rows[1:])
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 1 + 2 * 2
    means = [
        sum(r["results"]["finetuned"] for r in rows[1:] if r["method"] == "random" and r["implant_ratio"] == q) / 2
        for q in (0.0, 0.4)
    ]
    assert f" {100 * means[0]:.2f} ± " in lines[4]
    assert f" {100 * means[1]:.2f} ± " in lines[6]

    monkeypatch.setattr(cifar_table, "prune_in_each_way", lambda *_: pytest.fail("ran again"))
    assert cifar_table.main(words) == text
