"""The GLUE example: its flags, its metrics, and what it says to bad input."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from glue_data import PRUNE, pairs, run, write
from run_glue_hap import make_compute_metrics, parse
from transformers import EvalPrediction

from hap_hf import ConfigError, HapConfig, Hessian, known_criteria


def test_every_setting_is_a_flag_with_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    settings = {f.name for of in (HapConfig, *known_criteria().values()) for f in dataclasses.fields(of)}
    for name in settings - {"amount", "parts"}:
        assert f" --{name} {name.upper()} " in text
    assert "Share of all units below the threshold" in text
    assert "Surviving numbers of neurons and of channels are a multiple of this. Default: 1." in text
    assert "Longer inputs are cut to this many tokens. (default: 128)" in text
    assert "default: None" not in text


def test_flags_become_the_config(tmp_path: Path) -> None:
    words = "--task_name cola --do_train --model_name_or_path m --seed 7 --prune_ratio 0.25 --kinds ffn --exclude a.* b"
    words += " --method hessian --num_probes 4 --precision bf16 --implant_init zero --round_to 8 --progress false"
    words += " --max_batches 3"
    *_, config = parse([*words.split(), "--output_dir", str(tmp_path)])
    expected = HapConfig(
        prune_ratio=0.25,
        kinds=("ffn",),
        exclude=("a.*", "b"),
        method=Hessian(num_probes=4),
        precision="bf16",
        implant_init="zero",
        round_to=8,
        progress=False,
        max_batches=3,
        seed=7,
    )
    assert config == expected


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
        ({"rounds": "2", "prune_step": "4"}, ValueError, "so leave out --prune_step, --prune_epoch and --num_rounds"),
        ({"grow": "1", "prune_epoch": "1"}, ValueError, "pass --prune_step, --rounds or neither"),
        ({"distill": "true", "recovery_epochs": "0"}, ValueError, "take place in the recovery"),
        ({"num_rounds": "2", "do_train": "true"}, ConfigError, "expected exactly one of prune_ratio"),
        ({"prune_ratio": "0.5", "num_probes": "2"}, ConfigError, "--num_probes belongs to --method hessian or"),
        ({"train_file": "none.txt"}, ValueError, "--train_file must end in one of .csv, .tsv, .json, .jsonl, .parquet"),
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


def test_a_model_that_was_never_fine_tuned_is_not_pruned(model_dir: Path, mrpc: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"is not fine-tuned, it has no values for classifier\.bias, classifier\.weight"
    ):
        run(model_dir, tmp_path / "out", *mrpc, *PRUNE, "--do_train", "--num_train_epochs", "0")


def metric_of(task: str | None, outputs: list[Any], truth: list[Any], **settings: Any) -> dict[str, float]:
    regression = settings.pop("regression", task == "stsb")
    compute = make_compute_metrics(task, is_regression=regression, metric_path=settings.pop("path", None))
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
    with caplog.at_level(logging.WARNING, logger="run_glue_hap"):
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
        make_compute_metrics("mrpc", is_regression=False, metric_path=str(tmp_path / "none.py"))
