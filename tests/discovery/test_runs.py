"""Paths that the example does not take: coupled where they can be run, else what they may touch is left whole."""

import copy
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from plans import plan_of
from reference import masked, uneven_removal
from torch import nn
from torch.nn import functional

from hap_hf import HapConfig, UnsupportedModelError, discover, prune
from hap_hf.discovery.runs import runs_of
from hap_hf.surgery import apply_plan_

pytestmark = pytest.mark.fast

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Auxiliary(nn.Module):
    """A second classifier in training, or where an argument asks for it."""

    def __init__(self, *, in_training=True, hidden=()):
        super().__init__()
        self.in_training = in_training
        self.a, self.b, self.c = (nn.Conv2d(n, m, 3, padding=1) for n, m in ((3, 12), (12, 7), (7, 9)))
        self.fc = nn.Linear(9, 3)
        widths = [12, *hidden, 3]
        self.aux = nn.Sequential(*(nn.Linear(n, m) for n, m in pairwise(widths)))

    def forward(self, x, both=False):
        h = functional.dropout(functional.relu(self.a(x)), 0.3, self.training)
        y = self.fc(functional.relu(self.c(functional.relu(self.b(h)))).mean((2, 3)))
        return (y, self.aux(h.mean((2, 3)))) if (self.training and self.in_training) or both else y


class Sampling(nn.Module):
    """A variational bottleneck: the standard deviation counts in training alone."""

    def __init__(self):
        super().__init__()
        self.encode, self.mean, self.log, self.up, self.out = (
            nn.Linear(n, m) for n, m in ((5, 12), (12, 6), (12, 6), (6, 10), (10, 3))
        )

    def forward(self, x):
        h = torch.relu(self.encode(x))
        z, s = self.mean(h), self.log(h)
        return self.out(torch.relu(self.up(z + torch.randn_like(z) * s.exp() if self.training else z)))


class LargeImages(nn.Module):
    """Another kernel for larger images."""

    def __init__(self):
        super().__init__()
        self.a, self.small, self.large = (
            nn.Conv2d(n, m, k, padding=k // 2) for n, m, k in ((3, 6, 3), (6, 8, 3), (6, 8, 5))
        )
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.fc(torch.relu((self.large if x.shape[-1] > 10 else self.small)(h)).mean((2, 3)))


class Skipping(nn.Module):
    """Stochastic depth by Python's own random numbers, and a mask by NumPy's."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.relu(self.a(x))
        if not self.training or random.random() < 0.7:
            h = h + self.b(h)
        if self.training:
            h = h * torch.tensor(np.random.rand(h.shape[-1]))  # noqa: NPY002 (the numbers that models draw)
        return self.fc(h.mean((2, 3)))


def owners(found):
    return {s.tensor.partition(".")[0] for g in found.groups for s in g.slices}


def assert_right_on(model, batch, runs):
    """Pruned equals masked in every run, in float64, and some run differs from the dense model's."""
    found = discover(model, batch)
    for seed in range(2):
        removed, pruned = uneven_removal(found.groups, seed), copy.deepcopy(model)
        apply_plan_(pruned, plan_of(removed))
        for run in runs:
            with masked(model, removed):
                expected = run(model)
            for got, want in zip(run(pruned), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
            assert not all(map(torch.equal, run(model), expected))


def in_training(model, x):
    """Return the outputs in training, without dropout."""
    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        out = model(x)
    model.eval()
    return out if isinstance(out, tuple) else (out,)


def test_a_head_that_runs_in_training_alone_is_cut_with_what_it_reads(monkeypatch):
    model = Auxiliary().double().eval()
    found = discover(model, {"x": IMAGES})
    assert [len(g.slices) for g in found.groups if g.name == "a:channels"] == [4]  # its weight, its bias, two readers
    monkeypatch.setattr(functional, "dropout", lambda x, p, training: x)
    assert_right_on(model, {"x": IMAGES}, [lambda m: (m(IMAGES),), lambda m: in_training(m, IMAGES)])


def test_the_first_training_step_goes_on():
    model = Auxiliary().float().eval()
    batch = {"x": IMAGES.float(), "labels": torch.tensor([0, 1, 2, 0])}
    prune(model, [batch], HapConfig(prune_ratio=0.5, method="random", progress=False))
    y, aux = model.train()(batch["x"])
    (y.sum() + aux.sum()).backward()
    assert model.aux[0].weight.shape[1] == model.a.weight.shape[0] < 12


@pytest.mark.parametrize("hidden", [(), (12,), (5, 12)])
def test_what_no_run_reaches_keeps_what_it_may_read_and_is_named(hidden):
    found = discover(Auxiliary(in_training=False, hidden=hidden).double().eval(), {"x": IMAGES})
    assert "a" not in {g.name.partition(":")[0] for g in found.groups}
    assert {"b:channels", "c:channels"} <= {g.name for g in found.groups}
    (entry,) = [e for e in found.left_whole if e.names == ("a:channels",)]
    assert "aux.0 did not run" in entry.reason


def test_a_batch_that_takes_the_other_path_couples_it():
    model = Auxiliary(in_training=False).double().eval()
    assert "aux" in owners(discover(model, {"x": IMAGES}, others=[{"x": IMAGES, "both": True}]))
    batches = [{"x": IMAGES, "labels": torch.tensor([0, 1, 2, 0]), "both": both} for both in (False, True)]

    def loss(model, batch):
        outputs = model(batch["x"], both=batch["both"])
        return functional.cross_entropy(outputs[0] if batch["both"] else outputs, batch["labels"])

    prune(model, batches, HapConfig(prune_ratio=0.5, method="random", progress=False), loss_fn=loss)
    assert model.a.weight.shape[0] < 12
    model(IMAGES, both=True)


def test_a_kernel_for_larger_images_is_found_by_making_them_larger():
    model = LargeImages().double().eval()
    assert owners(discover(model, {"x": IMAGES})) == {"a", "small", "large", "fc"}
    large = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    assert_right_on(model, {"x": IMAGES}, [lambda m: (m(IMAGES),), lambda m: (m(large),)])


def test_latents_that_are_drawn_at_random_stay_whole_and_the_rest_goes():
    model = Sampling().double().eval()
    x = torch.randn(4, 5, dtype=torch.float64)
    found = discover(model, {"x": x})
    assert {g.num_units for g in found.groups} == {12, 10}
    assert_right_on(model, {"x": x}, [lambda m: (m(x),), lambda m: in_training(m, x)])


def test_numbers_of_python_and_numpy_are_the_same_in_each_run_and_go_on_afterwards():
    model = Skipping().double().eval()
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    expected = (
        random.Random(5).random(),
        np.random.RandomState(5).rand(),
        torch.rand(1, generator=torch.Generator().manual_seed(5)),
    )
    assert owners(discover(model, {"x": IMAGES})) == {"a", "b", "fc"}
    assert (random.random(), np.random.rand()) == expected[:2]  # noqa: NPY002
    assert torch.equal(torch.rand(1), expected[2])


def test_a_model_that_behaves_alike_is_run_in_one_way():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)
    )
    net = net.double().eval()
    runs, unrun = runs_of(net, {"input": IMAGES})
    assert (len(runs), unrun) == (1, frozenset())
    runs, _ = runs_of(Auxiliary().double().eval(), {"x": IMAGES})
    assert [run.training for run in runs] == [False, True]


def test_nothing_left_is_refused_with_the_layer_that_did_not_run():
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc, self.other = nn.Conv2d(3, 6, 3), nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x, task=0):
            h = torch.relu(self.a(x)).mean((2, 3))
            return self.other(h) if task else self.fc(h)

    with pytest.raises(UnsupportedModelError, match="other did not run"):
        discover(Only().double().eval(), {"x": IMAGES})
