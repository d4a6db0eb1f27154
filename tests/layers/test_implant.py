"""Implants: exact at full rank, best at low rank, silent at first where asked."""

import pytest
import torch
from cases import batch_of, build
from plans import plan_of
from reference import logits, masked
from torch import nn

from hap_hf.discovery import find_groups
from hap_hf.layers.implant_linear import ImplantLinear, factor_rows
from hap_hf.names.group import Role
from hap_hf.surgery import apply_plan_, collect_input_moments

pytestmark = pytest.mark.fast


def low_rank_rows(model, group, units, rank):
    """Give the units' rows rank ``rank``, so that an implant of that rank is exact."""
    generator = torch.Generator().manual_seed(5)
    for tensor in {s.tensor for s in group.slices if s.role is Role.PRODUCER}:
        weight = model.get_parameter(tensor)
        slices = [s for s in group.slices if s.tensor == tensor and s.role is Role.PRODUCER]
        rows = [i for s in slices for u in units for i in s.indices(u)]
        inputs = weight.shape[1 - slices[0].dim]
        product = (
            torch.randn(len(rows), rank, generator=generator).double()
            @ torch.randn(rank, inputs, generator=generator).double()
        )
        with torch.no_grad():
            (weight if slices[0].dim == 0 else weight.T)[rows] = product / rank


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt_neox", "llama", "modernbert", "t5", "gemma_one_key_head"])
@pytest.mark.parametrize("kind", ["heads", "ffn"])
def test_an_implant_of_sufficient_rank_reproduces_the_layer(name, kind):
    model, batch = build(name), batch_of(name)
    group = next(g for g in find_groups(model, batch) if g.kind == kind)
    units = [0, 2] if group.num_units > 2 else [0]
    units = range(0, 10, 2) if kind == "ffn" else units
    low_rank_rows(model, group, units, 2)
    expected = logits(model, batch)
    apply_plan_(model, plan_of({}, {group: units}, rank=2))
    assert any(isinstance(m, ImplantLinear) for m in model.modules())
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "qwen3"])
def test_a_zero_implant_is_silent_at_first_and_every_part_of_it_learns(name):
    model, batch = build(name), batch_of(name)
    groups = find_groups(model, batch)
    units = {g: range(g.num_units // 2) for g in groups}
    with masked(model, {g: list(u) for g, u in units.items()}):
        expected = logits(model, batch)
    apply_plan_(model, plan_of({}, units), init="zero")
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-10)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):  # the first step moves the reading columns, the second what they read
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    implants = [n for n in before if "implant" in n]
    assert implants
    assert not [n for n in implants if torch.equal(model.get_parameter(n), before[n])]


def test_implants_and_removals_in_one_group_equal_masking_where_the_implant_is_exact():
    model, batch = build("bert"), batch_of("bert")
    heads = find_groups(model, batch)[0]
    low_rank_rows(model, heads, [0, 3], 3)
    with masked(model, {heads: [1]}):
        expected = logits(model, batch)
    apply_plan_(model, plan_of({heads: [1]}, {heads: [0, 3]}, rank=3))
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-9)


def test_parameter_counts_by_hand():
    model, batch = build("bert"), batch_of("bert")
    ffn = find_groups(model, batch)[1]
    before = model.num_parameters()
    apply_plan_(model, plan_of({ffn: [0, 1]}, {ffn: range(10, 20)}, rank=3))
    # Two neurons of 24 + 1 + 24 weights go; ten rows of 24 become 3 x (10 + 24).
    assert model.num_parameters() == before - 2 * 49 - 10 * 24 + 3 * 34


def test_factors_are_the_best_of_their_rank_on_the_given_inputs():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    inputs = torch.randn(500, 16, generator=generator, dtype=torch.float64) * torch.logspace(-2, 1, 16).double()
    moment = inputs.T @ inputs / len(inputs)

    def error(up, down):
        return float(((inputs @ (rows - up @ down).T) ** 2).sum())

    best = error(*factor_rows(rows, 4, moment=moment))
    assert best < 0.9 * error(*factor_rows(rows, 4)), "whitening must help where inputs are unequal"
    up, down = factor_rows(rows, 4, moment=moment)
    for _ in range(20):
        noise_up, noise_down = torch.randn(up.shape, generator=generator), torch.randn(down.shape, generator=generator)
        assert error(up + 1e-3 * noise_up, down + 1e-3 * noise_down) > best


def test_factors_survive_inputs_that_span_few_directions():
    rows = torch.randn(6, 8).double()
    x = torch.zeros(10, 8).double()
    x[:, :2] = torch.randn(10, 2)
    up, down = factor_rows(rows, 2, x.T @ x)
    torch.testing.assert_close(x @ (up @ down).T, x @ rows.T, rtol=1e-6, atol=1e-6)


def test_input_moments_are_means_over_tokens():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x = torch.randn(5, 7, 3).double()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net(x)

    moments = collect_input_moments(Wrapped(), ["net.0.weight"], [{"x": x[:2]}, {"x": x[2:]}])
    flat = x.reshape(-1, 3)
    torch.testing.assert_close(moments["net.0.weight"], flat.T @ flat / len(flat), rtol=1e-6, atol=1e-6)


def test_the_forward_of_an_implanted_layer_keeps_the_order_of_segments():
    layer = ImplantLinear(3, [(2, 1), (1, 2)], 1, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape))
    x = torch.randn(4, 3).double()
    low = layer.implant_up @ layer.implant_down
    rows = torch.stack([layer.weight[0], layer.weight[1], low[0], layer.weight[2], low[1], low[2]])
    torch.testing.assert_close(layer(x), x @ rows.T + layer.bias)
