"""Checkpoints that lie: from_pretrained must raise a clear error and never return a half-random model."""

import pytest
import torch
from checkpoints import edited, pruned, single
from plans import plan_of as removal
from reference import logits
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import BitsAndBytesConfig

from hap_hf.checkpoint import load_pruned_heads, plan_of, record_plan, save_pruned
from hap_hf.discovery import find_groups
from hap_hf.errors import ConfigError, PlanFormatError, PlanMismatchError
from hap_hf.names.plan import FORMAT_VERSION
from hap_hf.surgery import apply_plan_

load = AutoModelForSequenceClassification.from_pretrained
UP = "bert.encoder.layer.1.intermediate.dense"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, _ = pruned("bert")
    directory = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(directory)
    return directory


def plan_in(config):
    return config["quantization_config"]["plan"]


def groups_in(config):
    return plan_in(config)["stages"][0]["groups"]


def group_in(config, name):
    return next(g for g in groups_in(config) if g["name"] == name)


MALFORMED = {
    "plan is a number": (lambda c: c["quantization_config"].update(plan=5), "plan must be a dict, got int"),
    "plan is missing": (lambda c: c["quantization_config"].pop("plan"), "must hold quant_method, plan"),
    "an entry too many": (lambda c: c["quantization_config"].update(code="x"), "must hold quant_method, plan"),
    "a newer format": (lambda c: plan_in(c).update(format=FORMAT_VERSION + 1), "upgrade hap_hf"),
    "stages are a string": (lambda c: plan_in(c).update(stages="kkk"), "stages must be a list"),
    "too few actions": (lambda c: groups_in(c)[0].update(actions="k"), "exactly 4 units"),
    "a huge rank": (
        lambda c: group_in(c, "bert.encoder.layer.1:ffn").update(ranks={f"{UP}.weight": 2**31 - 1}),
        "ranks.* must lie between 1 and",
    ),
    "a name that is none": (lambda c: groups_in(c)[0]["slices"][0].__setitem__(0, "../x"), "name"),
    "a huge shape": (lambda c: groups_in(c)[0]["slices"][0].__setitem__(1, [10**12, 4]), "must lie between"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_entry_is_refused(case, saved, tmp_path):
    change, message = MALFORMED[case]
    with pytest.raises(PlanFormatError, match=message):
        load(edited(saved, tmp_path / "model", config=change))


def test_another_models_plan_is_refused(saved, tmp_path):
    other, _ = pruned("vit")
    entry = other.config.quantization_config
    with pytest.raises(PlanMismatchError, match=r"has none of them; it was made for another model"):
        load(edited(saved, tmp_path / "model", config=lambda c: c.update(quantization_config=entry)))


def test_a_plan_for_another_size_is_refused_with_every_mismatch(saved, tmp_path):
    with pytest.raises(PlanMismatchError, match=r"expected shape \[20, 24\], got \[40, 24\]") as caught:
        load(edited(saved, tmp_path / "model", config=lambda c: c.update(intermediate_size=40)))
    assert str(caught.value).count("expected shape") == 6  # up projection, its bias and down projection of both layers


def test_a_plan_that_renames_a_tensor_is_refused(saved, tmp_path):
    def rename(config):
        group_in(config, "bert.encoder.layer.0:ffn")["slices"][0][0] = "bert.encoder.layer.0.nothing.weight"
        group_in(config, "bert.encoder.layer.0:ffn").update(ranks={}, actions="10k10p")

    with pytest.raises(PlanMismatchError, match=r"expected a tensor bert\.encoder\.layer\.0\.nothing"):
        load(edited(saved, tmp_path / "model", config=rename))


def test_an_implant_that_saves_nothing_is_refused(saved, tmp_path):
    def enlarge(config):
        group = group_in(config, "bert.encoder.layer.1:ffn")
        group["ranks"] = dict.fromkeys(group["ranks"], 12)

    with pytest.raises(PlanMismatchError, match="it must be cheaper"):
        load(edited(saved, tmp_path / "model", config=enlarge))


@pytest.mark.parametrize("attribute", ["bert.encoder.num_heads", "bert.config.vocab_size", "bert.training"])
def test_an_attribute_that_is_no_counter_of_a_module_is_refused(attribute, saved, tmp_path):
    def count(config):
        groups_in(config)[0]["counters"] = [[attribute, 1]]

    with pytest.raises(PlanMismatchError, match=rf"{attribute}: expected an integer attribute"):
        load(edited(saved, tmp_path / "model", config=count))


def test_a_counter_that_falls_more_often_than_it_counts_is_refused(tmp_path):
    model, _ = pruned("llama")
    model.save_pretrained(tmp_path / "model")

    def repeat(config):
        group = group_in(config, "model.layers.0.mlp:ffn")
        group["counters"] *= 40

    with pytest.raises(PlanMismatchError, match=r"mlp.intermediate_size: expected .* of at least 80 .*, got 20"):
        AutoModelForCausalLM.from_pretrained(edited(tmp_path / "model", tmp_path / "edited", config=repeat))


def test_a_buffer_that_no_checkpoint_holds_is_not_cut(tmp_path):
    model, _ = pruned("llama")
    model.save_pretrained(tmp_path / "model")

    def cut(config):
        frequencies = ["model.rotary_emb.inv_freq", [3], 0, 0, 1, "aligned", 0]
        group = {"name": "x", "kind": "ffn", "units": 3, "slices": [frequencies], "actions": "2kp"}
        groups_in(config).append(group)

    with pytest.raises(PlanMismatchError, match=r"inv_freq: expected a weight that checkpoints hold"):
        AutoModelForCausalLM.from_pretrained(edited(tmp_path / "model", tmp_path / "edited", config=cut))


def test_sizes_that_no_weight_pays_for_cost_neither_time_nor_memory(saved, tmp_path):
    huge = 10**9

    def enlarge(config):
        up, down = UP.replace("layer.1", "layer.0"), "bert.encoder.layer.0.output.dense"
        config["intermediate_size"] = huge
        slices = [
            [f"{up}.weight", [huge, 24], 0, 0, 1, "producer", 0],
            [f"{up}.bias", [huge], 0, 0, 1, "aligned", 0],
            [f"{down}.weight", [24, huge], 1, 0, 1, "consumer", 0],
        ]
        group = {"name": "x", "kind": "ffn", "units": 2, "slices": slices, "actions": "kp"}
        plan_in(config)["stages"] = [{"groups": [group]}]

    with pytest.raises(PlanMismatchError, match=r"cuts tensors of 3000000000 rows and columns, and the checkpoint has"):
        load(edited(saved, tmp_path / "model", config=enlarge))


@pytest.fixture
def pickled(saved, tmp_path, monkeypatch):
    """Return a checkpoint whose weights are a pickle, which nobody may open."""

    def opened(*args, **kwargs):
        pytest.fail("a pickle was opened")

    path = edited(saved, tmp_path / "model")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", opened)
    return path


def test_a_pickle_with_a_plan_is_refused_unopened(pickled):
    with pytest.raises(PlanMismatchError, match=r"in safetensors, got 'pytorch_model.bin', which could run code"):
        load(pickled)


@pytest.mark.skipif(
    not hasattr(HfQuantizer, "update_attn_implementation"),
    reason="before that hook transformers looks for a dtype in the weights, with its restricted reader of pickles",
)
def test_a_pickle_is_not_opened_for_its_dtype(pickled, tmp_path):
    path = edited(pickled, tmp_path / "without dtype", config=lambda c: c.pop("dtype"))
    with pytest.raises(PlanMismatchError, match=r"in safetensors, got 'pytorch_model.bin'"):
        load(path)


def test_pickles_that_run_code_cannot_be_asked_for(pickled):
    with pytest.raises(ConfigError, match=r"expected weights_only=True for a pruned model, got False"):
        load(pickled, weights_only=False)


def test_a_pickle_of_pruned_heads_is_refused_unopened(pickled, tmp_path):
    def note(config):
        del config["quantization_config"]
        config["pruned_heads"] = {"0": [1]}

    path = edited(pickled, tmp_path / "version 4", config=note)
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        load_pruned_heads(AutoModelForSequenceClassification, path)
    with pytest.raises(ConfigError, match=r"expected use_safetensors=True, got False"):
        load_pruned_heads(AutoModelForSequenceClassification, path, use_safetensors=False)


@pytest.mark.parametrize("vanilla", [False, True])
def test_no_pickle_is_saved(vanilla, tmp_path):
    model, batch = single("bert")
    ffn = [g for g in find_groups(model, batch) if g.kind == "ffn"]
    plan = removal({g: [0, 1] for g in ffn})
    apply_plan_(model, plan)
    record_plan(model, plan)
    save_pruned(model, tmp_path, vanilla=vanilla)
    assert {f.suffix for f in tmp_path.iterdir()} == {".json", ".safetensors"}


IGNORING = [{}, {"ignore_mismatched_sizes": True}]


@pytest.mark.parametrize("kwargs", IGNORING)
def test_a_plan_that_keeps_what_was_removed_is_refused(kwargs, saved, tmp_path):
    def keep(config):
        group_in(config, "bert.encoder.layer.1:ffn").update(actions="20k", ranks={})

    with pytest.raises(PlanMismatchError, match=rf"{UP}.weight: expected shape \[20, 24\], got"):
        load(edited(saved, tmp_path / "model", config=keep), **kwargs)


def test_a_plan_that_leaves_out_a_group_is_refused(saved, tmp_path):
    def leave_out(config):
        groups_in(config).remove(group_in(config, "bert.encoder.layer.1:ffn"))

    path = edited(saved, tmp_path / "model", config=leave_out)
    with pytest.raises(PlanMismatchError, match="never initialised anew, not with ignore_mismatched_sizes"):
        load(path, ignore_mismatched_sizes=True)
    with pytest.raises(
        (PlanMismatchError, RuntimeError), match="ignore_mismatched_sizes"
    ):  # or transformers' own check
        load(path)


@pytest.mark.parametrize("kwargs", IGNORING)
def test_weights_of_another_shape_are_refused(kwargs, saved, tmp_path):
    path = edited(saved, tmp_path / "model", tensors=lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][1:]}))
    with pytest.raises(PlanMismatchError, match=rf"{UP}.weight: expected shape"):
        load(path, **kwargs)


@pytest.mark.parametrize("kwargs", IGNORING)
def test_renamed_weights_of_another_shape_are_refused(kwargs, tmp_path):
    model, _ = pruned("vit")  # saved under other names than the model's
    model.save_pretrained(tmp_path / "model")
    name = "vit.encoder.layer.1.intermediate.dense.weight"
    path = edited(tmp_path / "model", tmp_path / "edited", tensors=lambda t: t.update({name: t[name][1:]}))
    with pytest.raises((PlanMismatchError, RuntimeError), match="ignore_mismatched_sizes"):
        type(model).from_pretrained(path, **kwargs)


@pytest.mark.parametrize("kwargs", IGNORING)
@pytest.mark.parametrize("leaf", ["weight", "bias", "implant_up", "implant_down"])
def test_missing_weights_are_refused(leaf, kwargs, saved, tmp_path):
    path = edited(saved, tmp_path / "model", tensors=lambda t: t.pop(f"{UP}.{leaf}"))
    with pytest.raises(PlanMismatchError, match=rf"{UP}.{leaf}: expected shape .*, got none of that name and shape"):
        load(path, **kwargs)


def test_missing_weights_of_an_offloaded_layer_raise_when_they_are_used(saved, tmp_path):
    path = edited(saved, tmp_path / "model", tensors=lambda t: t.pop(f"{UP}.implant_up"))
    device_map = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    model = load(path, device_map=device_map, offload_folder=tmp_path / "offload")
    with pytest.raises(KeyError, match=f"{UP}.implant_up"):
        model(torch.tensor([[1, 2, 3]]))


def test_a_dense_checkpoint_with_a_plan_is_refused(saved, tmp_path):
    config = BertConfig.from_pretrained(saved)
    entry = config.__dict__.pop("quantization_config")
    BertForSequenceClassification(config).save_pretrained(tmp_path / "dense")
    path = edited(tmp_path / "dense", tmp_path / "model", config=lambda c: c.update(quantization_config=entry))
    with pytest.raises(PlanMismatchError, match="take both from one save"):
        load(path)


def test_a_dense_model_with_the_config_of_a_pruned_one_is_not_saved(saved, tmp_path):
    model = BertForSequenceClassification(BertConfig.from_pretrained(saved))
    with pytest.raises(PlanMismatchError, match=r"shape \[24, 24\], the plan leaves \[24, 18\].* take the plan off"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    del model.config.quantization_config
    model.save_pretrained(tmp_path / "model")
    assert load(tmp_path / "model").num_parameters() == model.num_parameters()


def test_other_weights_than_the_plan_leaves_are_not_saved_in_the_place_of_a_models_own(saved, tmp_path):
    model = load(saved)
    weights = dict(model.state_dict())
    model.save_pretrained(tmp_path / "model", state_dict=weights)
    dense = {**weights, f"{UP}.weight": torch.zeros(20, 24)}
    with pytest.raises(PlanMismatchError, match=rf"{UP}.weight has shape \[20, 24\], the plan leaves \[\d+, 24\]"):
        model.save_pretrained(tmp_path / "dense", state_dict=dense)
    assert not (tmp_path / "dense").exists()


def test_a_plan_as_an_argument_for_a_dense_checkpoint_is_refused(saved, tmp_path):
    config = BertConfig.from_pretrained(saved)
    entry = config.__dict__.pop("quantization_config")
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="got a dense one and a plan as quantization_config"):
        load(tmp_path, quantization_config=entry)


def test_quantizing_while_loading_is_refused(saved):
    with pytest.raises(ValueError, match="HapPlanConfig but you are passing a BitsAndBytesConfig"):
        load(saved, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_a_plan_with_very_many_units_is_read(saved, tmp_path):
    def provenance(config):
        plan_in(config)["stages"][0]["provenance"] = {f"key {i}": "x" * 1000 for i in range(60)}

    model = load(edited(saved, tmp_path / "model", config=provenance))
    (origin,) = plan_of(model).provenance
    assert len(origin) == 60


def test_a_failed_load_leaves_later_ones_alone(saved, tmp_path):
    model, batch = pruned("bert")
    with pytest.raises(PlanFormatError, match="must be a dict"):
        load(edited(saved, tmp_path / "model", config=MALFORMED["plan is a number"][0]))
    assert torch.equal(logits(load(saved), batch), logits(model, batch))
    assert torch.get_default_dtype() is torch.float32
    assert torch.empty(1).device.type == "cpu"
