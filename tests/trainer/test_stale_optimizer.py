"""Optimizers from before pruning: they raise at their next step, unless they went along with the parameters."""

import copy
import gc

import pytest
import torch
import transformers as hf
from torch import nn
from trainings import Net, assert_same, config, make_trainer, samples, tiny_model

import hap_hf.admission
import hap_hf.cut
import hap_hf.pipeline
from hap_hf import (
    HapError,
    HessianPruner,
    StaleOptimizerError,
    apply_plan_,
    carry_optimizer_state_,
    carry_out_,
    decide,
    find_groups,
    prune,
)
from hap_hf.model.stale import _REPLACED
from hap_hf.names.plan import GroupPlan, PruningPlan

MESSAGE = (
    r"this (\w+) holds (\d+) parameters that pruning replaced, bert\.[\w.]+ among them, so the pruned layers would not "
    r"be trained; make the optimizer, or the Trainer, after pruning, or pass it along: "
    r"hap_hf\.prune\(model, batches, config, optimizer=optimizer\)"
)
KINDS = [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]


def batches():
    return [hf.default_data_collator(samples()[i : i + 8]) for i in (0, 8)]


def backward(model):
    model(**batches()[0]).loss.backward()


def fails(*args, **kwargs):
    raise OSError("failed")


@pytest.mark.parametrize("settings", [{}, {"implant_ratio": 0.5}, {"compensate": False}], ids=str)
@pytest.mark.parametrize("stepped", [False, True], ids=["new", "after a step"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_made_before_pruning_raises_at_its_next_step(kind, stepped, settings):
    model = tiny_model()
    optimizer = kind(model.parameters(), lr=1e-3)
    if stepped:
        backward(model)
        optimizer.step()
    prune(model, batches(), config(**settings))
    backward(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StaleOptimizerError, match=MESSAGE) as caught:
        optimizer.step()
    assert f"this {kind.__name__} holds" in str(caught.value)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with pytest.raises(StaleOptimizerError):  # and does not get used to it
        optimizer.step()


def test_the_error_counts_and_names_what_is_no_longer_in_the_model():
    model = tiny_model()
    held = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    prune(model, batches(), config())
    gone = {name for name, p in held.items() if dict(model.named_parameters()).get(name) is not p}
    with pytest.raises(StaleOptimizerError, match=rf"this SGD holds {len(gone)} parameters") as caught:
        optimizer.step()
    assert str(caught.value).partition("replaced, ")[2].partition(" among")[0] in gone


def test_the_error_is_one_of_hap_hf_and_a_runtime_error():
    assert issubclass(StaleOptimizerError, HapError)
    assert issubclass(StaleOptimizerError, RuntimeError)


def test_an_optimizer_of_a_part_of_the_model_raises_if_that_part_was_cut():
    model = tiny_model()
    layer = torch.optim.SGD(model.bert.encoder.layer[0].parameters(), lr=1e-3)
    embeddings = torch.optim.SGD(model.bert.embeddings.parameters(), lr=1e-3)
    prune(model, batches(), config())
    backward(model)
    with pytest.raises(StaleOptimizerError):
        layer.step()
    embeddings.step()


def test_only_those_layers_count_that_lost_something():
    model = tiny_model()
    first, second = (torch.optim.SGD(layer.parameters(), lr=1e-3) for layer in model.bert.encoder.layer)
    prune(model, batches(), config(exclude="*layer.0*", method="magnitude"))
    backward(model)
    first.step()
    with pytest.raises(StaleOptimizerError):
        second.step()


@pytest.mark.parametrize("settings", [{}, {"implant_ratio": 0.5}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_that_was_passed_goes_on(kind, settings):
    model = tiny_model()
    optimizer = kind(model.parameters(), lr=1e-2)
    backward(model)
    optimizer.step()
    for amount in (0.3, 0.3):
        prune(model, batches(), config(**settings, prune_ratio=amount), optimizer=optimizer)
        optimizer.zero_grad()
        backward(model)
        # The key bias has a gradient of rounding errors alone: softmax does not see it.
        trained = {n: p for n, p in model.named_parameters() if p.grad.abs().max() > 1e-5}
        before = {n: p.detach().clone() for n, p in trained.items()}
        optimizer.step()
        assert not [n for n, p in trained.items() if torch.equal(p, before[n])]
        assert {n for n, _ in model.named_parameters() if "key.bias" not in n} <= set(trained)


def test_of_two_optimizers_the_one_that_was_not_passed_raises():
    model = tiny_model()
    passed, other = (torch.optim.SGD(model.parameters(), lr=1e-3) for _ in range(2))
    prune(model, batches(), config(), optimizer=passed)
    backward(model)
    passed.step()
    with pytest.raises(StaleOptimizerError):
        other.step()


def test_an_optimizer_made_after_pruning_goes_on():
    model = tiny_model()
    stale = torch.optim.SGD(model.parameters(), lr=1e-3)
    prune(model, batches(), config(implant_ratio=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    backward(model)
    optimizer.step()
    with pytest.raises(StaleOptimizerError):
        stale.step()


@pytest.mark.parametrize("stage", ["discover", "score_in_passes", "apply_plan_", "measure_size", "record_plan"])
@pytest.mark.parametrize("passed", [False, True], ids=["not passed", "passed"])
def test_after_pruning_failed_and_was_rolled_back_every_optimizer_goes_on(stage, passed, monkeypatch):
    model, twin = tiny_model(), tiny_model()
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9) for m in (model, twin))
    for m, o in ((model, optimizer), (twin, other)):
        m.eval()
        backward(m)
        o.step()

    module = next(m for m in (hap_hf.admission, hap_hf.cut, hap_hf.pipeline) if hasattr(m, stage))
    original = getattr(module, stage)
    calls = []

    def failing(*args, **kwargs):
        original(*args, **kwargs)
        calls.append(stage)
        raise OSError("failed")

    with monkeypatch.context() as patch:
        # what is called last must not have come to its end
        patch.setattr(module, stage, fails if stage == "record_plan" else failing)
        with pytest.raises(OSError, match="failed"):
            prune(model, batches(), config(implant_ratio=0.5), optimizer=optimizer if passed else None)
    for m, o in ((model, optimizer), (twin, other)):
        backward(m)
        o.step()
    assert_same(model, twin)


def test_after_a_failure_in_the_middle_of_surgery_the_optimizer_goes_on(monkeypatch):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    apply, cut, calls = hap_hf.cut.apply_plan_, hap_hf.surgery.apply._cut, []

    def failing(*args):
        calls.append(1)
        return fails() if len(calls) > 3 else cut(*args)

    def applied(*args, **kwargs):  # not the trials of discovery
        with monkeypatch.context() as inner:
            inner.setattr(hap_hf.surgery.apply, "_cut", failing)
            return apply(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(hap_hf.cut, "apply_plan_", applied)
        with pytest.raises(OSError, match="failed"):
            prune(model, batches(), config())
    backward(model)
    optimizer.step()
    prune(model, batches(), config())
    with pytest.raises(StaleOptimizerError):
        optimizer.step()


def test_a_decision_makes_optimizers_stale_when_it_is_carried_out_and_not_before():
    model, settings = tiny_model(), config()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    decision = decide(settings.evidence(model, batches()), settings)
    backward(model)
    optimizer.step()
    carry_out_(model, decision)
    with pytest.raises(StaleOptimizerError):
        optimizer.step()


def test_pruning_a_copy_leaves_the_optimizer_of_the_original_alone():
    model, settings = tiny_model(), config()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    twin = copy.deepcopy(model)
    prune(twin, batches(), settings)
    backward(model)
    optimizer.step()


def plan_for(model):
    groups = find_groups(model, batches()[0])
    return PruningPlan((tuple(GroupPlan(g, "p" + "k" * (g.num_units - 1)) for g in groups),))


def test_surgery_by_hand_makes_optimizers_stale_until_they_are_carried_over():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    changes = apply_plan_(model, plan_for(model))
    backward(model)
    with pytest.raises(StaleOptimizerError):
        optimizer.step()
    carry_optimizer_state_(optimizer, changes)
    optimizer.step()


def test_a_model_that_is_no_transformer_is_watched_too():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    data = [{k: b[k] for k in ("input_ids", "labels")} for b in batches()]
    prune(model, data, config(kinds="ffn"))
    model(**data[0])["loss"].backward()
    with pytest.raises(StaleOptimizerError, match=r"(up|down)\.(weight|bias) among them"):
        optimizer.step()


def test_an_optimizer_of_something_else_does_not_mind():
    other = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-3)
    model = tiny_model()
    stale = torch.optim.SGD(model.parameters(), lr=1e-3)
    prune(model, batches(), config())
    other(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(StaleOptimizerError):
        stale.step()


def test_what_nobody_holds_any_more_is_not_remembered():
    gc.collect()
    before = len(_REPLACED)
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    prune(model, batches(), config())
    gc.collect()
    assert len(_REPLACED) > before
    del optimizer
    gc.collect()
    assert len(_REPLACED) == before


def test_a_trainer_that_trained_before_pruning_raises_at_its_next_training(tmp_path):
    trainer = make_trainer(tmp_path, tiny_model(), max_steps=2)
    trainer.train()
    settings = config()
    prune(trainer.model, batches(), settings)
    with pytest.raises(StaleOptimizerError, match=MESSAGE):
        trainer.train()


def test_a_trainer_whose_optimizer_was_passed_trains_on(tmp_path):
    trainer = make_trainer(tmp_path, tiny_model(), max_steps=2)
    trainer.train()
    prune(trainer.model, batches(), config(), optimizer=trainer.optimizer.optimizer)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    pruned = [
        name for name, x in trainer.model.state_dict().items() if x.shape != tiny_model().state_dict()[name].shape
    ]
    assert pruned
    assert [n for n in pruned if torch.equal(trainer.model.state_dict()[n], before[n])] == []


def test_a_trainer_made_after_pruning_trains_on(tmp_path):
    model = tiny_model()
    make_trainer(tmp_path, model, max_steps=2).train()
    prune(model, batches(), config())
    trainer = make_trainer(tmp_path, model, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_trainer_made_before_pruning_that_has_not_trained_yet_trains_on(tmp_path):
    trainer = make_trainer(tmp_path, tiny_model(), max_steps=2)  # makes its optimizer when it trains
    prune(trainer.model, batches(), config())
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_trainer_with_an_optimizer_of_the_users_from_before_pruning_raises(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    prune(model, batches(), config())
    with pytest.raises(StaleOptimizerError, match="this SGD holds"):
        make_trainer(tmp_path, model, optimizers=(optimizer, None), max_steps=2).train()


def test_the_callback_keeps_the_trainers_own_optimizer_and_no_other_in_step(tmp_path):
    model = tiny_model()
    other = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = make_trainer(tmp_path, model, HessianPruner(config(), step=1, num_rounds=2), max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4
    with pytest.raises(StaleOptimizerError):
        other.step()
    trainer.train()
