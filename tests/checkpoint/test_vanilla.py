"""Plain checkpoints: the same model in an interpreter that has never heard of hap_hf, or an error that says why not."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from checkpoints import prune_, pruned, single
from plans import plan_of as one_stage
from reference import logits
from safetensors.torch import save_file
from transformers import AutoConfig

from hap_hf.checkpoint import plan_of, record_plan, save_pruned
from hap_hf.discovery import find_groups
from hap_hf.errors import ConfigError
from hap_hf.names.group import Kind
from hap_hf.surgery import apply_plan_


def uniform(name, *, heads=0, ffn=0, until=None):
    """Return a case's model after every group lost as many units, but other ones, and its batch."""
    model, batch = single(name)
    removed = {}
    for i, group in enumerate(find_groups(model, batch)[:until]):
        count = heads if group.kind is Kind.HEADS else ffn
        removed[group] = [(i + u) % group.num_units for u in range(count)]
    plan = one_stage(removed)
    apply_plan_(model, plan)
    record_plan(model, plan)
    return model, batch


UNIFORM = {
    "bert": {"ffn": 7},
    "gpt2": {"ffn": 7},
    "bart": {"ffn": 4},
    "dinov2": {"ffn": 24},
    "llama": {"heads": 1, "ffn": 7},
    "qwen2": {"heads": 1},
    "qwen3": {"heads": 1, "ffn": 4},
    "gemma_one_key_head": {"heads": 2},
    "phi": {"heads": 1, "ffn": 4},
    "t5": {"heads": 1, "ffn": 4},
}


def test_a_plain_checkpoint_loads_bitwise_without_hap_hf(tmp_path):
    for name, amounts in UNIFORM.items():
        model, batch = uniform(name, **amounts)
        save_pruned(model, tmp_path / name, vanilla=True)
        tensors = {f"batch.{k}": v for k, v in batch.items()} | {"logits": logits(model, batch)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / f"{name}.safetensors")
    code = """
        import sys, torch, transformers
        from safetensors.torch import load_file
        torch.set_num_threads(1)
        for name in sys.argv[2:]:
            path = f"{sys.argv[1]}/{name}"
            architecture = transformers.AutoConfig.from_pretrained(path).architectures[0]
            model = getattr(transformers, architecture).from_pretrained(path)
            for parameter in model.parameters():  # products of mapped, unaligned memory round differently
                parameter.data = parameter.data.clone()
            saved = load_file(f"{path}.safetensors")
            with torch.no_grad():
                got = model(**{k[6:]: v for k, v in saved.items() if k != "logits"}).logits
            print(name, torch.equal(got, saved["logits"]), "hap_hf" in sys.modules)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), *UNIFORM],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.splitlines() == [f"{name} True False" for name in UNIFORM], result.stderr


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_plain_checkpoint_is_smaller_and_says_so_in_its_config(name, tmp_path):
    dense, batch = single(name)
    model, _ = uniform(name, heads=1, ffn=4)
    assert not torch.allclose(logits(model, batch), logits(dense, batch), atol=1e-6), "pruning changed nothing"
    save_pruned(model, tmp_path, vanilla=True)
    values = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in values
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.num_parameters() == model.num_parameters() < dense.num_parameters()
    assert plan_of(loaded) is None


def test_the_head_size_stays_when_heads_go(tmp_path):
    model, _ = uniform("llama", heads=1)
    before = model.config
    save_pruned(model, tmp_path, vanilla=True)
    after = AutoConfig.from_pretrained(tmp_path)
    assert (before.num_attention_heads, before.num_key_value_heads, before.head_dim) == (4, 2, 6)
    assert (after.num_attention_heads, after.num_key_value_heads, after.head_dim) == (2, 1, 6)


def test_two_uniform_stages_make_one_plain_checkpoint(tmp_path):
    model, batch = uniform("bert", ffn=7)
    plan = one_stage({g: [0, 5] for g in find_groups(model, batch) if g.kind is Kind.FFN})
    apply_plan_(model, plan)
    record_plan(model, plan)
    save_pruned(model, tmp_path, vanilla=True)
    assert AutoConfig.from_pretrained(tmp_path).intermediate_size == 11
    torch.testing.assert_close(
        logits(type(model).from_pretrained(tmp_path), batch), logits(model, batch), rtol=0, atol=1e-6
    )


def test_encoder_and_decoder_may_have_widths_of_their_own(tmp_path):
    model, batch = single("bart")
    ffn = [g for g in find_groups(model, batch) if g.kind is Kind.FFN]
    plan = one_stage({g: [1, 2, 3] if "encoder" in g.name else [4] for g in ffn})
    apply_plan_(model, plan)
    record_plan(model, plan)
    save_pruned(model, tmp_path, vanilla=True)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (17, 19)


def test_the_model_in_memory_stays_as_it_was(tmp_path):
    model, batch = uniform("bert", ffn=7)
    config, values, expected = model.config, model.config.to_json_string(), logits(model, batch)
    save_pruned(model, tmp_path, vanilla=True)
    assert model.config is config
    assert config.to_json_string() == values
    assert torch.equal(logits(model, batch), expected)


def test_the_config_comes_back_when_saving_fails(tmp_path):
    model, _ = uniform("bert", ffn=7)
    config = model.config
    with pytest.raises(TypeError, match="object"):
        save_pruned(model, tmp_path, vanilla=True, max_shard_size=object())
    assert model.config is config


def refusal(model, directory):
    """Return the message with which a plain checkpoint is refused, after nothing was written."""
    values = model.config.to_json_string()
    with pytest.raises(ConfigError, match="save with vanilla=False") as caught:
        save_pruned(model, directory, vanilla=True)
    assert not list(directory.iterdir())
    assert model.config.to_json_string() == values
    return str(caught.value)


def test_uneven_widths_are_named_with_their_layers(tmp_path):
    model, batch = single("bert")
    first, second = (g for g in find_groups(model, batch) if g.kind is Kind.FFN)
    plan = one_stage({first: [0], second: [0, 1, 2]})
    apply_plan_(model, plan)
    record_plan(model, plan)
    assert (
        "BertConfig.intermediate_size is one number for all layers, and the plan leaves "
        "17 in bert.encoder.layer.1:ffn, 19 in bert.encoder.layer.0:ffn"
    ) in refusal(model, tmp_path)


def test_a_plan_of_some_layers_only_is_refused(tmp_path):
    model, _ = uniform("gpt2", heads=0, ffn=5, until=2)
    assert "transformer.h.1.mlp.c_fc.weight: shape [24, 20] in the model, [24, 15] in the stock model" in refusal(
        model, tmp_path
    )


def test_fewer_heads_need_a_config_that_knows_the_head_size(tmp_path):
    model, _ = uniform("bert", heads=1)
    message = refusal(model, tmp_path)
    assert "no BertConfig describes the pruned BertForSequenceClassification: it has no head_dim" in message
    assert "attention.output.dense.weight: shape [24, 18] in the model, [24, 24] in the stock model" in message
    assert "--kinds ffn --equal-widths" in message
    assert len(message) < 700


def test_uneven_heads_are_told_where_none_can_go(tmp_path):
    model, batch = single("bert")
    first, second = (g for g in find_groups(model, batch) if g.kind is Kind.HEADS)
    plan = one_stage({first: [0], second: [0, 1]})
    apply_plan_(model, plan)
    record_plan(model, plan)
    message = refusal(model, tmp_path)
    assert "equal_widths=True), and kinds='ffn' where head_dim follows from the number of heads, as of BERT" in message


def test_implants_are_refused(tmp_path):
    model, _ = pruned("bert")
    assert "a plain checkpoint cannot hold implants" in refusal(model, tmp_path)


def test_a_setting_of_whole_numbers_only_is_refused(tmp_path):
    model, _ = uniform("dinov2", ffn=7)
    assert "Dinov2Config does not accept the pruned sizes" in refusal(model, tmp_path)


def test_uneven_plans_without_implants_still_save_with_the_record(tmp_path):
    model, batch = single("bert")
    prune_(model, batch, implants=False)
    save_pruned(model, tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), batch), logits(model, batch))
