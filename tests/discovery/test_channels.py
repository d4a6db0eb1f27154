"""Convolution channels: a small net for every coupling, pruned = masked in float64."""

import copy

import pytest
import torch
from cases import randomise_
from channel_nets import NETS
from plans import plan_of
from reference import masked, uneven_removal
from torch import nn

from hap_hf.discovery import find_groups
from hap_hf.surgery import apply_plan_

pytestmark = pytest.mark.fast

IMAGES = {"x": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)}


def net(name):
    if "standardisation" in name or "same padding" in name:
        pytest.importorskip("timm")
    model = randomise_(NETS[name][0]()).double().eval()
    generator = torch.Generator().manual_seed(1)
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.running_mean.normal_(0, 0.3, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.mark.parametrize("name", NETS)
def test_every_coupling_is_found(name):
    groups = find_groups(net(name), IMAGES)
    assert {g.name.rpartition(":")[0]: g.num_units for g in groups} == NETS[name][1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETS)
def test_the_pruned_net_equals_the_masked_one_and_is_smaller(name, seed):
    model = net(name)
    groups = find_groups(model, IMAGES)
    removed = uneven_removal(groups, seed)
    with masked(model, removed), torch.no_grad():
        expected = model(**IMAGES)
    dense, before = model(**IMAGES), sum(p.numel() for p in model.parameters())
    apply_plan_(model, plan_of(removed))
    torch.testing.assert_close(model(**IMAGES), expected, rtol=0, atol=1e-10)
    assert not torch.allclose(expected, dense)
    assert sum(p.numel() for p in model.parameters()) < before


@pytest.mark.parametrize("name", NETS)
def test_finding_channels_leaves_the_net_as_it_was(name):
    model = net(name).train()
    before, attributes = copy.deepcopy(model.state_dict()), [dict(vars(m)) for m in model.modules()]
    find_groups(model, IMAGES)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [set(vars(m)) for m in model.modules()] == [set(a) for a in attributes]
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_zero_initialised_layers_hide_no_coupling():
    model = net("residual")
    for module in (model.bn2, model.bn3):
        nn.init.zeros_(module.weight)
    assert {g.name.rpartition(":")[0]: g.num_units for g in find_groups(model, IMAGES)} == NETS["residual"][1]


def test_a_dead_activation_hides_no_coupling():
    model = net("residual")
    model.bn.running_mean.fill_(1e4)  # the ReLU behind it gives nothing but zeros
    assert {g.name.rpartition(":")[0]: g.num_units for g in find_groups(model, IMAGES)} == NETS["residual"][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_channels_are_found_in_any_precision(dtype):
    model = net("residual").to(dtype)
    groups = find_groups(model, {"x": IMAGES["x"].to(dtype)})
    assert {g.name.rpartition(":")[0]: g.num_units for g in groups} == NETS["residual"][1]
    assert all(p.dtype == dtype for p in model.parameters())


def test_channels_last_stays_channels_last():
    model = net("residual").to(memory_format=torch.channels_last)
    images = {"x": IMAGES["x"].contiguous(memory_format=torch.channels_last)}
    apply_plan_(model, plan_of(uneven_removal(find_groups(model, images))))
    assert model.a1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.a1.weight.is_contiguous()


def test_sizes_that_layers_print_follow():
    model = net("depthwise")
    groups = {g.name: g for g in find_groups(model, IMAGES)}
    apply_plan_(model, plan_of({groups["expand:channels"]: [1, 4], groups["reduce:channels"]: [0]}))
    assert (model.dw.in_channels, model.dw.out_channels, model.dw.groups) == (5, 10, 5)
    assert (model.bn1.num_features, model.bn2.num_features) == (5, 10)
    assert (model.gate.in_channels, model.gate.out_channels) == (3, 10)
    assert model.project.in_channels == 10


def test_a_frozen_convolution_is_pruned_and_stays_frozen():
    model = net("residual")
    model.a1.requires_grad_(False)
    apply_plan_(model, plan_of(uneven_removal(find_groups(model, IMAGES))))
    assert not model.a1.weight.requires_grad
    assert model.a2.weight.requires_grad


def test_a_convolution_called_twice_couples_what_it_reads_and_makes():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.fc = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 3)

        def forward(self, x):
            x = torch.relu(self.first(x))
            return self.fc(torch.relu(self.again(torch.relu(self.again(x)))).mean((2, 3)))

    model = randomise_(Shared()).double().eval()
    (group,) = find_groups(model, IMAGES)
    assert {(s.tensor, s.dim) for s in group.slices} >= {("again.weight", 0), ("again.weight", 1), ("first.weight", 0)}
    with masked(model, {group: [1, 4]}), torch.no_grad():
        expected = model(**IMAGES)
    apply_plan_(model, plan_of({group: [1, 4]}))
    torch.testing.assert_close(model(**IMAGES), expected, rtol=0, atol=1e-10)


def test_a_tied_convolution_is_left_whole():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.fc = conv(3), conv(6), conv(6), nn.Linear(6, 3)
            self.c.weight = self.b.weight

        def forward(self, x):
            return self.fc(self.c(torch.relu(self.b(torch.relu(self.a(x))))).mean((2, 3)))

    def conv(inputs):
        return nn.Conv2d(inputs, 6, 3, padding=1)

    tied = {"b.weight", "c.weight"}
    model = randomise_(Tied()).double().eval()
    model.c.weight = model.b.weight
    try:
        groups = find_groups(model, IMAGES)
    except ValueError:
        groups = ()
    assert not any(s.tensor in tied for g in groups for s in g.slices)
