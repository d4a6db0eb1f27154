"""The benchmark of estimators: that it compares what it says, with numbers that are right; never how long they take."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import score_fidelity
import torch
import trace_runs
from glue_data import build_model, pairs, write
from trace_peers import PEERS, OfPeer
from trace_runs import ESTIMATORS, SPLIT, Estimate, estimate, run_alone
from trace_table import Reference, half_found, largest_difference, to_markdown
from transformers import AutoModelForSequenceClassification

from hap_hf import Coupling, Evidence, Hessian, Hvp, ScoringTask, find_groups
from hap_hf.criteria import UnitWeights
from hap_hf.criteria.probes import Again, by_probes
from hap_hf.curvature import LinearisedLosses


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ScoringTask:
    folder = build_model(tmp_path_factory.mktemp("models") / "bert", head=True, initializer_range=0.2)
    model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    generator = torch.Generator().manual_seed(0)
    # Of different sizes, so that batches which count alike would show.
    batches = [
        {
            "input_ids": torch.randint(5, 15, (size, 6), generator=generator),
            "attention_mask": torch.ones(size, 6, dtype=torch.long),
            "labels": torch.randint(0, 2, (size,), generator=generator),
        }
        for size in (3, 1)
    ]
    return ScoringTask(Evidence.of(model, batches, progress=False), find_groups(model, batches[0]))


def every(by_group: dict[str, torch.Tensor], task: ScoringTask) -> torch.Tensor:
    return torch.cat([by_group[group.name] for group in task.groups])


def fake(name: str, values: list[float], num_probes: int = 2, seconds: float = 1.0) -> score_fidelity.Row:
    return {"estimator": name, **vars(Estimate(num_probes, values, [0.0] * len(values), seconds, seconds))}


def cells_of(text: str) -> list[dict[str, str]]:
    """Return the lines of the table by their column's name."""
    head, _, *lines = ([c.strip() for c in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("|"))
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_an_estimate_is_what_the_criterion_says(task: ScoringTask) -> None:
    for name, number in (("ggn, exact", 0), ("hessian, finite_difference", 2)):
        found, scores = estimate(name, number, task), ESTIMATORS[name](number).score(task)
        expected = every(scores.sensitivity, task)
        torch.testing.assert_close(torch.tensor(found.sensitivity, dtype=torch.float64), expected)
        assert (found.num_probes, found.seconds > 0) == (number, True)
    found, scores = estimate("hessian", 4, task), Hessian(num_probes=4).score(task)
    torch.testing.assert_close(torch.tensor(found.error).double(), every(scores.standard_error, task))


def test_the_error_of_the_split_trace_is_that_of_the_probes_alone(task: ScoringTask) -> None:
    found = torch.tensor(estimate(SPLIT, 3, task).error, dtype=torch.float64)
    units = UnitWeights.of(task.evidence.model, task.groups)
    rest = LinearisedLosses(task.evidence.model, Again(task.evidence.losses), units.tensors)
    probing = Hessian(num_probes=3, stop_share=None, hvp=Hvp.DOUBLE_BACKWARD, coupling=Coupling.SUM)
    torch.testing.assert_close(found, by_probes(task, units, probing, rest, "").standard_error)
    # With the spread over the samples it is larger.
    assert (found < every(ESTIMATORS[SPLIT](3).score(task).standard_error, task)).all()


@pytest.mark.parametrize("peer", sorted(PEERS))
def test_a_peer_comes_to_the_scores_of_the_same_probes(task: ScoringTask, peer: str) -> None:
    if PEERS[peer][0]:
        pytest.importorskip(PEERS[peer][0])
    other = replace(task, evidence=replace(task.evidence, seed=1))
    expected, with_other_probes = (every(Hessian(num_probes=3).score(t).sensitivity, t) for t in (task, other))
    found = every(OfPeer(peer=peer, num_probes=3).score(task).sensitivity, task)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, with_other_probes)
    assert all(p.grad is None for p in task.evidence.model.parameters())


def test_parts_of_a_reference_count_by_their_probes() -> None:
    parts = [
        {"num_probes": 1, "sensitivity": [4.0, 0.0], "error": [2.0, 0.0]},
        {"num_probes": 3, "sensitivity": [8.0, 0.0], "error": [1.0, 0.0]},
    ]
    found = Reference.of(parts)
    assert found.num_probes == 4
    assert found.values.tolist() == [7.0, 0.0]
    assert found.errors.tolist() == [math.hypot(2.0 * 1 / 4, 1.0 * 3 / 4), 0.0]


def test_the_error_of_a_reference_is_the_median_relative_to_its_scores() -> None:
    values = torch.tensor([-2.0, 10.0, 1.0, 0.0, 0.0])
    assert Reference(values, torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]), 8).relative_error == 0.5


def test_a_reference_grows_until_its_error_is_small_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def part(_: object, seed: int, num_probes: int) -> score_fidelity.Row:
        asked.append((seed, num_probes))
        return {"num_probes": num_probes, "sensitivity": [1.0], "error": [num_probes**-0.5]}

    monkeypatch.setattr(score_fidelity.Bench, "part_of_reference", part)
    flags = ["--work_dir", str(tmp_path), "--seed", "3", "--reference_error"]
    found = score_fidelity.reference_of(score_fidelity.Bench(score_fidelity.parse([*flags, "0.2"]), tmp_path))
    assert found.num_probes == 25
    assert found.relative_error == pytest.approx(0.2)
    assert asked == [(4, 8), (5, 8), (6, 9)]
    asked.clear()
    few = [*flags, "0.01", "--most_probes", "20"]
    assert score_fidelity.reference_of(score_fidelity.Bench(score_fidelity.parse(few), tmp_path)).num_probes == 20


def test_a_reference_without_noise_takes_no_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"num_probes": 0, "sensitivity": [1.0, 0.0], "error": None}
    monkeypatch.setattr(score_fidelity.Bench, "part_of_reference", lambda *_: row)
    own = score_fidelity.parse(["--work_dir", str(tmp_path), "--reference", "ggn, exact"])
    found = score_fidelity.reference_of(score_fidelity.Bench(own, tmp_path))
    assert (found.values.tolist(), found.relative_error, found.num_probes) == ([1.0, 0.0], 0.0, 0)


def test_half_of_the_units_are_those_with_the_lowest_scores() -> None:
    truth = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert half_found(torch.tensor([2.0, 1.0, 9.0, 8.0, 7.0]), truth) == 1
    assert half_found(torch.tensor([-9.0, 8.0, 7.0, 6.0, 0.0]), truth) == 0.5
    assert half_found(-truth, truth) == 0


def test_differences_are_relative_to_the_largest_score_of_the_same_group() -> None:
    truth, owners = torch.tensor([-10.0, 1.0, 0.5]), torch.tensor([0, 0, 1])
    assert largest_difference(torch.tensor([-10.0, 2.0, 0.5]), truth, owners) == pytest.approx(0.1)
    assert largest_difference(torch.tensor([-10.0, 1.0, 0.6]), truth, owners) == pytest.approx(0.2)


def test_the_table_compares_ranks_with_the_reference() -> None:
    reference = Reference(torch.tensor([1.0, 2.0, 3.0, -4.0]), torch.zeros(4), 8)
    rows = [
        fake("hessian", [1.0, 2.0, 3.0, -4.0], seconds=6.0),
        fake("ggn", [1.0, 2.0, -4.0, 3.0], 1, seconds=2.0),
        fake("loop", [1.0, 2.0, 3.0, -2.0]),
        {"estimator": "curvlinops", "failed": "RuntimeError: no | rule"},
    ]
    text = to_markdown(rows, [("ffn", 2), ("heads", 2)], reference, "hessian")
    hessian, ggn, loop, failed = cells_of(text)
    assert [hessian[name] for name in ("Spearman", "ffn", "heads", "half found", "off by")] == ["1.000"] * 4 + [""]
    assert [ggn[name] for name in ("Spearman", "ffn", "heads", "half found", "off by")] == [
        "-0.800",
        "1.000",
        "-1.000",
        "0.500",
        "",
    ]
    assert (hessian["times ggn"], hessian["s a probe"]) == ("3.0", "3.000")
    assert loop["off by"] == "5e-01"
    assert failed["probes"] == "RuntimeError: no / rule"
    assert "2 ffn and 2 heads. Reference: hessian, 8 probes; median standard error 0.0%" in text
    assert "25.0% of the scores negative" in text
    assert "2 probes of hessian take 3.0 times as long as ggn" in text


def test_a_run_is_measured_and_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(tmp_path / "bert")
    train, validation = write(pairs(), tmp_path / "train.csv"), write(pairs(8, seed=1), tmp_path / "validation.csv")
    words = ["--work_dir", str(tmp_path / "runs"), "--estimators", "hessian", "ggn", "loop", "PyHessian"]
    words += ["--probes", "2", "3", "--peer_probes", "2", "--reference_error", "1000"]
    words += ["--model_name_or_path", str(model), "--train_file", str(train), "--validation_file", str(validation)]
    words += ["--num_train_epochs", "0", "--max_batches", "2", "--cache_dir", str(tmp_path / "cache")]
    monkeypatch.setattr(score_fidelity, "is_installed", lambda name: name == "loop")
    monkeypatch.setattr(trace_runs, "_REPEATS", 1)

    def run_here(material: Path, name: str, numbers: list[int], *, seed: int, threads: int) -> list[Estimate]:
        if name == "ggn":  # in a process of its own, as all of them outside of this test
            return run_alone(material, name, numbers, seed=seed, threads=threads)
        return trace_runs.run(material, name, numbers, seed, threads)

    monkeypatch.setattr(score_fidelity, "run_alone", run_here)
    text = score_fidelity.main(words)
    assert text in capsys.readouterr().out
    rows = cells_of(text)
    assert [(row["estimator"], row["probes"]) for row in rows] == [
        ("hessian", "2"),
        ("hessian", "3"),
        ("ggn", "1"),
        ("loop", "2"),
    ]
    assert "PyHessian is not installed and left out." in text
    assert f"Reference: {SPLIT}, 8 probes" in text
    assert float(rows[3]["off by"]) < 1e-4
    kept = [json.loads(line) for line in (tmp_path / "runs" / "rows.jsonl").read_text().splitlines()]
    assert all(row["seconds"] > 0 and row["mebibytes"] >= 0 for row in kept if row["estimator"] != "units")
    monkeypatch.setattr(score_fidelity, "run_alone", None)
    assert score_fidelity.main(words) == text


def test_an_estimator_that_fails_says_so_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no rule\nand a long trace")

    monkeypatch.setattr(score_fidelity, "run_alone", fail)
    bench = score_fidelity.Bench(score_fidelity.parse(["--work_dir", str(tmp_path)]), tmp_path)
    bench.material = tmp_path / "material.pt"
    assert bench.rows_of("ggn", [1], 0) == [{"estimator": "ggn", "failed": "RuntimeError: no rule"}]
    assert not bench.file.exists()
    with pytest.raises(RuntimeError, match="there is no reference"):
        score_fidelity.reference_of(bench)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--probes", "1"], "--probes must be at least 2"),
        (["--peer_probes", "1"], "--peer_probes must be at least 2"),
        (["--most_probes", "7"], "--most_probes must be at least 8"),
    ],
)
def test_too_few_probes_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        score_fidelity.parse(["--work_dir", "runs", *flags])
    assert message in capsys.readouterr().err
