"""Gauss-Newton trace and rest in half precision, and losses that cannot be split like this."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from scored_models import BATCH, FFN, config, net, score
from torch import Tensor, nn

from hap_hf.curvature import LinearisedLosses, estimate_traces, rademacher
from hap_hf.errors import CurvatureError, UnsupportedModelError

HALF = {"x": BATCH["x"].float(), "labels": BATCH["labels"]}
NAME = "net:ffn"


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 8e-2), ("fp16", 1e-2)])
def test_autocast_agrees_with_float64_to_the_precision_of_its_dtype(precision: str, tolerance: float) -> None:
    truth = score(net(), [FFN], [BATCH], config(method="hessian_split")).sensitivity[NAME]
    found = score(net().float(), [FFN], [HALF], config(method="hessian_split", precision=precision)).sensitivity[NAME]
    assert (found - truth).norm() < tolerance * truth.norm()


def remainder(factor: float, scale: float) -> Tensor:
    """Return the trace of the rest under float16 autocast, of the loss times a factor, divided by it again."""
    model = net().float()
    tensors = {"up.weight": model.up.weight, "down.weight": model.down.weight}

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return factor * model(**HALF).loss

    losses = LinearisedLosses(model, [(loss, 6)], tensors, scale)
    reduce: Callable[..., Tensor] = lambda v: v["up.weight"].sum(1)  # ruff: ignore[lambda-assignment]
    probes = partial(rademacher, tensors, 0)
    return estimate_traces(losses, tensors, reduce, probes, num_probes=8, loss_scale=scale).trace / factor


def test_the_loss_scale_saves_slopes_that_float16_would_lose() -> None:
    truth, tiny = remainder(1.0, 1.0), 2.0**-20
    assert (remainder(tiny, 2.0**16) - truth).norm() < 1e-2 * truth.norm()
    assert (remainder(tiny, 1.0) - truth).norm() > 0.1 * truth.norm()


def test_a_loss_scale_under_which_slopes_overflow_is_lowered() -> None:
    truth = remainder(1.0, 1.0)
    assert (remainder(2.0**6, 2.0**16) - truth).norm() < 1e-2 * truth.norm()


def test_a_loss_that_weights_reach_past_the_outputs_is_an_error() -> None:
    with pytest.raises(UnsupportedModelError, match=r"computed from the model's outputs alone, .* up.weight reaches"):
        score(
            net(),
            [FFN],
            [BATCH],
            config(method="hessian_split"),
            loss_fn=lambda model, b: model(**b).loss + model.up.weight.square().sum(),
        )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda z: z.sum() * float("nan"), "batch 1: expected a finite loss, got nan"),
        (lambda z: (z - z.detach()).abs().sqrt().sum(), "batch 1: expected finite gradients of the model's outputs"),
    ],
)
def test_what_is_not_finite_is_an_error_with_the_batch(spoil: Callable[[Tensor], Tensor], message: str) -> None:
    model = nn.Linear(3, 2).double()
    losses = [(lambda: model(BATCH["x"]).square().sum(), 6), (lambda: spoil(model(BATCH["x"])), 6)]
    first, second = (linearised for linearised, _ in LinearisedLosses(model, losses, {"weight": model.weight}))
    first()
    with pytest.raises(CurvatureError, match=message):
        second()
