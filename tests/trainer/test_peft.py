"""Adapters of peft: added to pruned models, trained, merged, saved and loaded; merged before pruning; else refused."""

import copy
import re

import pytest
import torch
import transformers as hf
from checkpoints import prune_, pruned, single
from reference import logits
from torch import nn
from trainings import assert_same, config, make_trainer, tiny_model

from hap_hf import (
    HapConfig,
    HessianPruner,
    ImplantLinear,
    UnsupportedModelError,
    find_groups,
    plan_of,
    prune,
    record_plan,
    save_pruned,
    train_only_implants_,
)
from hap_hf.names.plan import PruningPlan

peft = pytest.importorskip("peft")
BaseTunerLayer = pytest.importorskip("peft.tuners.tuners_utils").BaseTunerLayer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",  # peft's own use
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`",
    "ignore:.*pin_memory.*:UserWarning",
)

WITHOUT_IMPLANTS = {
    "bert": {"target_modules": ["query", "value", "intermediate.dense", "output.dense"]},
    "gpt2": {"target_modules": ["c_attn", "c_fc", "c_proj"]},  # Conv1D
}
WITH_IMPLANTS = {
    "bert": {"target_modules": [], "target_parameters": ["query.weight", "intermediate.dense.weight", "wer.weight"]},
    "gpt2": {"target_modules": [], "target_parameters": ["c_attn.weight", "c_fc.implant_up", "c_proj.weight"]},
    "llama": {"target_modules": ["down_proj"], "target_parameters": ["q_proj.weight", "gate_proj.weight"]},
}
CASES = [(n, False, t) for n, t in WITHOUT_IMPLANTS.items()] + [(n, True, t) for n, t in WITH_IMPLANTS.items()]
NOT_TRAINED = {"r": 2, "init_lora_weights": False}  # weights that are no zeros, as after a training


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Return a function that loads a pruned model, and returns its batch and its folder as well."""
    saved = {}

    def load(name="bert", implants=True):
        if (name, implants) not in saved:
            model, batch = pruned(name, implants=implants)
            folder = tmp_path_factory.mktemp("pruned")
            model.save_pretrained(folder)
            saved[name, implants] = type(model), batch, folder
        kind, batch, folder = saved[name, implants]
        return kind.from_pretrained(folder), batch, folder

    return load


def layers_of_peft(model):
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]


def add_adapter_(model, settings):
    """Call transformers' method, or skip where it asks for a newer peft than this one."""
    try:
        model.add_adapter(settings)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"peft {peft.__version__}, transformers {hf.__version__}: {error}")


def merged_by_hand(model):
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    return model


@pytest.mark.fast
@pytest.mark.parametrize(("name", "implants", "targets"), CASES, ids=lambda x: x if isinstance(x, str) else None)
def test_merged_adapters_save_and_reload_bitwise_with_the_plan(name, implants, targets, reloaded, tmp_path):
    model, batch, _ = reloaded(name, implants)
    before, plan, tensors = logits(model, batch), plan_of(model), model.state_dict().keys()
    assert implants == any(isinstance(m, ImplantLinear) for m in model.modules())
    adapted = peft.get_peft_model(model, peft.LoraConfig(**targets, **NOT_TRAINED))
    assert len(layers_of_peft(adapted)) >= 3
    expected = logits(adapted, batch)
    assert not torch.allclose(expected, before, atol=1e-2)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-5)
    assert plan_of(merged) == plan
    assert merged.state_dict().keys() == tensors
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), logits(merged, batch))


@pytest.mark.parametrize("wrapped", [True, False], ids=["get_peft_model", "add_adapter"])
@pytest.mark.parametrize(("name", "implants", "targets"), CASES, ids=lambda x: x if isinstance(x, str) else None)
def test_adapters_saved_alone_load_onto_the_reloaded_pruned_model(name, implants, targets, wrapped, reloaded, tmp_path):
    model, batch, _ = reloaded(name, implants)
    settings = peft.LoraConfig(**targets, **NOT_TRAINED)
    if wrapped:
        model = peft.get_peft_model(model, settings)
    else:
        add_adapter_(model, settings)
    model.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    onto = peft.PeftModel.from_pretrained(reloaded(name, implants)[0], tmp_path)
    loaded, *_ = reloaded(name, implants)
    loaded.load_adapter(str(tmp_path))
    for other in (onto, loaded):
        assert torch.equal(logits(other, batch), logits(model, batch))


def test_the_adapters_folder_alone_names_the_pruned_model(reloaded, tmp_path):
    model, batch, _ = reloaded()
    settings = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["output.dense"], **NOT_TRAINED)
    model = peft.get_peft_model(model, settings)
    model.save_pretrained(tmp_path)
    for auto in (peft.AutoPeftModelForSequenceClassification, hf.AutoModelForSequenceClassification):
        loaded = auto.from_pretrained(tmp_path)
        assert plan_of(loaded) == plan_of(model)
        assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_all_linear_means_every_layer_without_implants(reloaded):
    model, *_ = reloaded()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    implanted = [n for n, m in model.named_modules() if isinstance(m, ImplantLinear)]
    assert implanted
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    found = {n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if isinstance(m, BaseTunerLayer)}
    assert found == set(linear)


def test_a_layer_with_implants_is_refused_as_a_target_module_by_its_name(reloaded):
    model, *_ = reloaded()
    with pytest.raises(ValueError, match=r"Target module ImplantLinear\(in_features=24, .* is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"]))


@pytest.mark.parametrize("wrapped", [True, False], ids=["get_peft_model", "add_adapter"])
def test_the_trainer_trains_the_adapters_of_a_reloaded_model_and_nothing_else(wrapped, reloaded, tmp_path):
    model, batch, _ = reloaded()
    settings = peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    if wrapped:
        trained = peft.get_peft_model(model, settings)
    else:
        add_adapter_(model, settings)
        trained = model
    before = {n: p.detach().clone() for n, p in trained.named_parameters()}
    make_trainer(tmp_path, trained, save_strategy="steps", save_steps=2, max_steps=3).train()
    moved = {n for n, p in trained.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n or "modules_to_save" in n}
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    if wrapped:
        merged = trained.merge_and_unload()
        merged.save_pretrained(tmp_path / "recovered")
        again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "recovered")
        assert torch.equal(logits(again, batch), logits(merged, batch))


def test_implants_and_adapters_are_trained_together(reloaded):
    model, batch, _ = reloaded()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    names = train_only_implants_(adapted, also=["*.lora_?"])
    assert {n.split(".")[-1] for n in names if "lora_" not in n} == {"implant_down", "implant_up"}
    assert any("lora_A" in n for n in names)
    adapted(**batch).loss.backward()
    assert {n for n, p in adapted.named_parameters() if p.grad is not None} == set(names)


def test_a_reloaded_model_is_not_taken_for_a_quantized_one(reloaded):
    model, batch, _ = reloaded()
    expected = logits(model, batch)
    hf.trainer_utils.validate_quantization_for_training(model)
    prepared = peft.prepare_model_for_kbit_training(model)
    assert torch.equal(logits(prepared, batch), expected)
    assert not prepared.is_gradient_checkpointing
    adapted = peft.get_peft_model(prepared, peft.LoraConfig(target_modules="all-linear", r=2))
    assert {type(layer) for layer in layers_of_peft(adapted)} == {peft.tuners.lora.Linear}


def test_adapters_may_be_added_once_the_callback_has_done_its_rounds(tmp_path):
    pruner = HessianPruner(config())
    first = make_trainer(tmp_path, tiny_model(), pruner, max_steps=1)
    first.train()
    adapted = peft.get_peft_model(first.model, peft.LoraConfig(target_modules=["query"], r=2))
    make_trainer(tmp_path, adapted, pruner, max_steps=1).train()
    assert len(pruner.reports) == 1


def test_a_training_of_adapters_with_a_finished_callback_is_resumed(tmp_path):
    pruner = HessianPruner(config())

    def trained(model, folder, resume=None):
        trainer = make_trainer(tmp_path / folder, model, pruner, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    smaller = trained(tiny_model(), "pruned")
    settings = peft.LoraConfig(target_modules=["query"], r=2)
    first = peft.get_peft_model(copy.deepcopy(smaller), settings)
    second = peft.get_peft_model(copy.deepcopy(smaller), settings)
    second.load_state_dict(first.state_dict())
    whole = trained(first, "adapters")
    assert_same(trained(second, "again", str(tmp_path / "adapters" / "checkpoint-2")), whole)


def adapter(**settings):
    return peft.LoraConfig(target_modules=["query", "value"], **NOT_TRAINED, **settings)


def wrapped_in_peft(model):
    return peft.get_peft_model(model, adapter())


def with_adapter(model):
    add_adapter_(model, adapter())
    return model


def with_injected_adapter(model):
    return peft.inject_adapter_in_model(adapter(), model)


def with_deleted_adapter(model):
    with_adapter(model).delete_adapter("default")
    return model


def with_prompt(model):
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))


def with_prefix(model):
    return peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))


def not_unwrapped(model):
    wrapper = wrapped_in_peft(model)
    wrapper.merge_and_unload()
    return wrapper


ADVICE = {
    wrapped_in_peft: "got a PeftModel with live adapters; merge them first (model = model.merge_and_unload()), drop",
    not_unwrapped: "got a PeftModel with live adapters; merge them first (model = model.merge_and_unload())",
    with_adapter: "with live adapters in 4 modules, such as 'bert.encoder.layer.0.attention.self.query'; prune first",
    with_injected_adapter: "with live adapters in 4 modules, such as 'bert.encoder.layer.0.attention.self.query'",
    with_deleted_adapter: "and no adapters for them, as delete_adapter leaves it; load the model anew, or put back",
    with_prompt: "got a PeftModelForSequenceClassification with live prompts or adapters that cannot be merged; load",
    with_prefix: "load the model inside it anew, prune that, and train new ones for the result",
}


@pytest.mark.parametrize("adapt", ADVICE)
def test_live_adapters_are_refused_by_name_wherever_the_model_is_handed_in(adapt):
    dense, batch = single("bert")
    again, _ = pruned("bert", implants=False)
    dense, again = adapt(dense), adapt(again)
    calls = [
        lambda: find_groups(dense, batch),
        lambda: prune(dense, [batch], HapConfig(prune_ratio=0.3)),
        lambda: prune(again, [batch], HapConfig(prune_ratio=0.3)),
        lambda: save_pruned(again, "never written"),
        *([lambda: record_plan(dense, PruningPlan(()))] if isinstance(dense, hf.PreTrainedModel) else []),
    ]
    for call in calls:
        with pytest.raises(UnsupportedModelError, match=re.escape(ADVICE[adapt])):
            call()


@pytest.mark.parametrize("adapt", [wrapped_in_peft, with_adapter, with_injected_adapter, with_prompt])
def test_the_callback_refuses_live_adapters_before_the_first_step(adapt, tmp_path):
    model = adapt(tiny_model())
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(tmp_path, model, HessianPruner(config(), step=4))
    with pytest.raises(UnsupportedModelError, match=re.escape(ADVICE[adapt][-30:])):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def merged(model):
    return wrapped_in_peft(model).merge_and_unload()


def merged_with_a_trained_head(model):
    return peft.get_peft_model(model, adapter(modules_to_save=["classifier"])).merge_and_unload()


def added_and_merged_by_hand(model):
    return merged_by_hand(with_adapter(model))


def injected_and_merged_by_hand(model):
    return merged_by_hand(with_injected_adapter(model))


def deleted_and_put_back(model):
    return merged_by_hand(with_deleted_adapter(model))


@pytest.mark.parametrize(
    "adapt",
    [
        merged,
        merged_with_a_trained_head,
        added_and_merged_by_hand,
        injected_and_merged_by_hand,
        deleted_and_put_back,
    ],
)
def test_models_with_nothing_left_of_peft_are_pruned_saved_and_reloaded(adapt, tmp_path):
    dense, batch = single("bert")
    model = adapt(dense)
    assert len(find_groups(model, batch)) == 4
    prune_(model, batch)
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same(loaded, model)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_an_adapter_of_add_adapter_is_merged_as_the_error_says(tmp_path):
    model, batch = single("bert")
    with_adapter(model).save_pretrained(tmp_path)
    around = peft.PeftModel.from_pretrained(single("bert")[0], tmp_path)
    plain = around.merge_and_unload()
    torch.testing.assert_close(logits(plain, batch), logits(model, batch), rtol=1e-4, atol=1e-5)
    assert len(find_groups(plain, batch)) == 4
