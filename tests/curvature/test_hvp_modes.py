"""Products with the Hessian by finite differences and by dual numbers, against double backward."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scored_models import BATCH, FFN, bert, config, heads, net, score, text_batch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hap_hf.criteria import Scores
from hap_hf.curvature import DoubleBackward, FiniteDifference, ForwardOverReverse, rademacher
from hap_hf.errors import ConfigError, CurvatureError, UnsupportedModelError
from hap_hf.model.state import preserved

NAME = "net:ffn"
OTHERS = ["finite_difference", "forward_over_reverse"]
METHODS = ["hessian", "hessian_split"]
HALF = {"x": BATCH["x"].float(), "labels": BATCH["labels"]}


def distance(one: Scores, other: Scores) -> float:
    """Return the relative difference of all sensitivities together."""
    a, b = (torch.cat(list(s.sensitivity.values())) for s in (one, other))
    return ((a - b).norm() / b.norm()).item()


def scored(model: nn.Module, batch: Mapping[str, Any] = BATCH, hvp: str = "double_backward", **settings: Any) -> Scores:
    """Return the scores of a net."""
    loss_fn = settings.pop("loss_fn", None)
    return score(model, [FFN], [batch], config(hvp=hvp, **settings), loss_fn=loss_fn)


def products(dtype: torch.dtype) -> dict[type, Tensor]:
    """Return a product with the Hessian of all matrices of a small BERT's encoder, in each way, in float64."""
    model = bert().to(dtype).eval()
    batch = text_batch(labels=torch.tensor([0, 1, 1]))
    tensors = {n: p for n, p in model.named_parameters() if "encoder" in n and p.dim() == 2}
    vector = rademacher(tensors, 0, 0, 0)
    result = {}
    with preserved(model, tensors):
        for kind, extra in ((DoubleBackward, {}), (FiniteDifference, {}), (ForwardOverReverse, {"model": model})):
            product = kind(0, lambda: model(**batch).loss, tensors, 1.0, **extra).product(vector)
            result[kind] = torch.cat([x.double().flatten() for x in product.values()])
    return result


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        (FiniteDifference, torch.float64, 1e-8),  # measured: 2e-10
        (FiniteDifference, torch.float32, 5e-4),  # measured: 1e-4
        (ForwardOverReverse, torch.float64, 1e-12),
        (ForwardOverReverse, torch.float32, 1e-5),
    ],
)
def test_products_on_a_bert_agree_with_double_backward_in_float64(
    kind: type, dtype: torch.dtype, tolerance: float
) -> None:
    truth = products(torch.float64)[DoubleBackward]
    found = products(dtype)[kind]
    assert (found - truth).norm() < tolerance * truth.norm()


@pytest.mark.parametrize("hvp", OTHERS)
@pytest.mark.parametrize("method", METHODS)
def test_scores_of_a_bert_agree_with_those_by_double_backward(method: str, hvp: str) -> None:
    batch = text_batch(labels=torch.tensor([0, 1, 1]))
    groups = [heads(0), heads(1)]
    exact, other = (
        score(bert(), groups, [batch], config(method=method, hvp=h, num_probes=3)) for h in ("double_backward", hvp)
    )
    assert distance(other, exact) < (1e-6 if hvp == "finite_difference" else 1e-12)


@pytest.mark.parametrize(("hvp", "a_product"), [("finite_difference", 2), ("forward_over_reverse", 1)])
def test_a_product_takes_one_or_two_passes_and_a_batch_one_more(hvp: str, a_product: int) -> None:
    calls: list[int] = []

    def counted(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        calls.append(1)
        return model(**batch).loss

    scored(net(), hvp=hvp, num_probes=5, loss_fn=counted)
    assert len(calls) == 1 + 5 * a_product


class OnlyOnce(torch.autograd.Function):
    """Tanh whose backward pass has no derivative, like that of a fused attention kernel."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        """Return the value."""
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        """Return the derivative."""
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


def fused() -> nn.Module:
    """Return the net with such a kernel, named as transformers names attention kernels that are not its own."""
    model = net()
    model.config = SimpleNamespace(_attn_implementation="flash_attention_2")

    def forward(x: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = model.down(OnlyOnce.apply(model.up(x)))
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))

    model.forward = forward
    return model


@pytest.mark.parametrize("method", METHODS)
def test_finite_differences_need_no_kernel_that_can_be_differentiated_twice(method: str) -> None:
    exact, other = scored(net(), method=method), scored(fused(), method=method, hvp="finite_difference")
    assert distance(other, exact) < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("hvp", ["double_backward", "forward_over_reverse"])
def test_the_other_ways_refuse_foreign_attention_and_name_the_one_that_works(hvp: str, method: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'flash_attention_2', .* or set hvp='finite_difference'"):
        scored(fused(), hvp=hvp, method=method)


@pytest.mark.parametrize(
    ("hvp", "message"),
    [
        ("double_backward", "batch 0: .* differentiable only once; .* or set hvp='finite_difference'"),
        (
            "forward_over_reverse",
            "batch 0: .* no forward-mode derivative: .* set hvp='double_backward' or 'finite_diff",
        ),
    ],
)
def test_a_function_that_has_only_a_gradient_is_an_error_and_not_a_lost_term(hvp: str, message: str) -> None:
    model = fused()
    model.config = None
    with pytest.raises(CurvatureError, match=message):
        scored(model, hvp=hvp)


def test_fused_attention_stays_on_for_finite_differences_alone() -> None:
    for hvp, expected in (("finite_difference", True), ("double_backward", False), ("forward_over_reverse", False)):
        allowed: list[bool] = []

        def loss(model: nn.Module, batch: Mapping[str, Any], allowed: list[bool] = allowed) -> Tensor:
            allowed.append(torch.backends.cuda.flash_sdp_enabled())
            return model(**batch).loss

        scored(net(), hvp=hvp, loss_fn=loss)
        assert set(allowed) == {expected}


class Checkpointed(nn.Module):
    """The net's first layer, which computes its activations again in the backward pass, as timm's models do."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.weight, self.grad_checkpointing, self.calls = inner, inner.weight, True, 0

    def forward(self, x: Tensor) -> Tensor:
        """Compute again under the flag."""
        return checkpoint(self._run, x, use_reentrant=False) if self.grad_checkpointing else self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


def test_finite_differences_keep_activations_checkpointed() -> None:
    model = net()
    exact = scored(net())
    model.up = Checkpointed(model.up)
    assert distance(scored(model, hvp="finite_difference", num_probes=8), exact) < 1e-6
    assert model.up.calls == 1 + 8 * 2 * 2  # a forward pass, and two passes a product with everything computed twice
    model.up.calls = 0
    assert distance(scored(model), exact) < 1e-12
    assert model.up.calls == 1


@pytest.mark.parametrize("hvp", OTHERS)
def test_gradient_checkpointing_of_transformers_does_not_matter(hvp: str) -> None:
    batch = text_batch(labels=torch.tensor([0, 1, 1]))
    plain, checkpointed = bert(), bert().train()
    for module in checkpointed.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    first, second = (score(m, [heads(0)], [batch], config(num_probes=2, hvp=hvp)) for m in (plain, checkpointed))
    assert distance(first, second) < 1e-12
    assert checkpointed.bert.encoder.layer[0].gradient_checkpointing


@pytest.mark.parametrize("hvp", OTHERS)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.2), ("fp16", 0.05)])
def test_weights_cast_by_autocast_are_cast_anew(hvp: str, precision: str, tolerance: float) -> None:
    # Casts of the weights from before would make every difference zero.
    found = scored(net().float(), HALF, hvp, precision=precision)
    assert distance(found, scored(net())) < tolerance


def test_an_overflow_lowers_the_loss_scale() -> None:
    def large(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return 2.0**10 * model(**batch).loss

    truth = scored(net(), loss_fn=large)
    for hvp in OTHERS:
        assert distance(scored(net().float(), HALF, hvp, precision="fp16", loss_fn=large), truth) < 0.05


def test_an_overflow_without_any_scale_is_an_error() -> None:
    for hvp in OTHERS:
        with pytest.raises(CurvatureError, match=r"batch 0: expected finite second derivatives, .* score in fp32"):
            scored(net().float(), HALF, hvp, precision="fp16", loss_fn=lambda m, b: 1e7 * m(**b).loss)


@pytest.mark.parametrize("hvp", OTHERS)
def test_tied_weights_move_together(hvp: str) -> None:
    def tied() -> nn.Module:
        model = net()
        model.other = nn.Linear(3, 4).double()
        model.other.weight = model.up.weight
        inner = model.forward
        model.forward = lambda x, labels: inner(x + model.other(x)[:, :3], labels)
        return model

    assert distance(scored(tied(), hvp=hvp), scored(tied())) < 1e-6


@pytest.mark.parametrize("hvp", OTHERS)
def test_a_weight_that_the_loss_ignores_has_no_curvature(hvp: str) -> None:
    tensors = {n: torch.randn(2, 2, dtype=torch.float64) for n in ("weight", "other")}
    model = nn.ParameterDict(tensors)
    parameters = dict(model.named_parameters())
    extra = {"model": model} if hvp == "forward_over_reverse" else {}
    kind: Any = ForwardOverReverse if extra else FiniteDifference
    product = kind(0, lambda: model["weight"].pow(2).sum(), parameters, 1.0, **extra).product(tensors)
    torch.testing.assert_close(product["weight"], 2 * tensors["weight"], rtol=1e-9, atol=0)
    assert torch.equal(product["other"], torch.zeros(2, 2, dtype=torch.float64))


def test_a_loss_of_other_weights_is_an_error() -> None:
    other = torch.ones(1, dtype=torch.float64, requires_grad=True)
    for hvp in OTHERS:
        with pytest.raises(CurvatureError, match=r"batch 0: expected a loss .* uses none of up.weight, down.weight"):
            scored(net(), hvp=hvp, loss_fn=lambda model, batch: other.sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hvp": "double"}, "hvp must be one of .*'finite_difference'.*, got 'double'"),
        ({"stop_share": 0}, r"stop_share must lie in \(0, 1\), got 0"),
        ({"stop_share": 1.0}, r"stop_share must lie in \(0, 1\), got 1.0"),
        ({"stop_share": "5%"}, r"stop_share must be a number in \(0, 1\), got '5%'"),
    ],
)
def test_settings_out_of_range_are_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)
