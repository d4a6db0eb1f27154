"""Channels through prune(), the Trainer and AutoModel: implants, batch norms, wrappers, plain modules."""

import copy

import pytest
import torch
from cases import randomise_
from channel_nets import NETS
from plans import plan_of
from scored_models import score
from torch import nn
from torch.nn import functional

from hap_hf import (
    HapConfig,
    HessianPruner,
    ImplantConv2d,
    find_groups,
    make_plan,
    prune,
    recalibrate_batch_norms_,
    wrap_timm,
)
from hap_hf import (
    plan_of as recorded_plan,
)
from hap_hf.errors import BatchError, ConfigError, PlanMismatchError, UnsupportedModelError
from hap_hf.names.group import Counter
from hap_hf.names.outcome import footprint, whole
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.surgery import apply_plan_, collect_input_moments

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

HALF = HapConfig(prune_ratio=0.5, progress=False)


def images(samples=8, seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, size, size, generator=generator)


def pairs(number=2, size=16):
    return [(images(8, i, size), torch.arange(8) % 3) for i in range(number)]


def batches(number=2):
    return [{"pixel_values": x, "labels": y} for x, y in pairs(number)]


def wrapper(architecture="cifar_resnet20", **model_args):
    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig(architecture=architecture, num_labels=3, model_args=model_args or None)
    model = transformers.TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(timm.create_model(architecture, num_classes=3, **model_args).state_dict())
    return model


def net(name="residual"):
    model = randomise_(NETS[name][0]()).double().eval()
    return model, {"x": images().double()}


def implanting_plan(groups, letters):
    plans = [
        GroupPlan(g, letters(g), {t: 1 for t, s in g.implant_shapes(1).items() if (s.taps or 1) > 1}) for g in groups
    ]
    return PruningPlan((tuple(plans),))


def test_an_implant_with_all_taps_but_the_centre_at_zero_changes_nothing():
    model, batch = net()
    for module in (model.stem, model.a1, model.a2, model.b1, model.b2):
        centre = module.weight.detach()[:, :, 1:2, 1:2].clone()
        module.weight.data.zero_()[:, :, 1:2, 1:2] = centre
    expected = model(**batch)
    groups = find_groups(model, batch)
    apply_plan_(model, implanting_plan(groups, lambda g: "i" + "k" * (g.num_units - 1)))
    assert isinstance(model.a1, ImplantConv2d)
    assert isinstance(model.down, nn.Conv2d)  # 1 x 1 already
    torch.testing.assert_close(model(**batch), expected, rtol=0, atol=1e-10)


def test_least_squares_implants_are_nearer_to_the_layer_than_the_centre_tap():
    model, batch = net("chain")
    batch = {"x": functional.avg_pool2d(batch["x"], 3, 1, 1)}  # neighbouring pixels agree, as in images
    (group, _) = find_groups(model, batch)
    plan = PruningPlan(((GroupPlan(group, "iiikkk", {"0.weight": 1}),),))
    moments = collect_input_moments(model, ["0.weight"], [batch])
    errors = []
    expected = model(**batch)
    for given in ({}, moments):
        implanted = copy.deepcopy(model)
        apply_plan_(implanted, plan, input_moments=given)
        order = [3, 4, 5, 0, 1, 2]
        errors.append((implanted[0](batch["x"]) - model[0](batch["x"])[:, order]).square().sum().item())
        assert implanted(**batch).shape == expected.shape
    assert errors[1] < 0.8 * errors[0]


def test_zero_implants_are_silent_and_learn():
    model, batch = net("chain")
    (group, _) = find_groups(model, batch)
    silent = copy.deepcopy(model)
    apply_plan_(silent, PruningPlan(((GroupPlan(group, "iiikkk", {"0.weight": 1}),),)), init="zero")
    apply_plan_(model, plan_of({group: [0, 1, 2]}))
    torch.testing.assert_close(silent(**batch), model(**batch), rtol=0, atol=1e-12)
    silent(**batch).square().sum().backward()
    assert silent[3].weight.grad[:, 3:].abs().sum() > 0


def test_a_tensor_cut_along_two_dimensions_is_counted_once():
    model, batch = net("chain")
    groups = find_groups(model, batch)
    # 6 x 3 x 3 x 3 and its bias and norm, 5 x 6 x 3 x 3 and its bias, 3 x 5
    assert footprint(whole(groups)).params == 162 + 6 + 12 + 270 + 5 + 15
    plan = plan_of({groups[0]: [0, 1], groups[1]: [4]})
    before = sum(p.numel() for p in model.parameters())
    left = footprint(whole(groups)).params - footprint(plan).params
    apply_plan_(model, plan)
    assert before - sum(p.numel() for p in model.parameters()) == left


def test_the_footprint_with_implants_is_what_the_model_holds():
    model, batch = net()
    groups = find_groups(model, batch)
    plan = implanting_plan(groups, lambda g: "pii" + "k" * (g.num_units - 3))
    before = sum(p.numel() for p in model.parameters())
    left = footprint(whole(groups)).params - footprint(plan).params
    apply_plan_(model, plan)
    assert before - sum(p.numel() for p in model.parameters()) == left


@pytest.mark.parametrize("implant_ratio", [0.0, 0.4])
@pytest.mark.parametrize("setting", ["target_params", "target_macs"])
def test_budgets_hold_for_coupled_channels(setting, implant_ratio):
    model = timm.create_model("cifar_resnet20", num_classes=3)
    config = HapConfig(**{setting: 0.5}, method="magnitude", implant_ratio=implant_ratio)
    groups = find_groups(model, {"x": images(2)})
    plan = make_plan(groups, score(model, groups, [], config), config)
    left, before = footprint(plan), footprint(whole(groups))
    share = left.params / before.params if setting == "target_params" else left.macs / before.macs
    assert 0.49 <= share <= 0.5


def test_a_plain_module_is_pruned_on_pairs_of_images_and_labels():
    model = timm.create_model("cifar_resnet20", num_classes=3)
    before = sum(p.numel() for p in model.parameters())
    report = prune(model, pairs(), HALF)
    assert report.after.params == sum(p.numel() for p in model.parameters()) < before
    assert model(images()).shape == (8, 3)


@pytest.mark.parametrize("margin", [16, 60])
@pytest.mark.parametrize("method", ["mask_ggn", "ggn", "ggn_quadratic", "mask_fisher"])
def test_a_model_that_is_sure_of_every_sample_is_pruned(method, margin):
    model, batch = net("residual")
    logits = model(**batch)
    best = logits.topk(2, 1)
    with torch.no_grad():  # cross entropy is convex, also where the softmax leaves nothing of its curvature
        model.head.fc.weight *= margin / (best.values[:, 0] - best.values[:, 1]).min()
        model.head.fc.bias *= margin / (best.values[:, 0] - best.values[:, 1]).min()
    report = prune(model, [(batch["x"], best.indices[:, 0])], HapConfig(prune_ratio=0.3, method=method, progress=False))
    assert report.after.params < report.before.params


def test_batch_norms_are_recalibrated_on_the_batches_by_default():
    pruned = timm.create_model("cifar_resnet20", num_classes=3)
    other = copy.deepcopy(pruned)
    prune(pruned, pairs(), HapConfig(prune_ratio=0.5, progress=False, reconstruct=False))
    prune(other, pairs(), HapConfig(prune_ratio=0.5, progress=False, reconstruct=False, recalibrate=False))
    assert not torch.equal(pruned.bn1.running_mean, other.bn1.running_mean)
    recalibrate_batch_norms_(other, [{"x": x} for x, _ in pairs()])
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in pruned.state_dict().items())


def test_batches_that_no_batch_norm_can_learn_from_leave_the_statistics_with_a_warning(caplog):
    class Pooled(nn.Sequential):
        def forward(self, x):
            return super().forward(x.mean((2, 3)))

    model = Pooled(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).eval()
    single = [(images(1), torch.tensor([1]))]
    report = prune(model, single, HALF)
    assert report.after.params < report.before.params
    assert "batch norms keep the statistics from before pruning" in caplog.text
    assert not model[3].running_mean.any()


def test_a_wrapped_timm_model_is_saved_loaded_and_pruned_again(tmp_path):
    model = wrapper().eval()
    for number in (1, 2):
        prune(model, batches(), HapConfig(prune_ratio=0.3, implant_ratio=0.5, progress=False))
        model.save_pretrained(tmp_path / str(number))
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / str(number))
        assert torch.equal(loaded(images()).logits, model(images()).logits)
        assert sum(isinstance(m, ImplantConv2d) for m in loaded.modules()) > 0
        model = loaded
    assert len(recorded_plan(model).stages) == 2


def test_channels_are_pruned_inside_the_trainer(tmp_path):
    data = [{"pixel_values": x, "labels": int(y)} for xs, ys in pairs(3) for x, y in zip(xs, ys, strict=True)]
    args = transformers.TrainingArguments(
        tmp_path, max_steps=6, per_device_train_batch_size=8, report_to=[], use_cpu=True, save_strategy="no",
        optim="sgd", learning_rate=0.05,
    )  # fmt: skip
    pruner = HessianPruner(HapConfig(prune_ratio=0.5, progress=False), step=3)
    trainer = transformers.Trainer(wrapper(), args, train_dataset=data, callbacks=[pruner])
    trainer.train()
    (report,) = pruner.reports
    assert report.after.params == sum(p.numel() for p in trainer.model.parameters()) < report.before.params
    trainer.save_model(tmp_path / "smaller")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "smaller")
    trainer.model.eval()
    assert torch.equal(loaded(images()).logits, trainer.model(images()).logits)


@pytest.mark.fast
def test_a_pruned_timm_model_is_wrapped_and_saved(tmp_path):
    model = timm.create_model("cifar_resnet20", num_classes=3).eval()
    first = prune(model, pairs(), HALF).plan
    second = prune(model, pairs(), HALF).plan
    wrapped = wrap_timm(model, first.then(second))
    wrapped.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images()).logits, model(images()))


def test_settings_of_the_architecture_are_kept(tmp_path):
    model = timm.create_model("cifar_resnet20", num_classes=3, in_chans=1).eval()
    wrapped = wrap_timm(model, in_chans=1)
    wrapped.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images()[:, :1]).logits, model(images()[:, :1]))


def test_what_timm_would_not_build_is_not_wrapped():
    model = timm.create_model("cifar_resnet20", num_classes=3, in_chans=1)
    with pytest.raises(UnsupportedModelError, match=r"is another model: 1 tensors differ, as conv1.weight"):
        wrap_timm(model)
    with pytest.raises(UnsupportedModelError, match=r"timm builds no 'cifar_resnet21' with"):
        wrap_timm(model, architecture="cifar_resnet21")
    with pytest.raises(UnsupportedModelError, match=r"expected a timm classifier .* got a Linear"):
        wrap_timm(nn.Linear(2, 2))
    prune(model, [(x[:, :1], y) for x, y in pairs()], HALF)
    with pytest.raises(UnsupportedModelError, match=r"pruned by no plan, is another model"):
        wrap_timm(model, in_chans=1)


def test_images_of_another_size_than_the_model_takes_are_an_error_that_changes_nothing():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, depth=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BatchError, match=r"does not run on the first batch, .*\[8, 3, 16, 16\].*height \(16\)"):
        prune(model, pairs(size=16), HALF)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all("forward" not in vars(m) for m in model.modules())


def test_images_in_place_of_batches_are_an_error_and_without_labels_none():
    model = timm.create_model("cifar_resnet20", num_classes=3)
    with pytest.raises(
        BatchError, match=r"expected several batches, got one tensor of shape \[8, 3, .*put it in a list"
    ):
        prune(model, images(), HALF)
    report = prune(model, [images()], HALF)
    assert report.after.macs < 0.7 * report.before.macs


def test_every_layer_of_a_network_with_padding_shortcuts_is_prunable():
    model = timm.create_model("cifar_resnet20", num_classes=3).eval()
    groups = find_groups(model, {"x": images(2)})
    cut = {s.tensor for g in groups for s in g.slices}
    assert {n for n, p in model.named_parameters() if p.dim() > 1} <= cut
    assert [sum(g.num_units for g in groups if "conv2" in g.name)] == [2 * 8 + 2 * 16]


def test_control_flow_that_depends_on_the_data_is_no_obstacle():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            x = torch.relu(self.first(x))
            if x.sum().item() > 0:
                x = self.last(x)
            return self.fc(x[:, :4].mean((2, 3)))

    groups = find_groups(randomise_(Branching()).eval(), {"x": images(2)})
    assert [g.num_units for g in groups] == [6, 4]


def test_a_plan_that_lowers_the_groups_of_a_layer_it_does_not_cut_is_refused():
    model, batch = net("grouped")
    group = next(g for g in find_groups(model, batch) if g.name == "last:channels")
    changed = copy.copy(group)
    object.__setattr__(changed, "counters", (*group.counters, Counter("first.groups", 1)))
    with pytest.raises(PlanMismatchError, match=r"first\.groups: expected an integer attribute"):
        apply_plan_(model, plan_of({changed: [1]}))


def test_dropout_and_stochastic_depth_in_train_mode_do_not_matter():
    torch.manual_seed(0)
    model = timm.create_model("test_byobnet", num_classes=3, drop_rate=0.5, drop_path_rate=0.5).train()
    x = images(2, size=32)
    found = [find_groups(model, {"x": x}) for _ in range(2)]
    assert found[0] == found[1]
    assert model.training


def test_synchronised_batch_norms_are_pruned():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(timm.create_model("cifar_resnet20", num_classes=3)).eval()
    report = prune(model, pairs(), HALF)
    assert report.after.params < report.before.params
    assert model(images()).shape == (8, 3)


def test_a_plan_with_torn_channels_is_refused():
    model, batch = net("chain")
    (group, _) = find_groups(model, batch)
    for torn in ("1.running_var", "1.weight", "0.bias"):
        slices = tuple(s for s in group.slices if s.tensor != torn)
        cut = copy.copy(group)
        object.__setattr__(cut, "slices", slices)
        with pytest.raises(PlanMismatchError, match="would lose different"):
            apply_plan_(model, plan_of({cut: [1]}))


def test_a_plan_that_leaves_the_groups_of_a_grouped_convolution_is_refused():
    model, batch = net("grouped")
    group = find_groups(model, batch)[0]
    cut = copy.copy(group)
    object.__setattr__(cut, "counters", ())
    with pytest.raises(PlanMismatchError, match="whole groups of channels must go, and groups with them"):
        apply_plan_(model, plan_of({cut: [1]}))


def test_an_implant_of_a_grouped_or_pointwise_convolution_is_refused():
    model, batch = net()
    group = next(g for g in find_groups(model, batch) if g.name == "down:channels")
    plan = PruningPlan(((GroupPlan(group, "i" + "k" * 8, {"down.weight": 1}),),))
    with pytest.raises(PlanMismatchError, match=r"down.weight: .*(can take no implant|must be cheaper)"):
        apply_plan_(model, plan)


def test_only_channels_can_be_asked_for():
    model, batch = net("normed")
    with pytest.raises(ConfigError, match=r"no groups of the kinds \['channels'\]"):
        prune(model.float(), [{"x": batch["x"].float(), "labels": torch.arange(8) % 3}],
              HapConfig(prune_ratio=0.5, kinds="channels", method="magnitude"))  # fmt: skip
