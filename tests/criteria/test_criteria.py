"""Every criterion against its definition written out: dense matrices, masks put into the model, plain gradients."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from reference_curvature import dense_hessian, hadamard, split_like
from reference_ggn import dense_ggn, gradient
from scored_models import BATCH, FFN, bert, config, heads, net, score, text_batch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import BertForTokenClassification

import hap_hf
from hap_hf.curvature import sample_means
from hap_hf.evidence.evidence import Evidence
from hap_hf.names.group import Group, Kind, Role, Slice


@pytest.fixture(autouse=True)
def _no_sample_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sure that no sample is differentiated alone but to check the others."""
    monkeypatch.setattr(sample_means.SampleMeans, "_one_by_one", None)


class ConvNet(nn.Module):
    """A residual network whose channels are made by three layers, filtered by a fourth and read by two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 3, stride=1, padding=1)
        self.outer, self.depthwise = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        """Return logits and the loss."""
        x = self.stem(x)
        x = x + self.outer(torch.tanh(self.inner(x)))
        x = torch.relu_(self.norm(self.depthwise(x)))
        logits = self.head(x.mean((2, 3)))
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))


IMAGES = {
    "x": torch.randn(4, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
    "labels": torch.tensor([0, 2, 1, 1]),
}
CHANNELS = Group(
    "channels",
    Kind.FFN,
    3,  # two channels a unit
    (
        Slice("stem.weight", (6, 2, 3, 3), 0, 0, 2, Role.PRODUCER),
        Slice("outer.weight", (6, 4, 1, 1), 0, 0, 2, Role.PRODUCER),
        Slice("depthwise.weight", (6, 1, 3, 3), 0, 0, 2, Role.FACTOR),
        Slice("stem.bias", (6,), 0, 0, 2, Role.ALIGNED),
        Slice("norm.weight", (6,), 0, 0, 2, Role.ALIGNED),
        Slice("inner.weight", (4, 6, 3, 3), 1, 0, 2, Role.CONSUMER),
        Slice("head.weight", (3, 6), 1, 0, 2, Role.CONSUMER),
    ),
)


def convnet() -> ConvNet:
    """Return the network in float64 with random statistics."""
    torch.manual_seed(0)
    model = ConvNet().double().eval()
    model.norm.running_mean.normal_()
    return model


def token_bert() -> tuple[nn.Module, list[Group], dict[str, Tensor]]:
    """Return a BERT that labels tokens, some of them ignored."""
    labels = torch.randint(0, 3, (3, 7), generator=torch.Generator().manual_seed(1))
    labels[1, 4:] = labels[2, 1] = -100
    return bert(BertForTokenClassification, num_labels=3).eval(), [heads(0), heads(1)], text_batch(labels=labels)


CASES: dict[str, Callable[[], tuple[nn.Module, list[Group], dict[str, Tensor]]]] = {
    "neurons": lambda: (net(), [FFN], BATCH),
    "heads": lambda: (bert(num_labels=3).eval(), [heads(1), heads(0)], text_batch(labels=torch.tensor([0, 2, 1]))),
    "heads_of_tokens": token_bert,
    "coupled_channels": lambda: (convnet(), [CHANNELS], IMAGES),
}


def terms(batch: Mapping[str, Tensor]) -> int:
    """Return the number of labels that count."""
    return int((batch["labels"] != -100).sum())


def samples(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield each sample alone."""
    for n in range(len(batch["labels"])):
        yield {k: v[n : n + 1] for k, v in batch.items()}


def summed_loss(model: nn.Module, sample: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of a sample's loss terms."""
    return model(**sample).loss * terms(sample)


def tensors_of(model: nn.Module, groups: list[Group]) -> dict[str, Tensor]:
    """Return the matrices of all groups."""
    return {s.tensor: model.get_parameter(s.tensor) for g in groups for s in g.slices if len(s.shape) > 1}


def unit_masks(group: Group, unit: int, roles: set[Role]) -> list[dict[str, Tensor]]:
    """Return, for each slice that counts, ones where the unit's weights are."""
    masks = []
    for s in group.slices:
        if s.role in roles and len(s.shape) > 1:
            mask = torch.zeros(s.shape, dtype=torch.float64)
            mask.movedim(s.dim, 0)[s.offset + unit * s.width : s.offset + (unit + 1) * s.width] = 1
            masks.append({s.tensor: mask})
    return masks


MATRICES = {Role.PRODUCER, Role.FACTOR, Role.CONSUMER}


def inner(values: Mapping[str, Tensor], weights: Mapping[str, Tensor], masks: list[dict[str, Tensor]]) -> Tensor:
    """Return the inner product of values and weights over a unit."""
    return sum((values[n] * weights[n].detach() * m).sum() for mask in masks for n, m in mask.items())


def relative_trace(
    diagonal: Mapping[str, Tensor], weights: Mapping[str, Tensor], group: Group, coupling: str
) -> Tensor:
    """Return trace times squared norm over twice the entries of each unit, slices combined as told."""
    roles = MATRICES - {Role.CONSUMER} if coupling == "filter" else MATRICES
    result = []
    for unit in range(group.num_units):
        masks = [(n, m) for mask in unit_masks(group, unit, roles) for n, m in mask.items()]
        traces = torch.stack([(diagonal[n] * m).sum() for n, m in masks])
        norms = torch.stack([(weights[n].detach().square() * m).sum() for n, m in masks])
        entries = torch.stack([m.sum() for _, m in masks])
        if coupling == "joint":
            result.append(traces.sum() * norms.sum() / (2 * entries.sum()))
        else:
            result.append((traces * norms / (2 * entries)).sum())
    return torch.stack(result)


def ggn_of(model: nn.Module, tensors: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Return the dense Gauss-Newton matrix."""

    def of_logits(z: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(z.reshape(-1, z.shape[-1]), labels.flatten(), reduction="sum")

    every = list(samples(batch))
    outputs = [lambda s=s: [model(**s).logits] for s in every]
    losses = [lambda z, s=s: of_logits(z, s["labels"]) for s in every]
    return dense_ggn(outputs, losses, tensors, terms(batch))


@pytest.mark.parametrize("coupling", ["joint", "sum", "filter"])
@pytest.mark.parametrize("case", CASES)
def test_ggn_is_the_relative_trace_of_the_dense_matrix(case: str, coupling: str) -> None:
    model, groups, batch = CASES[case]()
    tensors = tensors_of(model, groups)
    diagonal = split_like(ggn_of(model, tensors, batch).diagonal(), tensors)
    scores = score(model, groups, [batch], config(method="ggn", coupling=coupling, num_output_probes=None))
    for group in groups:
        truth = relative_trace(diagonal, tensors, group, coupling)
        torch.testing.assert_close(scores.sensitivity[group.name], truth, rtol=1e-9, atol=1e-12)
    assert scores.negative_share == 0


@pytest.mark.parametrize(("method", "roles"), [("ggn_quadratic", MATRICES), ("mask_ggn", {Role.CONSUMER})])
@pytest.mark.parametrize("case", CASES)
def test_quadratic_scores_are_the_form_in_the_units_weights(case: str, method: str, roles: set[Role]) -> None:
    model, groups, batch = CASES[case]()
    tensors = tensors_of(model, groups)
    matrix = ggn_of(model, tensors, batch)
    scores = score(model, groups, [batch], config(method=method, num_output_probes=None))
    for group in groups:
        truth = []
        for unit in range(group.num_units):
            masks = unit_masks(group, unit, roles)
            w = {
                n: sum((tensors[n].detach() * m[n] for m in masks if n in m), torch.zeros(t.shape))
                for n, t in tensors.items()
            }
            long = torch.cat([x.flatten() for x in w.values()]).double()
            truth.append(long @ matrix @ long / 2)
        torch.testing.assert_close(scores.sensitivity[group.name], torch.stack(truth), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("coupling", ["joint", "sum", "filter"])
@pytest.mark.parametrize("case", CASES)
def test_the_empirical_fisher_has_squared_gradients_of_the_labels(case: str, coupling: str) -> None:
    model, groups, batch = CASES[case]()
    tensors = tensors_of(model, groups)
    squares = {n: torch.zeros_like(t) for n, t in tensors.items()}
    for sample in samples(batch):
        g = gradient(summed_loss(model, sample), tensors)
        squares = {n: squares[n] + g[n].square() / terms(batch) for n in g}
    scores = score(model, groups, [batch], config(method="empirical_fisher", coupling=coupling))
    for group in groups:
        truth = relative_trace(squares, tensors, group, coupling)
        torch.testing.assert_close(scores.sensitivity[group.name], truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_taylor_is_the_first_order_change_of_the_mean_loss(case: str) -> None:
    model, groups, batch = CASES[case]()
    tensors = tensors_of(model, groups)
    g = gradient(model(**batch).loss, tensors)
    scores = score(model, groups, [batch], config(method="taylor"))
    for group in groups:
        truth = [inner(g, tensors, unit_masks(group, u, MATRICES)).abs() for u in range(group.num_units)]
        torch.testing.assert_close(scores.sensitivity[group.name], torch.stack(truth), rtol=1e-9, atol=1e-12)


@contextmanager
def masked(model: nn.Module, group: Group) -> Iterator[Tensor]:
    """Put a mask of ones on what every layer reads of each unit, and yield it."""
    mask = torch.ones(group.num_units, dtype=torch.float64, requires_grad=True)

    def hook(width: int, is_conv: bool) -> Callable[..., tuple[Tensor]]:
        def multiply(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            entries = mask.repeat_interleave(width)
            return (args[0] * (entries[:, None, None] if is_conv else entries),)

        return multiply

    handles = []
    for s in group.slices:
        if s.role is Role.CONSUMER:
            layer = model.get_submodule(s.tensor.rpartition(".")[0])
            handles.append(layer.register_forward_pre_hook(hook(s.width, isinstance(layer, nn.Conv2d))))
    try:
        yield mask
    finally:
        for handle in handles:
            handle.remove()


def mask_gradients(model: nn.Module, group: Group, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the gradient of each sample's loss with respect to the mask, [samples, units]."""
    with masked(model, group) as mask:
        return torch.stack([torch.autograd.grad(summed_loss(model, s), mask)[0] for s in samples(batch)])


@pytest.mark.parametrize("case", CASES)
def test_mask_fisher_is_half_the_mean_square_of_the_gradients_of_a_mask(case: str) -> None:
    model, groups, batch = CASES[case]()
    scores = score(model, groups, [batch], config(method="mask_fisher"))
    for group in groups:
        truth = mask_gradients(model, group, batch).square().sum(0) / terms(batch) / 2
        torch.testing.assert_close(scores.sensitivity[group.name], truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_mask_ggn_is_half_the_mean_square_of_a_masks_effect_on_the_models_own_losses(case: str) -> None:
    """Fisher's form of the same matrix: labels drawn from the prediction, each counted by its probability."""
    model, groups, batch = CASES[case]()
    scores = score(model, groups, [batch], config(method="mask_ggn", num_output_probes=None))
    for group in groups:
        truth = torch.zeros(group.num_units, dtype=torch.float64)
        with masked(model, group) as mask:
            for sample in samples(batch):
                logits = model(**sample).logits.reshape(-1, 3 if case != "neurons" else 2)
                counted = logits[sample["labels"].flatten() != -100].log_softmax(-1)
                for row in counted:  # tokens are independent given the logits, so their squares add up
                    for log_p in row:
                        (g,) = torch.autograd.grad(log_p, mask, retain_graph=True)
                        truth += log_p.exp().detach() * g.square() / terms(batch) / 2
        torch.testing.assert_close(scores.sensitivity[group.name], truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_michel_is_the_mean_absolute_gradient_of_a_mask_normalised_in_each_group(case: str) -> None:
    model, groups, batch = CASES[case]()
    scores = score(model, groups, [batch], config(method="michel"))
    for group in groups:
        truth = mask_gradients(model, group, batch).abs().sum(0)
        torch.testing.assert_close(scores.sensitivity[group.name], truth / truth.norm(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("coupling", ["joint", "sum", "filter"])
def test_the_hessian_method_combines_slices_in_the_same_ways(coupling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = hadamard(32)
    monkeypatch.setattr(Evidence, "signs", lambda evidence, like, batch, probe: split_like(matrix[probe], like))
    model = net()
    tensors = tensors_of(model, [FFN])
    hessian = dense_hessian(lambda w: functional_call(model, w, kwargs=BATCH).loss, tensors)
    truth = relative_trace(split_like(hessian.diagonal(), tensors), tensors, FFN, coupling)
    scores = score(model, [FFN], [BATCH], config(coupling=coupling, num_probes=32))
    torch.testing.assert_close(scores.sensitivity["net:ffn"], truth, rtol=0, atol=1e-8)


@pytest.mark.parametrize("coupling", ["joint", "sum", "filter"])
def test_magnitude_combines_slices_in_the_same_ways(coupling: str) -> None:
    model = convnet()
    tensors = tensors_of(model, [CHANNELS])
    roles = MATRICES - {Role.CONSUMER} if coupling == "filter" else MATRICES
    truth = []
    for unit in range(3):
        masks = [(n, m) for mask in unit_masks(CHANNELS, unit, roles) for n, m in mask.items()]
        norms = torch.stack([(tensors[n].detach().square() * m).sum() for n, m in masks])
        entries = torch.stack([m.sum() for _, m in masks])
        truth.append(norms.sum() / entries.sum() if coupling == "joint" else (norms / entries).sum())
    scores = score(model, [CHANNELS], [], config(method="magnitude", coupling=coupling))
    torch.testing.assert_close(scores.sensitivity["channels"], torch.stack(truth))


def test_the_list_of_criteria_does_not_hide_the_package_of_that_name() -> None:
    # ``import hap_hf.criteria.hessian as module`` goes through this attribute.
    assert isinstance(hap_hf.criteria, ModuleType)
