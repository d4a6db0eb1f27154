"""The benchmark of criteria: the same shares, rows that are kept, and peers that may fail."""

import json
from pathlib import Path

import pytest
import score_quality
import torch
from glue_data import build_model, pairs, write
from score_quality import OfEachKind, config_of, main
from scored_models import bert, text_batch

from hap_hf import Kind, Magnitude, ScoringTask, find_groups

TEXT = ["--per_device_train_batch_size", "4", "--num_train_epochs", "1", "--max_batches", "2"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a command line for a tiny BERT on a few pairs, with the folder of its results."""
    folder = tmp_path_factory.mktemp("quality")
    train, validation = write(pairs(), folder / "train.csv"), write(pairs(10, seed=1), folder / "validation.csv")
    files = ["--train_file", str(train), "--validation_file", str(validation), "--cache_dir", str(folder / "cache")]
    model = ["--model_name_or_path", str(build_model(folder / "bert"))]
    return ["--work_dir", str(folder / "work"), *model, *files, *TEXT, "--shares", "0.25", "0.5"]


@pytest.fixture(scope="module")
def rows(words: list[str]) -> list[dict[str, object]]:
    main([*words, "--criteria", "random", "mask_ggn@2", "ggn:joint+", "--seeds", "0", "1"])
    return [json.loads(line) for line in Path(words[1], "rows.jsonl").read_text().splitlines()]


def test_every_criterion_removes_the_same_share_of_each_kind(rows: list[dict[str, object]]) -> None:
    assert len(rows) == 2 * (1 + 3 * 2)
    for share in (0.25, 0.5):
        sizes = {row["results"]["params"] for row in rows if row["share"] == share}
        assert len(sizes) == 1
    dense, less, least = (next(r["results"]["params"] for r in rows if r["share"] == s) for s in (0.0, 0.25, 0.5))
    assert dense > less > least


def test_units_keep_their_order_and_are_spread_evenly_over_each_kind() -> None:
    model = bert()
    groups = find_groups(model, text_batch())
    task = ScoringTask(config_of("magnitude", 0.5, 0).evidence(model, []), groups)
    places, scores = OfEachKind(of=Magnitude()).score(task).sensitivity, Magnitude().score(task).sensitivity
    for kind in (Kind.HEADS, Kind.FFN):
        found, given = (torch.cat([of[g.name] for g in groups if g.kind is kind]) for of in (places, scores))
        assert found.argsort().tolist() == given.argsort().tolist()
        torch.testing.assert_close(found.sort().values, (torch.arange(len(found)).double() + 0.5) / len(found))


def test_what_is_done_is_not_made_again(
    rows: list[dict[str, object]], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_quality, "measure", None)
    text = main([*words, "--criteria", "ggn:joint+", "--seeds", "0", "1"])
    accuracy = [100 * r["results"]["accuracy"] for r in rows if r["criterion"] == "ggn:joint+" and r["share"] == 0.25]
    assert f"| ggn:joint+ | {sum(accuracy) / 2:.1f} ± " in text


def test_a_peer_that_fails_has_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(score_quality, "prune_with_torch_pruning", fail)
    words = ["--images", "--work_dir", str(tmp_path), "--shares", "0.5", "--criteria", "magnitude", "tp_taylor"]
    few = ["--max_train_samples", "64", "--max_eval_samples", "64", "--per_device_train_batch_size", "32"]
    text = main([*words, *few, "--model_name_or_path", "test_resnet", "--num_train_epochs", "1", "--augment"])
    assert "| tp_taylor | fails |" in text
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert lines[-1]["results"] == {"error": "RuntimeError: shapes do not match"}
    assert lines[1]["results"]["params"] < lines[0]["results"]["params"]


def test_the_peer_removes_as_many_heads_and_neurons(words: list[str], rows: list[dict[str, object]]) -> None:
    pytest.importorskip("torch_pruning", reason="the peer is compared where it is installed")
    main([*words, "--criteria", "tp_taylor", "tp_hessian", "--seeds", "0", "--shares", "0.25"])
    made = [json.loads(line) for line in Path(words[1], "rows.jsonl").read_text().splitlines()]
    own = next(row["results"]["params"] for row in rows if row["share"] == 0.25)
    theirs = [row["results"]["params"] for row in made if row["criterion"].startswith("tp_")]
    assert theirs == 2 * [pytest.approx(own, rel=0.02)]  # it rounds otherwise
