"""New statistics for batch norms: torch's own, from the given batches alone, and nothing else touched."""

import copy

import pytest
import torch
from scored_models import snapshot
from torch import nn

from hap_hf.errors import BatchError
from hap_hf.model.state import preserved
from hap_hf.surgery.recalibration import recalibrate_batch_norms_


class Net(nn.Module):
    """Two convolutions with batch norms, dropout, and a linear layer with a batch norm."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.norm1 = norm(4)
        self.dropout = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(4, 5, 3)
        self.norm2 = norm(5)
        self.linear = nn.Linear(5, 6)
        self.norm3 = nn.BatchNorm1d(6)

    def forward(self, pixel_values, labels=None):
        x = self.norm1(self.conv1(pixel_values)).relu()
        x = self.norm2(self.conv2(self.dropout(x))).relu()
        return self.norm3(self.linear(x.mean(dim=(2, 3))))


def norms_of(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def net(**options):
    """Return a net in an uneven state: wrong statistics, stored gradients, mixed flags."""
    model = Net(**options).double().train()
    for norm in norms_of(model):
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
            tensor.add_(torch.randn(tensor.shape).double())
        norm.running_var.mul_(5 + torch.rand(norm.running_var.shape))
        norm.num_batches_tracked.fill_(7)
    model.norm2.eval()
    model.conv1.weight.requires_grad_(False)
    model.conv2.weight.grad = torch.ones_like(model.conv2.weight)
    return model


def batch_of(size, labels=True):
    batch = {"pixel_values": 3 * torch.randn(size, 3, 8, 8).double() + 1}
    return {**batch, "labels": torch.zeros(size, dtype=torch.long)} if labels else batch


def outputs(model, batch):
    """Return the outputs in eval mode."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return model(**batch)


def train_mode_statistics(model, batches):
    """Return what torch accumulates by itself with ``momentum=None``, dropout off, and the last batch's output."""
    model = copy.deepcopy(model).eval()
    for norm in norms_of(model):
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches:
            out = model(**batch)
    return [(norm.running_mean, norm.running_var) for norm in norms_of(model)], out


def statistics(model):
    return [(norm.running_mean, norm.running_var) for norm in norms_of(model)]


def assert_all_close(got, expected):
    for pair, other in zip(got, expected, strict=True):
        for tensor, reference in zip(pair, other, strict=True):
            torch.testing.assert_close(tensor, reference, rtol=0, atol=1e-11)


def test_after_one_batch_eval_mode_is_train_mode_but_for_the_unbiased_factor():
    model, batch = net(), batch_of(4)
    _, expected = train_mode_statistics(model, [batch])
    assert recalibrate_batch_norms_(model, [batch]) == 3
    assert (outputs(model, batch) - expected).abs().max() > 1e-4
    for norm, num_values in zip(norms_of(model), (4 * 6 * 6, 4 * 4 * 4, 4), strict=True):
        norm.running_var.mul_((num_values - 1) / num_values)
    torch.testing.assert_close(outputs(model, batch), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_batches_of_one_size_give_what_torch_accumulates(number):
    model, batches = net(), [batch_of(4) for _ in range(number)]
    expected, _ = train_mode_statistics(model, batches)
    recalibrate_batch_norms_(model, batches)
    assert_all_close(statistics(model), expected)


def test_batches_of_two_sizes_are_weighted_by_them():
    model, small, large = net(), batch_of(2), batch_of(6)
    by_batch = [train_mode_statistics(model, [batch])[0] for batch in (small, large)]
    recalibrate_batch_norms_(model, [small, large])
    by_hand = [
        tuple((2 * a + 6 * b) / 8 for a, b in zip(one, other, strict=True))
        for one, other in zip(*by_batch, strict=True)
    ]
    assert_all_close(statistics(model), by_hand)


def test_a_batch_norm_that_is_called_twice_counts_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(input=x[:2]), self.norm(input=x[2:])  # also by name

    model, x = Twice().double(), torch.randn(8, 3).double()
    assert recalibrate_batch_norms_(model, [{"x": x}]) == 1
    torch.testing.assert_close(model.norm.running_mean, x.mean(0))
    torch.testing.assert_close(model.norm.running_var, (2 * x[:2].var(0) + 6 * x[2:].var(0)) / 8)


@pytest.mark.parametrize("damage", [0.0, 1e4, float("nan")])
def test_a_net_with_ruined_statistics_recovers_exactly(damage):
    model, batches = net(), [batch_of(4), batch_of(4)]
    recalibrate_batch_norms_(model, batches)
    expected = outputs(model, batches[0])
    for norm in norms_of(model):
        norm.running_mean.fill_(damage)
        norm.running_var.fill_(damage)
    assert not torch.allclose(outputs(model, batches[0]), expected)
    recalibrate_batch_norms_(model, batches)
    torch.testing.assert_close(outputs(model, batches[0]), expected, rtol=0, atol=1e-12)


def test_nothing_changes_but_the_statistics():
    model = net()
    before, momenta = snapshot(model), [norm.momentum for norm in norms_of(model)]
    recalibrate_batch_norms_(model, iter([batch_of(4), batch_of(4, labels=False)]))
    after = snapshot(model)
    del before["random state"], after["random state"]  # the batches were drawn from it
    changed = {
        (name, identity)
        for (name, identity, old), (_, _, new) in zip(before.pop("buffers"), after.pop("buffers"), strict=True)
        if old != new
    }
    assert changed == {(n, id(getattr(m, n))) for m in norms_of(model) for n in ("running_mean", "running_var")}
    assert after == before
    assert [norm.momentum for norm in norms_of(model)] == momenta
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_random_state_stays_even_if_the_batches_draw_from_it():
    model = net()
    before = torch.get_rng_state()
    recalibrate_batch_norms_(model, (batch_of(4) for _ in range(2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_everything_is_in_eval_mode_during_the_passes():
    model, seen = net(), []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: seen.append(module.training))
    recalibrate_batch_norms_(model, [batch_of(4)])
    assert len(seen) == len([*model.modules()])
    assert not any(seen)


def batches_then(ending):
    yield batch_of(4)
    raise ending


@pytest.mark.parametrize("ending", [ValueError("loader failed"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_after_an_exception_the_old_statistics_are_back(ending):
    model = net()
    before = snapshot(model)
    with pytest.raises(type(ending)):
        recalibrate_batch_norms_(model, batches_then(ending))
    assert snapshot(model) == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_batch_with_one_value_a_channel_is_refused_and_nothing_changes():
    model, batches = net(), [batch_of(4), batch_of(1)]
    before = snapshot(model)
    with pytest.raises(
        BatchError, match=r"batch norm 'norm3' takes at least 2 values .* shape \[1, 6\]; use batches of 2"
    ):
        recalibrate_batch_norms_(model, batches)
    assert snapshot(model) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused_and_nothing_changes(value):
    model, batch = net(), batch_of(4)
    batch["pixel_values"][0, 0, 0, 0] = value
    before = snapshot(model)
    with pytest.raises(BatchError, match=r"batch norm 'norm1' must be finite, and in torch\.float64 they are not"):
        recalibrate_batch_norms_(model, [batch_of(4), batch])
    after = snapshot(model)
    del before["random state"], after["random state"]
    assert after == before


def test_an_overflow_of_low_precision_statistics_is_refused():
    model = nn.Sequential(nn.BatchNorm1d(2)).half()
    with pytest.raises(BatchError, match=r"in torch\.float16 they are not; .* recalibrate in float32"):
        recalibrate_batch_norms_(model, [{"input": torch.tensor([[1e3, 1.0], [-1e3, 0.0]]).half()}])
    assert torch.equal(model[0].running_var, torch.ones(2).half())


def test_no_batches_are_refused():
    with pytest.raises(BatchError, match="3 batch norms take at least one batch, got none; pass a list of batches"):
        recalibrate_batch_norms_(net(), [])


def test_a_model_without_tracked_statistics_is_not_run():
    vision = pytest.importorskip("torchvision.ops")

    def never():
        pytest.fail("a batch was drawn")
        yield

    class Others(nn.Sequential):
        def forward(self, **batch):
            pytest.fail("the model was run")

    model = Others(
        nn.Conv2d(3, 4, 3),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.BatchNorm2d(4, track_running_stats=False),
        vision.FrozenBatchNorm2d(4),
    )
    assert recalibrate_batch_norms_(model, never()) == 0


def test_batch_norms_that_track_nothing_keep_normalising_by_the_batch():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    x = torch.randn(6, 3).double()
    assert recalibrate_batch_norms_(model, [{"input": x}]) == 1
    torch.testing.assert_close(model[2].running_mean, model[1](model[0](x)).mean(0).detach())


def test_a_batch_norm_that_no_batch_reaches_keeps_its_statistics_and_is_not_counted():
    model = net()
    model.add_module("unused", nn.BatchNorm2d(3).double())
    model.unused.running_mean.fill_(2)
    assert recalibrate_batch_norms_(model, [batch_of(4)]) == 3
    assert torch.equal(model.unused.running_mean, torch.full((3,), 2.0).double())


def test_synchronised_batch_norms_work_on_the_cpu():
    model, batches = net(), [batch_of(4), batch_of(4)]
    expected, _ = train_mode_statistics(model, batches)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert recalibrate_batch_norms_(synchronised, batches) == 3
    assert any(isinstance(m, nn.SyncBatchNorm) for m in synchronised.modules())
    assert_all_close(statistics(synchronised), expected)


def test_timms_batch_norms_with_activations():
    timm_layers = pytest.importorskip("timm.layers")
    model = net(norm=timm_layers.BatchNormAct2d)
    batches = [batch_of(4), batch_of(4)]
    expected, _ = train_mode_statistics(model, batches)
    assert recalibrate_batch_norms_(model, batches) == 3
    assert_all_close(statistics(model), expected)


def test_a_compiled_model_is_recalibrated_too():
    model, batch = net(), batch_of(4)
    expected, _ = train_mode_statistics(model, [batch])
    compiled = torch.compile(model, backend="eager")
    with preserved(model), torch.no_grad():
        compiled(**batch)  # compiled without hooks, and in the state in which it will be called
    assert recalibrate_batch_norms_(compiled, [batch]) == 3
    assert_all_close(statistics(model), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models_get_statistics_of_their_own_precision(dtype):
    model, batch = net().to(dtype), batch_of(4)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    assert recalibrate_batch_norms_(model, [batch]) == 3
    x = model.conv1(batch["pixel_values"]).float()
    assert model.norm1.running_var.dtype == dtype
    assert torch.equal(model.norm1.running_mean, x.mean(dim=(0, 2, 3)).to(dtype))
