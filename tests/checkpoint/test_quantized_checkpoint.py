"""Quantized models in files: bit for bit, loud without hap_hf, and checked value by value."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from checkpoints import edited, pruned, single
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, BitsAndBytesConfig

import hap_hf
from hap_hf import BitConfig, ConfigError, PlanFormatError, PlanMismatchError, quantize_
from hap_hf.checkpoint import bits_of, plan_of, record_bits
from hap_hf.layers.quantized import Quantized
from hap_hf.model.quantizing import bit_plan_of, remove_bits_
from hap_hf.names.bits import BitPlan, Stored

MIXED = BitConfig(weight_bits={"*": 3, "*.0.*": 5, "*embed*": 8}, activation_bits={"*": 8, "*key*": None})


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("bert", BitConfig()),
        ("vit", MIXED),
        ("llama", BitConfig(activations="per_token", weight_bits=4)),
        ("t5", MIXED),
        ("gpt2", BitConfig(activations="symmetric")),
    ],
)
@pytest.mark.parametrize("kind", Stored)
def test_a_pruned_implanted_and_quantized_model_is_read_bit_for_bit(name, config, kind, tmp_path):
    model, batch = pruned(name)
    report = quantize_(model, [batch], config)
    record_bits(model, bit_plan_of(model, kind))
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), expected)
    assert bits_of(loaded) == bit_plan_of(model, kind)
    assert plan_of(loaded) == plan_of(model)
    assert sum(isinstance(m, Quantized) for m in loaded.modules()) == len(report.plan.layers)
    if kind is Stored.FLOATS:  # what training goes on with is not rounded
        for (n, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
            assert torch.equal(p, q), n
    # Once more, from what was read: the same file.
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_convolutional_network_is_read_bit_for_bit(tmp_path):
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    torch.manual_seed(0)
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=3))
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 0])}
    settings = {"prune_ratio": 0.3, "implant_ratio": 0.3, "progress": False, "method": "magnitude"}
    hap_hf.prune(model, [batch], hap_hf.HapConfig(**settings))
    quantize_(model, [batch])
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(TimmWrapperForImageClassification.from_pretrained(tmp_path), batch), expected)


def test_a_file_of_integers_is_a_quarter_as_large_and_fewer_bits_are_fewer_bytes(tmp_path):
    sizes = {}
    for bits in (None, 8, 4, 3):
        model, batch = single("bert")
        model = type(model)(copy.deepcopy(model.config).__class__(**{**model.config.to_dict(), "hidden_size": 256}))
        if bits is not None:
            report = quantize_(model, [batch], BitConfig(weight_bits=bits))
        model.save_pretrained(tmp_path / str(bits))
        sizes[bits] = sum(t.nbytes for t in load_file(tmp_path / str(bits) / "model.safetensors").values())
        if bits is not None:
            assert sizes[bits] == report.bytes_after
            assert sizes[None] == report.bytes_before
    assert sizes[8] < 0.29 * sizes[None]
    assert sizes[4] - 0.04 * sizes[None] < 0.5 * sizes[8]
    assert sizes[3] < 0.85 * sizes[4]


def test_a_base_model_is_read_from_a_task_models_file(tmp_path):
    model, batch = pruned("bert")
    quantize_(model, [batch])
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        ours = base.eval()(**inputs).last_hidden_state
        theirs = model.eval().bert(**inputs).last_hidden_state
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", Stored)
def test_load_state_dict_reads_what_a_file_holds(kind, tmp_path):
    model, batch = pruned("bert")
    quantize_(model, [batch])
    record_bits(model, bit_plan_of(model, kind))
    model.save_pretrained(tmp_path)
    expected = logits(model, batch)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    result = model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(logits(model, batch), expected)


def test_without_hap_hf_loading_fails(tmp_path):
    folders = []
    # Llama has no biases that could have the wrong shape, and what is not pruned has no weights that could.
    for name, is_pruned in (("bert", False), ("llama", True), ("llama", False)):
        model, batch = pruned(name) if is_pruned else single(name)
        quantize_(model, [batch])
        for kind in Stored:
            record_bits(model, bit_plan_of(model, kind))
            folders.append(str(tmp_path / f"{name}-{is_pruned}-{kind}"))
            model.save_pretrained(folders[-1])
        assert type(model).from_pretrained(folders[-1]) is not None
    code = f"""
import transformers
for folder in {folders}:
    kind = "AutoModelForCausalLM" if "llama" in folder else "AutoModelForSequenceClassification"
    try:
        getattr(transformers, kind).from_pretrained(folder)
    except RuntimeError as error:
        assert "mismatch" in str(error), error
        print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused"] * 6
    assert "hap_hf" in done.stderr  # the name of what is missing


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    model, batch = pruned("bert")
    quantize_(model, [batch], BitConfig(weight_bits=4))
    model.save_pretrained(folder)
    return folder


def bits_in(config):
    return config["quantization_config"]["bits"]


FIRST = "bert.encoder.layer.0.attention.self.query"
HOSTILE = {
    "newer format": (lambda c: bits_in(c).update(format=2), None, PlanFormatError, "upgrade"),
    "unknown entry": (lambda c: bits_in(c).update(code="x"), None, PlanFormatError, "nothing else"),
    "too many bits": (lambda c: bits_in(c)["layers"].update({FIRST: [9, 8]}), None, PlanFormatError, "between 2 and 8"),
    "bits of text": (lambda c: bits_in(c)["layers"].update({FIRST: ["8", 8]}), None, PlanFormatError, "must be a int"),
    "a bool": (lambda c: bits_in(c)["layers"].update({FIRST: [True, 8]}), None, PlanFormatError, "must be a int"),
    "a name": (lambda c: bits_in(c)["layers"].update({"a b": [8, 8]}), None, PlanFormatError, "no dotted"),
    "no layers": (lambda c: bits_in(c).update(layers={}), None, PlanFormatError, "has 0 entries"),
    "a rounding": (lambda c: bits_in(c).update(rounding="eval"), None, PlanFormatError, "must be one of"),
    "a norm": (
        lambda c: bits_in(c)["layers"].update({"bert.embeddings.LayerNorm": [8, 8]}),
        None,
        PlanMismatchError,
        "LayerNorm",
    ),
    "other bits": (lambda c: bits_in(c)["layers"].update({FIRST: [8, 8]}), None, PlanMismatchError, "expected shape"),
    "no scales": (None, lambda w: w.pop(f"{FIRST}.weight_scale"), PlanMismatchError, "weight_scale"),
    "no range": (None, lambda w: w.pop(f"{FIRST}.input_range"), PlanMismatchError, "input_range"),
    "NaN scale": (None, lambda w: w[f"{FIRST}.weight_scale"].fill_(torch.nan), PlanMismatchError, "finite scales"),
    "negative scale": (None, lambda w: w[f"{FIRST}.weight_scale"].neg_(), PlanMismatchError, "above 0"),
    "infinite range": (None, lambda w: w[f"{FIRST}.input_range"].fill_(torch.inf), PlanMismatchError, "finite range"),
    "range without 0": (
        None,
        lambda w: w[f"{FIRST}.input_range"].copy_(torch.tensor([1.0, 2.0])),
        PlanMismatchError,
        "holds 0",
    ),
    "codes": (None, lambda w: w[f"{FIRST}.weight"].fill_(255), PlanMismatchError, "codes of 4 bits"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_values_of_strangers_are_refused(name, stored, tmp_path):
    config, tensors, error, words = HOSTILE[name]
    folder = edited(stored, tmp_path / "x", config=config, tensors=tensors)
    with pytest.raises(error, match=words):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_what_could_not_be_read_again_is_not_saved(stored, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(stored)
    with pytest.raises(ConfigError, match="plain checkpoint cannot hold the bits"):
        hap_hf.save_pruned(model, tmp_path, vanilla=True)
    bare = copy.deepcopy(model)
    remove_bits_(bare)
    with pytest.raises(PlanMismatchError, match="its config names"):
        bare.save_pretrained(tmp_path)
    del model.config.quantization_config
    with pytest.raises(PlanMismatchError, match="are quantized, and its config names 0"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_quantizer_is_refused_while_loading(stored):
    other = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="quantized with HapPlanConfig but you are passing a BitsAndBytesConfig"):
        AutoModelForSequenceClassification.from_pretrained(stored, quantization_config=other)
    assert bits_of(AutoModelForSequenceClassification.from_pretrained(stored)) is not None


def test_a_plan_of_bits_through_json(stored):
    bits = json.loads((stored / "config.json").read_text())["quantization_config"]["bits"]
    assert BitPlan.from_dict(bits).to_dict() == bits
