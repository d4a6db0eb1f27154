"""A loaded pruned model is an ordinary model: casts, trains, compiles, copies, runs in pipelines."""

import copy
import io

import pytest
import torch
from checkpoints import pruned
from reference import logits
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hap_hf.checkpoint import plan_of


@pytest.fixture
def loaded(tmp_path):
    model, batch = pruned("bert")
    model.save_pretrained(tmp_path / "saved")
    return AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved"), batch


def test_nothing_says_quantized_but_the_record(loaded):
    model, _ = loaded
    for module in model.modules():
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            assert not hasattr(module, name)
    assert not hasattr(model.config, "_is_quantized")
    assert model.config.quantization_config["quant_method"] == "hap_hf"


def test_casts_are_allowed(loaded):
    model, batch = loaded
    expected = logits(model, batch)
    assert model.half().dtype is torch.float16
    assert model.float().dtype is torch.float32
    assert model.to(torch.float64).dtype is torch.float64
    assert model.to("cpu", torch.bfloat16).dtype is torch.bfloat16
    torch.testing.assert_close(logits(model.float(), batch), expected, rtol=0.05, atol=0.05)


def test_copies_and_pickles_carry_the_plan(loaded):
    model, batch = loaded
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), logits(model, batch))
    assert plan_of(twin) == plan_of(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), batch), logits(model, batch))


def test_it_compiles(loaded):
    model, batch = loaded
    expected = logits(model, batch)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, expected, rtol=0, atol=1e-6)


def test_the_trainer_trains_saves_and_resumes_it(loaded, tmp_path):
    model, batch = loaded
    rows = [{k: v[i] for k, v in batch.items()} for i in range(len(batch["labels"]))] * 4
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def arguments(steps):
        return TrainingArguments(
            output_dir=tmp_path / "run",
            max_steps=steps,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            save_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )

    Trainer(model, arguments(2), train_dataset=rows).train()
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert not {n for n in still if ".layer." in n and not n.endswith("key.bias")}, "these tensors did not move"
    checkpoint = tmp_path / "run" / "checkpoint-2"
    again = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    assert torch.equal(logits(again, batch), logits(model, batch))
    resumed = Trainer(again, arguments(4), train_dataset=rows)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    resumed.save_model(tmp_path / "final")
    final = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert torch.equal(logits(final, batch), logits(again, batch))


def test_a_pipeline_loads_it_by_path_and_leaves_the_tokenizer_alone(loaded, tmp_path):
    model, _ = loaded
    words = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path / "saved"
    )
    model.save_pretrained(tmp_path / "saved")
    classify = pipeline("text-classification", model=str(tmp_path / "saved"), device="cpu")
    inputs = AutoTokenizer.from_pretrained(tmp_path / "saved")("good bad", return_tensors="pt")
    expected = logits(model, {"input_ids": inputs["input_ids"]}).softmax(-1).max()
    assert classify("good bad")[0]["score"] == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_a_cache_equals_generation_without(cache, name, tmp_path):
    model, batch = pruned(name)
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = batch["input_ids"][:1, :4]
    flags = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation=cache, **flags)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **flags)
    assert torch.equal(cached, plain)
