"""The GLUE example: what its flags do, what it computes, and what it says to bad input."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import run_glue_hap
import torch
from benchmarks import glue_table
from datasets import Dataset
from glue.metrics import make_metric
from glue.settings import parse
from glue.tasks import TASKS
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, EvalPrediction

from hap_hf import HapConfig
from hap_hf.errors import ConfigError

WORDS = ["good", "bad", "film", "play", "the", "a", "was", "is", "very", "not"]


def sentences(count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size=generator.integers(3, 9))) for _ in range(count)]


def pairs(
    count: int = 24, seed: int = 0, columns: tuple[str, str] = ("sentence1", "sentence2")
) -> dict[str, list[Any]]:
    first, second = sentences(count, seed), sentences(count, seed + 100)
    labels = [int("good" in a.split()) for a in first]
    return {columns[0]: first, columns[1]: second, "label": labels, "idx": list(range(count))}


def write(table: dict[str, list[Any]], file: Path) -> Path:
    writers = {"parquet": "to_parquet", "csv": "to_csv", "json": "to_json", "jsonl": "to_json"}
    getattr(Dataset.from_dict(table), writers[file.suffix[1:]])(file)
    return file


def build_model(folder: Path, *, head: bool = False, **config: Any) -> Path:
    torch.manual_seed(0)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(specials + WORDS), encoding="utf-8")
    AutoTokenizer.from_pretrained(folder, config=BertConfig()).save_pretrained(folder)
    small = BertConfig(
        vocab_size=len(specials + WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=32,
        **config,
    )
    model = AutoModelForSequenceClassification.from_config(small)
    (model if head else model.bert).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def mrpc(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("mrpc")
    train, validation = write(pairs(), folder / "train.csv"), write(pairs(10, seed=1), folder / "validation.csv")
    return ["--task_name", "mrpc", "--train_file", str(train), "--validation_file", str(validation)]


def run(model: Path, output: Path, *more: str) -> dict[str, float]:
    common = {
        "model_name_or_path": model,
        "output_dir": output,
        "cache_dir": output / "cache",
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return run_glue_hap.main([*(word for name, value in common.items() for word in (f"--{name}", str(value))), *more])


PRUNE = ["--target_params", "0.5", "--max_batches", "2", "--num_probes", "2", "--no_progress"]


def logits_of(folder: Path, *texts: list[str]) -> np.ndarray:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(*texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits.double().numpy()


def num_params(folder: Path) -> int:
    return sum(p.numel() for p in AutoModelForSequenceClassification.from_pretrained(folder).parameters())


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


def test_a_fine_tuned_model_is_pruned_without_being_fine_tuned_again(
    pruned: tuple[Path, dict[str, float]], mrpc: list[str], tmp_path: Path
) -> None:
    output, results = pruned
    again = run(output / "dense", tmp_path, *mrpc, *PRUNE, "--do_train", "--do_eval", "--num_train_epochs", "0")
    assert again["dense_loss"] == pytest.approx(results["dense_loss"], rel=1e-6)
    assert "train_runtime" not in again
    assert not (tmp_path / "dense").exists()


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
    expected = [f"{i}\t{TASKS['mrpc'].labels[n]}" for i, n in enumerate(numbers)]
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


def test_every_setting_is_a_flag_with_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(HapConfig):
        assert f"--{field.name}" in text
    assert "Share of all units below the threshold" in text
    assert "Surviving FFN widths are a multiple of this" in text


def test_flags_become_the_config(tmp_path: Path) -> None:
    words = "--task_name cola --do_train --model_name_or_path m --seed 7 --prune_ratio 0.25 --kinds ffn --exclude a.* b"
    words += " --method magnitude --precision bf16 --implant_init zero --round_to 8 --no_progress --max_batches 3"
    _, _, pruning, args = parse([*words.split(), "--output_dir", str(tmp_path)])
    expected = HapConfig(
        prune_ratio=0.25,
        kinds=("ffn",),
        exclude=("a.*", "b"),
        method="magnitude",
        precision="bf16",
        implant_init="zero",
        round_to=8,
        progress=False,
        max_batches=3,
        seed=7,
    )
    assert pruning.to_config(args.seed) == expected


def test_a_json_file_may_hold_all_flags(tmp_path: Path) -> None:
    values = {"model_name_or_path": "m", "task_name": "RTE", "do_eval": True, "output_dir": str(tmp_path)}
    (tmp_path / "flags.json").write_text(json.dumps(values), encoding="utf-8")
    assert parse([str(tmp_path / "flags.json")])[1].task_name == "rte"


GOOD = {"task_name": "mrpc", "do_eval": "true", "output_dir": "o", "model_name_or_path": "m"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task_name": None}, ValueError, "no data: pass --task_name"),
        ({"task_name": "squad"}, ValueError, "--task_name must be one of cola, .* got 'squad'"),
        ({"train_file": "a.csv", "dataset_name": "d"}, ValueError, "got both --dataset_name d and local files"),
        ({"validation_mismatched_file": "a.csv"}, ValueError, "belongs to --task_name mnli, got --task_name mrpc"),
        ({"max_eval_samples": "0"}, ValueError, "--max_eval_samples must be at least 1, got 0"),
        ({"do_eval": "false"}, ValueError, "nothing to do"),
        ({"prune_ratio": "0.5"}, ValueError, "pass --do_train"),
        ({"do_train": "true", "num_train_epochs": "0"}, ValueError, "nothing to train"),
        ({"implant_ratio": "0.5", "do_train": "true"}, ConfigError, "expected exactly one of prune_ratio"),
        ({"prune_ratio": "1.5", "do_train": "true"}, ConfigError, r"prune_ratio must lie in \[0, 1\), got 1.5"),
        (
            {"prune_ratio": "0.5", "do_train": "true", "recovery_epochs": "-1"},
            ValueError,
            "--recovery_epochs must not be negative, got -1",
        ),
        ({"num_rounds": "2", "do_train": "true"}, ConfigError, "expected exactly one of prune_ratio"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(
    changes: dict[str, str | None], error: type[Exception], message: str
) -> None:
    settings = {**GOOD, **changes}
    with pytest.raises(error, match=message):
        parse([word for name, value in settings.items() if value is not None for word in (f"--{name}", value)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sentence2": None}, r"validation: expected the text columns \['sentence1', 'sentence2'\], got the columns"),
        ({"label": None}, "validation: expected a column 'label', got the columns"),
        ({"label": [-1] * 10}, "validation: 10 of 10 rows have no label, the first of them row 0 with -1"),
        ({"label": [0, None] * 5}, "validation: 5 of 10 rows have no label, the first of them row 1 with None"),
        ({"label": [0, 2] * 5}, r"validation: unknown label 2; expected one of \['not_equivalent', 'equivalent'\]"),
        ({"label": ["yes", "equivalent"] * 5}, "validation: unknown label 'yes'"),
        ({"sentence1": ["good", None] * 5}, "validation: expected text in column 'sentence1', got None"),
    ],
)
def test_data_that_does_not_fit_the_task_is_refused(
    model_dir: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    table = {name: values for name, values in (pairs(10) | changes).items() if values is not None}
    file = str(write(table, tmp_path / "v.parquet"))
    with pytest.raises(ValueError, match=message):
        run(model_dir, tmp_path / "out", "--task_name", "mrpc", "--validation_file", file, "--do_eval")


def test_missing_files_and_splits_are_refused(model_dir: Path, mrpc: list[str], tmp_path: Path) -> None:
    train_only = mrpc[:4]
    with pytest.raises(ValueError, match=r"needs a validation split and \['train'\] were given"):
        run(model_dir, tmp_path, *train_only, "--do_train", "--do_eval")
    with pytest.raises(FileNotFoundError, match=r"--train_file 'none.csv' does not exist"):
        run(model_dir, tmp_path, "--task_name", "mrpc", "--train_file", "none.csv", "--do_train")
    with pytest.raises(ValueError, match=r"--train_file must end in one of .csv, .tsv, .json, .jsonl, .parquet"):
        run(model_dir, tmp_path, "--task_name", "mrpc", "--train_file", "none.txt", "--do_train")


def test_a_model_that_was_never_fine_tuned_is_not_pruned(model_dir: Path, mrpc: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"is not fine-tuned, it has no values for classifier\.bias, classifier\.weight"
    ):
        run(model_dir, tmp_path / "out", *mrpc, *PRUNE, "--do_train", "--num_train_epochs", "0")


def metric_of(task: str | None, outputs: list[Any], truth: list[Any], **settings: Any) -> dict[str, float]:
    regression = settings.pop("regression", task == "stsb")
    compute = make_metric(task, regression=regression, path=settings.pop("path", None))
    return compute(EvalPrediction(predictions=np.array(outputs, dtype=np.float64), label_ids=np.array(truth)))


# Predicted classes 1 1 0 1 0 0 against 1 1 1 0 0 0: two true and one false positives, one false and two true negatives.
LOGITS = [[0, 1], [0, 2], [1, 0], [0, 1], [3, 1], [1, 0]]
TRUTH = [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("mrpc", {"accuracy": 4 / 6, "f1": 2 / 3, "combined_score": 2 / 3}),
        ("qqp", {"accuracy": 4 / 6, "f1": 2 / 3, "combined_score": 2 / 3}),
        ("cola", {"matthews_correlation": (2 * 2 - 1 * 1) / 9}),
        ("sst2", {"accuracy": 4 / 6}),
        ("rte", {"accuracy": 4 / 6}),
        (None, {"accuracy": 4 / 6}),
    ],
)
def test_metrics_of_classes_without_a_network(task: str | None, expected: dict[str, float]) -> None:
    assert metric_of(task, LOGITS, TRUTH) == pytest.approx(expected)


def test_metrics_of_a_regression_without_a_network() -> None:
    outputs, truth = [0.5, 1.5, 9.0, 2.0], [1.0, 2.0, 4.0, 3.0]  # the same order, not on a line
    result = metric_of("stsb", [[x] for x in outputs], truth)
    pearson = float(np.corrcoef(outputs, truth)[0, 1])
    assert result == pytest.approx({"pearson": pearson, "spearmanr": 1.0, "combined_score": (pearson + 1) / 2})
    assert metric_of(None, [[x] for x in outputs], truth, regression=True)["mse"] == pytest.approx(
        (0.25 + 0.25 + 25 + 1) / 4
    )


def test_computing_the_metric_locally_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="glue.metrics"):
        metric_of("mrpc", LOGITS, TRUTH)
    assert "evaluate.load('glue', 'mrpc') is out of reach" in caplog.text
    assert "accuracy and f1 computed by scikit-learn and SciPy instead" in caplog.text


def test_the_hubs_metric_is_used_where_it_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Metric:
        def compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, Any]:
            return {"accuracy": np.float64(0.25)}

    calls = []
    monkeypatch.setattr(evaluate, "load", lambda *args: calls.append(args) or Metric())
    assert metric_of("sst2", LOGITS, TRUTH) == {"accuracy": 0.25}
    assert calls == [("glue", "sst2")]


def test_a_local_copy_of_the_metric_is_used(tmp_path: Path) -> None:
    script = """
import datasets
import evaluate

class Glue(evaluate.Metric):
    def _info(self):
        features = datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"ones": sum(predictions), "task": len(self.config_name)}
"""
    (tmp_path / "glue_copy.py").write_text(script, encoding="utf-8")
    result = metric_of("mrpc", LOGITS, TRUTH, path=str(tmp_path / "glue_copy.py"))
    assert result == {"ones": 3.0, "task": 4.0, "combined_score": 3.5}


def test_a_local_metric_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="metric script"):
        make_metric("mrpc", regression=False, path=str(tmp_path / "none.py"))


def test_the_table_has_a_row_for_each_size_and_is_not_made_twice(
    model_dir: Path, mrpc: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model_name_or_path", str(model_dir), "--work_dir", str(tmp_path / "table"), "--threads", "1"]
    words += ["--keep", "0.6", "--implant_ratio", "0.4", "--cache_dir", str(tmp_path / "cache"), *mrpc, *PRUNE[2:]]
    words += ["--disable_tqdm", "true", "--num_train_epochs", "1", "--recovery_epochs", "1"]
    text = glue_table.main(words)
    assert len(text.splitlines()) == 2 + 3
    removed, implanted = [json.loads(row) for row in (tmp_path / "table" / "rows.jsonl").read_text().splitlines()][1:]
    assert removed["heads"]["implanted"] + removed["ffn"]["implanted"] == 0
    assert implanted["heads"]["implanted"] + implanted["ffn"]["implanted"] > 0
    assert removed["results"]["pruned_params"] == num_params(tmp_path / "table" / "keep0.6-implant0")
    assert f"{100 * removed['results']['eval_accuracy']:.1f} / " in text

    monkeypatch.setattr(glue_table, "run_glue_hap", lambda command: pytest.fail(f"ran again: {command}"))
    assert glue_table.main(words) == text
