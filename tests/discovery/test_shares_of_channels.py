"""Code that computes a share of its channels at run time: never another model, neither when found nor when pruned."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from hap_hf import Decision, HapConfig, UnsupportedModelError, carry_out_, decide, discover, prune
from hap_hf.discovery import check_equals_masked, trial
from hap_hf.names.plan import GroupPlan, PruningPlan

pytestmark = pytest.mark.fast

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 0])


def shifted(h):
    """Temporal Shift's fold: the first quarter moves."""
    k = h.shape[1] // 4
    return torch.cat([h[:, :k].roll(1, -1), h[:, k:]], 1)


def last_eighth(h):
    """A partial operation on the last channels."""
    k = h.shape[1] - h.shape[1] // 8
    return torch.cat([h[:, :k], h[:, k:].tanh()], 1)


def halves(h):
    """The larger half is squared."""
    k = (h.shape[1] + 1) // 2
    return torch.cat([h[:, :k] ** 2, h[:, k:]], 1)


def never_one(h):
    """Something that a single channel does not allow."""
    return h - h.std(1, keepdim=True).mean() * 0 if h.shape[1] > 1 else h * 2


def place(h):
    """A slope for each channel by its place."""
    return h * torch.linspace(1, 2, h.shape[1], dtype=h.dtype)[:, None, None]


class Net(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 1), nn.Linear(12, 3)
        self.between = between

    def forward(self, x):
        return self.fc(torch.relu(self.b(self.between(torch.relu(self.a(x))))).mean((2, 3)))


@pytest.mark.parametrize("between", [shifted, last_eighth, halves, never_one, place])
def test_channels_of_which_a_share_is_computed_stay_whole(between):
    torch.manual_seed(0)
    found = discover(Net(between).double().eval(), {"x": IMAGES})
    assert [g.name for g in found.groups] == ["b:channels"]
    assert ("a:channels",) in [e.names for e in found.left_whole]


def without_hard_choices(monkeypatch):
    """Let discovery try random units alone, so that it believes what it should not."""
    # Of 16 channels one of the first quarter and three of the others go: a quarter of what is left are the same ones.
    for name in ("_any", "_low", "_high", "_nearly_all"):
        monkeypatch.setattr(trial, name, lambda rng, n: [0, n // 3, n // 2, n - 2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("implant_ratio", [0.0, 0.5])
def test_prune_compares_the_plan_that_it_carries_out_and_undoes_it(dtype, implant_ratio, monkeypatch):
    without_hard_choices(monkeypatch)
    torch.manual_seed(0)
    model = Net(shifted).to(dtype).eval()
    batches, before = [(IMAGES.to(dtype), LABELS)], {n: t.clone() for n, t in model.state_dict().items()}
    assert len(discover(model, batches[0]).groups) == 2  # the control: it was believed
    config = HapConfig(prune_ratio=0.6, implant_ratio=implant_ratio, method="random", progress=False, recalibrate=False)
    with pytest.raises(UnsupportedModelError, match=r"groups at fault are a:channels\. .*exclude=\['a:channels'\]"):
        prune(model, batches, config)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    prune(model, batches, replace(config, exclude=("a:channels",), implant_ratio=0.0))
    assert model.b.weight.shape[0] < 12


def test_rounding_is_no_difference(monkeypatch):
    torch.manual_seed(0)
    model = Net(nn.Identity()).eval()
    config = HapConfig(prune_ratio=0.5, method="random", progress=False)
    decision: Decision = decide(config.evidence(model, [(IMAGES.float(), LABELS)]), config)
    monkeypatch.setitem(trial.TOLERANCE, torch.float32, 0.0)  # nothing is equal in its last bits
    carry_out_(model, decision)
    assert model.a.weight.shape[0] < 16


def test_training_mode_is_compared_too():
    class InTraining(Net):
        def forward(self, x):
            h = torch.relu(self.a(x))
            return self.fc(torch.relu(self.b(shifted(h) if self.training else h)).mean((2, 3)))

    model = InTraining(None).double().eval()
    assert [g.name for g in discover(model, {"x": IMAGES}).groups] == ["b:channels"]
    (group,) = discover(Net(nn.Identity()).double().eval(), {"x": IMAGES}).groups[:1]
    low = PruningPlan(((GroupPlan(group, "p" * 8 + "k" * 8),),))
    with pytest.raises(UnsupportedModelError, match="a:channels"):
        check_equals_masked(model, low, {"x": IMAGES})
    check_equals_masked(Net(nn.Identity()).double().eval(), low, {"x": IMAGES})
