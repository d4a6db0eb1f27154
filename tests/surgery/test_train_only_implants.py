"""Training the implants alone: nothing else moves, by hand and in the Trainer, resumed and in several processes."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from cases import batch_of, build
from checkpoints import prune_ as prune_somehow_
from plans import plan_of as make_plan
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trainings import assert_same, config, make_trainer, tiny_model

from hap_hf import (
    ConfigError,
    HapConfig,
    HessianPruner,
    ImplantConv2d,
    apply_plan_,
    find_groups,
    prune,
    train_only_implants_,
)
from hap_hf.trainer import scoring_batches, trainer_loss
from hap_hf.trainer.freezing import freeze_the_rest_

pytestmark = pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning", "ignore:.*pin_memory.*:UserWarning")

ALONE = {"train_only_implants": True}


def implanted(name="bert"):
    model, batch = build(name), batch_of(name)
    prune_somehow_(model, batch)
    return model, batch


def values_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def moved(model, before):
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def step(model, optimizer, batch):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_implants_and_nothing_else_require_gradients(name):
    model, _ = implanted(name)
    names = train_only_implants_(model)
    assert set(names) == {n for n, _ in model.named_parameters() if "implant_" in n}
    assert set(names) == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.3),
        lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, foreach=False),
    ],
    ids=["adamw", "sgd", "adam"],
)
def test_momentum_weight_decay_and_left_over_gradients_move_nothing_that_is_frozen(optimizer):
    model, batch = implanted()
    optimizer = optimizer(model.parameters())
    step(model, optimizer, batch)
    model(**batch).loss.backward()  # accumulated, and not yet taken
    names = train_only_implants_(model, optimizer=optimizer)
    assert set(optimizer.state) == {model.get_parameter(n) for n in names}
    before = values_of(model)
    for _ in range(3):
        step(model, optimizer, batch)
    assert moved(model, before) == set(names)


def test_what_is_named_is_trained_as_well():
    model, _ = implanted()
    names = train_only_implants_(model, ["classifier", "*.1.output.dense.bias", "bert.encoder.layer.?.attention.self"])
    others = {n for n in names if "implant_" not in n}
    assert {"classifier.weight", "classifier.bias", "bert.encoder.layer.1.output.dense.bias"} < others
    assert "bert.encoder.layer.0.attention.self.query.weight" in others
    assert not any("embeddings" in n or "attention.output" in n for n in others)
    assert set(train_only_implants_(model)) == set(names) - others


def test_one_name_of_a_tied_tensor_is_enough():
    model, _ = implanted("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "transformer.wte.weight" in train_only_implants_(model, ["lm_head"])


def test_implants_of_convolutions_are_trained_alone():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()).double()
    (group,) = find_groups(model, {"input": torch.randn(2, 3, 4, 4, dtype=torch.float64)})
    apply_plan_(model, make_plan({group: [0]}, {group: [1, 2]}))
    assert isinstance(model[0], ImplantConv2d)
    assert train_only_implants_(model) == ("0.implant_pointwise",)
    model(torch.randn(2, 3, 4, 4, dtype=torch.float64)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["0.implant_pointwise"]


def test_a_model_without_implants_is_refused_and_left_alone():
    model, batch = build("bert"), batch_of("bert")
    prune_somehow_(model, batch, implants=False)
    with pytest.raises(ConfigError, match="this BertForSequenceClassification has none; prune it with implant_ratio"):
        train_only_implants_(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("also", "message"),
    [
        (["clasifier"], r"patterns \['clasifier'\] match no module .* whose modules are \['bert', 'dropout', 'class"),
        ("classifier", r"got 'classifier'; write \['classifier'\]"),
    ],
)
def test_names_that_match_nothing_are_refused_and_the_model_left_alone(also, message):
    model, _ = implanted()
    with pytest.raises(ConfigError, match=message):
        train_only_implants_(model, also)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_that_is_frozen_but_for_its_implants_is_pruned_like_one_that_is_not():
    (frozen, batch), (whole, _) = implanted(), implanted()
    train_only_implants_(frozen)
    settings = HapConfig(prune_ratio=0.3, progress=False)
    assert prune(frozen, [batch], settings).plan == prune(whole, [batch], settings).plan
    assert_same(frozen, whole)
    assert {n for n, p in frozen.named_parameters() if p.requires_grad} == {
        n for n, _ in whole.named_parameters() if "implant_" in n
    }


class Watch(hf.TrainerCallback):
    """Remembers the weights at the end of each step, after all callbacks before it."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = values_of(model)


def implants_in(model):
    return {n for n, _ in model.named_parameters() if "implant_" in n}


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"activation_checkpointing": True}, {"optim": "adafactor"}],
    ids=str,
)
def test_only_implants_and_what_is_named_move_after_the_round(tmp_path, settings):
    pruner, watch = HessianPruner(config(implant_ratio=0.5), step=2, also_train=["classifier"], **ALONE), Watch()
    trainer = make_trainer(tmp_path, tiny_model(), pruner, watch, max_steps=4, weight_decay=0.3, **settings)
    trainer.train()
    named = {"classifier.weight", "classifier.bias"}
    assert moved(trainer.model, watch.after[2]) == implants_in(trainer.model) | named
    assert implants_in(trainer.model)
    first = tiny_model().state_dict()
    assert not torch.equal(watch.after[1]["bert.pooler.dense.weight"], first["bert.pooler.dense.weight"])


def test_the_callback_equals_pruning_and_freezing_by_hand(tmp_path):
    settings = config(implant_ratio=0.5)
    called = make_trainer(tmp_path / "a", tiny_model(), HessianPruner(settings, **ALONE), max_steps=4)
    called.train()
    model = tiny_model()
    by_hand = make_trainer(tmp_path / "b", model, max_steps=4)
    batches = scoring_batches(by_hand.train_dataset, by_hand.data_collator, 8, settings)
    prune(model, batches, settings, loss_fn=trainer_loss(by_hand))
    train_only_implants_(model)
    by_hand.train()
    assert_same(called.model, model)


def test_rounds_before_the_last_freeze_nothing(tmp_path):
    pruner, watch = HessianPruner(config(implant_ratio=0.5), step=1, num_rounds=2, interval=2, **ALONE), Watch()
    trainer = make_trainer(tmp_path, tiny_model(), pruner, watch, max_steps=5)
    trainer.train()
    dense = "bert.pooler.dense.weight"
    assert not torch.equal(watch.after[1][dense], watch.after[2][dense])
    assert moved(trainer.model, watch.after[3]) == implants_in(trainer.model)


@pytest.mark.parametrize("restored", [False, True])
def test_a_resumed_training_ends_like_one_that_was_not_interrupted(tmp_path, restored):
    def new(**settings):
        pruner = HessianPruner(config(implant_ratio=0.5), step=2, also_train=["classifier"], **ALONE)
        return make_trainer(
            tmp_path, tiny_model(), pruner, max_steps=6, save_strategy="steps", save_steps=3, **settings
        )

    whole = new()
    whole.train()
    resumed = new(restore_callback_states_from_checkpoint=restored)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(resumed.model, whole.model)
    trained = {n for n, p in resumed.model.named_parameters() if p.requires_grad}
    assert trained == implants_in(whole.model) | {"classifier.weight", "classifier.bias"}


def test_a_further_training_goes_on_with_the_implants_alone(tmp_path):
    trainer = make_trainer(tmp_path, tiny_model(), HessianPruner(config(implant_ratio=0.5), **ALONE), max_steps=2)
    trainer.train()
    trainer.model.requires_grad_(True)
    before = values_of(trainer.model)
    trainer.train()
    assert moved(trainer.model, before) == implants_in(trainer.model)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, ALONE, "needs implants, got a config with implant_ratio=0"),
        ({"implant_ratio": 0.5, "implant_init": "zero"}, ALONE, "would stay so and the implants without gradients"),
        ({"implant_ratio": 0.5}, {"also_train": ["classifier"]}, "a meaning only with train_only_implants=True"),
        ({"implant_ratio": 0.5}, {**ALONE, "also_train": "classifier"}, r"write \['classifier'\]"),
    ],
)
def test_settings_that_would_train_nothing_are_refused(settings, arguments, message):
    with pytest.raises(ConfigError, match=message):
        HessianPruner(config(**settings), **arguments)


def test_a_name_that_matches_nothing_is_refused_before_the_first_step(tmp_path):
    model = tiny_model()
    before = copy.deepcopy(model)
    pruner = HessianPruner(config(implant_ratio=0.5), step=2, also_train=["head"], **ALONE)
    with pytest.raises(ConfigError, match=r"patterns \['head'\] match no module"):
        make_trainer(tmp_path, model, pruner).train()
    assert_same(model, before)


@pytest.fixture
def process_group(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_all_reduce_of_several_processes_waits_for_no_frozen_parameter(process_group):
    def backward_twice(told):
        model, batch = implanted()
        wrapper = DistributedDataParallel(model, find_unused_parameters=False)
        if told:
            trainer = SimpleNamespace(model_wrapped=wrapper, accelerator=SimpleNamespace(ddp_handler=None))
            freeze_the_rest_(trainer, model, torch.optim.SGD(model.parameters()), ())
        else:
            train_only_implants_(model)
        for _ in range(2):
            wrapper(**batch).loss.backward()
        return {n for n, p in model.named_parameters() if p.grad is not None}

    assert backward_twice(told=True) == implants_in(implanted()[0])
    with pytest.raises(RuntimeError, match="Expected to have finished reduction in the prior iteration"):
        backward_twice(told=False)
