"""Files that are not whole are told by their name, and no sweep is written that could not be read."""

import json
import math

import pytest
from documented import bert, text_batches
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import hap_hf
from hap_hf.checkpoint.headers import read_header
from hap_hf.cli.app import app
from hap_hf.errors import ConfigError
from hap_hf.evidence.evidence import Evidence
from hap_hf.report import PruningReport
from hap_hf.tradeoff import SWEEP_FILE, Tradeoff, TradeoffPoint

REPORT, SCORES, WEIGHTS = "pruning_report.json", "pruning_scores.safetensors", "model.safetensors"
DAMAGES = {"empty": lambda b: b"", "half": lambda b: b[: len(b) // 2], "other": lambda b: b"\xff\xfe" + b}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files that a pruning and a sweep leave, by name."""
    folder = tmp_path_factory.mktemp("whole")
    model, config = bert(), hap_hf.HapConfig(target_params=0.6, method="taylor")
    decision = hap_hf.decide(Evidence(model, text_batches()), config)
    decision.save(folder)
    hap_hf.carry_out_(model, decision).save(folder)
    model.save_pretrained(folder)
    points = (TradeoffPoint(1.0, 100, 1e6, 0.5, 0.9, predicted=None), TradeoffPoint(0.5, 60, 6e5, 0.6, 0.8))
    Tradeoff(points, "accuracy", True).save(folder / SWEEP_FILE)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def folder(whole, tmp_path):
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


READERS = {
    REPORT: PruningReport.load,
    SCORES: PruningReport.load,
    SWEEP_FILE: lambda folder: Tradeoff.load(folder / SWEEP_FILE),
    WEIGHTS: read_header,
    "decision.json": lambda folder: hap_hf.Decision.load(folder, Evidence(bert(), text_batches())),
    "decision.safetensors": lambda folder: hap_hf.Decision.load(folder, Evidence(bert(), text_batches())),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
@pytest.mark.parametrize("name", sorted(READERS))
def test_a_file_that_is_not_whole_is_named(name, damage, folder):
    READERS[name](folder)
    (folder / name).write_bytes(DAMAGES[damage]((folder / name).read_bytes()))
    with pytest.raises(ConfigError, match=f"{name} is damaged, or no "):
        READERS[name](folder)


@pytest.mark.parametrize("damage", ["empty", "half"])
def test_weights_that_are_not_whole_are_named_where_a_pruned_model_is_loaded(damage, folder):
    AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / WEIGHTS).write_bytes(DAMAGES[damage]((folder / WEIGHTS).read_bytes()))
    with pytest.raises(ConfigError, match=f"{WEIGHTS} is damaged, or no safetensors"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def set_in(values, place, value):
    *path, last = place
    for step in path:
        values = values[step]
    values[last] = value


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        (REPORT, ["groups", 0, "name"], None),
        (REPORT, ["groups", 0, "units"], "12"),
        (REPORT, ["before", "params"], "many"),
        (REPORT, ["threshold"], "high"),
        (REPORT, ["seconds"], []),
        (SWEEP_FILE, ["points", 1, "loss"], math.nan),
        (SWEEP_FILE, ["points", 1, "macs"], math.inf),
        (SWEEP_FILE, ["points"], 3),
    ],
)
def test_values_that_are_none_of_their_kind_are_one_line_with_the_file(name, place, value, folder):
    other = {REPORT: SWEEP_FILE, SWEEP_FILE: REPORT}[name]
    (folder / other).unlink()
    values = json.loads((folder / name).read_text(encoding="utf-8"))
    set_in(values, place, value)
    (folder / name).write_text(json.dumps(values), encoding="utf-8")
    done = CliRunner().invoke(app, ["plot", str(folder), "--out", str(folder / "new")])
    assert done.exit_code == 1, done.output + repr(done.exception)
    assert done.stderr.startswith(f"error: {folder / name}: expected ")
    assert done.stderr.count("\n") == 1
    assert not (folder / "new").exists()


def test_a_sweep_without_numbers_is_not_written(tmp_path):
    points = (TradeoffPoint(1.0, 100, 1e6, 0.5, 0.9), TradeoffPoint(0.5, 60, 6e5, math.nan, 0.8))
    with pytest.raises(ConfigError, match=r"expected numbers in a sweep, and at 0.5 .* are nan, 0.8, 0; leave"):
        Tradeoff(points, "accuracy", True).save(tmp_path / SWEEP_FILE)
    assert not list(tmp_path.iterdir())
