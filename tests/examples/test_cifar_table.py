"""The table of image classifiers: a line for each way, made once, with the numbers of its runs."""

import json
from pathlib import Path

import cifar_table
import pytest


def test_the_table_has_a_line_for_each_way_and_is_not_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--work_dir", str(tmp_path / "table"), "--threads", "1", "--keep", "0.6", "--implant_ratio", "0.4"]
    words += ["--model_name_or_path", "test_resnet", "--methods", "random", "--seeds", "0", "1"]
    words += ["--num_train_epochs", "1"]
    words += ["--recovery_epochs", "1", "--max_train_samples", "64", "--max_eval_samples", "64"]
    words += ["--per_device_train_batch_size", "32", "--max_batches", "2"]
    text = cifar_table.main(words)
    rows = [json.loads(row) for row in (tmp_path / "table" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 1 + 2 * 2
    for row in rows[1:]:
        results = row["results"]
        assert 0.4 < results["kept"] <= 0.6
        assert results["params"] < rows[0]["results"]["params"]
        assert results["macs"] < rows[0]["results"]["macs"]
    assert any(row["results"]["recalibrated"] != row["results"]["pruned"] for row in rows[1:])
    assert any(row["results"]["finetuned"] != row["results"]["recalibrated"] for row in rows[1:])
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 1 + 2
    for ratio, line in zip((0.0, 0.4), lines[3:], strict=True):
        mean = sum(row["results"]["finetuned"] for row in rows[1:] if row["implant_ratio"] == ratio) / 2
        assert f" {100 * mean:.2f} ± " in line

    monkeypatch.setattr(cifar_table, "prune_in_each_way", lambda *_: pytest.fail("ran again"))
    assert cifar_table.main(words) == text
