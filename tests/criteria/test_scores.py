"""Sensitivities of units against dense Hessians, finite differences and sums written out by hand."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from reference_curvature import dense_hessian, difference_product, hadamard, split_like
from scored_models import BATCH, FFN, Net, bert, config, heads, net, score, text_batch
from torch import Tensor, nn
from torch.func import functional_call

import hap_hf.evidence.evidence
from hap_hf.criteria import Scores, UnitWeights, known_criteria, unit_sensitivity
from hap_hf.curvature import rademacher
from hap_hf.names.group import Group, Kind, Role, Slice

pytestmark = pytest.mark.fast


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Make the 20 weights of the net's neurons see Hadamard probes; return the setting that makes them exact."""
    matrix = hadamard(32)
    monkeypatch.setattr(
        hap_hf.evidence.evidence, "rademacher", lambda tensors, seed, batch, probe: split_like(matrix[probe], tensors)
    )
    return {"num_probes": 32}


def expected_sensitivity(model: Net) -> Tensor:
    """Return tr(H_uu) ||w_u||^2 / (2 n_u) of the net's neurons, from the dense Hessian, written out."""
    tensors = {n: p for n, p in model.named_parameters() if n in {"up.weight", "down.weight"}}
    hessian = dense_hessian(lambda w: functional_call(model, w, kwargs=BATCH).loss, tensors)
    diagonal = split_like(hessian.diagonal(), tensors)
    result = []
    for u in range(4):
        trace = diagonal["up.weight"][u].sum() + diagonal["down.weight"][:, u].sum()
        norm = model.up.weight[u].square().sum() + model.down.weight[:, u].square().sum()
        result.append(trace * norm / (2 * 5))
    return torch.stack(result).detach()


def test_the_formula_is_trace_times_squared_norm_over_twice_the_entries() -> None:
    result = unit_sensitivity(torch.tensor([4.0, -1.0]), torch.tensor([3.0, 6.0]), 6)
    assert torch.equal(result, torch.tensor([1.0, -0.5]))


def test_for_isotropic_curvature_the_sensitivity_is_the_exact_loss_increase(exact: dict[str, int]) -> None:
    model = net()

    def quadratic(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return 1.5 * (model.up.weight.square().sum() + model.down.weight.square().sum())

    scores = score(model, [FFN], [BATCH], config(**exact), loss_fn=quadratic)
    removed = 1.5 * (model.up.weight.square().sum(1) + model.down.weight.square().sum(0)).detach()
    torch.testing.assert_close(scores.sensitivity["net:ffn"], removed, rtol=0, atol=1e-12)


def test_sensitivities_equal_those_from_the_dense_hessian(exact: dict[str, int]) -> None:
    model = net()
    scores = score(model, [FFN], [BATCH], config(**exact))
    torch.testing.assert_close(scores.sensitivity["net:ffn"], expected_sensitivity(model), rtol=0, atol=1e-8)


def test_random_probes_agree_within_their_standard_errors() -> None:
    model = net()
    scores = score(model, [FFN], [BATCH], config(num_probes=200))
    error = (scores.sensitivity["net:ffn"] - expected_sensitivity(model)).abs()
    assert (error < 3 * scores.standard_error["net:ffn"]).all()
    assert (scores.standard_error["net:ffn"] > 0).all()


def test_scores_say_how_they_were_made() -> None:
    scores = score(net(), [FFN], [BATCH, BATCH], config(num_probes=3))
    assert (scores.method, scores.num_probes, scores.num_batches, scores.num_loss_terms) == ("hessian", 3, 2, 12)
    assert 0 < scores.seconds < 60
    assert scores.sensitivity["net:ffn"].dtype is scores.standard_error["net:ffn"].dtype is torch.float64


def test_the_same_seed_gives_bitwise_the_same_scores_and_another_one_does_not() -> None:
    first, again, other = (score(net(), [FFN], [BATCH], config(seed=s)).sensitivity["net:ffn"] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_only_the_weight_matrices_of_the_groups_are_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []

    def watching(tensors: Mapping[str, Tensor], *key: int) -> dict[str, Tensor]:
        seen.append(set(tensors))
        return rademacher(tensors, *key)

    monkeypatch.setattr(hap_hf.evidence.evidence, "rademacher", watching)
    score(net(), [FFN], [BATCH], config(num_probes=2))
    assert seen == [{"up.weight", "down.weight"}] * 2


def test_heads_of_a_bert_with_sdpa_attention_match_finite_differences_of_eager_gradients() -> None:
    batch = text_batch(labels=torch.tensor([0, 1, 1]))
    groups = [heads(0), heads(1)]
    scores = score(bert(), groups, [batch], config(num_probes=2))

    eager = bert(attention="eager").eval()
    tensors = {s.tensor: eager.get_parameter(s.tensor) for g in groups for s in g.scored_slices()}
    for group in groups:
        samples = []
        for p in range(2):
            v = rademacher(tensors, 0, 0, p)
            hv = difference_product(lambda: eager(**batch).loss, tensors, v)
            total = torch.zeros(4, dtype=torch.float64)
            for s in group.scored_slices():
                part = v[s.tensor] * hv[s.tensor]
                total += torch.stack([part.movedim(s.dim, 0)[4 * u : 4 * u + 4].sum() for u in range(4)])
            samples.append(total)
        norm = sum(
            torch.stack([
                tensors[s.tensor].detach().movedim(s.dim, 0)[4 * u : 4 * u + 4].square().sum() for u in range(4)
            ])
            for s in group.scored_slices()
        )
        expected = sum(samples) / 2 * norm / (2 * 4 * 64)
        torch.testing.assert_close(scores.sensitivity[group.name], expected, rtol=1e-4, atol=1e-8)


def test_unit_sums_follow_offset_width_and_dim_of_every_slice() -> None:
    model = nn.Module()
    model.fused = nn.Linear(5, 14)
    model.out = nn.Linear(6, 3)
    group = Group(
        "heads",
        Kind.HEADS,
        3,
        (
            Slice("fused.weight", (14, 5), 0, 0, 2, Role.PRODUCER),
            Slice("fused.weight", (14, 5), 0, 8, 2, Role.FACTOR),
            Slice("out.weight", (3, 6), 1, 0, 2, Role.CONSUMER),
        ),
    )
    neurons = Group("ffn", Kind.FFN, 5, (Slice("fused.weight", (14, 5), 1, 0, 1, Role.CONSUMER),))
    units = UnitWeights.of(model, [group, neurons])
    f, o = (torch.randn(s, dtype=torch.float64) for s in ((14, 5), (3, 6)))
    expected = [
        f[2 * u : 2 * u + 2].sum() + f[8 + 2 * u : 10 + 2 * u].sum() + o[:, 2 * u : 2 * u + 2].sum() for u in range(3)
    ] + [f[:, u].sum() for u in range(5)]
    torch.testing.assert_close(
        units.totals(units.marginals({"fused.weight": f, "out.weight": o})), torch.stack(expected)
    )
    assert units.num_entries() == {"heads": 2 * 5 * 2 + 6, "ffn": 14}


def test_tied_weights_are_probed_once_under_either_name() -> None:
    model = net()
    model.alias = model.up
    renamed = Group(
        FFN.name,
        FFN.kind,
        4,
        (Slice("alias.weight", (4, 3), 0, 0, 1, Role.PRODUCER), *FFN.slices[1:]),
    )
    plain, aliased = (score(model, [g], [BATCH], config()) for g in (FFN, renamed))
    assert torch.equal(plain.sensitivity["net:ffn"], aliased.sensitivity["net:ffn"])


def test_negative_sensitivities_are_kept_and_their_share_is_told(exact: dict[str, int]) -> None:
    def saddle(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        signs = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
        return (signs[:, None] * model.up.weight.square()).sum() + (signs * model.down.weight.square()).sum()

    scores = score(net(), [FFN], [BATCH], config(**exact), loss_fn=saddle)
    assert (scores.sensitivity["net:ffn"] < 0).tolist() == [False, False, False, True]
    assert scores.negative_share == pytest.approx(0.25)


def test_negative_share_counts_units_and_not_groups() -> None:
    sensitivity = {"a": torch.tensor([-1.0]), "b": torch.tensor([1.0, 0.0, 2.0])}
    assert Scores(sensitivity, sensitivity, "hessian", 2, 1, 1, 0.0).negative_share == pytest.approx(0.25)


def test_magnitude_is_the_squared_norm_per_entry_and_needs_no_batch() -> None:
    model = net()
    scores = score(model, [FFN], [], config(method="magnitude"))
    norm = (model.up.weight.square().sum(1) + model.down.weight.square().sum(0)).detach()
    torch.testing.assert_close(scores.sensitivity["net:ffn"], norm / 5)
    assert torch.equal(scores.standard_error["net:ffn"], torch.zeros(4, dtype=torch.float64))
    assert (scores.method, scores.num_probes, scores.num_batches, scores.num_loss_terms) == ("magnitude", 0, 0, 0)


def test_random_scores_depend_on_the_seed_and_the_groups_name_only() -> None:
    other = Group("other:ffn", FFN.kind, FFN.num_units, FFN.slices)
    torch.manual_seed(5)
    both = score(net(), [FFN, other], [], config(method="random")).sensitivity
    alone = score(net(1), [other], [], config(method="random")).sensitivity
    reseeded = score(net(), [FFN], [], config(method="random", seed=1)).sensitivity
    assert torch.equal(both["other:ffn"], alone["other:ffn"])
    assert not torch.equal(both["net:ffn"], both["other:ffn"])
    assert not torch.equal(both["net:ffn"], reseeded["net:ffn"])
    assert all((x >= 0).all() and (x < 1).all() for x in both.values())


METHODS = [
    "mask_ggn",
    "reconstruction",
    "mask_fisher",
    "michel",
    "ggn",
    "ggn_quadratic",
    "hessian",
    "hessian_split",
    "empirical_fisher",
    "taylor",
    "magnitude",
    "random",
]


def test_every_method_of_the_config_can_score() -> None:
    assert {c.name for c in known_criteria().values() if c.__module__.startswith("hap_hf.")} == set(METHODS)
    for method in METHODS:
        scores = score(net(), [FFN], [BATCH], config(method=method))
        assert scores.method == method == known_criteria()[method].name
        assert scores.sensitivity["net:ffn"].shape == (4,)


def test_no_more_batches_are_drawn_than_max_batches() -> None:
    drawn: list[int] = []

    def batches() -> Iterator[dict[str, Tensor]]:
        for i in range(10):
            drawn.append(i)
            yield BATCH

    scores = score(net(), [FFN], batches(), config(max_batches=3, num_probes=2))
    assert drawn == [0, 1, 2]
    assert scores.num_batches == 3


def test_the_loss_is_the_users_and_is_called_once_a_batch() -> None:
    calls: list[Mapping[str, Any]] = []

    def doubled(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        calls.append(batch)
        return 2 * model(**batch).loss

    plain = score(net(), [FFN], [BATCH] * 2, config())
    twice = score(net(), [FFN], [BATCH] * 2, config(), loss_fn=doubled)
    torch.testing.assert_close(twice.sensitivity["net:ffn"], 2 * plain.sensitivity["net:ffn"])
    assert len(calls) == 2


def test_the_progress_bar_ticks_once_a_probe_on_standard_error(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # in a pipe there is none
    score(net(), [FFN], [BATCH] * 5, config(num_probes=3, max_batches=2, progress=True))
    out, err = capfd.readouterr()
    assert out == ""
    assert "Hessian trace: 100%" in err
    assert "6/6" in err


def test_without_progress_nothing_is_written(capfd: pytest.CaptureFixture[str]) -> None:
    score(net(), [FFN], [BATCH], config())
    assert capfd.readouterr() == ("", "")
