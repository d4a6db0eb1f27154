"""The Hessian trace as that of the Gauss-Newton matrix and of the rest, against dense matrices."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from ggn_models import CASES, X
from reference_curvature import dense_hessian, hadamard, split_like
from reference_ggn import dense_ggn
from scored_models import BATCH, FFN, bert, config, heads, net, score, text_batch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import BertForTokenClassification

from hap_hf.criteria import Scores, hessian_split
from hap_hf.curvature import LinearisedLosses, differentiable_gradient, estimate_traces, hvp, rademacher
from hap_hf.evidence import evidence
from hap_hf.model.state import preserved
from hap_hf.names.group import Group, Kind, Role, Slice

NAME = "net:ffn"


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Make the 20 weights of the net's neurons see Hadamard probes; return the settings that make both traces exact."""
    matrix = hadamard(32)
    monkeypatch.setattr(evidence, "rademacher", lambda tensors, seed, batch, probe: split_like(matrix[probe], tensors))
    return {"method": "hessian_split", "num_probes": 32, "num_output_probes": None}


def split(**settings: Any) -> Any:
    """Return a config of the method."""
    return config(**{"method": "hessian_split", **settings})


def expected(model: nn.Module, coupling: str = "joint") -> Tensor:
    """Return the sensitivities of the net's neurons from the dense Hessian, written out."""
    tensors = {n: p for n, p in model.named_parameters() if n in {"up.weight", "down.weight"}}
    diagonal = dense_hessian(lambda w: functional_call(model, w, kwargs=BATCH).loss, tensors).diagonal()
    h = split_like(diagonal, tensors)
    rows, columns = h["up.weight"].sum(1), h["down.weight"].sum(0)
    up, down = model.up.weight.detach().square().sum(1), model.down.weight.detach().square().sum(0)
    if coupling == "joint":
        return (rows + columns) * (up + down) / (2 * 5)
    return rows * up / (2 * 3) + (columns * down / (2 * 2) if coupling == "sum" else 0)


def trained() -> nn.Module:
    """Return the net, fitted to its labels as far as 60 steps take it."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        model(**BATCH).loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


@pytest.mark.parametrize("coupling", ["joint", "sum", "filter"])
def test_with_exact_probes_the_sum_of_both_traces_is_that_of_the_dense_hessian(
    coupling: str, exact: dict[str, Any]
) -> None:
    model = net()
    scores = score(model, [FFN], [BATCH], config(**exact, coupling=coupling))
    torch.testing.assert_close(scores.sensitivity[NAME], expected(model, coupling), rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_the_rest_is_the_hessian_without_the_gauss_newton_matrix(case: str) -> None:
    build, loss, loss_sum, y, terms = CASES[case]
    model = build()
    tensors = {n: p for n, p in model.named_parameters() if "norm" not in n}  # whose block torch.func gets wrong
    hessian = dense_hessian(lambda w: loss(functional_call(model, w, (X,)), y), tensors)
    outputs = [lambda n=n: [model(X[n : n + 1])] for n in range(len(X))]
    losses = [lambda z, n=n: loss_sum(z, y[n : n + 1]) for n in range(len(X))]
    expected_rest = hessian - dense_ggn(outputs, losses, tensors, terms)

    with preserved(model, tensors):
        ((linearised, count),) = LinearisedLosses(model, [(lambda: loss(model(X), y), terms)], tensors)
        gradient = differentiable_gradient(linearised(), tensors)
        columns = []
        for unit in torch.eye(len(hessian), dtype=torch.float64):
            columns.append(torch.cat([x.flatten() for x in hvp(gradient, tensors, split_like(unit, tensors)).values()]))
    torch.testing.assert_close(torch.stack(columns), expected_rest, rtol=0, atol=1e-9)
    assert count == terms
    assert expected_rest.abs().max() > 1e-3


def ggn_product(loss: Tensor, logits: Tensor, tensors: Mapping[str, Tensor], v: Mapping[str, Tensor]) -> list[Tensor]:
    """Return J^T H_z J v, with J v as the derivative of J^T u with respect to u."""
    u = torch.zeros_like(logits, requires_grad=True)
    weights = list(tensors.values())
    pulled = torch.autograd.grad(logits, weights, u, create_graph=True)
    (pushed,) = torch.autograd.grad(pulled, u, [v[n] for n in tensors], retain_graph=True)
    (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
    (curved,) = torch.autograd.grad(slope, logits, pushed, retain_graph=True)
    return list(torch.autograd.grad(logits, weights, curved, retain_graph=True))


@pytest.mark.parametrize("task", ["sequences", "tokens"])
def test_on_a_bert_with_padding_products_with_the_rest_and_with_the_gauss_newton_matrix_add_up(task: str) -> None:
    model, labels = bert().eval(), torch.tensor([0, 1, 1])
    if task == "tokens":
        model = bert(BertForTokenClassification).eval()
        labels = torch.randint(0, 2, (3, 7), generator=torch.Generator().manual_seed(0))
        labels[1, 4:] = labels[0, :2] = -100
    batch = text_batch(labels=labels)
    tensors = {s.tensor: model.get_parameter(s.tensor) for s in heads(0).scored_slices()}
    v = rademacher(tensors, 0, 0, 0)
    with preserved(model, tensors):
        output = model(**batch)
        whole = hvp(differentiable_gradient(output.loss, tensors), tensors, v)
        ggn = ggn_product(output.loss, output.logits, tensors, v)
        ((linearised, _),) = LinearisedLosses(model, [(lambda: model(**batch).loss, 3)], tensors)
        rest = hvp(differentiable_gradient(linearised(), tensors), tensors, v)
    for name, part in zip(tensors, ggn, strict=True):
        torch.testing.assert_close(rest[name] + part, whole[name], rtol=1e-9, atol=1e-12)
        assert rest[name].abs().max() > 1e-6 * whole[name].abs().max() > 0


class Linear(nn.Module):
    """Logits that are linear in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 4)
        self.register_buffer("readout", torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.up(x) @ self.readout


ROWS = Group("linear:ffn", Kind.FFN, 4, (Slice("up.weight", (4, 3), 0, 0, 1, Role.PRODUCER),))


@pytest.mark.parametrize("setting", [{"num_output_probes": None}, {"stop_share": 0.01, "num_output_probes": None}])
def test_where_outputs_are_linear_in_the_weights_the_scores_are_those_of_the_gauss_newton_matrix(
    setting: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    model = Linear().double()
    both = score(model, [ROWS], [BATCH], split(**setting))
    ggn = score(model, [ROWS], [BATCH], config(method="ggn", num_output_probes=None))
    assert torch.equal(both.sensitivity[ROWS.name], ggn.sensitivity[ROWS.name])
    assert torch.equal(both.standard_error[ROWS.name], ggn.standard_error[ROWS.name])
    if "stop_share" in setting:
        # The spread over the samples is large, and no number of probes would change it.
        assert (both.num_probes, both.settled) == (4, True)
        assert both.standard_error[ROWS.name].min() > 0


class Three(nn.Module):
    """The net with three classes, where one sign a sample is not exact."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.down(torch.tanh(self.up(x)))


THREE = Group(
    NAME,
    Kind.FFN,
    4,
    (Slice("up.weight", (4, 3), 0, 0, 1, Role.PRODUCER), Slice("down.weight", (3, 4), 1, 0, 1, Role.CONSUMER)),
)
THREE_BATCH = {**BATCH, "labels": torch.tensor([0, 1, 2, 1, 2, 0])}


def three() -> tuple[nn.Module, Tensor]:
    """Return that net and its exact sensitivities."""
    torch.manual_seed(0)
    model = Three().double()
    tensors = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    loss = lambda w: F.cross_entropy(functional_call(model, w, (BATCH["x"],)), THREE_BATCH["labels"])  # ruff: ignore[lambda-assignment]
    h = split_like(dense_hessian(loss, tensors).diagonal(), tensors)
    trace = h["up.weight"].sum(1) + h["down.weight"].sum(0)
    norm = model.up.weight.detach().square().sum(1) + model.down.weight.detach().square().sum(0)
    return model, trace * norm / (2 * 6)


def runs(model: nn.Module, group: Group, batch: Mapping[str, Any], count: int, **settings: Any) -> list[Scores]:
    """Return the scores for some seeds."""
    return [score(model, [group], [batch], split(seed=s, **settings)) for s in range(count)]


def every_sign(like: Mapping[str, Tensor], seed: int, batch: int, probe: int) -> dict[str, Tensor]:
    """Return the same two signs for each sample, one of their four combinations a probe."""
    ((name, coefficients),) = like.items()
    signs = torch.tensor([1.0 if probe >> i & 1 else -1.0 for i in range(2)], dtype=torch.float64)
    return {name: signs.expand_as(coefficients)}


def test_the_mean_over_all_signs_at_the_outputs_is_exact(
    exact: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, truth = three()
    monkeypatch.setattr(hessian_split, "rademacher", every_sign)
    found, one = (
        score(model, [THREE], [THREE_BATCH], config(**{**exact, "num_output_probes": n})).sensitivity[NAME]
        for n in (4, 1)
    )
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-9)
    assert (one - truth).abs().max() > 1e-4


def test_two_standard_errors_cover_the_exact_trace_most_of_the_time() -> None:
    model, truth = three()
    within = [
        (s.sensitivity[NAME] - truth).abs() < 2 * s.standard_error[NAME]
        for s in runs(model, THREE, THREE_BATCH, 30, num_probes=8)
    ]
    assert torch.stack(within).double().mean() > 0.9


def test_squared_standard_errors_are_those_of_the_gauss_newton_trace_and_of_the_probes() -> None:
    model = net()
    both, ggn = (
        score(model, [FFN], [BATCH], config(method=m, num_output_probes=None)).standard_error[NAME]
        for m in ("hessian_split", "ggn")
    )
    tensors = {"up.weight": model.up.weight, "down.weight": model.down.weight}
    norm = (model.up.weight.square().sum(1) + model.down.weight.square().sum(0)).detach()
    rest = estimate_traces(
        LinearisedLosses(model, [(lambda: model(**BATCH).loss, 6)], tensors),
        tensors,
        lambda v: v["up.weight"].sum(1) + v["down.weight"].sum(0),
        partial(rademacher, tensors, 0),
        num_probes=8,
    )
    probes = rest.standard_error * norm / (2 * 5)
    torch.testing.assert_close(both, (ggn.square() + probes.square()).sqrt(), rtol=1e-9, atol=0)
    assert (probes > 0).all()


def test_near_a_minimum_the_noise_is_a_fraction_of_that_of_probes_alone() -> None:
    model = trained()
    spread = {}
    for method, own in (("hessian", {}), ("hessian_split", {"num_output_probes": None})):
        samples = [score(model, [FFN], [BATCH], config(method=method, num_probes=2, seed=s, **own)) for s in range(30)]
        spread[method] = torch.stack([s.sensitivity[NAME] for s in samples]).var(0)
    truth = expected(model)
    assert (spread["hessian_split"] < 0.05 * spread["hessian"]).all()
    assert spread["hessian"].max().sqrt() > 0.2 * truth.max()


def test_splitting_a_batch_changes_nothing(exact: dict[str, Any]) -> None:
    parts = [{k: v[:2] for k, v in BATCH.items()}, {k: v[2:] for k, v in BATCH.items()}]
    whole, halves = (score(net(), [FFN], b, config(**exact)) for b in ([BATCH], parts))
    torch.testing.assert_close(halves.sensitivity[NAME], whole.sensitivity[NAME], rtol=0, atol=1e-12)
    assert (halves.num_batches, halves.num_loss_terms) == (2, 6)


def test_ignored_labels_do_not_count(exact: dict[str, Any]) -> None:
    labels = BATCH["labels"].clone()
    labels[[0, 4]] = -100
    kept = [i for i in range(6) if i not in {0, 4}]
    fewer = {k: v[kept] for k, v in BATCH.items()}
    padded, short = (score(net(), [FFN], [b], config(**exact)) for b in ({**BATCH, "labels": labels}, fewer))
    torch.testing.assert_close(padded.sensitivity[NAME], short.sensitivity[NAME], rtol=0, atol=1e-12)
    assert padded.num_loss_terms == 4


def test_frozen_weights_are_scored_like_others() -> None:
    batch = text_batch(labels=torch.tensor([0, 1, 1]))
    plain, frozen = (
        score(m, [heads(1)], [batch], split(num_probes=2)).sensitivity[heads(1).name]
        for m in (bert(), bert().requires_grad_(False))
    )
    assert torch.equal(plain, frozen)


def test_probes_of_weights_and_signs_at_outputs_come_from_different_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[Any, set[tuple[int, ...]]] = {}
    for module in (evidence, hessian_split):

        def watching(tensors: Any, *key: int, module: Any = module) -> Any:
            seen.setdefault(module, set()).add(key)
            return rademacher(tensors, *key)

        monkeypatch.setattr(module, "rademacher", watching)
    score(net(), [FFN], [BATCH, BATCH], split(num_probes=3, num_output_probes=3))
    weights, outputs = seen[evidence], seen[hessian_split]
    assert (len(weights), len(outputs)) == (6, 6)
    assert not weights & outputs


def test_batches_from_an_iterator_are_the_same_ones_for_both_traces() -> None:
    halves = [{k: v[:2] for k, v in BATCH.items()}, {k: v[2:] for k, v in BATCH.items()}]
    listed, streamed = (score(net(), [FFN], b, split()) for b in (halves, iter(halves)))
    assert torch.equal(listed.sensitivity[NAME], streamed.sensitivity[NAME])
    assert streamed.num_batches == 2


def test_the_method_says_how_it_scored() -> None:
    scores = score(net(), [FFN], [BATCH], split(num_probes=3))
    assert (scores.method, scores.num_probes, scores.num_batches, scores.num_loss_terms) == ("hessian_split", 3, 1, 6)
    assert scores.settled is None
