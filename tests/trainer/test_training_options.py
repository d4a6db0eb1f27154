"""Options of the Trainer: the training goes on as that of the masked model, or is refused before it starts."""

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn
from trainings import Net, config, exact_model, make_trainer, samples, tiny_bert, tiny_model, trained_pruned_and_masked
from transformers import Trainer

from hap_hf import HessianPruner, UnsupportedModelError, plan_of

# Older releases know checkpointing by another name, which newer ones warn of.
CHECKPOINTING = "activation" if "activation_checkpointing" in hf.TrainingArguments.__dataclass_fields__ else "gradient"


def checkpointing(**options):
    return {f"{CHECKPOINTING}_checkpointing": True, f"{CHECKPOINTING}_checkpointing_kwargs": options}


def of_many_lengths(features):
    """Pad to the longest of the batch."""
    longest = max(len(f["input_ids"]) for f in features)
    padded = [
        {k: nn.functional.pad(v, (0, longest - len(v))) if v.dim() else v for k, v in f.items()} for f in features
    ]
    return hf.default_data_collator(padded)


CUT = [{k: v[: 3 + i % 5] if v.dim() else v for k, v in s.items()} for i, s in enumerate(samples())]
OPTIONS = {
    "clipping, two rounds": {"max_grad_norm": 0.3, "steps": (2, 4), "weight_decay": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2},
    "reentrant checkpoints": checkpointing(use_reentrant=True),
    "checkpoints": checkpointing(use_reentrant=False),
    "label smoothing": {"label_smoothing_factor": 0.1},
    "groups of one length": {
        "train_sampling_strategy": "group_by_length",
        "data": CUT,
        "data_collator": of_many_lengths,
        "changes": {"method": "taylor"},
    },
    "small ones": {
        "torch_empty_cache_steps": 1,
        "dataloader_drop_last": True,
        "average_tokens_across_devices": True,
        "include_num_input_tokens_seen": "all",
        "remove_unused_columns": False,
        "data": samples(30),
        "changes": {"method": "taylor"},
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_rest_of_the_training_equals_that_of_the_masked_model(tmp_path, name):
    trainer, found, expected = trained_pruned_and_masked(tmp_path, **OPTIONS[name])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert len(plan_of(trainer.model).stages) == len(OPTIONS[name].get("steps", (2,)))


def test_no_gradient_from_before_is_left_after_a_round(tmp_path):
    seen = []

    class Look(hf.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append([p.grad for p in model.parameters()])

    pruner = HessianPruner(config(method="taylor"), step=1)
    make_trainer(tmp_path, exact_model(), pruner, Look(), max_steps=2, gradient_accumulation_steps=2).train()
    assert all(grad is None for grads in seen for grad in grads)


def test_weights_and_implants_decay_and_biases_do_not_as_in_a_fresh_optimizer(tmp_path):
    model = tiny_bert(num_hidden_layers=1)
    pruner = HessianPruner(config(implant_ratio=0.5, prune_ratio=0.6), step=1)
    trainer = make_trainer(tmp_path, model, pruner, max_steps=2, weight_decay=0.1)
    trainer.train()
    fresh = make_trainer(tmp_path, model, weight_decay=0.1).create_optimizer()
    names = {id(p): n for n, p in model.named_parameters()}
    found, expected = (
        [(group["weight_decay"], [names[id(p)] for p in group["params"]]) for group in optimizer.param_groups]
        for optimizer in (trainer.optimizer, fresh)
    )
    assert found == expected
    assert any("implant" in name for name in found[0][1])


class Scaled(Trainer):
    """Trains with fp16 and a loss scale on the CPU, where accelerate would leave both out."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)


PRECISIONS = {"bf16": {"bf16": True}, "fp16": {"fp16": True, "kind": Scaled}, "weights in bf16": {}}


@pytest.mark.parametrize("name", PRECISIONS)
def test_half_precision_goes_on_as_with_the_masked_model(tmp_path, name):
    def build():
        model = exact_model().float()
        return model.bfloat16() if name == "weights in bf16" else model

    # Zeroed units leave sums of the same numbers, which may be rounded in another order.
    settings = {"steps": (1,), "learning_rate": 1e-3, "build": build, **PRECISIONS[name]}
    trainer, found, expected = trained_pruned_and_masked(tmp_path, **settings)
    assert ("_original_forward" in vars(trainer.model)) == (name != "weights in bf16")
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0.03)
    if name == "fp16":
        assert trainer.accelerator.scaler.get_scale() == 64 * 2**2  # no step of four was skipped


def test_a_compiled_training_ends_like_one_that_is_not(tmp_path):
    trainers = []
    for compiled in (False, True):
        pruner = HessianPruner(config(implant_ratio=0.5, prune_ratio=0.6), step=1, num_rounds=2)
        settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainers.append(make_trainer(tmp_path, Net(), pruner, max_steps=3, **settings))
        # What was compiled before a round must not count.
        with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
            trainers[-1].train()
    plain, compiled = (trainer.model.state_dict() for trainer in trainers)
    assert isinstance(trainers[1].model_wrapped, torch._dynamo.OptimizedModule)
    assert any("implant" in name for name in plain)
    assert list(plain) == list(compiled)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=1e-6)
    trainers[1].save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == compiled.keys()
    assert all(torch.equal(saved[name], compiled[name]) for name in saved)


def test_a_model_compiled_in_place_is_scored_uncompiled(tmp_path):
    thresholds = []
    for compiled in (False, True):
        model = Net()
        if compiled:
            model.compile(backend="eager")
        pruner = HessianPruner(config())
        make_trainer(tmp_path, model, pruner, max_steps=1).train()
        thresholds.append(pruner.reports[0].threshold)
    assert thresholds[0] == thresholds[1]


def compiled_as_a_whole(model):
    return torch.compile(model, backend="eager")


def compiled_in_part(model):
    model.bert.encoder = torch.compile(model.bert.encoder, backend="eager")
    return model


@pytest.mark.parametrize("compiled", [compiled_as_a_whole, compiled_in_part])
def test_models_that_come_compiled_are_refused(tmp_path, compiled):
    trainer = make_trainer(tmp_path, compiled(exact_model()), HessianPruner(config()), remove_unused_columns=False)
    with pytest.raises(UnsupportedModelError, match="the model as it is, and torch_compile=True in its arguments"):
        trainer.train()


def test_compiling_layers_one_by_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    settings = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = make_trainer(tmp_path, tiny_model(), HessianPruner(config()), **settings)
    with pytest.raises(UnsupportedModelError, match="ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"):
        trainer.train()


def test_noise_on_embeddings_does_not_reach_the_scores(tmp_path):
    thresholds, losses = [], []
    for alpha in (None, 20.0):
        pruner = HessianPruner(config(method="taylor"))
        trainer = make_trainer(tmp_path, exact_model(), pruner, neftune_noise_alpha=alpha, max_steps=1)
        trainer.train()
        thresholds.append(pruner.reports[0].threshold)
        losses.append(trainer.state.log_history[1]["loss"])
        assert not trainer.model.get_input_embeddings()._forward_hooks
    assert thresholds[0] == thresholds[1]
    assert losses[0] != losses[1]


def test_generated_text_and_metrics_are_those_of_the_smaller_model(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 24, "num_layers": 1, "vocab_size": 40}
    model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0))
    data = [{**s, "labels": s["input_ids"][:5]} for s in samples()]
    seen = []
    trainer = make_trainer(
        tmp_path,
        model,
        HessianPruner(config(implant_ratio=0.5), step=1),
        data=data,
        eval_dataset=data[:8],
        max_steps=2,
        kind=hf.Seq2SeqTrainer,
        arguments_kind=hf.Seq2SeqTrainingArguments,
        predict_with_generate=True,
        generation_max_length=6,
        eval_strategy="steps",
        eval_steps=1,
        compute_metrics=lambda p: seen.append(torch.tensor(p.predictions)) or {"length": p.predictions.shape[1]},
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved")
    assert reloaded.num_parameters() < hf.T5ForConditionalGeneration(model.config.__class__(**sizes)).num_parameters()
    ids = torch.stack([d["input_ids"] for d in data[:8]])
    expected = reloaded.generate(ids, max_length=6)
    assert torch.equal(seen[-1][:, : expected.shape[1]], expected)
    assert all("eval_length" in e for e in trainer.state.log_history if "eval_loss" in e)


def test_logits_are_preprocessed_for_metrics_after_pruning_too(tmp_path):
    shapes = []
    settings = {
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        "compute_metrics": lambda p: shapes.append(p.predictions.shape) or {"accuracy": 1.0},
        "eval_dataset": samples(8),
    }
    trainer = make_trainer(tmp_path, Net(), HessianPruner(config()), max_steps=1, **settings)
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == 1.0
    assert shapes == [(8,)]
