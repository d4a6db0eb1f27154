"""The coverage table, on one small model."""

from pathlib import Path

import timm_coverage


def test_a_model_is_pruned_compared_and_reloaded_in_a_process_of_its_own(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    text = timm_coverage.main(["--models", "cifar_resnet20", "--log", str(log)])
    (row,) = [line for line in text.splitlines() if "cifar_resnet20" in line and line.startswith("|")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert sum(cell.startswith("yes") for cell in cells) == 2  # equal to the masked model, and reloaded
    assert "14" in cells  # groups
    assert len(log.read_text().splitlines()) == 1
