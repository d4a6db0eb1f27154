"""The benchmark of bits: rows that are kept, what they say of size, and rows that fail."""

import json
from pathlib import Path

import bits
import bits_clock
import pytest
import torch
from rows import made_in_processes

pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")
WORDS = ["--images", "--model_name_or_path", "test_resnet", "--max_train_samples", "48", "--max_eval_samples", "20"]
WORDS += ["--num_train_epochs", "0", "--max_batches", "1", "--per_device_train_batch_size", "20", "--held_out", "8"]


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bits")
    for name in ("dense", "pruned", "int8 QAT", "4 mixed PTQ"):
        assert bits.main(["--work_dir", str(folder), *WORDS, "--row", name]) == ""
    return folder


def test_rows_are_made_once_and_say_how_large_files_are(work_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in (work_dir / "rows.jsonl").read_text().splitlines()]
    of = {row["version"]: row["results"] for row in rows}
    assert of["4 mixed PTQ"]["bytes"] < of["int8 QAT"]["bytes"] < 0.4 * of["dense"]["bytes"]
    assert of["int8 QAT"]["onnx_accuracy"] == pytest.approx(of["int8 QAT"]["accuracy"], abs=0.1)
    assert set(of["4 mixed PTQ"]["bits"].values()) <= {3, 4, 6, 8}
    asked: list[str] = []
    monkeypatch.setattr(bits, "made_in_processes", lambda script, words, names: asked.extend(names))
    text = bits.main(["--work_dir", str(work_dir), *WORDS, "--versions", "dense", "4 QAT", "int8 QAT"])
    assert asked == ["4 QAT"]
    assert "| 4 QAT |  |  |  |  |" in text
    assert f"| int8 QAT | {100 * of['int8 QAT']['accuracy']:.2f} |" in text


def test_times_are_shares_of_the_dense_models_of_the_same_turn(work_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--work_dir", str(work_dir), "--runtimes", "eager", "--batch_sizes", "2", "--threads", "1", "--runs", "3"]
    assert bits_clock.main([*words, "--row", "2x1"]) == ""
    monkeypatch.setattr(bits_clock, "made_in_processes", lambda script, words, names: None)
    text = bits_clock.main(words)
    assert "| 2 | 1 | eager | pruned |" in text
    assert "int8 |" not in text  # rounding in floating point is no runtime
    lines = bits_clock.lines_of({"x": {"dense": [1.0, 2.0, 8.0], "pruned": [0.5, 1.5, 4.0]}}, ["1", "2"])
    assert lines[1] == ["1", "2", "x", "pruned", "1500.00", "0.50", "0.50 to 0.62", "3"]


def test_held_out_samples_are_the_last_and_not_trained_on(work_dir: Path) -> None:
    subject, whole = (
        bits.make_subject(WORDS[1:-2], work_dir / "dense", 0, on_images=True, num_held_out=count) for count in (8, 0)
    )
    images = torch.stack([image for image, _ in whole.material.train])
    assert torch.equal(torch.stack([image for image, _ in subject.material.train]), images[:40])
    collated = whole.material.collate(list(whole.material.train)[40:])
    held_out = torch.cat([batch["pixel_values"] for batch in subject.held_out])
    assert torch.equal(held_out, collated["pixel_values"])
    assert not whole.held_out


def test_a_row_that_fails_does_not_keep_the_others_from_being_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = tmp_path / "script.py"
    code = "import sys, pathlib; name = sys.argv[-1]; assert name != 'bad'; pathlib.Path(sys.argv[1], name).touch()"
    script.write_text(code, encoding="utf-8")
    made_in_processes(str(script), [str(tmp_path)], ["a", "bad", "b"])
    assert {file.name for file in tmp_path.iterdir()} == {"script.py", "a", "b"}
    assert "no row 'bad'" in caplog.text
