"""Training with rounding: against a loop by hand, resumed, after rounds of pruning, and with what is frozen."""

import copy

import pytest
import torch
from torch import nn
from trainings import Net, assert_same, config, make_trainer, samples, tiny_bert
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hap_hf import BitConfig, ConfigError, HessianPruner, QuantizeAware, quantize_
from hap_hf.bits.ranges import KEPT
from hap_hf.checkpoint import bits_of
from hap_hf.layers.grid import weight_codes
from hap_hf.layers.quantized import Quantized
from hap_hf.model.quantizing import quantized_layers
from hap_hf.names.bits import Stored

NO_DROPOUT = {"num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PLAIN = {"max_steps": 6, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}


def batches_of(count, size=8):
    rows = samples()
    return [{k: torch.stack([s[k] for s in rows[i : i + size]]) for k in rows[0]} for i in range(0, count * size, size)]


def ranges(model):
    return {name: layer.input_range.clone() for name, layer in quantized_layers(model) if hasattr(layer, "input_range")}


class Record(TrainerCallback):
    """Keeps what goes into one layer at each training step, and where its range is afterwards."""

    def __init__(self, name):
        self.name, self.inputs, self.ranges = name, [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def look(module, args):
            if module.training:
                self.inputs[-1].append(args[0].detach().aminmax())

        model.get_submodule(self.name).register_forward_pre_hook(look)

    def on_step_begin(self, args, state, control, **kwargs):
        self.inputs.append([])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.ranges.append(model.get_submodule(self.name).input_range.tolist())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranges_follow_each_step_and_are_frozen_for_the_last(accumulation, tmp_path):
    record = Record("classifier")
    callback = QuantizeAware(BitConfig(), freeze_ranges_after=0.5)
    trainer = make_trainer(
        tmp_path, tiny_bert(**NO_DROPOUT), callback, record, gradient_accumulation_steps=accumulation, **PLAIN
    )
    reference = tiny_bert(**NO_DROPOUT)
    quantize_(reference, list(map(dict, trainer_batches(trainer))), BitConfig())
    low, high = reference.classifier.input_range.tolist()
    trainer.train()
    for step in range(6):
        if step < 3:
            lo = min(min(low_.item() for low_, _ in record.inputs[step]), 0)
            hi = max(max(high_.item() for _, high_ in record.inputs[step]), 0)
            low, high = KEPT * low + (1 - KEPT) * lo, KEPT * high + (1 - KEPT) * hi
        assert record.ranges[step] == pytest.approx([low, high], rel=1e-5)
        assert len(record.inputs[step]) == accumulation
    assert len({tuple(r) for r in record.ranges}) == 3


def trainer_batches(trainer):
    from hap_hf.trainer import scoring_batches

    return scoring_batches(trainer.train_dataset, trainer.data_collator, 8, BitConfig())


def test_a_step_is_that_of_the_rounded_weights_taken_straight_through(tmp_path):
    model = Net()
    start = copy.deepcopy(model.state_dict())
    data = samples(8)
    callback = QuantizeAware(BitConfig(weight_bits=4, activation_bits=None, embeddings=False))
    settings = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    make_trainer(tmp_path, model, callback, data=data, **settings).train()
    # By hand: rounded values as parameters, their gradient on the values that are not rounded.
    rounded = Net()
    with torch.no_grad():
        for name, layer in rounded.named_children():
            if isinstance(layer, nn.Linear):
                codes, scales = weight_codes(start[f"{name}.weight"], 4, 0)
                layer.weight.copy_(codes.float() * scales[:, None])
    batch = {k: torch.stack([s[k] for s in data]) for k in data[0]}
    rounded(**batch)["loss"].backward()
    for name, p in rounded.named_parameters():
        after = model.get_parameter(name).detach()
        torch.testing.assert_close(after, start[name] - 0.1 * p.grad, rtol=1e-4, atol=1e-6)
    assert not torch.equal(model.up.weight, start["up.weight"])


def test_prune_recover_and_quantize_in_one_training(tmp_path):
    pruner = HessianPruner(config(implant_ratio=0.3), step=1, num_rounds=2, interval=2)
    callback = QuantizeAware({"weight_bits": 6})
    trainer = make_trainer(tmp_path, tiny_bert(), pruner, callback, save_strategy="steps", save_steps=2, **PLAIN)
    trainer.train()
    assert len(pruner.reports) == 2
    assert callback.progress["start"] == 3
    assert len(callback.report.plan.layers) == sum(isinstance(m, Quantized) for m in trainer.model.modules())
    assert bits_of(trainer.model).stored is Stored.CODES
    trainer.save_model(tmp_path / "final")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final").eval()
    batch = batches_of(1)[0]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trainer.model.eval()(**batch).logits)
    # A checkpoint of the training holds weights that are not rounded.
    during = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert bits_of(during).stored is Stored.FLOATS
    weight = during.classifier.weight.detach()
    codes, scales = weight_codes(weight, 6, 0)
    assert not torch.equal(codes.float() * scales[:, None], weight)
    assert any("quantized_layers" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("resume_at", [2, 4])
@pytest.mark.parametrize("model", [tiny_bert, Net])
def test_a_resumed_training_is_the_uninterrupted_one(model, resume_at, tmp_path):
    def trainer(folder):
        callbacks = [HessianPruner(config(), step=1), QuantizeAware(BitConfig(weight_bits=5), step=3)]
        if model is Net:
            callbacks = callbacks[1:]
        return make_trainer(folder, model(), *callbacks, save_strategy="steps", save_steps=2, **PLAIN)

    whole = trainer(tmp_path / "a")
    whole.train()
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{resume_at}"))
    assert_same(whole.model, resumed.model)
    assert ranges(whole.model)
    assert all(layer.observed is None for _, layer in quantized_layers(resumed.model))


def test_the_best_model_is_one_that_is_rounded(tmp_path):
    trainer = make_trainer(
        tmp_path,
        tiny_bert(),
        QuantizeAware(step=2),
        eval_dataset=samples(8),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        **PLAIN,
    )
    trainer.train()
    assert trainer.state.best_global_step >= 2
    trainer.save_model(tmp_path / "final")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final").eval()
    batch = batches_of(1)[0]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trainer.model.eval()(**batch).logits)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.head(self.norm(self.conv(input_ids[:, None].float())).relu().mean(2))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norms_keep_their_statistics_unless_told_otherwise(frozen, tmp_path):
    model = Normed()
    before = model.norm.running_mean.clone()
    make_trainer(tmp_path, model, QuantizeAware({"recalibrate": False}, freeze_batch_norms=frozen), **PLAIN).train()
    assert torch.equal(model.norm.running_mean, before) == frozen
    model.train()
    model.norm(torch.randn(3, 4, 5))
    assert not torch.equal(model.norm.running_mean, before)  # afterwards it is as any other


def test_bf16_and_checkpointing_train_with_the_ranges_of_a_step(tmp_path):
    models = {}
    for name, settings in (("plain", {}), ("checkpointed", {}), ("bf16", {"bf16": True})):
        models[name] = tiny_bert(**NO_DROPOUT)
        if name == "checkpointed":  # each layer runs twice in a step
            model = models[name]  # the method has a new name from transformers 5.24 on
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        make_trainer(tmp_path / name, models[name], QuantizeAware(), **{**PLAIN, **settings}).train()
    for key, value in ranges(models["plain"]).items():
        torch.testing.assert_close(ranges(models["checkpointed"])[key], value)
        torch.testing.assert_close(ranges(models["bf16"])[key], value, rtol=0.1, atol=0.1)
    assert {p.dtype for p in models["bf16"].parameters()} == {torch.float32}


def test_settings_that_cannot_be_met_are_refused(tmp_path, caplog):
    for settings, words in (
        ({"step": 1, "epoch": 1}, "at most one"),
        ({"step": 0}, "at least 1"),
        ({"freeze_ranges_after": 0}, "must lie in"),
        ({"freeze_batch_norms": 1}, "must be True or False"),
    ):
        with pytest.raises(ConfigError, match=words):
            QuantizeAware(**settings)
    with pytest.raises(ConfigError, match="after 9 steps and the training ends after 6"):
        make_trainer(tmp_path, Net(), QuantizeAware(step=9), **PLAIN).train()
    # Given before the pruner, it waits for it.
    callback, pruner = QuantizeAware(), HessianPruner(config(), step=2)
    make_trainer(tmp_path, tiny_bert(), callback, pruner, **PLAIN).train()
    assert callback.progress["start"] == 3
    other = make_trainer(tmp_path / "s", tiny_bert(), QuantizeAware(), save_strategy="steps", save_steps=3, **PLAIN)
    other.train()
    model = tiny_bert()
    quantize_(model, batches_of(1), BitConfig(weight_bits=3))
    with pytest.raises(ConfigError, match="quantized otherwise"):
        make_trainer(tmp_path, model, QuantizeAware(), **PLAIN).train(
            resume_from_checkpoint=str(tmp_path / "s" / "checkpoint-3")
        )
