"""Bypasses: a pruned model with them is the masked one with the same paths beside its blocks."""

import copy
import pickle

import pytest
import torch
from bypasses import beside, bypassed_plan, subject
from reference import masked, uneven_removal
from torch.utils.checkpoint import checkpoint

from hap_hf import ImplantLinear, PlanMismatchError, find_groups
from hap_hf.layers.bypass import Bypass, bypass_of
from hap_hf.names.bypass import BypassPlan
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.surgery import apply_plan_, carry_optimizer_state_, check_plan

NAMES = ["bert", "vit", "gpt2", "llama", "t5", "resnet"]


def bypassed(name):
    model, batch = subject(name)
    batch = {k: v for k, v in batch.items() if name == "t5" or k != "labels"}
    plan, values, removed = bypassed_plan(model, batch)
    return model, batch, plan, values, removed


def run(model, batch):
    with torch.no_grad():
        out = model(**batch)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_bypasses_is_the_masked_one_with_the_paths_beside_it(name):
    model, batch, plan, values, removed = bypassed(name)
    assert plan.bypasses[0]
    with masked(model, removed):
        silenced = run(model, batch)
        with beside(model, plan, values):
            expected = run(model, batch)
    apply_plan_(model, plan, bypass_values=values)
    torch.testing.assert_close(run(model, batch), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, silenced, rtol=1e-2)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_call_their_own_bypasses(how):
    model, batch, plan, values, _ = bypassed("bert")
    apply_plan_(model, plan, bypass_values=values)
    before = run(model, batch)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    for module in model.modules():
        if isinstance(module, Bypass):
            module.up.weight.data.zero_()
    assert torch.equal(run(twin, batch), before)
    assert not torch.allclose(run(model, batch), before)


def test_without_values_a_bypass_adds_nothing_and_can_learn():
    model, batch, plan, _, removed = bypassed("bert")
    with masked(model, removed):
        expected = run(model, batch)
    apply_plan_(model, plan)
    torch.testing.assert_close(run(model, batch), expected, rtol=1e-9, atol=1e-9)
    model(**batch).logits.sum().backward()
    assert all(m.up.weight.grad.abs().max() > 0 for m in model.modules() if isinstance(m, Bypass))


def test_activations_that_are_computed_again_go_through_the_bypass_as_well():
    model, _, plan, values, _ = bypassed("bert")
    apply_plan_(model, plan, bypass_values=values)
    layer, x = model.bert.encoder.layer[0], torch.randn(2, 5, 24, dtype=torch.float64)
    layer(x)[0].sum().backward()
    grads = {n: p.grad.clone() for n, p in layer.named_parameters()}
    for reentrant in (True, False):
        layer.zero_grad()
        checkpoint(layer, x.clone().requires_grad_(), use_reentrant=reentrant)[0].sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(p.grad, grads[name])
    assert any("bypass" in name for name in grads)


def test_an_optimizer_goes_on_with_the_new_weights():
    model, batch, plan, values, _ = bypassed("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**batch).logits.sum().backward()
    optimizer.step()
    carry_optimizer_state_(optimizer, apply_plan_(model, plan, bypass_values=values))
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    optimizer.zero_grad()
    model(**batch).logits.sum().backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "bypass" in n}
    optimizer.step()
    assert before
    assert not any(torch.equal(model.get_parameter(n), old) for n, old in before.items())


def test_the_last_layer_alone_says_that_it_misses_the_first():
    model, _, plan, values, _ = bypassed("bert")
    apply_plan_(model, plan, bypass_values=values)
    last = model.bert.encoder.layer[0].output.dense
    with pytest.raises(RuntimeError, match="call the whole block"):
        last(torch.zeros(1, last.in_features, dtype=torch.float64))


def test_an_implant_that_takes_the_place_of_a_layer_calls_the_same_bypass():
    model, batch, plan, values, _ = bypassed("bert")
    apply_plan_(model, plan, bypass_values=values)
    (group,) = [g for g in find_groups(model, batch) if g.name == "bert.encoder.layer.0:ffn"]
    first, last = "bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"
    rest = GroupPlan(group, "i" * (group.num_units - 1) + "k", {f"{first}.weight": 1})
    apply_plan_(model, PruningPlan(((rest,),)))
    assert isinstance(model.get_submodule(first), ImplantLinear)
    seen = []
    bypass_of(model.get_submodule(last)).down.register_forward_hook(lambda *a: seen.append(1))
    before = run(model, batch)
    assert seen == [1]
    bypass_of(model.get_submodule(last)).up.weight.data.zero_()
    assert not torch.allclose(run(model, batch), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_bypasses_can_be_pruned_again(name):
    model, batch, plan, values, _ = bypassed(name)
    apply_plan_(model, plan, bypass_values=values)
    dense, groups = run(model, batch), [g for g in find_groups(model, batch) if g.num_units > 1]
    # The directions of a bypass are units like others.
    assert sum("bypass" in g.name for g in groups) == len(plan.bypasses[0])
    removed = uneven_removal(groups)
    stage = tuple(GroupPlan(g, "".join("p" if u in removed[g] else "k" for u in range(g.num_units))) for g in groups)
    with masked(model, removed):
        expected = run(model, batch)
    apply_plan_(model, PruningPlan((stage,)))
    torch.testing.assert_close(run(model, batch), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, dense, rtol=1e-2)


def test_a_plan_that_fails_leaves_no_bypass_and_no_hook():
    model, batch, plan, values, _ = bypassed("bert")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    before, other = run(model, batch), model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *a: None)
    with pytest.raises(PlanMismatchError):  # the second stage names tensors as they were
        apply_plan_(model, plan.then(plan), bypass_values=values)
    other.remove()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(run(model, batch), before)
    assert not any(bypass_of(m) for m in model.modules())


FFN = "bert.encoder.layer.0"
WRONG = {
    "no such layer": (BypassPlan("nowhere", f"{FFN}.output.dense", 24, 24, 2), "expected a layer nowhere"),
    "no layer with a weight": (BypassPlan("bert", f"{FFN}.output.dense", 24, 24, 2), "got BertModel and Linear"),
    "one layer": (BypassPlan(f"{FFN}.output.dense", f"{FFN}.output.dense", 20, 24, 2), "expected two linear layers"),
    "other sizes": (BypassPlan(f"{FFN}.intermediate.dense", f"{FFN}.output.dense", 23, 24, 2), "expected 23 inputs"),
    "a stride": (BypassPlan(f"{FFN}.intermediate.dense", f"{FFN}.output.dense", 24, 24, 2, 2), "a stride of 2"),
    "convolutions": (BypassPlan(f"{FFN}.intermediate.dense", f"{FFN}.output.dense", 24, 24, 2, 1, 2), "2 dimensions"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_bypass_that_does_not_fit_is_refused_and_changes_nothing(case):
    model, batch = subject("bert")
    bypass, message = WRONG[case]
    state, modules = {n: t.clone() for n, t in model.state_dict().items()}, len(list(model.modules()))
    plan = PruningPlan(((),), (), ((bypass,),))
    for do in (check_plan, apply_plan_):
        with pytest.raises(PlanMismatchError, match=message):
            do(model, plan)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert len(list(model.modules())) == modules
    assert run(model, batch).isfinite().all()
