"""What compensation does to a model and its optimizer."""

import copy
from collections.abc import Iterable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from cases import batch_of, build
from channel_nets import Chain, Head, Residual, conv
from compensations import TEXT, evidence_of, make_up_for_, measured
from plans import plan_of
from reference import logits
from scored_models import bert, config, net, snapshot, text_batch
from torch import Tensor, nn

import hap_hf.cut
from hap_hf import BatchError, Compensation, apply_plan_, find_groups, make_plan, prune
from hap_hf.compensation.fit import fit_removed
from hap_hf.model.masking import masked
from hap_hf.model.values import replace_values_
from hap_hf.names.actions import PRUNE
from hap_hf.names.group import Group, Kind, Role, Slice
from hap_hf.selection import score_in_passes


def every_third(groups: Iterable[Group]) -> dict[Group, list[int]]:
    return {g: list(range(0, g.num_units, 3)) for g in groups}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_pruned_and_compensated_is_silenced_and_compensated(family: str) -> None:
    model, batch = build(family), batch_of(family)
    groups = find_groups(model, batch)
    removed = every_third(groups)
    compensation = measured(model, groups, batch)
    with compensation.applied(removed.items()):
        expected = logits(model, batch)
    with masked(model, removed.items()):
        assert not torch.allclose(logits(model, batch), expected)
    plan = plan_of(removed)
    make_up_for_(compensation, plan)
    apply_plan_(model, plan)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-9, atol=1e-11)


def test_new_weights_do_what_predicted_inputs_would_do() -> None:
    model = bert().eval()
    groups = [g for g in find_groups(model, TEXT) if g.kind is Kind.FFN][:1]
    gone = list(range(0, 24, 2))
    compensation = measured(model, groups)
    (path,) = compensation.moments
    layer = model.get_submodule(path)
    (fit,) = fit_removed(compensation.moments[path], torch.tensor(gone), layer.weight, constant=True)
    assert fit is not None

    def predicted(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        x = args[0].clone()
        x[..., gone] = 0
        return (
            nn.functional.linear(x, module.weight, module.bias) + args[0][..., fit.kept] @ fit.weights.T + fit.constants
        )

    handle = layer.register_forward_hook(predicted)
    expected = logits(model, TEXT)
    handle.remove()
    with compensation.applied([(groups[0], gone)]):
        torch.testing.assert_close(logits(model, TEXT), expected, rtol=1e-9, atol=1e-11)


def test_twins_of_what_stays_go_without_a_trace() -> None:
    model = net()
    model.up, model.down = nn.Linear(3, 6).double(), nn.Linear(6, 2).double()
    with torch.no_grad():
        model.up.weight[4:], model.up.bias[4:] = model.up.weight[:2], model.up.bias[:2]
    slices = (
        Slice("up.weight", (6, 3), 0, 0, 1, Role.PRODUCER),
        Slice("up.bias", (6,), 0, 0, 1, Role.ALIGNED),
        Slice("down.weight", (2, 6), 1, 0, 1, Role.CONSUMER),
    )
    group = Group("net:ffn", Kind.FFN, 6, slices)
    x = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    batch = {"x": x, "labels": (x[:, 0] > 0).long()}
    dense = logits(model, batch)
    plan = plan_of({group: [4, 5]})
    cut = copy.deepcopy(model)
    apply_plan_(cut, plan)
    make_up_for_(measured(model, [group], batch), plan)
    apply_plan_(model, plan)
    lost, left = ((logits(m, batch) - dense).square().mean() for m in (cut, model))
    assert left < 1e-6 * lost


def test_inside_and_afterwards_the_model_keeps_its_own_parameters() -> None:
    model = bert().eval()
    groups = find_groups(model, TEXT)
    compensation = measured(model, groups)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="stop"), compensation.applied(every_third(groups).items()):
        raise RuntimeError("stop")
    assert snapshot(model) == before


def test_values_are_those_of_the_whole_model_whatever_was_asked_before() -> None:
    model = bert().eval()
    groups = find_groups(model, TEXT)
    compensation = measured(model, groups)
    gone = every_third(groups).items()
    alone = compensation.values(gone)
    with compensation.applied([(g, [0]) for g in groups]):
        pass
    assert all(torch.equal(v, alone[n]) for n, v in compensation.values(gone).items())


def test_weights_shared_with_other_layers_are_left_alone() -> None:
    model = bert().eval()
    groups = find_groups(model, TEXT)
    first, second = (model.bert.encoder.layer[i].output.dense for i in (0, 1))
    second.weight = first.weight
    assert [r.path for r in measured(model, groups).readers] == [
        f"bert.encoder.layer.{i}.attention.output.dense" for i in (0, 1)
    ]


def test_prune_compensates_by_default_with_mask_ggn_and_only_then() -> None:
    batches = [text_batch(rows=6, labels=torch.tensor(y)) for y in ([0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 1, 0])]
    settings = config(prune_ratio=0.4, method="mask_ggn", num_passes=2, reconstruct=False)
    by_hand = bert().eval()
    groups = find_groups(by_hand, batches[0])
    assert settings.compensates
    assert not config(method="hessian").compensates
    assert config(method="hessian", compensate=True).compensates
    evidence = settings.evidence(by_hand, batches)
    compensation = Compensation.measure(evidence, groups)
    scores = score_in_passes(evidence, groups, settings, compensation=compensation)
    plan = make_plan(groups, scores, settings)
    replace_values_(by_hand, compensation.best_values(plan.stages[0], evidence))
    apply_plan_(by_hand, plan)
    model, plain = bert().eval(), bert().eval()
    report = prune(model, batches, settings)
    assert set(report.seconds) > {"repair"}
    assert torch.equal(logits(model, TEXT), logits(by_hand, TEXT))
    report = prune(plain, batches, config(prune_ratio=0.4, method="mask_ggn", num_passes=2, compensate=False))
    assert not {"measuring", "repair"} & set(report.seconds)
    assert not torch.allclose(logits(model, TEXT), logits(plain, TEXT))


def test_of_several_regularisations_the_one_with_the_least_loss_is_taken() -> None:
    model = bert().eval()
    groups = find_groups(model, TEXT)
    compensation = measured(model, groups)
    removed = every_third(groups)

    def loss(weights: dict[str, Tensor]) -> float:
        with masked(model, removed.items()), torch.no_grad():
            return float(torch.func.functional_call(model, weights, kwargs=TEXT).loss)

    choices = [{}, *compensation._values_by_floor(list(removed.items()), [10.0, 1.0, 0.0])]
    losses = [loss(values) for values in choices]
    assert len(set(losses)) == 4
    best = choices[losses.index(min(losses))]
    before = snapshot(model)
    values = compensation.best_values(plan_of(removed).stages[0], evidence_of(model, iter([TEXT])))
    assert values.keys() == best.keys()
    assert all(torch.equal(values[name], value) for name, value in best.items())
    assert snapshot(model) == before


def test_compensation_that_makes_the_model_worse_is_not_done() -> None:
    model = bert().eval()
    groups = find_groups(model, TEXT)
    plan = plan_of(every_third(groups))
    before = snapshot(model)
    with masked(model, [(g.group, g.units(PRUNE)) for g in plan]):
        cut = logits(model, TEXT)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return (module(**batch).logits - cut).square().mean()

    assert measured(model, groups).best_values(plan.stages[0], evidence_of(model, loss_fn=loss)) == {}
    assert snapshot(model) == before


def test_batches_to_compare_losses_on_must_have_loss_terms() -> None:
    model = bert().eval()
    groups = find_groups(model, TEXT)
    compensation = measured(model, groups)
    before = snapshot(model)
    unlabelled = {**TEXT, "labels": torch.full((6,), -100)}
    with pytest.raises(BatchError, match="expected loss terms in the batches, got 1 with none"):
        compensation.best_values(plan_of(every_third(groups)).stages[0], evidence_of(model, [unlabelled]))
    assert snapshot(model) == before


def test_an_error_after_compensation_puts_the_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    before = snapshot(model)
    monkeypatch.setattr(hap_hf.cut, "apply_plan_", Mock(side_effect=RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        prune(model, [TEXT, TEXT], config(prune_ratio=0.3, method="mask_ggn"))
    assert snapshot(model) == before


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_measures_the_same_up_to_rounding(precision: str) -> None:
    model = bert().float().eval()
    groups = find_groups(model, TEXT)
    full, half = measured(model, groups).moments, measured(model, groups, precision=precision).moments
    for name, moment in full.items():
        assert half[name].dtype == torch.float32
        assert (half[name] - moment).norm() < 0.05 * moment.norm()


def test_models_in_half_precision_keep_their_dtype() -> None:
    model = bert().bfloat16().eval()
    prune(model, [TEXT, TEXT], config(prune_ratio=0.3, method="mask_ggn"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model, TEXT).isfinite().all()


def test_optimizer_state_stays_with_compensated_weights() -> None:
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(**TEXT).loss.backward()
    optimizer.step()
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    prune(model, [TEXT, TEXT], config(prune_ratio=0.3, method="mask_ggn"), optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert id(p) in held
        assert optimizer.state[p]["exp_avg"].shape == p.shape
        if p.shape == moments[name].shape:
            assert torch.equal(optimizer.state[p]["exp_avg"], moments[name])


X = torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
IMAGES = {"x": X, "labels": torch.arange(16) % 3}


def cross_entropy(module: nn.Module, inputs: Any) -> Tensor:
    return nn.functional.cross_entropy(module(inputs["x"]), inputs["labels"])


def assert_made_up_for(model: nn.Module) -> Compensation:
    """Check that a net without two channels of each group is nearer to the whole one with compensation, cut or not."""
    groups = find_groups(model, {"x": X})
    compensation = measured(model, groups, IMAGES, loss_fn=cross_entropy)
    gone = {g: [0, 2] for g in groups}
    dense = model(X)
    with masked(model, gone.items()):
        lost = (model(X) - dense).square().mean()
    with compensation.applied(gone.items()):
        compensated = model(X)
    assert (compensated - dense).square().mean() < lost
    plan = plan_of(gone)
    make_up_for_(compensation, plan)
    apply_plan_(model, plan)
    torch.testing.assert_close(model(X), compensated, rtol=1e-9, atol=1e-11)
    return compensation


@pytest.mark.parametrize("net_name", ["chain", "residual"])
def test_convolutions_are_compensated_tap_by_tap(net_name: str) -> None:
    torch.manual_seed(0)
    model = (
        Residual() if net_name == "residual" else Chain(conv(3, 8), nn.ReLU(True), conv(8, 6, 1), nn.GELU(), Head(6))
    )
    assert_made_up_for(model.double().eval())


def test_layers_with_implants_make_up_with_both_of_their_weights() -> None:
    torch.manual_seed(0)
    model = Chain(conv(3, 8), nn.ReLU(), conv(8, 9), nn.ReLU(), conv(9, 8), nn.ReLU(), Head(8)).double().eval()
    prune(model, [IMAGES], config(prune_ratio=0.5, implant_ratio=0.6, method="mask_ggn"), loss_fn=cross_entropy)
    compensation = assert_made_up_for(model)
    assert {len(reader.inputs) for reader in compensation.readers} == {1, 2}
