"""Saving a pruned model and loading it back: the same model, for every family and every way of loading."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from cases import CASES
from checkpoints import edited, heads_may_change, prune_, pruned, single
from reference import logits
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    T5EncoderModel,
)

import hap_hf.checkpoint
from hap_hf.checkpoint import check_recordable, plan_of, record_plan, save_pruned
from hap_hf.errors import ConfigError, PlanFormatError, PlanMismatchError
from hap_hf.names.plan import FORMAT_VERSION, MAX_STAGES, PruningPlan


@pytest.mark.parametrize("name", CASES)
def test_logits_are_bitwise_equal_after_two_round_trips(name, tmp_path):
    dense, batch = single(name)
    model, _ = pruned(name)
    expected = logits(model, batch)
    assert not torch.allclose(expected, logits(dense, batch), atol=1e-6), "pruning changed nothing"
    assert model.num_parameters() < dense.num_parameters()
    model.save_pretrained(tmp_path / "first")
    once = type(model).from_pretrained(tmp_path / "first")
    once.save_pretrained(tmp_path / "second")
    twice = type(model).from_pretrained(tmp_path / "second")
    assert torch.equal(logits(once, batch), expected)
    assert torch.equal(logits(twice, batch), expected)
    assert plan_of(twice) == plan_of(model)
    assert twice.state_dict().keys() == model.state_dict().keys()


@pytest.mark.fast
@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "qwen3", "bart"])
def test_a_model_pruned_again_after_loading_reloads_with_both_stages(name, tmp_path):
    model, batch = pruned(name)
    model.save_pretrained(tmp_path / "first")
    again = type(model).from_pretrained(tmp_path / "first")
    prune_(again, batch, seed=3)
    assert again.num_parameters() < model.num_parameters()
    again.save_pretrained(tmp_path / "second")
    loaded = type(model).from_pretrained(tmp_path / "second")
    assert torch.equal(logits(loaded, batch), logits(again, batch))
    assert len(plan_of(loaded).stages) == 2


@pytest.mark.parametrize("name", ["bert", "vit", "t5"])
def test_a_bfloat16_load_equals_the_cast_model(name, tmp_path):
    model, batch = pruned(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    assert torch.equal(logits(loaded, batch), logits(model.bfloat16(), batch))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_is_obeyed(device_map, tmp_path):
    model, batch = pruned("bert")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_layers_may_be_offloaded_to_disk(tmp_path):
    model, batch = pruned("bert")
    model.save_pretrained(tmp_path / "model")
    device_map = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    loaded = type(model).from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    assert loaded.bert.encoder.layer[0].output.dense.weight.is_meta
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), rtol=0, atol=1e-6)


def test_sharded_files_load(tmp_path):
    model, batch = pruned("bert")
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), batch), logits(model, batch))


def test_the_file_holds_nothing_but_json_and_safetensors(tmp_path):
    model, _ = pruned("bert")
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_a_base_model_loads_from_a_task_models_checkpoint_and_the_other_way_round(tmp_path):
    model, batch = pruned("bert")
    ids = batch["input_ids"]
    model.save_pretrained(tmp_path / "task")
    base = AutoModel.from_pretrained(tmp_path / "task")
    assert torch.equal(base(ids).last_hidden_state, model.bert(ids).last_hidden_state)
    assert {g.group.name for g in plan_of(base)} == {g.group.name.removeprefix("bert.") for g in plan_of(model)}
    base.save_pretrained(tmp_path / "base")
    task = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(task.bert(ids).last_hidden_state, model.bert(ids).last_hidden_state)
    assert plan_of(task) == plan_of(model)


def test_another_task_gets_the_pruned_encoder_and_a_new_head(tmp_path):
    model, batch = pruned("bert")
    model.save_pretrained(tmp_path)
    other = AutoModelForMaskedLM.from_pretrained(tmp_path)
    expected = model.bert(batch["input_ids"]).last_hidden_state
    assert torch.equal(other.bert(batch["input_ids"]).last_hidden_state, expected)


@heads_may_change
def test_another_number_of_labels_gets_a_new_head_when_mismatched_sizes_are_ignored(tmp_path):
    model, batch = pruned("bert")
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert logits(other, batch).shape[-1] == 7
    expected = model.bert(batch["input_ids"]).last_hidden_state
    assert torch.equal(other.bert(batch["input_ids"]).last_hidden_state, expected)


def test_an_encoder_alone_loads_from_an_encoder_decoders_checkpoint(tmp_path):
    model, batch = pruned("t5")
    model.save_pretrained(tmp_path)
    encoder = T5EncoderModel.from_pretrained(tmp_path)
    ids = batch["input_ids"]
    assert torch.equal(encoder(ids).last_hidden_state, model.encoder(ids).last_hidden_state)
    assert len(list(plan_of(encoder))) < len(list(plan_of(model)))


def test_tied_embeddings_stay_tied_and_generation_goes_on(shared_data, tmp_path):
    source = shared_data / "stories260K"
    if not source.is_dir():
        pytest.skip(f"no model at {source}")
    model = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.tensor([[1, 403, 407, 261]])
    prune_(model, {"input_ids": ids, "labels": ids})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded, {"input_ids": ids}), logits(model, {"input_ids": ids}))
    written = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=12, do_sample=False), written)
    assert written.shape[1] > ids.shape[1]


@pytest.mark.parametrize("flags", [{}, {"save_original_format": False}])
def test_names_that_transformers_converts_survive_in_both_formats(flags, tmp_path):
    model, batch = pruned("dinov2_swiglu")  # renamed attention, gate and up projection saved as one tensor
    model.save_pretrained(tmp_path, **flags)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), batch), logits(model, batch))


def run_without_import(code, *arguments):
    """Run code in a new interpreter that does not import hap_hf."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_without_the_import_loading_fails_loudly(tmp_path):
    model, _ = pruned("bert")
    model.save_pretrained(tmp_path)
    result = run_without_import(
        """
        import sys
        from transformers import AutoModelForSequenceClassification
        AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
        print("loaded", "hap_hf" in sys.modules)
        """,
        tmp_path,
    )
    assert result.returncode != 0
    assert "loaded" not in result.stdout
    assert "RuntimeError: You set `ignore_mismatched_sizes` to `False`" in result.stderr
    assert "Unknown quantization type, got hap" in result.stderr


def test_pruning_twice_in_memory_records_both_stages():
    model, batch = pruned("bert")
    first = plan_of(model)
    prune_(model, batch, seed=3)
    assert plan_of(model).stages[:1] == first.stages
    assert len(plan_of(model).stages) == 2


def test_the_config_is_plain_data_before_saving_and_after_loading(tmp_path):
    model, _ = pruned("bert")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    expected = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    for config in (model.config, loaded.config, AutoConfig.from_pretrained(tmp_path)):
        assert config.quantization_config == expected
        assert json.loads(config.to_json_string())["quantization_config"] == expected
        assert config.to_diff_dict()["quantization_config"] == expected


def test_a_config_in_hand_may_be_passed_to_from_pretrained(tmp_path):
    model, batch = pruned("bert")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, config=model.config)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_a_dense_model_has_no_plan():
    model, _ = single("bert")
    assert plan_of(model) is None
    assert plan_of(nn.Linear(2, 2)) is None


def test_a_module_without_a_transformers_config_is_left_alone():
    record_plan(nn.Linear(2, 2), PruningPlan(()))


def test_a_quantized_models_slot_is_not_taken():
    model, _ = single("bert")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(ConfigError, match="quant_method 'bitsandbytes'; a checkpoint has room for one"):
        check_recordable(model)


def test_a_plan_that_was_not_applied_is_not_recorded():
    model, _ = pruned("bert")
    dense, _ = single("bert")
    with pytest.raises(
        PlanMismatchError, match=r"does not describe this BertForSequenceClassification.*\n.*expected shape"
    ):
        record_plan(dense, plan_of(model))
    assert plan_of(dense) is None


def test_a_dense_model_built_from_a_pruned_models_config_cannot_pass_for_pruned():
    model, batch = pruned("bert")
    rebuilt = type(model)(model.config).eval()
    for attempt in (lambda: check_recordable(rebuilt), lambda: prune_(rebuilt, batch)):
        with pytest.raises(PlanMismatchError, match="build new models from a config without the quantization_config"):
            attempt()


def test_more_stages_than_a_plan_may_have_are_refused_before_anything_is_done():
    model, _ = pruned("bert")
    plan = PruningPlan(((),) * MAX_STAGES)
    with pytest.raises(PlanFormatError, match=f"at most {MAX_STAGES}"):
        check_recordable(model, plan)


def test_save_pruned_writes_what_save_pretrained_writes(tmp_path):
    model, batch = pruned("bert")
    save_pruned(model, tmp_path, max_shard_size="20KB")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), batch), logits(model, batch))


def test_save_pruned_refuses_a_module_that_carries_no_plan(tmp_path):
    with pytest.raises(ConfigError, match="this Linear carries no plan"):
        save_pruned(nn.Linear(2, 2), tmp_path)


def test_save_pruned_refuses_a_model_that_was_not_pruned(tmp_path):
    model, _ = single("bert")
    with pytest.raises(ConfigError, match="carries no plan"):
        save_pruned(model, tmp_path)


def test_registration_happens_on_import():
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    for name in ("hap_hf", "hap"):
        assert AUTO_QUANTIZER_MAPPING[name] is hap_hf.checkpoint.loading.HapQuantizer
        assert AUTO_QUANTIZATION_CONFIG_MAPPING[name] is hap_hf.checkpoint.loading.HapPlanConfig


def as_hap_hf_0_1_wrote_it(config):
    """Give a config the older name of the method, and its plan format 1: bare lists of groups, one provenance."""
    stages = config["quantization_config"]["plan"]["stages"]
    origin = {"threshold": 0.25, "method": "hessian", "seed": 3}
    plan = {"format": 1, "stages": [stage["groups"] for stage in stages], "provenance": origin}
    config["quantization_config"] = {"quant_method": "hap", "plan": plan}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_checkpoint_of_hap_hf_0_1_is_the_same_model_and_is_saved_in_todays_form(name, tmp_path):
    model, batch = pruned(name)
    prune_(model, batch, seed=3)
    model.save_pretrained(tmp_path / "new")
    old = type(model).from_pretrained(edited(tmp_path / "new", tmp_path / "old", config=as_hap_hf_0_1_wrote_it))
    assert torch.equal(logits(old, batch), logits(model, batch))
    assert plan_of(old).stages == plan_of(model).stages
    assert plan_of(old).provenance == ({}, {"threshold": 0.25, "method": "hessian", "seed": 3})
    old.save_pretrained(tmp_path / "again")
    entry = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert (entry["quant_method"], entry["plan"]["format"]) == ("hap_hf", FORMAT_VERSION)
    again = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert plan_of(again) == plan_of(old)
