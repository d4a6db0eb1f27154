"""``hap-hf export``: once as a process, and otherwise inside this one."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from on_disk import save_data, save_model
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from hap_hf.cli.app import app
from hap_hf.cli.example import example_batch
from hap_hf.cli.loading import load
from hap_hf.cli.tasks import TASKS

onnx = pytest.importorskip("onnx", reason="the extra [export] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")


def run(*words):
    return CliRunner().invoke(app, ["export", *map(str, words)])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for task in ("image-classification", "text-classification"):
        save_model(task, folder / task)
    save_data("text-classification", folder)
    return folder


def logits_of(path, **inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def test_a_process_writes_onnx_that_computes_what_the_model_does(models, tmp_path):
    out = tmp_path / "new" / "vit.onnx"
    command = [sys.executable, "-m", "hap_hf", "export", models / "image-classification", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert str(out) in done.stdout
    pixels = torch.rand(5, 1, 8, 8)
    model = AutoModelForImageClassification.from_pretrained(models / "image-classification")
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
    torch.testing.assert_close(logits_of(out, pixel_values=pixels), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits_of(out, pixel_values=1 - pixels), expected, rtol=1e-4, atol=1e-5)


def test_half_precision_is_exported_in_single(models, tmp_path):
    half = AutoModelForImageClassification.from_pretrained(models / "image-classification", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    done = run(tmp_path / "half", "--out", tmp_path / "vit.onnx")
    assert done.exit_code == 0, done.output
    pixels = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        expected = half.float()(pixel_values=pixels).logits
    torch.testing.assert_close(logits_of(tmp_path / "vit.onnx", pixel_values=pixels), expected, rtol=1e-4, atol=1e-5)


def test_integers_take_their_ranges_from_data_and_are_judged(models, tmp_path):
    out, words = tmp_path / "bert.onnx", ["--data", models / "train.csv", "--max-batches", 2, "--json"]
    done = run(models / "text-classification", "--out", out, "--format", "onnx-int8", *words)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["bytes"] == out.stat().st_size
    assert {"before", "rounded"} <= told.keys()
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(out).graph.node}


def test_a_program_takes_texts_of_other_lengths(models, tmp_path):
    out = tmp_path / "bert.pt2"
    assert run(models / "text-classification", "--out", out, "--format", "pt2").exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(models / "text-classification")
    batch = tokenizer(["w1 w2 w3 w4", "w5 w6", "w7"], padding=True, return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(models / "text-classification").eval()
    with torch.no_grad():
        expected = model(**batch).logits
        found = torch.export.load(out).module()(*batch.values())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, expected.flip(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_has_an_example_that_its_model_takes(task, tmp_path):
    loaded = load(str(save_model(task, tmp_path / "model")), None)
    batch = example_batch(loaded)
    with torch.no_grad():
        out = loaded.model(**batch)
    assert next(iter(out.values())).shape[0] == 2
    if "attention_mask" in batch:
        assert batch["attention_mask"].min() == 0  # padding is among what the file is compared on


def test_images_of_timm_have_the_size_that_timm_says(tmp_path):
    pytest.importorskip("timm", reason="the extra [timm] is not installed")
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(architecture="test_resnet", num_labels=10)
    TimmWrapperForImageClassification(config).save_pretrained(tmp_path)
    assert example_batch(load(str(tmp_path), None))["pixel_values"].shape[1:] == (3, 160, 160)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "{folder}/x.onnx", "--format", "onnx-int8"], "needs some data to see in which range"),
        (["--out", "{folder}/x.pt2"], "a file of --format onnx ends in .onnx"),
        (["--out", "{folder}"], "is a folder; name a file"),
        (["--out", "{folder}/x.onnx", "--round-sums"], "round_sums=True has a meaning only with"),
        (["--out", "{folder}/x.onnx", "--data", "nothing.csv"], "there is no file 'nothing.csv'"),
    ],
)
def test_a_slip_is_one_line_and_leaves_no_file(words, message, models, tmp_path):
    done = run(models / "text-classification", *(word.format(folder=tmp_path) for word in words))
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    done = run("no-such-model", "--out", tmp_path / "x.onnx")
    assert done.exit_code == 1
    assert 'needs onnxscript, not installed: pip install "hap_hf[export]"' in done.stderr
