"""The command line, most of it inside this process."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from on_disk import save_data, save_model
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer
from typer.testing import CliRunner

from hap_hf import PruningReport, plan_of
from hap_hf.arguments import pruning_arguments
from hap_hf.cli.app import app
from hap_hf.cli.tasks import TASKS
from hap_hf.tradeoff import Tradeoff

MACS = ["--target-macs", "0.5"]
QUICK = ["--max-batches", "2", "--batch-size", "4", "--eval-samples", "8", "--method", "taylor"]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def ran(*words):
    done = run(*words)
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.stdout


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with a dense model and one with the same, pruned to half."""
    folder = tmp_path_factory.mktemp("images")
    save_model("image-classification", folder / "dense")
    words = ["--implant-ratio", 0.5, *QUICK, "--method", "mask_ggn", "--json"]
    printed = ran("prune", folder / "dense", "--data", "digits", "--out", folder / "pruned", *words)
    return folder, json.loads(printed)


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"image-classification"}))
def test_every_task_is_pruned_trained_and_saved(task, tmp_path):
    model, data = save_model(task, tmp_path / "dense"), save_data(task, tmp_path)
    words = ["--keep", 0.6, *QUICK, "--max-length", 8, "--epochs", 1]
    text = ran("prune", model, "--data", data, "--out", tmp_path / "out", *words)
    assert f"{TASKS[task].metric} after training" in text
    smaller = TASKS[task].auto.from_pretrained(tmp_path / "out")
    report = PruningReport.load(tmp_path / "out")
    assert report.after.params == smaller.num_parameters() < report.before.params
    assert report.prunable_after.params <= 0.6 * report.prunable_before.params
    assert {"heads.png", "widths.png", "pruning_report.md"} <= {f.name for f in (tmp_path / "out").iterdir()}
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 60


def test_the_json_is_the_report(images):
    folder, printed = images
    report = PruningReport.load(folder / "pruned")
    assert {name: printed[name] for name in report.to_dict()} == report.to_dict() | {
        "provenance": printed["provenance"]
    }
    assert set(printed["results"]) == {"before", "after pruning"}
    assert report.loss_before is not None


def test_the_judge_is_the_accuracy_of_the_model(images):
    folder, printed = images
    model = AutoModelForImageClassification.from_pretrained(folder / "pruned")
    from hap_hf.cli.setup import Given, set_up

    setup = set_up(Given(str(folder / "pruned"), "digits", batch_size=4, max_batches=2, eval_samples=8))
    right = total = 0
    with torch.no_grad():
        for batch in [*setup.judge.keywords["batches"]]:
            guess = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
            right, total = right + (guess == batch["labels"]).sum().item(), total + len(guess)
    assert total == 8
    assert printed["results"]["after pruning"] == right / total


def test_inspect_says_what_went_without_loading_weights(images, monkeypatch):
    folder, _ = images
    monkeypatch.setattr(AutoModelForImageClassification, "from_pretrained", None)
    told = json.loads(ran("inspect", folder / "pruned", "--json"))
    monkeypatch.undo()
    model = AutoModelForImageClassification.from_pretrained(folder / "pruned")
    dense = AutoModelForImageClassification.from_pretrained(folder / "dense")
    assert told["parameters"] == model.num_parameters()
    assert told["parameters before"] == dense.num_parameters()
    groups = {g["name"]: g for g in told["stages"][0]["groups"]}
    for g in plan_of(model):
        assert groups[g.group.name]["removed"] == g.units("p")
        assert groups[g.group.name]["implanted"] == g.units("i")
    assert "heads 4 -> " in ran("inspect", folder / "pruned")


def test_sweep_scores_once_and_leaves_the_model(images, tmp_path, monkeypatch):
    folder, _ = images
    before = (folder / "dense" / "model.safetensors").read_bytes()
    words = ["--data", "digits", "--out", tmp_path, "--keep", "0.8,0.5", "--html", *QUICK]
    text = ran("sweep", folder / "dense", *words)
    found = Tradeoff.load(tmp_path / "sweep.json")
    assert [p.keep for p in found.points] == [1.0, 0.8, 0.5]
    assert [p.params for p in found.points] == sorted((p.params for p in found.points), reverse=True)
    assert "dense" in text
    assert (tmp_path / "sweep.png").is_file()
    page = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    assert f"<h1>{found.subject}: accuracy" in page
    heads = [g for g in found.groups if g.kind == "heads"]
    assert [len(g.sensitivity) for g in heads] == [4, 4] == [len(g.error) for g in heads]
    (tmp_path / "sweep.html").unlink()
    assert "sweep.html" in ran("plot", tmp_path, "--html")
    assert (tmp_path / "sweep.html").read_text(encoding="utf-8") == page
    assert (folder / "dense" / "model.safetensors").read_bytes() == before


def test_plot_draws_what_is_there(images, tmp_path):
    folder, _ = images
    drawn = json.loads(ran("plot", folder / "pruned", "--svg", "--out", tmp_path / "new", "--json"))
    assert sorted(p.rpartition("/")[2] for p in drawn) == ["heads.svg", "threshold.svg", "widths.svg"]
    assert (tmp_path / "new" / "heads.svg").read_text(encoding="utf-8").count("<svg") == 1


def test_vanilla_needs_no_hap_hf(tmp_path):
    model, data = save_model("text-generation", tmp_path / "dense"), save_data("text-generation", tmp_path)
    words = ["--keep", 0.5, "--max-group-ratio", 0.5, *QUICK, "--max-length", 8]
    ran("prune", model, "--data", data, "--out", tmp_path / "pruned", *words)
    ran("vanilla", tmp_path / "pruned", "--out", tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text(encoding="utf-8"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.num_parameters() == PruningReport.load(tmp_path / "pruned").after.params


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "{dense}"], "carries no plan of hap_hf"),
        (["inspect", "{root}"], "has no config.json"),
        (["inspect", "{dense}/config.json"], "config.json is a file; name the folder that holds the model"),
        (
            ["prune", "{dense}", "--data", "nothing", "--out", "{root}/x"],
            "there is no file or folder 'nothing', and no",
        ),
        (["vanilla", "{pruned}", "--out", "{root}/x"], "cannot hold implants"),
        (["plot", "{pruned}", "--html"], "has no sweep.json; hap-hf sweep writes one"),
        (["plot", "{dense}"], "has neither pruning_report.json nor sweep.json"),
        (["prune", "./nothing", "--data", "digits", "--out", "{root}/x"], "there is no folder './nothing'"),
        (
            ["prune", "nothing", "--data", "digits", "--out", "{root}/x"],
            "there is no folder 'nothing', and it could not",
        ),
        (["prune", "{root}", "--data", "digits", "--out", "{root}/x"], "holds no model that can be read"),
        (["inspect", "nothing"], "there is no folder 'nothing', and it could not be read from the Hub"),
        (["inspect", "no/such/path"], "there is no folder 'no/such/path'"),
        (["vanilla", "nothing", "--out", "{root}/x"], "there is no folder 'nothing', and"),
        (["prune", "{dense}", "--data", "nothing.csv", "--out", "{root}/x"], "there is no file 'nothing.csv'"),
        (["prune", "{dense}", "--data", "digits", "--out", "{dense}"], "would be overwritten"),
        (
            ["prune", "{dense}", "--data", "digits", "--out", "{root}/x", "--keep", "50"],
            "--keep must lie in (0, 1), got 50.0",
        ),
        (["prune", "{dense}", "--data", "digits", "--out", "{root}/x", "--task", "ocr"], "--task must be one of"),
        (["prune", "{dense}", "--data", "digits", "--out", "{root}/x", "--label-column", "y"], "has no column 'y'"),
        (["prune", "{dense}", "--data", "digits", "--out", "{root}/x", "--held-out", "v"], "has no split 'v'"),
        (["prune", "{dense}", "--data", "digits", "--out", "{root}/x", "--num-probes", "3"], "belongs to --method"),
        (["sweep", "{dense}", "--data", "digits", "--out", "{root}/x", "--keep", "half"], "takes shares with commas"),
        (
            ["sweep", "{dense}", "--data", "digits", "--out", "{root}/x", "--keep", "50,0.3"],
            "--keep must lie in (0, 1)",
        ),
        (["sweep", "{dense}", "--data", "digits", "--out", "{root}/x", *MACS], "--keep names; leave out --target-macs"),
        (
            ["prune", "{dense}", "--data", "digits", "--out", "{root}/x", "--keep", "0.4", *MACS],
            "got --keep 0.4 and --target-macs 0.5; leave the others out",
        ),
        (
            ["prune", "{dense}", "--data", "digits", "--out", "{root}/x", "--prune-ratio", "0.4", *MACS],
            "got --prune-ratio 0.4 and --target-macs 0.5",
        ),
        (["prune", "{dense}", "--data", "digits", "--out", "{root}/x", "--target-macs", "5"], "--target-macs must lie"),
    ],
)
def test_a_slip_is_one_line_and_exit_code_1(words, message, images):
    folder, _ = images
    places = {"root": folder, "dense": folder / "dense", "pruned": folder / "pruned"}
    done = run(*(word.format(**places) for word in words))
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert not (folder / "x").exists()


def test_a_wrong_use_is_exit_code_2():
    done = run("prune", "somewhere")
    assert done.exit_code == 2
    assert "--data" in done.stderr


def test_every_setting_is_a_flag_and_the_help_fits_a_screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    short, long = ran("prune", "--help"), ran("prune", "--help-all")
    assert short.count("\n") <= 50
    assert "--implant-ratio" not in short
    flags = {f.name for f in fields(pruning_arguments("seed", "max_batches"))}
    assert {"implant_ratio", "num_probes", "exclude"} <= flags
    for name in flags:
        assert f"--{name.replace('_', '-')} " in long


def test_a_process_answers_and_is_quiet_in_a_pipe(images):
    folder, _ = images
    command = [sys.executable, "-m", "hap_hf"]
    done = subprocess.run([*command, "inspect", folder / "pruned"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
