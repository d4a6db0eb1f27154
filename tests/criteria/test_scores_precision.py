"""Half precision: close to full precision, never scaled, and recovering from overflow."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from scored_models import BATCH, FFN, config, net, score
from torch import Tensor, nn

from hap_hf.criteria import UnitWeights
from hap_hf.curvature import TraceEstimate, estimate_traces, hutchinson, rademacher
from hap_hf.errors import CurvatureError
from hap_hf.evidence.losses import batch_losses
from hap_hf.evidence.precision import Precision

HALF = {"x": BATCH["x"].float(), "labels": BATCH["labels"]}
TOLERANCE = {"fp32": 1e-5, "bf16": 8e-2, "fp16": 1e-2}  # a few units in the last place of 8 and 11 bits


def times(factor: float) -> Any:
    """Return the model's loss times a factor."""

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return factor * model(**batch).loss

    return loss


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Return the error as a share of the truth, over all units."""
    return ((result - truth).norm() / truth.norm()).item()


def truth() -> Tensor:
    """Return the sensitivities in float64, with the probes of every test here."""
    return score(net(), [FFN], [BATCH], config()).sensitivity["net:ffn"]


@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_autocast_agrees_with_float64_to_the_precision_of_its_dtype(precision: str) -> None:
    scores = score(net().float(), [FFN], [HALF], config(precision=precision))
    assert relative_error(scores.sensitivity["net:ffn"], truth()) < TOLERANCE[precision]


@pytest.mark.parametrize(("precision", "at_least"), [("bf16", 1e-5), ("fp16", 1e-6)])
def test_autocast_really_computes_in_half_precision(precision: str, at_least: float) -> None:
    dtypes: set[torch.dtype] = set()

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        output = model(**batch)
        dtypes.add(output.logits.dtype)
        return output.loss

    scores = score(net().float(), [FFN], [HALF], config(precision=precision), loss_fn=loss)
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert relative_error(scores.sensitivity["net:ffn"], truth()) > at_least


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.12), (torch.float16, 1e-2)])
def test_models_stored_in_any_dtype_are_scored(dtype: torch.dtype, tolerance: float) -> None:
    batch = {"x": BATCH["x"].to(dtype), "labels": BATCH["labels"]}
    scores = score(net().to(dtype), [FFN], [batch], config())
    assert relative_error(scores.sensitivity["net:ffn"], truth()) < tolerance


def traces(loss_scale: float, factor: float = 1.0) -> TraceEstimate:
    """Estimate under float16 autocast from a given loss scale on."""
    model = net().float()
    units = UnitWeights.of(model, [FFN])
    return estimate_traces(
        batch_losses(model, [HALF], times(factor), Precision.FP16),
        units.tensors,
        lambda products: units.totals(units.marginals(products)),
        partial(rademacher, units.tensors, 0),
        num_probes=8,
        loss_scale=loss_scale,
    )


@pytest.mark.parametrize("scale", [2.0**4, 2.0**8, 2.0**12])
def test_results_do_not_depend_on_the_loss_scale(scale: float) -> None:
    assert relative_error(traces(scale).trace, traces(1.0).trace) < 1e-2


def test_every_probe_weighs_the_same_under_a_loss_scale() -> None:
    scaled, plain = traces(2.0**12).standard_error, traces(1.0).standard_error
    assert relative_error(scaled, plain) < 1e-2  # a scale that changed from probe to probe would spread the samples


def test_the_loss_scale_saves_gradients_that_float16_would_lose() -> None:
    reference = traces(1.0).trace
    tiny = 2.0**-20
    assert relative_error(traces(2.0**16, tiny).trace / tiny, reference) < 1e-2
    assert relative_error(traces(1.0, tiny).trace / tiny, reference) > 0.1


def test_an_overflow_lowers_the_scale_for_good_and_computes_the_loss_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def large(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        calls.append(1)
        return 2.0**10 * model(**batch).loss

    full = score(net(), [FFN], [BATCH] * 2, config(), loss_fn=large)
    calls.clear()
    scales: list[float] = []
    original = hutchinson.differentiable_gradient

    def watching(loss: Tensor, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        scales.append(scale)
        return original(loss, tensors, scale)

    monkeypatch.setattr(hutchinson, "differentiable_gradient", watching)
    scores = score(net().float(), [FFN], [HALF] * 2, config(precision="fp16"), loss_fn=large)
    assert len(calls) == 2
    assert scales[:2] == [2.0**16, 2.0**14]
    assert scales[-1] == scales[-2] < 2.0**16  # the second batch starts where the first one ended
    assert relative_error(scores.sensitivity["net:ffn"], full.sensitivity["net:ffn"]) < 1e-2


def test_an_overflow_without_any_scale_is_an_error() -> None:
    with pytest.raises(CurvatureError, match=r"batch 0: expected finite second derivatives, .* score in fp32"):
        score(net().float(), [FFN], [HALF], config(precision="fp16"), loss_fn=times(1e7))


def test_the_callers_autocast_does_not_reach_in() -> None:
    plain = score(net().float(), [FFN], [HALF], config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = score(net().float(), [FFN], [HALF], config())
    assert torch.equal(inside.sensitivity["net:ffn"], plain.sensitivity["net:ffn"])
