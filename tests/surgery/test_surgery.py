"""Applying plans: algebra, refusals, and nothing half done."""

import copy
from dataclasses import replace

import pytest
import torch
from cases import batch_of, build
from plans import plan_of
from reference import logits, masked, uneven_removal
from torch import nn

from hap_hf.discovery import find_groups
from hap_hf.errors import PlanMismatchError
from hap_hf.names.group import Counter, Role
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.surgery import apply_plan_, check_plan

pytestmark = pytest.mark.fast


@pytest.fixture
def bert():
    model, batch = build("bert"), batch_of("bert")
    return model, batch, find_groups(model, batch)


def state_of(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def assert_untouched(model, state):
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_a_plan_that_keeps_everything_changes_no_bit(bert):
    model, batch, groups = bert
    expected, tensors = logits(model, batch), dict(model.named_parameters())
    assert apply_plan_(model, plan_of({g: [] for g in groups})) == ()
    assert torch.equal(logits(model, batch), expected)
    assert all(p is tensors[n] for n, p in model.named_parameters())


def test_two_plans_in_turn_equal_the_composed_plan(bert):
    model, batch, groups = bert
    once, twice = copy.deepcopy(model), copy.deepcopy(model)
    first = plan_of(
        uneven_removal(groups), {groups[1]: [17, 18, 19]} if 17 not in uneven_removal(groups)[groups[1]] else {}
    )
    apply_plan_(once, first)
    later = find_groups(once, batch)
    second = plan_of({g: [0] for g in later if g.num_units > 1})
    apply_plan_(once, second)
    apply_plan_(twice, first.then(second))
    assert torch.equal(logits(once, batch), logits(twice, batch))
    assert once.num_parameters() == twice.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("name", ["bert", "gpt2", "modernbert", "llama"])
def test_a_layer_with_an_implant_can_be_pruned_again(name):
    model, batch = build(name), batch_of(name)
    groups = find_groups(model, batch)
    apply_plan_(model, plan_of({}, {g: range(g.num_units - 6, g.num_units) for g in groups if g.num_units == 20}))
    again = find_groups(model, batch)
    assert sorted(g.num_units for g in again if g.kind == "ffn") == [6, 6, 14, 14]
    assert any(s.role is Role.FACTOR for g in again for s in g.slices)
    removed = uneven_removal(again)
    with masked(model, removed):
        expected = logits(model, batch)
    apply_plan_(model, plan_of(removed))
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-10)
    assert not [m for m in model.modules() if hasattr(m, "segments") and sum(map(sum, m.segments)) != m.out_features]


def test_the_composed_plan_of_two_rounds_with_implants_survives_json(bert):
    model, batch, groups = bert
    dense = copy.deepcopy(model)
    first = plan_of({groups[0]: [1]}, {groups[1]: range(10, 20)})
    apply_plan_(model, first)
    second = plan_of(uneven_removal(find_groups(model, batch)))
    apply_plan_(model, second)
    rebuilt = PruningPlan.from_dict(first.then(second).to_dict())
    apply_plan_(dense, rebuilt)
    assert torch.equal(logits(dense, batch), logits(model, batch))


def test_the_meta_device_gives_the_same_shapes(bert):
    model, _, groups = bert
    skeleton = copy.deepcopy(model).to("meta")
    plan = plan_of(
        uneven_removal(groups), {groups[3]: [0, 1]} if not {0, 1} & set(uneven_removal(groups)[groups[3]]) else {}
    )
    apply_plan_(model, plan)
    apply_plan_(skeleton, plan)
    assert {n: t.shape for n, t in skeleton.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert all(t.is_meta for t in skeleton.parameters())


def test_size_attributes_follow(bert):
    model, _, groups = bert
    apply_plan_(model, plan_of({groups[0]: [0, 2], groups[1]: [0, 1, 2]}))
    attention = model.bert.encoder.layer[0].attention
    assert (attention.self.num_attention_heads, attention.self.all_head_size) == (2, 12)
    assert (attention.self.query.out_features, attention.output.dense.in_features) == (12, 12)
    assert (
        model.bert.encoder.layer[0].intermediate.dense.out_features,
        model.bert.encoder.layer[1].output.dense.in_features,
    ) == (17, 20)


def test_nothing_is_written_into_the_old_tensors(bert):
    model, _, groups = bert
    old = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    changes = apply_plan_(model, plan_of(uneven_removal(groups)))
    assert len(changes) == sum(len(g.slices) for g in groups)
    assert all(torch.equal(p, value) for p, value in old.values())


def test_gradients_and_flags_follow(bert):
    model, batch, groups = bert
    model(**batch).loss.backward()
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    weight.requires_grad_(False)
    expected = weight.grad[1:]
    apply_plan_(model, plan_of({groups[1]: [0]}))
    new = model.bert.encoder.layer[0].intermediate.dense.weight
    assert torch.equal(new.grad, expected)
    assert not new.requires_grad


def wrong_name(g):
    return replace(g, slices=(replace(g.slices[0], tensor="bert.nowhere.weight"), *g.slices[1:]))


def wrong_shape(g):
    return replace(g, slices=(replace(g.slices[0], shape=(24, 30)), *g.slices[1:]))


def wrong_role(g):
    return replace(g, slices=(replace(g.slices[0], role=Role.PRODUCER), *g.slices[1:]))


def without_bias(g):
    return replace(g, slices=tuple(s for s in g.slices if not s.tensor.endswith("bias")))


def overlapping(g):
    return replace(g, slices=(*g.slices, g.slices[0]))


def foreign_counter(g):
    return replace(g, counters=(Counter("bert.encoder.layer.0.attention.self.training", 1),))


def missing_counter(g):
    return replace(g, counters=(Counter("bert.encoder.layer.0.attention.self.num_heads", 1),))


def too_wide(g):
    return replace(g, slices=(replace(g.slices[0], offset=5), *g.slices[1:]))


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (wrong_name, "the model has none of that name"),
        (wrong_shape, r"expected shape \[24, 30\], got \[24, 24\]"),
        (wrong_role, "holds no producer"),
        (without_bias, "weight and bias would lose different outputs"),
        (overlapping, "slices overlap along dimension"),
        (foreign_counter, "expected an integer attribute .* that surgery may change"),
        (missing_counter, "expected an integer attribute"),
        (too_wide, "do not fit dimension"),
    ],
)
def test_a_plan_that_lies_is_refused_and_nothing_changes(bert, lie, message):
    model, _, groups = bert
    state = state_of(model)
    plan = plan_of({lie(groups[0]): [1], groups[1]: [0]})
    with pytest.raises(PlanMismatchError, match=message):
        apply_plan_(model, plan)
    with pytest.raises(PlanMismatchError, match=message):
        check_plan(model, plan)
    assert_untouched(model, state)


def test_every_mismatch_is_listed(bert):
    model, _, groups = bert
    with pytest.raises(PlanMismatchError, match=r"(?s)bert\.nowhere.*expected shape"):
        check_plan(model, plan_of({wrong_name(groups[0]): [1], wrong_shape(groups[2]): [0]}))


def test_a_mismatch_in_the_second_stage_leaves_the_model_whole(bert):
    model, batch, groups = bert
    state, expected = state_of(model), logits(model, batch)
    first = plan_of({groups[0]: [1]}, {groups[1]: range(10, 20)})
    with pytest.raises(PlanMismatchError, match="stage 2 of 2"):
        apply_plan_(model, first.then(first))
    assert_untouched(model, state)
    assert torch.equal(logits(model, batch), expected)
    assert model.bert.encoder.layer[0].attention.self.num_attention_heads == 4


def test_a_plan_for_another_model_is_refused(bert):
    _, _, groups = bert
    other = build("roberta")
    with pytest.raises(PlanMismatchError, match="does not fit this RobertaForSequenceClassification"):
        apply_plan_(other, plan_of({groups[0]: [1]}))


def test_checking_a_plan_that_fits_changes_nothing(bert):
    model, _, groups = bert
    state = state_of(model)
    check_plan(model, plan_of({groups[0]: [1]}).then(plan_of({})))
    assert_untouched(model, state)


def test_losing_every_unit_is_refused_where_the_layer_would_not_run():
    model, batch = build("gpt2"), batch_of("gpt2")
    group = find_groups(model, batch)[0]
    assert not group.may_be_empty
    with pytest.raises(PlanMismatchError, match="does not run without any"):
        apply_plan_(model, plan_of({group: range(group.num_units)}))


def test_an_implant_that_is_not_cheaper_is_refused_with_the_numbers(bert):
    model, _, groups = bert
    with pytest.raises(PlanMismatchError, match="rank 2 has 52 weights where it replaces 2 x 24 = 48"):
        apply_plan_(model, plan_of({}, {groups[1]: [0, 1]}, rank=2))


def test_tied_weights_are_refused(bert):
    model, _, groups = bert
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    with pytest.raises(PlanMismatchError, match=r"tied to .*layer\.1\.intermediate\.dense\.weight"):
        apply_plan_(model, plan_of({groups[1]: [0]}))


def test_wrong_actions_are_refused(bert):
    model, _, groups = bert
    with pytest.raises(PlanMismatchError, match="expected 4 actions"):
        apply_plan_(model, PruningPlan(((GroupPlan(groups[0], "kk"),),)))


def test_a_quantized_tensor_is_refused(bert):
    model, _, groups = bert
    dense = model.bert.encoder.layer[0].intermediate.dense
    dense.weight = nn.Parameter(dense.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(PlanMismatchError, match="expected floating point numbers"):
        apply_plan_(model, plan_of({groups[1]: [0]}))
