"""The benchmark of repairs: the same units, rows that are kept, and equal sizes."""

import json
from pathlib import Path

import pytest
import repair_quality
from glue_data import build_model, pairs, write
from repair_quality import main

TEXT = ["--per_device_train_batch_size", "4", "--num_train_epochs", "1", "--max_batches", "2"]
WAYS = ["--criteria", "mask_ggn", "reconstruction", "--repairs", "none", "reconstruction", "--seeds", "0"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Return a command line for a tiny BERT on a few pairs, with the folder of its results."""
    folder = tmp_path_factory.mktemp("repairs")
    train, validation = write(pairs(), folder / "train.csv"), write(pairs(10, seed=1), folder / "validation.csv")
    files = ["--train_file", str(train), "--validation_file", str(validation), "--cache_dir", str(folder / "cache")]
    model = ["--model_name_or_path", str(build_model(folder / "bert"))]
    return ["--work_dir", str(folder / "work"), *model, *files, *TEXT, "--keep", "0.5"]


@pytest.fixture(scope="module")
def table(words):
    return main([*words, *WAYS])


def test_each_criterion_chooses_and_each_repair_follows(words, table):
    rows = [json.loads(line) for line in Path(words[1], "rows.jsonl").read_text().splitlines()]
    made = {(r["criterion"], r["repair"]): r["results"] for r in rows}
    assert set(made) == {("", "dense")} | {
        (c, r) for c in ("mask_ggn", "reconstruction") for r in ("none", "reconstruction")
    }
    for criterion in ("mask_ggn", "reconstruction"):
        assert made[criterion, "none"]["params"] == made[criterion, "reconstruction"]["params"]
        assert made[criterion, "none"]["choice_s"] == made[criterion, "reconstruction"]["choice_s"]  # chosen once
    assert made["mask_ggn", "none"]["choice_s"] != made["reconstruction", "none"]["choice_s"]
    assert made["", "dense"]["divergence"] == 0
    assert table.count("| 50% |") == 4


def test_what_is_done_is_not_made_again(words, table, monkeypatch):
    monkeypatch.setattr(repair_quality, "measure", None)
    assert main([*words, *WAYS]) == table
