"""The table of recoveries: rows in processes of their own, made once, gone on with when they were interrupted."""

import json
import subprocess
from pathlib import Path

import pytest
import recovery

WORDS = ["--threads", "1", "--keep", "0.6", "--model_name_or_path", "test_resnet", "--num_train_epochs", "0"]
WORDS += ["--recovery_epochs", "2", "--max_train_samples", "64", "--max_eval_samples", "64", "--max_batches", "2"]
WORDS += ["--per_device_train_batch_size", "32"]


def test_rows_are_made_once_and_those_that_were_not_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--work_dir", str(tmp_path), "--ways", "distill", "scratch", *WORDS]
    asked = []

    def in_this_process(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        asked.append(json.loads(command[-1]))
        if asked[-1]["way"] == "scratch":
            return subprocess.CompletedProcess(command, 1)
        recovery.main(command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", in_this_process)
    text = recovery.main(words)
    assert [about["way"] for about in asked] == ["dense", "distill", "scratch"]
    rows = [json.loads(row) for row in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["way"] for row in rows] == ["dense", "distill"]
    results = rows[1]["results"]
    assert [point["epoch"] for point in results["curve"]] == [0, 1, 2]
    assert results["accuracy"] == results["curve"][-1]["accuracy"]
    assert results["params"] < rows[0]["results"]["params"]
    assert (tmp_path / "distill_0.6_0" / "teacher").is_dir()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert f" {100 * results['accuracy']:.2f} " in lines[3]
    assert "not run" in lines[4]

    # An interrupted row goes on from its last epoch.
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert recovery.main(words).splitlines()[:4] == text.splitlines()[:4]
