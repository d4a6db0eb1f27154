"""Corners that reading found: each was wrong once."""

import copy
import dataclasses

import pytest
import torch
from cases import batch_of, build
from torch import nn

import hap_hf
from hap_hf import Amount, ConfigError, HapConfig
from hap_hf.decision import stamps_of
from hap_hf.inputs.readers import readers_of
from hap_hf.selection import Round, config_of_round

timm_layers = pytest.importorskip("timm.layers")


def standardised(*more):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), timm_layers.StdConv2d(8, 8, 3, padding=1), nn.ReLU(), *more]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).double()


def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 8, 8, generator=generator).double(), torch.randint(2, (8,), generator=generator)


def test_an_optimizer_goes_on_with_the_weight_of_a_layer_that_no_longer_standardises_it():
    model, (x, y) = standardised(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()), images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    hap_hf.prune(model, [(x, y)], HapConfig(target_params=0.5, progress=False), optimizer=optimizer)
    assert type(model[2]) is nn.Conv2d
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held for p in model.parameters())
    before = model[2].weight.detach().clone()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not torch.equal(before, model[2].weight)


def test_a_model_of_which_no_reader_can_be_compensated_is_pruned():
    model, (x, y) = standardised(timm_layers.StdConv2d(8, 8, 3, padding=1)), images()
    config = HapConfig(target_params=0.6, exclude=("4*", "7*"), progress=False)
    groups = [g for g in hap_hf.find_groups(model, (x, y)) if config.selects(g)]
    assert readers_of(model, groups) == []
    assert hap_hf.prune(model, [(x, y)], config).after.params < 1000


def test_a_decision_fits_a_copy_in_another_memory_format_and_with_other_threads():
    model, (x, y) = standardised(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()).float(), images()
    config = HapConfig(target_params=0.5, progress=False)
    decision = hap_hf.decide(config.evidence(model, [(x.float(), y)]), config)
    decision = dataclasses.replace(decision, stamps=stamps_of(model, dict(model.named_parameters())))
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    hap_hf.carry_out_(other, decision)
    wobbled = {name: stamp * (1 + 1e-13) for name, stamp in decision.stamps.items()}
    hap_hf.carry_out_(model, dataclasses.replace(decision, stamps=wobbled))


def test_values_go_where_the_model_is():
    model = build("bert")
    config = HapConfig(target_params=0.5, progress=False)
    decision = hap_hf.decide(config.evidence(model, [batch_of("bert")]), config)
    single = {name: value.float() for name, value in decision.values.items()}
    hap_hf.carry_out_(model, dataclasses.replace(decision, values=single))
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_nearly_everything_may_be_asked_for():
    report = hap_hf.prune(
        build("bert"), [batch_of("bert")], HapConfig(prune_ratio=1 - 1e-9, method="magnitude", progress=False)
    )
    assert all(0 < g.kept <= 2 for g in report.groups)


def test_an_amount_with_settings_that_its_currency_has_not_is_refused():
    with pytest.raises(ConfigError, match="params is no currency with the settings"):
        Amount.from_dict({"what": {"name": "params", "x": 1}, "keep": 0.5})


def test_rounds_of_groups_that_cost_nothing_are_left_to_the_choice_of_units():
    config = HapConfig(target_macs=0.5)
    assert config_of_round(config, Round(1, 2), 0.0) is config


class Gated(nn.Module):
    """Attention whose heads two layers read."""

    def __init__(self, *, twice: bool) -> None:
        super().__init__()
        self.num_heads, self.twice = 4, twice
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.gate = nn.Linear(8, 8) if twice else None

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        heads = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.o(heads) * self.gate(heads).sigmoid() if self.twice else self.o(heads)


class Reader(nn.Module):
    """A classifier around it."""

    def __init__(self, *, twice: bool) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(3, 8), Gated(twice=twice), nn.Linear(8, 2)

    def forward(self, x):
        h = self.embed(x)
        return self.head(nn.functional.layer_norm(h + self.attention(h), (8,)).mean(1))


def test_attention_products_are_counted_once_whoever_reads_the_heads():
    batch = {"x": torch.randn(2, 6, 3).double()}
    once, twice = (
        next(g for g in hap_hf.find_groups(Reader(twice=t).double(), batch) if g.kind == "heads") for t in (False, True)
    )
    assert once.core_macs == twice.core_macs > 0
