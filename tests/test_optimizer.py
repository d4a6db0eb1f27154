"""Optimizer state follows the parameters: k steps on the pruned model equal k steps on the masked one."""

import copy

import pytest
import torch
from cases import batch_of, build
from plans import plan_of
from reference import logits, masked, uneven_removal

from hap_hf.discovery import find_groups
from hap_hf.surgery import apply_plan_, carry_optimizer_state_

OPTIMIZERS = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.1),
    "AdamW amsgrad": lambda ps: torch.optim.AdamW(ps, lr=1e-3, amsgrad=True),
    "SGD with momentum": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=1e-2),
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


def test_without_carrying_the_new_tensors_would_never_move():
    model, batch = build("bert"), batch_of("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    changes = apply_plan_(model, plan_of(uneven_removal(find_groups(model, batch))))
    before = {c.name: c.new.detach().clone() for c in changes}
    steps(model, optimizer, batch, 2)
    assert all(torch.equal(c.new, before[c.name]) for c in changes)
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
