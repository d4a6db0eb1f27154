"""A criterion, a kind of layer, a currency and a counter from outside the package: one registration each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from cases import batch_of, build
from torch import nn
from torch.nn import functional as F

import hap_hf
from hap_hf import Amount, ConfigError, Criterion, Currency, GroupPlan, HapConfig, LayerKind, Scores
from hap_hf.criteria import criterion as registry
from hap_hf.layers import kind as kinds
from hap_hf.model.masking import masked
from hap_hf.names import counters, currencies


@pytest.fixture(autouse=True)
def _registries_left_as_found(monkeypatch):
    for module, name in (
        (registry, "_CRITERIA"),
        (kinds, "_KINDS"),
        (currencies, "_CURRENCIES"),
        (counters, "_COUNTERS"),
    ):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))


@dataclass(frozen=True, kw_only=True)
class LastFirst(Criterion):
    """The last units go first."""

    name: ClassVar[str] = "last_first"
    needs_batches: ClassVar[bool] = False
    sign: int = -1

    def score(self, task):
        values = {g.name: self.sign * torch.arange(g.num_units).double() for g in task.groups}
        zeros = {name: torch.zeros_like(v) for name, v in values.items()}
        return Scores(values, zeros, self.name, num_probes=0, num_batches=0, num_loss_terms=0, seconds=0.0)


def test_a_criterion_is_a_class_and_a_registration():
    with pytest.raises(ConfigError, match="last_first"):
        HapConfig(prune_ratio=0.5, method="last_first")
    hap_hf.register_criterion(LastFirst)
    config = HapConfig(prune_ratio=0.5, method="last_first", kinds="ffn", progress=False)
    assert HapConfig.from_dict(config.to_dict()) == config
    report = hap_hf.prune(build("bert"), [batch_of("bert")], config)
    assert {g.actions for g in report.plan if g.group.kind == "ffn"} == {"k" * 10 + "p" * 10}
    other = HapConfig(prune_ratio=0.5, method=LastFirst(sign=1), kinds="ffn", progress=False)
    report = hap_hf.prune(build("bert"), [batch_of("bert")], HapConfig.from_dict(other.to_dict()))
    assert {g.actions for g in report.plan if g.group.kind == "ffn"} == {"p" * 10 + "k" * 10}


def test_a_name_is_given_once():
    hap_hf.register_criterion(LastFirst)

    @dataclass(frozen=True, kw_only=True)
    class Another(LastFirst):
        pass

    with pytest.raises(ConfigError, match="'last_first' is taken by LastFirst"):
        hap_hf.register_criterion(Another)


@dataclass(frozen=True)
class Blocks(Currency):
    """Widths are paid for in blocks, as a kernel that works on several units at a time pays for them."""

    name: ClassVar[str] = "blocks"
    size: int = 4

    def cost(self, plans: Sequence[GroupPlan]) -> float:
        return float(sum(math.ceil(g.survivors / self.size) for g in plans))


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_currency_is_a_class_and_a_registration(rounds):
    hap_hf.register_currency(Blocks)
    config = HapConfig(amount=Amount(Blocks(5), 0.5), kinds="ffn", method="magnitude", progress=False)
    assert HapConfig.from_dict(config.to_dict()) == config
    model = build("bert")
    place = hap_hf.selection.Round(1, rounds)
    for number in range(1, rounds + 1):
        place = hap_hf.selection.Round(number, rounds, place.start)
        evidence = config.evidence(model, [batch_of("bert")])
        report, place = hap_hf.pipeline.prune_round(evidence, config, place)
    left = [g.survivors for g in report.plan if g.group.kind == "ffn"]
    assert sum(math.ceil(n / 5) for n in left) == 4  # of 8 blocks
    assert all(n % 5 == 0 for n in left)  # what is paid for is used
    assert report.asked == f"Amount('blocks', {0.5 if rounds == 1 else 0.666667})"  # of what the round found


def test_an_unknown_currency_is_refused_by_name():
    values = HapConfig(amount=Amount(Blocks(), 0.5)).to_dict()
    with pytest.raises(ConfigError, match="'blocks'"):
        HapConfig.from_dict(values)


class Doubled(nn.Linear):
    """A linear layer of another library."""

    def forward(self, x):
        return 2 * super().forward(x)


class Net(nn.Module):
    """Two feed-forward blocks out of such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.up = nn.ModuleList(Doubled(6, 8) for _ in range(2))
        self.down = nn.ModuleList(Doubled(8, 6) for _ in range(2))
        self.head = nn.Linear(6, 2)

    def forward(self, x, labels=None):
        h = self.embed(x)
        for up, down in zip(self.up, self.down, strict=True):
            h = h + down(torch.tanh(up(h)))
        logits = self.head(h)
        return {"logits": logits, **({} if labels is None else {"loss": F.cross_entropy(logits, labels)})}


def test_a_kind_of_layer_is_a_class_and_a_registration():
    model = Net().double()
    batch = {"x": torch.randn(6, 3).double(), "labels": torch.tensor([0, 1, 1, 0, 1, 0])}
    with pytest.raises(hap_hf.UnsupportedModelError, match="found nothing to remove"):
        hap_hf.find_groups(model, batch)

    @hap_hf.register_layer(Doubled)
    class DoubledKind(LayerKind):
        """Its output is not the product of its input and its weight, so per-sample gradients take the slow way."""

        def knows_rows(self, module):
            return False

    groups = hap_hf.find_groups(model, batch)
    assert [g.num_units for g in groups] == [8, 8]
    config = HapConfig(target_params=0.5, compensate=False, progress=False)
    decision = hap_hf.decide(config.evidence(model, [batch]), config)
    with masked(model, [(g.group, g.units("p")) for g in decision.stage]), torch.no_grad():
        expected = model(**batch)["logits"]
    dense = model(**batch)["logits"].detach()
    hap_hf.carry_out_(model, decision)
    torch.testing.assert_close(model(**batch)["logits"].detach(), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(expected, dense)
    assert [layer.out_features for layer in model.up] == [layer.in_features for layer in model.down]


class Attention(nn.Module):
    """Self-attention that counts its heads under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.number_of_heads_here = 4
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.number_of_heads_here, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Reader(nn.Module):
    """A classifier with one such attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(3, 8), Attention(), nn.Linear(8, 2)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        h = self.embed(x)
        h = self.norm(h + self.attention(h))
        return self.head(self.norm(h + self.down(torch.tanh(self.up(h)))).mean(1))


def test_a_head_count_of_another_name_is_registered():
    model, batch = Reader().double(), {"x": torch.randn(2, 5, 3).double()}
    found = hap_hf.discover(model, batch)
    assert [g.kind.value for g in found.groups] == ["ffn"]
    assert [w.kind.value for w in found.left_whole if w.kind is not None] == ["heads"]
    hap_hf.register_counter("number_of_heads_here")
    assert sorted(g.kind.value for g in hap_hf.find_groups(model, batch)) == ["ffn", "heads"]


@pytest.mark.parametrize(
    ("name", "counts"), [("num_heads", "entries"), ("not a name", "heads"), ("width", "groups"), ("x", "colours")]
)
def test_a_counter_must_be_new_or_mean_the_same(name, counts):
    with pytest.raises(ConfigError):
        hap_hf.register_counter(name, counts)
    hap_hf.register_counter("num_heads", "heads")
