"""Losses of every kind, batches of every form and models that draw random numbers: pruned, or refused at the door."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from documented import bert, text_batches, texts
from torch import Tensor, nn
from torch.nn import functional as F

from hap_hf import (
    CurvatureError,
    HapConfig,
    HessianPruner,
    carry_out_,
    decide,
    decide_again,
    find_groups,
    prune,
    score_groups,
)

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 3, 8, 8, generator=GENERATOR)
MASKS = torch.randint(0, 4, (6, 8, 8), generator=GENERATOR)


class Net(nn.Module):
    """Three convolutions and an answer at each position."""

    def __init__(self, *, last: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = last
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return maps, with classes in the second dimension or in the last one."""
        z = self.c(self.b(self.a(x).relu()).relu())
        return z.permute(0, 2, 3, 1) if self.last else z


def pooled(model: nn.Module, x: Tensor) -> Tensor:
    return F.normalize(model(x).mean((2, 3)), dim=-1)


def resized(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(F.interpolate(model(batch["x"]), (16, 16), mode="bilinear"), batch["m"].repeat(1, 2, 2))


def dice(model: nn.Module, batch: Any) -> Tensor:
    p, t = model(batch["x"]).sigmoid(), (batch["m"][:, None] == torch.arange(4)[:, None, None]).float()
    return 1 - 2 * (p * t).sum() / (p + t).sum()


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    e = pooled(model, batch["x"])
    return F.cross_entropy(10 * e @ e.T, torch.arange(len(e)).flip(0))


def triplet(model: nn.Module, batch: Any) -> Tensor:
    e = pooled(model, batch["x"])
    return F.triplet_margin_loss(e[::3], e[1::3], e[2::3])


def ctc(model: nn.Module, batch: Any) -> Tensor:
    scores = model(batch["x"]).mean(3).permute(2, 0, 1).log_softmax(-1)
    size = scores.shape[1]
    return F.ctc_loss(scores, torch.ones(size, 2, dtype=torch.long), [8] * size, [2] * size, blank=0, reduction="sum")


def likelihood(model: nn.Module, batch: Any) -> Tensor:
    mean, width = model(batch["x"]).mean((2, 3)).chunk(2, 1)
    return -torch.distributions.Normal(mean, F.softplus(width) + 0.1).log_prob(torch.ones_like(mean)).mean()


LOSSES = [resized, dice, contrastive, triplet, ctc, likelihood]


def config(**settings: Any) -> HapConfig:
    return HapConfig(**{"target_params": 0.6, "progress": False, **settings})


@pytest.mark.parametrize("loss", LOSSES)
def test_the_default_prunes_with_any_loss_and_says_what_stands_in(loss: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = Net(), {"x": X, "m": MASKS}
    with caplog.at_level(logging.WARNING, logger="hap_hf"):
        decision = decide(config().evidence(model, [batch, batch], loss_fn=loss), config())
        report = carry_out_(model, decision)
    assert report.after.params < report.before.params
    assert caplog.text.count("scored by squared gradients (mask_fisher) and compensated by gradients, without") == 1
    used = decision.config
    assert (used.criterion.name, used.passes, used.compensates, used.per is not None) == ("mask_fisher", 2, True, True)
    assert loss(model, batch).isfinite()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", ["taylor", "mask_fisher", "hessian"])
def test_other_criteria_take_it_or_name_one_that_does(loss: Any, method: Any) -> None:
    batches = [{"x": X, "m": MASKS}]
    if (method, loss) == ("hessian", ctc):
        with pytest.raises(CurvatureError, match=r"use method='mask_fisher', .* or set hvp='finite_difference'"):
            prune(Net(), batches, config(method=method), loss_fn=loss)
        method = {"name": "hessian", "hvp": "finite_difference"}
    assert prune(Net(), batches, config(method=method), loss_fn=loss).after.params


def test_a_stand_in_can_be_asked_for_another_amount() -> None:
    settings = config()
    decision = decide(settings.evidence(Net(), [{"x": X}], loss_fn=contrastive), settings)
    gentler = decide_again(decision, config(target_params=0.8))
    assert gentler.expected.after.params > decision.expected.after.params


@pytest.mark.parametrize("method", ["mask_ggn", "ggn"])
def test_classes_may_lie_in_the_second_dimension(method: str) -> None:
    """The same numbers as with classes last, exactly: every sign in turn."""
    settings = config(method={"name": method, "num_output_probes": None})
    found = []
    for last in (False, True):
        model = Net(last=last).double()
        batch = {"x": X[:2, :, :4, :3].double(), "labels": MASKS[:2, :4, :3]}
        groups = find_groups(model, batch)
        found.append(score_groups(settings.evidence(model, [batch]), groups, settings).sensitivity)
    for name, x in found[0].items():
        torch.testing.assert_close(x, found[1][name], rtol=1e-9, atol=1e-15)


def detector() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    sizes = {"image_size": [16, 16], "patch_size": 8, "num_detection_tokens": 3, "num_labels": 3}
    return hf.YolosForObjectDetection(hf.YolosConfig(**shape, **sizes)).eval()


def images(number: int) -> dict[str, Any]:
    boxes = torch.rand(number, 2, 4, generator=GENERATOR) * 0.4 + 0.2
    targets = [
        {"class_labels": torch.tensor([i % 3] * (1 + i % 2)), "boxes": boxes[i, : 1 + i % 2]} for i in range(number)
    ]
    return {"pixel_values": torch.randn(number, 3, 16, 16, generator=GENERATOR), "labels": targets}


@pytest.mark.parametrize("size", [4, 2, 1])
@pytest.mark.parametrize("method", ["mask_ggn", "taylor", "hessian"])
def test_detectors_prune_at_every_batch_size(size: int, method: str) -> None:
    pytest.importorskip("scipy")
    method = {"name": method, "num_probes": 2} if method == "hessian" else method
    report = prune(detector(), [images(size), images(size)], config(method=method))
    assert report.after.params < report.before.params


class Chance(Net):
    """Draws numbers in eval mode."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        """Return maps with noise of the size of the answer."""
        return super().forward(x) * (0.5 + self.source(x))


@pytest.mark.parametrize(
    "source",
    [lambda x: torch.rand(len(x), 1, 1, 1, dtype=x.dtype), lambda x: float(np.random.rand())],  # noqa: NPY002
    ids=["torch", "numpy"],
)
def test_models_that_draw_random_numbers_are_looked_at_with_the_same_ones(source: Any) -> None:
    model, plain = Chance(source), Net()
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert [g.num_units for g in find_groups(model, {"x": X})] == [g.num_units for g in find_groups(plain, {"x": X})]
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == legacy).all()  # noqa: NPY002
    report = prune(model, [(X, MASKS)], config())
    assert report.after.params < report.before.params


@pytest.mark.parametrize("hook", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_a_hook_makes_anew_stay_whole_and_the_rest_is_pruned(hook: Any) -> None:
    torch.manual_seed(0)
    hooked = hook(nn.Conv2d(6, 4, 1))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), hooked).eval()
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, model(X)
    (group,) = find_groups(model, {"input": X})
    assert {s.tensor for s in group.slices} == {"0.weight", "0.bias", "2.weight"}
    assert torch.equal(model(X), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Torn(Net):
    """Writes in place where gradients need what was there."""

    def forward(self, x: Tensor) -> Tensor:
        """Return maps."""
        z = self.a(x).exp()
        z2 = z.square()
        z.mul_(0.5)
        return self.c(self.b(z2))


def test_what_autograd_refuses_is_an_error_that_names_the_model() -> None:
    with pytest.raises(CurvatureError, match=r"the loss of Torn cannot be differentiated: .* inplace operation"):
        prune(Torn(), [(X, MASKS)], config())


class Sizes(Net):
    """Takes a list of images of several sizes, and a list of targets."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Return logits, or the loss."""
        logits = torch.stack([super(Sizes, self).forward(image[None]).mean((0, 2, 3)) for image in images])
        if targets is None:
            return logits
        return {"loss": F.cross_entropy(logits, torch.stack([t["class"] for t in targets])), "logits": logits}


SIZES = [torch.randn(3, 6 + i, 5, generator=GENERATOR) for i in range(4)]
TARGETS = [{"class": torch.tensor(i % 3)} for i in range(4)]


@pytest.mark.parametrize(
    ("batch", "loss"),
    [
        ({"images": SIZES, "targets": TARGETS}, None),
        ((SIZES, torch.tensor([0, 1, 2, 0])), None),
        ((tuple(SIZES), tuple(TARGETS)), lambda m, b: m(list(b[0]), list(b[1]))["loss"]),
        (
            [{"i": i, "t": t} for i, t in zip(SIZES, TARGETS, strict=True)],
            lambda m, b: m([s["i"] for s in b], [s["t"] for s in b])["loss"],
        ),
    ],
    ids=["mapping", "pair", "tuples", "list_of_samples"],
)
def test_images_of_several_sizes_give_one_set_of_scores_whatever_the_form(batch: Any, loss: Any) -> None:
    settings = config(method="mask_fisher")
    model = Sizes()
    plain = find_groups(model, {"images": SIZES})
    scores = score_groups(settings.evidence(model, [batch], loss_fn=loss), plain, settings)
    expected = torch.zeros(8)
    (group, *_) = plain
    reader = next(s.tensor for s in group.slices if s.role.value == "consumer")
    for image, target in zip(SIZES, TARGETS, strict=True):
        weight = model.get_parameter(reader)
        (gradient,) = torch.autograd.grad(model([image], [target])["loss"], weight)
        expected += (gradient * weight).sum((0, 2, 3)).square() / 2 / 4
    torch.testing.assert_close(scores.sensitivity[group.name].float(), expected.detach(), rtol=1e-4, atol=1e-9)
    assert prune(model, [batch, batch], config(), loss_fn=loss).after.params


def test_the_backbone_of_a_pruned_classifier_loads(tmp_path: Any) -> None:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": 3}
    model = hf.ResNetForImageClassification(hf.ResNetConfig(**sizes)).eval()
    pixels = torch.randn(4, 3, 32, 32, generator=GENERATOR)
    prune(model, [{"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 1])}], config(target_params=0.5))
    assert model.classifier[1].in_features < 12
    model.save_pretrained(tmp_path / "whole")
    backbone = hf.AutoModel.from_pretrained(tmp_path / "whole").eval()
    expected = model.eval().resnet(pixels).last_hidden_state
    torch.testing.assert_close(backbone(pixels).last_hidden_state, expected, rtol=0, atol=0)
    backbone.save_pretrained(tmp_path / "backbone")
    again = hf.AutoModel.from_pretrained(tmp_path / "backbone").eval()
    torch.testing.assert_close(again(pixels).last_hidden_state, expected, rtol=0, atol=0)
    whole = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(whole(pixels).logits, model(pixels).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "loss", "message"),
    [
        ({"method": "ggn"}, lambda m, b: m(**b).logits.mean(), "got one that is linear in them"),
        ({}, lambda m, b: m(b["x"]).loss, "loss_fn failed on batch 0"),
        ({"exclude": "*nowhere*"}, None, "match no group"),
    ],
    ids=["no_curvature", "failing", "settings"],
)
def test_a_later_round_is_refused_before_the_first_step(settings: Any, loss: Any, message: str, tmp_path: Any) -> None:
    args = hf.TrainingArguments(str(tmp_path), max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True)
    pruner = HessianPruner(config(**settings), step=2, loss_fn=loss)
    trainer = hf.Trainer(bert(num_hidden_layers=1), args, train_dataset=texts(16), callbacks=[pruner])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_batches_that_can_be_drawn_once_serve_the_look_and_the_round(tmp_path: Any) -> None:
    args = hf.TrainingArguments(str(tmp_path), max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True)
    pruner = HessianPruner(config(), step=1, batches=iter(text_batches()))
    hf.Trainer(bert(num_hidden_layers=1), args, train_dataset=texts(16), callbacks=[pruner]).train()
    assert len(pruner.reports) == 1
