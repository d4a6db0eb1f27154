"""Every family that the README names: found by structure, pruned exactly, still trainable, exportable."""

import copy

import pytest
import torch
from cases import CASES, batch_of, build
from plans import plan_of
from reference import logits, masked, uneven_removal

from hap_hf.discovery import find_groups
from hap_hf.names.group import Kind
from hap_hf.surgery import apply_plan_


@pytest.mark.parametrize("name", CASES)
def test_heads_and_ffn_neurons_are_found(name):
    groups = find_groups(build(name), batch_of(name))
    assert len({g.name for g in groups}) == len(groups)
    assert tuple(g.num_units for g in groups if g.kind is Kind.HEADS) == CASES[name].heads
    assert tuple(g.num_units for g in groups if g.kind is Kind.FFN) == CASES[name].ffn


@pytest.mark.parametrize("name", CASES)
def test_the_pruned_model_equals_the_masked_one_and_is_smaller(name):
    model, batch = build(name), batch_of(name)
    whole = logits(model, batch)
    groups = find_groups(model, batch)
    for seed in (0, 1):
        removed = uneven_removal(groups, seed)
        with masked(model, removed):
            expected = logits(model, batch)
        smaller = copy.deepcopy(model)
        apply_plan_(smaller, plan_of(removed))
        torch.testing.assert_close(logits(smaller, batch), expected, rtol=0, atol=1e-10)
        assert not torch.allclose(expected, whole, atol=1e-6), "masking changed nothing: this test could not fail"
        assert smaller.num_parameters() == model.num_parameters() - sum(
            g.params_per_unit * len(units) for g, units in removed.items()
        )


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_pruned_model_equal_the_sliced_ones_of_the_masked_model(name):
    model, batch = build(name), batch_of(name)
    removed = uneven_removal(find_groups(model, batch))
    smaller = copy.deepcopy(model)
    changes = apply_plan_(smaller, plan_of(removed))
    with masked(model, removed):
        model(**batch).loss.backward()
    smaller(**batch).loss.backward()
    old = dict(model.named_parameters())
    for change in changes:
        expected = old[change.name].grad
        for dim, index in change.index.items():
            expected = expected.index_select(dim, index)
        torch.testing.assert_close(change.new.grad, expected, rtol=0, atol=1e-8)


FAST = {"bert", "llama", "qwen2"}  # with and without grouped queries


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.fast) if n in FAST else n for n in CASES])
def test_a_layer_may_lose_all_its_units_where_the_group_says_so(name):
    model, batch = build(name), batch_of(name)
    removed = {g: list(range(g.num_units)) for g in find_groups(model, batch) if g.may_be_empty}
    if not removed:
        pytest.skip("no layer of this family runs without any unit")
    with masked(model, removed):
        expected = logits(model, batch)
    apply_plan_(model, plan_of(removed))
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_and_implanted_model_trains_a_step(name):
    model, batch = (
        build(name).float().train(),
        {k: v.float() if v.is_floating_point() else v for k, v in batch_of(name).items()},
    )
    groups = find_groups(model, batch)
    removed = {g: [0] for g in groups}
    implanted = {g: list(range(g.num_units // 2, g.num_units)) for g in groups if g.num_units > 3}
    apply_plan_(model, plan_of(removed, implanted))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert any("implant_up" in n for n in before) == bool(implanted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(**batch).loss.backward()
    optimizer.step()
    touched = {s.tensor for g in groups for s in g.slices} | {n for n in before if "implant" in n}
    still = {n for n, p in model.named_parameters() if n in touched and torch.equal(p, before[n])}
    assert not {n for n in still if not n.endswith("bias")}, "these tensors did not move"


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "llama", "qwen3", "t5"])
def test_the_pruned_models_graph_exports_without_index_operations(name):
    model, batch = build(name), batch_of(name)
    removed = uneven_removal(find_groups(model, batch))
    baseline = index_ops(model, batch)
    implanted = {
        g: [u for u in range(g.num_units) if u not in gone][-max(2, g.num_units // 3) :] for g, gone in removed.items()
    }
    apply_plan_(model, plan_of({g: removed[g][:1] for g in removed}, implanted))
    assert any("implant" in n for n, _ in model.named_parameters())
    assert index_ops(model, batch) == baseline


def index_ops(model, batch):
    inputs = dict(batch) | (
        {"use_cache": False}
        if "input_ids" in batch and "labels" in batch and hasattr(model.config, "use_cache")
        else {}
    )
    program = torch.export.export(model, (), inputs, strict=False)
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    return sorted(n for n in names if any(w in n for w in ("index", "gather", "scatter")))


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_a_pruned_model_compiles(name):
    model, batch = build(name), batch_of(name)
    groups = find_groups(model, batch)
    apply_plan_(
        model,
        plan_of({g: [0] for g in groups}, {g: [g.num_units - 2, g.num_units - 1] for g in groups if g.num_units > 4}),
    )
    expected = logits(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, expected, rtol=0, atol=1e-10)
