"""The GLUE example: what its runs and its table compute."""

import json
from pathlib import Path

import glue_table
import numpy as np
import pytest
from glue_data import PRUNE, build_model, logits_of, num_params, pairs, run, sentences, write
from run_glue_hap import TASK_TO_LABELS


@pytest.fixture(scope="module")
def pruned(model_dir: Path, mrpc: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    output = tmp_path_factory.mktemp("runs") / "pruned"
    return output, run(model_dir, output, *mrpc, *PRUNE, "--implant_ratio", "0.3", "--do_train", "--do_eval")


def test_a_run_writes_down_every_stage(pruned: tuple[Path, dict[str, float]]) -> None:
    output, results = pruned
    assert json.loads((output / "all_results.json").read_text()) == results
    for stage in ("dense", "pruned", "recovered", "eval"):
        assert {f"{stage}_accuracy", f"{stage}_f1", f"{stage}_combined_score", f"{stage}_loss"} <= set(results)
    assert {"train_runtime", "recovery_runtime", "scoring_seconds", "total_seconds"} <= set(results)
    assert (output / "pruning_report.json").is_file()


def test_the_sizes_are_those_of_the_saved_models(pruned: tuple[Path, dict[str, float]]) -> None:
    output, results = pruned
    assert results["dense_params"] == num_params(output / "dense")
    assert results["pruned_params"] == num_params(output)
    assert results["pruned_params"] < results["dense_params"]
    assert results["pruned_macs"] < results["dense_macs"]


def test_the_reloaded_model_is_the_one_that_was_trained(pruned: tuple[Path, dict[str, float]]) -> None:
    _, results = pruned
    assert results["eval_loss"] == results["recovered_loss"]
    assert results["eval_accuracy"] == results["recovered_accuracy"]
    assert results["pruned_loss"] != results["dense_loss"]
    assert results["recovered_loss"] != results["pruned_loss"]


def test_what_helps_to_recover_is_a_flag_each(
    pruned: tuple[Path, dict[str, float]], mrpc: list[str], tmp_path: Path
) -> None:
    flags = [*mrpc, *PRUNE, "--do_train", "--do_eval", "--num_train_epochs", "0", "--recovery_epochs", "4"]
    again = run(pruned[0] / "dense", tmp_path, *flags, "--rounds", "2", "--grow", "1", "--distill", "--kinds", "ffn")
    report = json.loads((tmp_path / "pruning_round_2" / "pruning_report.json").read_text())
    assert report["loss_before"] is not None
    assert abs(report["loss_after"] - report["loss_before"]) < 0.1
    assert report["provenance"][0]["round"] == 2
    assert again["recovered_loss"] == again["eval_loss"]


def test_a_fine_tuned_model_is_pruned_without_being_fine_tuned_again(
    pruned: tuple[Path, dict[str, float]], mrpc: list[str], tmp_path: Path
) -> None:
    output, results = pruned
    again = run(output / "dense", tmp_path, *mrpc, *PRUNE, "--do_train", "--do_eval", "--num_train_epochs", "0")
    assert again["dense_loss"] == pytest.approx(results["dense_loss"], rel=1e-6)
    assert "train_runtime" not in again
    assert not (tmp_path / "dense").exists()


def test_a_run_prunes_recovers_and_rounds(
    pruned: tuple[Path, dict[str, float]], mrpc: list[str], tmp_path: Path
) -> None:
    whole = ["--num_train_epochs", "0", "--recovery_epochs", "2", "--quantize", "int8", "--do_train", "--do_eval"]
    results = run(pruned[0] / "dense", tmp_path, *mrpc, *PRUNE, *whole)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert len(entry["bits"]["layers"]) == results["quantized_layers"]
    assert entry["plan"]["stages"]
    assert results["eval_loss"] == results["recovered_loss"]
    assert results["pruned_bytes"] < pruned[1]["pruned_bytes"]


def test_a_pruned_model_is_only_evaluated(
    pruned: tuple[Path, dict[str, float]], mrpc: list[str], tmp_path: Path
) -> None:
    output, results = pruned
    again = run(output, tmp_path, *mrpc, "--do_eval")
    assert again["eval_loss"] == results["eval_loss"]


def test_pruning_in_rounds_at_steps_is_measured_after_the_last_one(
    pruned: tuple[Path, dict[str, float]], mrpc: list[str], tmp_path: Path
) -> None:
    when = ["--num_train_epochs", "0", "--prune_step", "1", "--num_rounds", "2", "--round_interval", "1"]
    results = run(pruned[0] / "dense", tmp_path, *mrpc, *PRUNE, *when, "--do_train", "--do_eval")
    # Three steps an epoch: trained before the first round and after the second.
    assert results["pruned_loss"] != results["recovered_loss"] == results["eval_loss"]
    assert len(json.loads((tmp_path / "config.json").read_text())["quantization_config"]["plan"]["stages"]) == 2


def test_a_training_that_was_interrupted_after_pruning_goes_on_to_the_same_end(
    pruned: tuple[Path, dict[str, float]], mrpc: list[str], tmp_path: Path
) -> None:
    flags = [*mrpc, *PRUNE, "--num_train_epochs", "0", "--recovery_epochs", "2", "--do_train", "--do_eval"]
    whole = run(pruned[0] / "dense", tmp_path / "whole", *flags, "--save_strategy", "epoch")
    # Three steps an epoch, and the model is pruned before the first one.
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = run(pruned[0] / "dense", tmp_path / "resumed", *flags, "--resume_from_checkpoint", checkpoint)
    assert resumed["eval_loss"] == whole["eval_loss"] != whole["pruned_loss"]
    assert resumed["pruned_params"] == whole["pruned_params"] < resumed["dense_params"]
    assert "pruned_loss" not in resumed  # what was read has been trained since it was pruned


def test_without_epochs_the_model_is_pruned_and_not_trained(
    pruned: tuple[Path, dict[str, float]], mrpc: list[str], tmp_path: Path
) -> None:
    none = ["--num_train_epochs", "0", "--recovery_epochs", "0"]
    results = run(pruned[0] / "dense", tmp_path, *mrpc, *PRUNE, *none, "--do_train", "--do_eval")
    assert results["pruned_loss"] == results["recovered_loss"] == results["eval_loss"]
    assert results["pruned_params"] < results["dense_params"]


def test_without_an_amount_it_is_plain_fine_tuning(model_dir: Path, mrpc: list[str], tmp_path: Path) -> None:
    results = run(model_dir, tmp_path, *mrpc, "--do_train", "--do_eval", "--num_train_epochs", "4")
    assert num_params(tmp_path) == num_params(model_dir)
    assert not any(name.startswith(("dense", "pruned", "recovered")) for name in results)


def test_training_learns_the_task(model_dir: Path, mrpc: list[str], tmp_path: Path) -> None:
    more = ["--num_train_epochs", "20", "--learning_rate", "5e-3", "--do_train", "--do_eval"]
    seen = ["--validation_file", mrpc[mrpc.index("--train_file") + 1]]
    assert run(model_dir, tmp_path, *mrpc, *seen, *more)["eval_accuracy"] > 0.9


def test_stsb_is_a_regression_whose_correlations_are_those_of_its_outputs(model_dir: Path, tmp_path: Path) -> None:
    table = pairs(16)
    table["label"] = [5.0 * (i % 4) / 3 for i in range(16)]
    files = ["--train_file", str(write(table, tmp_path / "t.json")), "--validation_file", str(tmp_path / "t.json")]
    output = tmp_path / "out"
    results = run(model_dir, output, "--task_name", "stsb", *files, *PRUNE, "--do_train", "--do_eval")
    predicted = logits_of(output, table["sentence1"], table["sentence2"])[:, 0]
    assert results["eval_pearson"] == pytest.approx(np.corrcoef(predicted, table["label"])[0, 1], abs=1e-5)
    assert results["eval_loss"] == pytest.approx(np.mean((predicted - table["label"]) ** 2), rel=1e-5)
    assert set(results) >= {"eval_spearmanr", "pruned_pearson", "dense_combined_score"}


def test_integer_scores_of_stsb_are_a_regression_too(model_dir: Path, tmp_path: Path) -> None:
    table = pairs(8) | {"label": [0, 1, 2, 3, 4, 5, 0, 1]}
    files = ["--train_file", str(write(table, tmp_path / "t.csv")), "--validation_file", str(tmp_path / "t.csv")]
    run(model_dir, tmp_path / "out", "--task_name", "stsb", *files, "--do_train", "--do_eval")
    assert logits_of(tmp_path / "out", ["good film"]).shape == (1, 1)


def test_mnli_is_evaluated_on_both_validation_sets(model_dir: Path, tmp_path: Path) -> None:
    columns = ("premise", "hypothesis")
    table, second = pairs(16, columns=columns), pairs(9, seed=3, columns=columns)
    table["label"], second["label"] = [i % 3 for i in range(16)], [i % 2 for i in range(9)]
    files = {"train_file": table, "validation_file": table, "validation_mismatched_file": second}
    named = [word for name, t in files.items() for word in (f"--{name}", str(write(t, tmp_path / f"{name}.parquet")))]
    output = tmp_path / "out"
    results = run(model_dir, output, "--task_name", "mnli", *named, *PRUNE, "--do_train", "--do_eval")
    for suffix, part in (("", table), ("_mm", second)):
        right = logits_of(output, part["premise"], part["hypothesis"]).argmax(-1) == np.array(part["label"])
        for stage in ("recovered", "eval"):
            assert results[f"{stage}_accuracy{suffix}"] == pytest.approx(right.mean())
        assert {f"dense_loss{suffix}", f"pruned_loss{suffix}"} <= set(results)
    assert json.loads((output / "config.json").read_text())["id2label"]["2"] == "contradiction"


def test_predictions_are_written_with_the_names_of_the_labels(
    pruned: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    table = pairs(5, seed=7) | {"label": [-1] * 5}
    test_file = str(write(table, tmp_path / "test.jsonl"))
    run(pruned[0], tmp_path / "out", "--task_name", "mrpc", "--test_file", test_file, "--do_predict")
    lines = (tmp_path / "out" / "predict_results_mrpc.txt").read_text().splitlines()
    numbers = logits_of(pruned[0], table["sentence1"], table["sentence2"]).argmax(-1)
    expected = [f"{i}\t{TASK_TO_LABELS['mrpc'][n]}" for i, n in enumerate(numbers)]
    assert lines == ["index\tprediction", *expected]


def test_data_of_ones_own_needs_no_task_name(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    table = {"review": sentences(12, 0), "label": ["pos", "neg", "mixed"] * 4}
    write(table, folder / "train.csv")
    write(table, folder / "validation.csv")
    run(model_dir, tmp_path / "out", "--dataset_name", str(folder), "--do_train", "--do_eval")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "mixed", "1": "neg", "2": "pos"}


def test_tab_separated_files_and_a_fixed_length_give_the_same_loss(
    pruned: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    table = pairs(10, seed=1)
    rows = zip(*table.values(), strict=True)
    text = "\n".join("\t".join(map(str, row)) for row in [tuple(table), *rows])
    (tmp_path / "v.tsv").write_text(text + "\n", encoding="utf-8")
    more = ["--task_name", "mrpc", "--validation_file", str(tmp_path / "v.tsv"), "--do_eval"]
    padded = run(pruned[0], tmp_path / "out", *more, "--pad_to_max_length", "--max_seq_length", "24")
    assert padded["eval_loss"] == pytest.approx(pruned[1]["eval_loss"], rel=1e-5)


def test_a_model_with_its_own_order_of_labels_keeps_it(tmp_path: Path) -> None:
    names = {0: "Equivalent", 1: "Not_Equivalent"}
    model = build_model(tmp_path / "swapped", head=True, id2label=names, label2id={v: k for k, v in names.items()})
    table = pairs(10)
    file = str(write(table, tmp_path / "v.parquet"))
    results = run(model, tmp_path / "out", "--task_name", "mrpc", "--validation_file", file, "--do_eval")
    right = logits_of(model, table["sentence1"], table["sentence2"]).argmax(-1) == 1 - np.array(table["label"])
    assert results["eval_accuracy"] == pytest.approx(right.mean())


def test_the_first_samples_are_used_where_a_number_is_given(
    pruned: tuple[Path, dict[str, float]], mrpc: list[str], tmp_path: Path
) -> None:
    results = run(pruned[0], tmp_path, *mrpc, "--do_eval", "--max_eval_samples", "4")
    table = pairs(10, seed=1)
    right = logits_of(pruned[0], table["sentence1"][:4], table["sentence2"][:4]).argmax(-1) == table["label"][:4]
    assert results["eval_accuracy"] == pytest.approx(right.mean())


def test_the_table_has_a_row_for_each_size_and_is_not_made_twice(
    model_dir: Path, mrpc: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model_name_or_path", str(model_dir), "--work_dir", str(tmp_path / "table"), "--threads", "1"]
    words += ["--keep", "0.6", "--implant_ratio", "0.4", "--cache_dir", str(tmp_path / "cache"), *mrpc, *PRUNE[2:]]
    words += ["--disable_tqdm", "true", "--num_train_epochs", "1", "--recovery_epochs", "1"]
    text = glue_table.main(words)
    assert len(text.splitlines()) == 2 + 3
    removed, implanted = [json.loads(row) for row in (tmp_path / "table" / "rows.jsonl").read_text().splitlines()][1:]
    for row, name in ((removed, "keep0.6-implant0"), (implanted, "keep0.6-implant0.4")):
        results = row["results"]
        assert results["pruned_params"] == num_params(tmp_path / "table" / name)
        assert 0.4 < results["prunable_params_kept"] <= 0.6
        assert (results["heads_implanted"] + results["ffn_implanted"] > 0) == (row is implanted)
        assert f"| {100 * results['eval_accuracy']:.1f} / {100 * results['eval_f1']:.1f} |" in text

    monkeypatch.setitem(glue_table.SCRIPT, "main", lambda command: pytest.fail(f"ran again: {command}"))
    assert glue_table.main(words) == text
