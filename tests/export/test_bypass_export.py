"""Models with bypasses in compiled form, in files for other runtimes, with fewer bits and as they are resumed."""

import copy
from dataclasses import replace

import pytest
import torch
from bypasses import bypassed_plan, planted
from checkpoints import single
from test_export import logits_of, longer, onnxruntime, session
from trainings import assert_same, make_trainer
from transformers import AutoModelForSequenceClassification

import hap_hf.bypassing
from hap_hf import BitConfig, HapConfig, HessianPruner, quantize_
from hap_hf.checkpoint import record_plan
from hap_hf.layers.bypass import Bypass
from hap_hf.layers.quantized import Quantized
from hap_hf.surgery import apply_plan_

assert onnxruntime


@pytest.fixture(scope="module")
def bypassed():
    model, batch = single("bert")
    plan, values, _ = bypassed_plan(model, batch)
    apply_plan_(model, plan, bypass_values={n: v.float() / 4 for n, v in values.items()})
    record_plan(model, plan)
    return model.eval(), batch


def run(model, batch):
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def without_paths(model):
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, Bypass):
            module.up.weight.data.zero_()
    return other


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_file_computes_the_paths_too(bypassed, kind, tmp_path):
    model, batch = bypassed
    path = hap_hf.export(model, batch, tmp_path / f"model.{kind}", kind)
    other = longer(batch)
    if kind == "onnx":
        found = logits_of(session(path), other)
    else:
        found = torch.export.load(path).module()(*other.values())
        found = found if isinstance(found, torch.Tensor) else found["logits"]
    torch.testing.assert_close(found, run(model, other), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, run(without_paths(model), other), atol=1e-3)


def test_both_layers_of_a_path_are_quantized_and_come_back(bypassed, tmp_path):
    model, batch = copy.deepcopy(bypassed[0]), bypassed[1]
    quantize_(model, [batch], BitConfig(weight_bits=8, activation_bits=8))
    paths = [m for m in model.modules() if isinstance(m, Bypass)]
    assert paths
    assert all(isinstance(layer, Quantized) for m in paths for layer in (m.down, m.up))
    expected = run(model, batch)
    assert 0 < (expected - run(bypassed[0], batch)).abs().max() < 0.2
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(run(again, batch), expected)


def test_a_compiled_model_computes_the_same(bypassed):
    model, batch = bypassed
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    torch.testing.assert_close(run(compiled, batch), run(model, batch), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run(compiled, longer(batch)), run(model, longer(batch)), rtol=1e-5, atol=1e-6)


def test_a_resumed_training_ends_like_one_that_nothing_interrupted(tmp_path, monkeypatch):
    # Whether paths are better after two steps of a training is not the question here.
    real = hap_hf.bypassing.bypassed_repair
    monkeypatch.setattr(hap_hf.bypassing, "bypassed_repair", lambda *args: replace(real(*args), loss=-1.0))

    def trainer(folder):
        config = HapConfig(target_params=0.6, implants="auto", progress=False, max_batches=2, kinds=("ffn",))
        pruner = HessianPruner(config, step=2)
        settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "learning_rate": 1e-3}
        return make_trainer(folder, planted()[0].float(), pruner, **settings), pruner

    whole, pruner = trainer(tmp_path / "whole")
    whole.train()
    assert pruner.reports[0].bypasses
    resumed, again = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again.reports[0].bypasses == pruner.reports[0].bypasses
    assert_same(resumed.model, whole.model)
