"""Optimizers of the Trainer: those that go on with the smaller model, and those that are refused by name."""

import copy
import types

import pytest
import torch
import transformers as hf
from trainings import Net, assert_same, config, exact_model, make_trainer, tiny_bert, trained_pruned_and_masked
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.training_args import OptimizerNames

import hap_hf.cut
from hap_hf import HessianPruner, UnsupportedModelError, plan_of
from hap_hf.trainer.best_model import forget_best_
from hap_hf.trainer.optimizers import check_optimizer

EQUAL_TO_MASKED = {
    "adamw_torch": {"weight_decay": 0.1},
    "adamw_torch_fused": {"weight_decay": 0.1},
    "sgd": {"optim_args": "momentum=0.9,nesterov=true"},
    "rmsprop": {"optim_args": "momentum=0.5,centered=true", "learning_rate": 1e-3},
    "adagrad": {},
}
PACKAGES = {
    "bitsandbytes": "adamw_bnb_8bit adamw_8bit ademamix ademamix_8bit lion_8bit lion_32bit paged_adamw_32bit "
    "paged_adamw_8bit paged_ademamix_32bit paged_ademamix_8bit paged_lion_32bit paged_lion_8bit rmsprop_bnb "
    "rmsprop_bnb_8bit rmsprop_bnb_32bit",
    "torchao": "adamw_torch_4bit adamw_torch_8bit",
    "galore_torch": "galore_adamw galore_adamw_8bit galore_adafactor galore_adamw_layerwise "
    "galore_adamw_8bit_layerwise galore_adafactor_layerwise",
    "apollo_torch": "apollo_adamw apollo_adamw_layerwise",
    "lomo_optim": "lomo adalomo",
    "torch_npu": "adamw_torch_npu_fused",
}
"""Optimizers that are refused, by the package that they come from."""

BY_THEIR_STATE = "adamw_anyprecision grokadamw schedule_free_radam schedule_free_adamw schedule_free_sgd stable_adamw"
"""Optimizers of packages that may be installed: what they remember has the parameters' shapes, or they are refused."""

ELSEWHERE = {"adafactor", "adamw_torch_xla"}
"""Has tests of its own; trainings on XLA devices are refused whatever the optimizer."""


def test_every_optimizer_that_transformers_names_is_decided():
    refused = {name for names in PACKAGES.values() for name in names.split()}
    decided = set(EQUAL_TO_MASKED) | refused | set(BY_THEIR_STATE.split()) | ELSEWHERE
    assert {name.value for name in OptimizerNames} <= decided


@pytest.mark.parametrize("name", EQUAL_TO_MASKED)
def test_the_rest_of_the_training_equals_that_of_the_masked_model(tmp_path, name):
    trainer, found, expected = trained_pruned_and_masked(tmp_path, optim=name, **EQUAL_TO_MASKED[name])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}


def test_with_fresh_moments_it_would_not(tmp_path, monkeypatch):
    carry = hap_hf.cut.carry_optimizer_state_

    def forget(optimizer, changes):
        carry(optimizer, changes)
        optimizer.state.clear()

    monkeypatch.setattr(hap_hf.cut, "carry_optimizer_state_", forget)
    _, found, expected = trained_pruned_and_masked(tmp_path, optim="adamw_torch")
    assert (found - expected).abs().max() > 1e-3


class Lion(torch.optim.Optimizer):
    """An optimizer that hap_hf has never heard of, with state of the parameters' shapes."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                moment = self.state[p].setdefault("moment", torch.zeros_like(p))
                p.sub_(torch.sign(0.9 * moment + 0.1 * p.grad), alpha=group["lr"])
                moment.lerp_(p.grad, 0.01)


def test_an_unknown_optimizer_goes_on_if_its_state_has_the_shapes_of_the_parameters(tmp_path):
    _, found, expected = trained_pruned_and_masked(tmp_path, optimizer=Lion)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


class Flat(Lion):
    """Remembers its moments in one dimension."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for p, state in self.state.items():
            state["flat"] = p.flatten().clone()


def test_state_of_another_shape_is_refused_and_everything_stays_as_it_was(tmp_path):
    before = {}

    class Remember(hf.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            before.update(model=copy.deepcopy(model), state={k: dict(v) for k, v in optimizer.state.items()})

    model = exact_model()
    pruner = HessianPruner(config(method="magnitude"), step=2)
    trainer = make_trainer(
        tmp_path, model, Remember(), pruner, optimizers=(Flat(model.parameters()), None), max_steps=3
    )
    with pytest.raises(UnsupportedModelError, match=r"Flat remembers a tensor \[\d+\] of bert.*prune before the first"):
        trainer.train()
    assert_same(model, before["model"])
    assert plan_of(model) is None
    assert {k: dict(v) for k, v in trainer.optimizer.state.items()} == before["state"]


@pytest.mark.parametrize("kind", ["adafactor", torch.optim.Adafactor])
def test_adafactor_goes_on_with_factors_of_the_smaller_weights(tmp_path, kind):
    model = tiny_bert(num_hidden_layers=1)
    own = {"optim": kind} if kind == "adafactor" else {"optimizers": (kind(model.parameters(), lr=1e-2), None)}
    pruner = HessianPruner(config(implant_ratio=0.5, prune_ratio=0.6), step=2)
    trainer = make_trainer(tmp_path, model, pruner, max_steps=4, **own)
    trainer.train()
    assert any("implant" in name for name, _ in model.named_parameters())
    state = trainer.optimizer.state
    assert all(p in state for p in model.parameters() if p.grad is not None)
    for p, values in state.items():
        if p.dim() > 1:
            row, column = (v for k, v in values.items() if "row" in k or "col" in k)
            assert (row.numel(), column.numel()) == (p.shape[0], p.shape[1])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_goes_on(tmp_path):
    model = exact_model()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    muon = torch.optim.Muon(matrices, lr=1e-3)
    pruner = HessianPruner(config(method="magnitude"), step=2)
    make_trainer(tmp_path, model, pruner, optimizers=(muon, None), max_steps=4).train()
    assert {id(p) for p in muon.param_groups[0]["params"]} == {id(p) for p in model.parameters() if p.dim() == 2}
    assert all(state["momentum_buffer"].shape == p.shape for p, state in muon.state.items())


def fake(package):
    return type("Fake", (torch.optim.SGD,), {"__module__": f"{package}.optim"})


@pytest.mark.parametrize("package", PACKAGES)
def test_optimizers_whose_state_cannot_be_cut_are_refused(package):
    model = exact_model()
    derived = type("OfTheUser", (fake(package),), {"__module__": "script"})
    for kind in (fake(package), derived):
        with pytest.raises(UnsupportedModelError, match=r"(Fake|OfTheUser) .*, which cannot be pruned.*'adamw_torch'"):
            check_optimizer(kind(model.parameters(), lr=1e-3), model)


def test_they_are_refused_before_the_training(tmp_path):
    model = exact_model()
    before = copy.deepcopy(model)
    optimizer = fake("bitsandbytes")(model.parameters(), lr=1e-3)
    with pytest.raises(UnsupportedModelError, match=r"bitsandbytes\.optim\.Fake keeps its state quantized"):
        make_trainer(tmp_path, model, HessianPruner(config(), step=2), optimizers=(optimizer, None)).train()
    assert_same(model, before)


def test_what_is_refused_trains_without_rounds_left(tmp_path):
    pruner = HessianPruner(config(method="magnitude"))
    model = exact_model()
    make_trainer(tmp_path, model, pruner, max_steps=1).train()
    refused = fake("torchao")(model.parameters(), lr=1e-3)
    make_trainer(tmp_path, model, pruner, optimizers=(refused, None), max_steps=1).train()
    assert len(pruner.reports) == 1


def keeping(model, **attributes):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    vars(optimizer).update(attributes)
    return optimizer


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (lambda m: {"inner": torch.optim.SGD(m.parameters(), lr=1.0)}, "keeps a SGD in inner"),
        (lambda m: {"trained": m}, "keeps a BertForSequenceClassification in trained"),
        (lambda m: {"names": {p: n for n, p in m.named_parameters()}}, "keeps a Parameter in names"),
        (lambda m: {"copies": [[p.detach().clone()] for p in m.parameters()]}, "keeps a Tensor in copies"),
    ],
)
def test_optimizers_that_keep_parameters_where_surgery_does_not_look_are_refused(kept, message):
    model = exact_model()
    with pytest.raises(UnsupportedModelError, match=message):
        check_optimizer(keeping(model, **kept(model)), model)
    check_optimizer(keeping(model, betas=(0.9, torch.tensor(0.99)), note="x"), model)


def test_updates_layer_by_layer_are_refused():
    model = exact_model()
    dummy = LayerWiseDummyOptimizer({p: torch.optim.SGD([p], lr=1e-3) for p in model.parameters()})
    with pytest.raises(UnsupportedModelError, match="LayerWiseDummyOptimizer keeps a Parameter in optimizer_dict"):
        check_optimizer(dummy, model)
    check_optimizer(torch.optim.SGD(model.parameters()), model)
    model.classifier.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(UnsupportedModelError, match=r"classifier\.weight has a hook on its gradient"):
        check_optimizer(torch.optim.SGD(model.parameters()), model)


def test_what_is_no_torch_optimizer_is_refused():
    model = exact_model()
    with pytest.raises(
        UnsupportedModelError, match=r"derived from torch\.optim\.Optimizer, got types\.SimpleNamespace"
    ):
        check_optimizer(types.SimpleNamespace(param_groups=[]), model)


SCHEDULERS = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4, "warmup_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
}
AFTER_EVALUATION = {"reduce_lr_on_plateau", "greedy"}


def test_every_learning_rate_schedule_of_transformers_is_tested():
    assert {kind.value for kind in hf.SchedulerType} <= set(SCHEDULERS) | AFTER_EVALUATION


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_learning_rate_goes_on_as_without_pruning(tmp_path, kind):
    rates = []

    class Watch(hf.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups])

    settings = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": SCHEDULERS[kind], "warmup_steps": 2}
    pruner = HessianPruner(config(method="magnitude"), step=3)
    trainer = make_trainer(tmp_path, Net(), pruner, Watch(), max_steps=6, **settings)
    trainer.train()
    alone = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = hf.get_scheduler(kind, alone, 2, 6, SCHEDULERS[kind])
    expected = []
    for _ in range(6):
        expected.append([alone.param_groups[0]["lr"]] * 2)
        alone.step()
        schedule.step()
    assert rates == expected
    assert trainer.optimizer.param_groups[0]["lr"] == alone.param_groups[0]["lr"]


@pytest.mark.parametrize("kind", sorted(AFTER_EVALUATION))
def test_schedules_that_follow_a_metric_begin_anew_with_the_smaller_model(kind):
    if kind not in {k.value for k in hf.SchedulerType}:
        pytest.skip("this transformers has no such schedule")
    settings = {"patience": 2, "factor": 0.5, "mode": "min"}
    settings |= {"smooth": True, "window_size": 3, "min_lr": 1e-5} if kind == "greedy" else {}

    def schedule():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        return hf.get_scheduler(kind, optimizer, scheduler_specific_kwargs=settings)

    def rates(scheduler):
        found = []
        for metric in (9.0, 8.5, 8.7, 8.9, 9.1, 9.3, 9.5):
            scheduler.step(metric)
            found.append(scheduler.get_last_lr())
        return found

    watched, again = schedule(), schedule()
    for scheduler in (watched, again):
        for metric in (3.0, 2.9):
            scheduler.step(metric)
    forget_best_(hf.TrainerState(), watched)
    expected = rates(schedule())
    assert rates(watched) == expected
    assert rates(again) != expected
