"""Optimizer state follows the parameters: k steps on the pruned model equal k steps on the masked one."""

import copy

import pytest
import torch
from cases import batch_of, build
from plans import plan_of
from reference import logits, masked, uneven_removal
from torch import nn
from transformers import Adafactor

from hap_hf.discovery import find_groups
from hap_hf.errors import StaleOptimizerError, UnsupportedModelError
from hap_hf.model.change import TensorChange
from hap_hf.surgery import apply_plan_, carry_optimizer_state_

OPTIMIZERS = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.1),
    "AdamW amsgrad": lambda ps: torch.optim.AdamW(ps, lr=1e-3, amsgrad=True),
    "SGD with momentum": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=1e-2),
    "AdamW fused": lambda ps: torch.optim.AdamW(ps, lr=1e-3, fused=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-4, momentum=0.5, centered=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
}


def steps(model, optimizer, batch, count):
    for _ in range(count):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_steps_on_the_pruned_model_equal_steps_on_the_masked_one(name, optimizer_name):
    model, batch = build(name), batch_of(name)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    steps(model, optimizer, batch, 2)

    smaller = copy.deepcopy(model)
    its_optimizer = OPTIMIZERS[optimizer_name](smaller.parameters())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    removed = uneven_removal(find_groups(model, batch))
    changes = apply_plan_(smaller, plan_of(removed))
    carry_optimizer_state_(its_optimizer, changes)

    steps(smaller, its_optimizer, batch, 3)
    with masked(model, removed):
        steps(model, optimizer, batch, 3)
        expected = logits(model, batch)
    torch.testing.assert_close(logits(smaller, batch), expected, rtol=0, atol=1e-8)
    cut = dict(model.named_parameters())
    for change in changes:
        value = cut[change.name]
        for dim, index in change.index.items():
            value = value.index_select(dim, index)
        torch.testing.assert_close(dict(smaller.named_parameters())[change.name], value, rtol=0, atol=1e-8)


def test_without_carrying_the_new_tensors_would_never_move_so_a_step_is_refused():
    model, batch = build("bert"), batch_of("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    changes = apply_plan_(model, plan_of(uneven_removal(find_groups(model, batch))))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = next(n for n in before if n in {c.name for c in changes})
    message = f"this AdamW holds {len(changes)} parameters that pruning replaced, {first} among them"
    with pytest.raises(StaleOptimizerError, match=message):
        steps(model, optimizer, batch, 2)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not optimizer.state
    carry_optimizer_state_(optimizer, changes)
    steps(model, optimizer, batch, 2)
    assert not any(torch.equal(c.new, before[c.name]) for c in changes)


def test_implants_join_the_group_of_their_weight_in_the_order_of_a_fresh_optimizer():
    model, batch = build("bert"), batch_of("bert")

    def grouped(m):
        decay = [p for n, p in m.named_parameters() if p.dim() > 1]
        rest = [p for n, p in m.named_parameters() if p.dim() <= 1]
        return torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2
        )

    optimizer = grouped(model)
    steps(model, optimizer, batch, 2)
    groups = find_groups(model, batch)
    changes = apply_plan_(model, plan_of({groups[0]: [1]}, {groups[1]: range(10, 20), groups[2]: [0, 1]}))
    carry_optimizer_state_(optimizer, changes)
    fresh = grouped(model)
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == [
        [id(p) for p in g["params"]] for g in fresh.param_groups
    ]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps(model, optimizer, batch, 1)
    implants = [n for n in before if "implant" in n]
    assert implants
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in implants)
    assert all(p in set(model.parameters()) for p in optimizer.state)


ADAFACTORS = {
    "transformers": lambda ps: Adafactor(ps, lr=1e-2, relative_step=False, scale_parameter=False),
    "torch": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
}


def second_moment(state):
    """Return what row and column factors stand for, ``[..., rows, columns]``."""
    row, column = (next(v for k, v in state.items() if name in k) for name in ("row", "col"))
    if row.shape[-1] != 1 or column.shape[-2:-1] != (1,):
        row, column = row.unsqueeze(-1), column.unsqueeze(-2)
    return row * column / row.mean(-2, keepdim=True)


def cut_of(old, index):
    new = old.detach()
    for dim, i in index.items():
        new = new.index_select(dim, i)
    return TensorChange("layer.weight", old, nn.Parameter(new.clone()), index)


@pytest.mark.parametrize("kind", ADAFACTORS)
@pytest.mark.parametrize("shape", [(6, 6), (5, 7), (4, 5, 6), (6, 5, 3, 3), (3, 3, 3, 3)], ids=str)
def test_factors_stand_for_the_same_second_moment_of_the_entries_that_remain(kind, shape):
    generator = torch.Generator().manual_seed(0)
    old = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    optimizer = ADAFACTORS[kind]([old])
    for _ in range(3):
        old.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    expected = second_moment(optimizer.state[old])
    change = cut_of(old, {0: torch.tensor([2, 0]), 1: torch.tensor([1, 2])})
    for dim, index in change.index.items():
        expected = expected.index_select(dim, index)
    carry_optimizer_state_(optimizer, [change])
    state = optimizer.state[change.new]
    torch.testing.assert_close(second_moment(state), expected, rtol=1e-12, atol=0)
    if len(shape) == 2:  # the means of rows and of columns are those of the whole matrix
        row, column = (next(v for k, v in state.items() if name in k) for name in ("row", "col"))
        torch.testing.assert_close(row.mean(), column.mean(), rtol=1e-6, atol=0)
    change.new.grad = torch.randn(change.new.shape, generator=generator, dtype=torch.float64)
    optimizer.step()


def test_only_rows_or_only_columns_are_cut_where_only_those_go():
    for dim in (0, 1):
        old = nn.Parameter(torch.randn(4, 4))
        optimizer = ADAFACTORS["transformers"]([old])
        old.grad = torch.randn(4, 4)
        optimizer.step()
        change = cut_of(old, {dim: torch.tensor([3, 1])})
        carry_optimizer_state_(optimizer, [change])
        state = optimizer.state[change.new]
        sizes = [state["exp_avg_sq_row"].numel(), state["exp_avg_sq_col"].numel()]
        assert sizes == ([2, 4] if dim == 0 else [4, 2])


class Remembering(torch.optim.SGD):
    """An optimizer with the given state for each parameter."""

    def __init__(self, parameter, **state):
        super().__init__([parameter], lr=1e-3)
        self.state[parameter] = dict(state)


class Quantized(torch.Tensor):
    """Looks like a tensor of the parameter's shape."""


@pytest.mark.parametrize(
    ("remembered", "message"),
    [
        ({"flat": torch.zeros(16)}, r"remembers a tensor \[16\] of layer.weight, \[4, 4\], as 'flat'"),
        ({"factor": torch.zeros(4)}, r"a tensor \[4\] of .* as 'factor'"),  # of rows or of columns, nobody knows
        ({"basis": torch.zeros(4, 2)}, r"a tensor \[4, 2\]"),
        ({"history": [torch.zeros(4, 4)]}, "a list with tensors"),
        ({"codes": torch.zeros(4, 4).as_subclass(Quantized)}, "a Quantized"),
    ],
)
def test_state_that_cannot_be_cut_is_refused_before_anything_changes(remembered, message):
    old = nn.Parameter(torch.randn(4, 4))
    optimizer = Remembering(old, step=torch.tensor(3.0), moment=torch.randn(4, 4), **remembered)
    before = dict(optimizer.state[old])
    fine, other = nn.Parameter(torch.randn(4)), cut_of(old, {0: torch.tensor([1])})
    optimizer.add_param_group({"params": [fine]})
    with pytest.raises(UnsupportedModelError, match=message):
        carry_optimizer_state_(optimizer, [cut_of(fine, {0: torch.tensor([0])}), other])
    assert optimizer.param_groups[0]["params"][0] is old
    assert optimizer.param_groups[1]["params"][0] is fine
    assert dict(optimizer.state) == {old: before}


def test_numbers_and_values_per_row_or_column_follow():
    old = nn.Parameter(torch.randn(4, 5))
    per_row, per_column = torch.arange(4.0), torch.arange(5.0)
    kept = {"step": 3, "scale": torch.tensor([2.0]), "note": "x", "nothing": None}
    optimizer = Remembering(old, per_row=per_row, per_column=per_column, broadcast=per_row[:, None], **kept)
    change = cut_of(old, {0: torch.tensor([3, 1]), 1: torch.tensor([4, 0, 2])})
    carry_optimizer_state_(optimizer, [change])
    state = optimizer.state[change.new]
    assert state["per_row"].tolist() == [3, 1]
    assert state["per_column"].tolist() == [4, 0, 2]
    assert state["broadcast"].tolist() == [[3], [1]]
    assert {k: state[k] for k in kept} == kept


def test_changes_of_several_stages_follow_on_each_other():
    old = nn.Parameter(torch.randn(6, 3))
    optimizer = Remembering(old, moment=torch.arange(18.0).view(6, 3))
    first = cut_of(old, {0: torch.tensor([5, 3, 1])})
    second = cut_of(first.new, {0: torch.tensor([2, 0])})
    carry_optimizer_state_(optimizer, [first, second])
    assert list(optimizer.state) == [second.new]
    assert optimizer.state[second.new]["moment"][:, 0].tolist() == [3, 15]
    assert optimizer.param_groups[0]["params"] == [second.new]


def test_moments_lie_in_memory_like_the_new_parameter():
    old = nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last))
    optimizer = Remembering(old, moment=torch.randn_like(old))
    change = cut_of(old, {0: torch.tensor([5, 1])})
    change.new.data = change.new.data.to(memory_format=torch.channels_last)
    expected = optimizer.state[old]["moment"][[5, 1]]
    carry_optimizer_state_(optimizer, [change])
    moment = optimizer.state[change.new]["moment"]
    assert torch.equal(moment, expected)
    assert moment.stride() == change.new.stride()


def test_implants_have_a_state_where_the_optimizer_makes_it_before_the_first_step():
    old = nn.Parameter(torch.randn(4, 4))
    optimizer = torch.optim.Adagrad([("layer.weight", old)], lr=1e-2, initial_accumulator_value=0.5)
    change = cut_of(old, {0: torch.tensor([1, 2])})
    added = TensorChange("layer.implant_up", None, nn.Parameter(torch.zeros(2, 1)), beside=change.new)
    carry_optimizer_state_(optimizer, [change, added])
    assert torch.equal(optimizer.state[added.new]["sum"], torch.full((2, 1), 0.5))
    assert optimizer.param_groups[0]["param_names"] == ["layer.weight", "layer.implant_up"]
