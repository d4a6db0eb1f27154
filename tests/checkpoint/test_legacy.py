"""Checkpoints whose heads transformers 4 pruned: they load, equal the masked model, and become hap_hf checkpoints."""

import copy
import json

import pytest
import torch
from checkpoints import edited, heads_may_change, single
from reference import logits
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
)

from hap_hf.checkpoint import plan_of
from hap_hf.checkpoint.legacy import load_pruned_heads
from hap_hf.errors import ConfigError, PlanFormatError, PlanMismatchError, UnsupportedModelError

WIDTH = 24
HEAD_DIM = 6

SELF = {"self.query": 1, "self.key": 1, "self.value": 1}

# For each family, as transformers 4 named them: a layer's attention, its producers with the number of parts fused in
# them, and the consumer; last the consumer's name in transformers 5.
FAMILIES = {
    "bert": ("encoder.layer.{}.attention.", SELF, "output.dense", "bert.encoder.layer.{}.attention.output.dense"),
    "roberta": ("encoder.layer.{}.attention.", SELF, "output.dense", "roberta.encoder.layer.{}.attention.output.dense"),
    "electra": ("encoder.layer.{}.attention.", SELF, "output.dense", "electra.encoder.layer.{}.attention.output.dense"),
    "distilbert": (
        "transformer.layer.{}.attention.",
        {"q_lin": 1, "k_lin": 1, "v_lin": 1},
        "out_lin",
        "distilbert.transformer.layer.{}.attention.out_lin",
    ),
    "vit": (
        "encoder.layer.{}.attention.",
        {"attention.query": 1, "attention.key": 1, "attention.value": 1},
        "output.dense",
        "vit.layers.{}.attention.o_proj",
    ),
    "albert": (
        "encoder.albert_layer_groups.0.albert_layers.{}.attention.",
        {"query": 1, "key": 1, "value": 1},
        "dense",
        "albert.encoder.albert_layer_groups.0.albert_layers.{}.attention.dense",
    ),
    "gpt2": ("h.{}.attn.", {"c_attn": 3}, "c_proj", "transformer.h.{}.attn.c_proj"),
}
AUTO = {"gpt2": AutoModelForCausalLM, "vit": AutoModelForImageClassification}


def entries(heads):
    return torch.tensor([h * HEAD_DIM + i for h in heads for i in range(HEAD_DIM)])


def version_4_checkpoint(name, pruned, directory):
    """Write a checkpoint as transformers 4 did; return its path, the masked dense model and a batch."""
    masked, batch = single(name)
    masked.save_pretrained(directory / "dense")
    layer, producers, consumer, reader = FAMILIES[name]
    transposed = name == "gpt2"  # Conv1D stores [in, out]

    def cut(tensors: dict[str, Tensor]) -> None:
        for number, heads in pruned.items():
            kept = entries([h for h in range(WIDTH // HEAD_DIM) if h not in heads])
            prefix = layer.format(number)
            found = 0
            for key in [k for k in tensors if prefix in k]:
                path, _, leaf = key.partition(prefix)[2].rpartition(".")
                if path in producers:
                    rows = torch.cat([kept + WIDTH * part for part in range(producers[path])])
                    tensors[key] = tensors[key].index_select(-1 if transposed else 0, rows)
                    found += 1
                elif path == consumer and leaf == "weight":
                    tensors[key] = tensors[key].index_select(0 if transposed else 1, kept)
                    found += 1
            assert found == 2 * len(producers) + 1

    def note(config):
        config |= {"pruned_heads": {str(k): v for k, v in pruned.items()}, "transformers_version": "4.40.0"}

    path = edited(directory / "dense", directory / "version 4", config=note, tensors=cut)
    for number, heads in pruned.items():
        weight = masked.get_submodule(reader.format(number)).weight
        weight.data.index_fill_(0 if transposed else 1, entries(heads), 0)
    return path, masked, batch


def load(path, name="bert", **kwargs):
    return load_pruned_heads(AUTO.get(name, AutoModelForSequenceClassification), path, **kwargs)


@pytest.fixture
def bert(tmp_path):
    """Return a BERT checkpoint that lacks heads 1 and 3 of layer 0 and head 0 of layer 1."""
    return version_4_checkpoint("bert", {0: [1, 3], 1: [0]}, tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loaded_model_equals_the_masked_dense_one(name, tmp_path):
    pruned = {0: [1, 2]} if name == "albert" else {0: [1, 3], 1: [0]}
    path, masked, batch = version_4_checkpoint(name, pruned, tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(masked).from_pretrained(path)  # what transformers 5 does with it alone
    model = load(path, name)
    dense, _ = single(name)
    torch.testing.assert_close(logits(model, batch), logits(masked, batch), rtol=0, atol=2e-6)
    assert not torch.allclose(logits(model, batch), logits(dense, batch), atol=1e-5), "nothing was pruned"
    assert model.num_parameters() < dense.num_parameters()


def test_saved_again_it_is_a_checkpoint_of_hap_hf(bert, tmp_path):
    path, _, batch = bert
    model = load(path)
    assert [g.actions for g in plan_of(model)] == ["kpkp", "pkkk"]
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, batch), logits(model, batch))
    values = json.loads((tmp_path / "again" / "config.json").read_text())
    assert values["quantization_config"]["quant_method"] == "hap_hf"
    assert "pruned_heads" not in values


def test_arguments_of_from_pretrained_are_passed_on(bert):
    path, _, _ = bert
    model = load(path, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager", hidden_act="relu")
    assert model.dtype is torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model.config.hidden_act == "relu"


@heads_may_change
def test_another_number_of_labels_gets_a_new_head_when_mismatched_sizes_are_ignored(bert):
    path, _, batch = bert
    model = load(path, num_labels=7, ignore_mismatched_sizes=True)
    assert logits(model, batch).shape[-1] == 7


def test_a_models_own_class_and_the_base_class_work_as_well(bert):
    path, masked, batch = bert
    ids = batch["input_ids"]
    expected = masked.bert(ids).last_hidden_state
    own = load_pruned_heads(BertForSequenceClassification, path)
    base = load_pruned_heads(AutoModel, path)
    torch.testing.assert_close(own.bert(ids).last_hidden_state, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(base(ids).last_hidden_state, expected, rtol=0, atol=2e-6)


def test_a_config_in_hand_is_used_and_left_alone(bert):
    path, _, batch = bert
    config = AutoConfig.from_pretrained(path)
    before = copy.deepcopy(config.to_dict())
    assert torch.equal(logits(load(path, config=config), batch), logits(load(path), batch))
    assert config.to_dict() == before


def test_the_random_state_stays(bert):
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    load(bert[0])
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize(
    ("pruned_heads", "message"),
    [
        ([[1, 3]], "must map layer numbers to lists, got list"),
        ({"first": [1]}, "must name each layer once by its number, got 'first'"),
        ({"-1": [1]}, "must name each layer once by its number, got '-1'"),
        ({"0": [1], "00": [1]}, "must name each layer once by its number, got '00'"),
        ({"0": "13"}, "must be a list of head numbers, got 13"),
        ({"0": 3}, "must be a list of head numbers, got 3"),
        ({"0": [-1]}, "must be a list of head numbers"),
        ({"0": [1.0]}, "must be a list of head numbers"),
        ({"0": [True]}, "must be a list of head numbers"),
        ({"0": [1, 1]}, "names a head twice"),
    ],
)
def test_nonsense_is_refused(pruned_heads, message, bert, tmp_path):
    path = edited(bert[0], tmp_path / "edited", config=lambda c: c.update(pruned_heads=pruned_heads))
    with pytest.raises(PlanFormatError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("pruned_heads", "message"),
    [
        ({"2": [1]}, "names layer 2, and the model has 2 layers"),
        ({"0": [4]}, "names head 4, and bert.encoder.layer.0.attention:heads has 4 heads"),
        ({"0": [1]}, "expected shape"),
        ({"1": [1, 3], "0": [0]}, "expected shape"),
    ],
)
def test_heads_that_the_weights_do_not_lack_are_refused(pruned_heads, message, bert, tmp_path):
    path = edited(bert[0], tmp_path / "edited", config=lambda c: c.update(pruned_heads=pruned_heads))
    with pytest.raises(PlanMismatchError, match=message):
        load(path)


@pytest.mark.parametrize("pruned_heads", [None, {}, {"0": []}])
def test_a_checkpoint_without_pruned_heads_is_refused(pruned_heads, bert, tmp_path):
    path = edited(bert[0], tmp_path / "edited", config=lambda c: c.update(pruned_heads=pruned_heads))
    with pytest.raises(
        ConfigError, match=r"found none; load it with AutoModelForSequenceClassification\.from_pretrained"
    ):
        load(path)


def test_pruned_heads_beside_a_quantization_config_are_refused(bert, tmp_path):
    entry = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    path = edited(bert[0], tmp_path / "edited", config=lambda c: c.update(quantization_config=entry))
    with pytest.raises(ConfigError, match="both pruned_heads and a quantization_config"):
        load(path)


def test_a_model_with_one_table_for_all_layers_is_refused(tmp_path):
    model, _ = single("mpnet")
    model.config.pruned_heads = {"0": [1]}
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="one set of heads for each of the 2 layers"):
        load(tmp_path)
