"""Probes are drawn until few units are undecided, or until as many are drawn as are allowed."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from scored_models import BATCH, FFN, bert, config, net, score, text_batch
from synthetic_groups import ffn_group, heads_group, random_scores
from torch import Tensor, nn

import hap_hf
from hap_hf.config import HapConfig
from hap_hf.criteria import Scores
from hap_hf.criteria.stopping import expected_threshold, near_threshold
from hap_hf.selection import make_plan

NAME = "net:ffn"
HALVES = [{k: v[:2] for k, v in BATCH.items()}, {k: v[2:] for k, v in BATCH.items()}]
# One neuron of the four is three times as sensitive as the others, which are alike.
EASY: dict[str, Any] = {"prune_ratio": 0.75, "stop_share": 0.3, "num_probes": 4096}
HARD: dict[str, Any] = {"prune_ratio": 0.5, "stop_share": 0.3, "num_probes": 64}


def scored(batches: Any = (BATCH,), **settings: Any) -> Scores:
    """Return the scores of the net."""
    return score(net(), [FFN], batches, config(**settings))


def undecided(scores: Scores, rank: int) -> float:
    """Return the share of neurons within two standard errors of the one at a rank."""
    values, errors = scores.sensitivity[NAME], scores.standard_error[NAME]
    return ((values - values.sort().values[rank]).abs() <= 2 * errors).double().mean().item()


@pytest.mark.parametrize("method", ["hessian", "hessian_split"])
def test_where_units_lie_far_apart_the_rule_stops_early(method: str) -> None:
    scores = scored(method=method, **EASY)
    assert scores.settled is True
    assert 4 < scores.num_probes < 4096
    assert scores.num_probes.bit_count() == 1


def test_where_units_are_alike_as_many_probes_are_drawn_as_are_allowed() -> None:
    scores = scored(**HARD)
    assert (scores.num_probes, scores.settled) == (64, False)
    assert undecided(scores, 2) >= 0.3


def test_it_stops_at_the_first_number_of_probes_that_is_enough() -> None:
    scores = scored(**EASY)
    assert undecided(scores, 3) < 0.3
    fewer = scored(**{**EASY, "stop_share": None, "num_probes": scores.num_probes // 2})
    assert undecided(fewer, 3) >= 0.3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_scores_are_bitwise_those_of_as_many_probes_without_the_rule(precision: str) -> None:
    settings = {"precision": precision, "batches": HALVES}
    ruled = scored(**settings, **EASY)
    plain = scored(**settings, **{**EASY, "stop_share": None, "num_probes": ruled.num_probes})
    assert torch.equal(ruled.sensitivity[NAME], plain.sensitivity[NAME])
    assert torch.equal(ruled.standard_error[NAME], plain.standard_error[NAME])
    assert (ruled.num_batches, ruled.num_loss_terms) == (plain.num_batches, plain.num_loss_terms) == (2, 6)
    assert plain.settled is None


def test_fewer_probes_than_a_first_look_takes_are_drawn_where_no_more_are_allowed() -> None:
    scores = scored(**{**HARD, "num_probes": 3})
    assert (scores.num_probes, scores.settled) == (3, False)


def test_without_noise_the_first_look_is_the_last() -> None:
    def quadratic(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return model.up.weight.square().sum() + model.down.weight.square().sum()

    scores = score(net(), [FFN], [BATCH], config(**{**HARD, "stop_share": 1e-9}), loss_fn=quadratic)
    assert (scores.num_probes, scores.settled) == (4, True)


class Reshuffled:
    """Batches that are others each time that they are drawn."""

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        start = len(self.drawn)
        for i in range(start, start + 5):
            self.drawn.append(i)
            yield {**BATCH, "x": BATCH["x"] + 0.1 * i}


def test_the_batches_are_drawn_once_however_often_they_are_gone_through() -> None:
    batches = Reshuffled()
    scores = scored(batches=batches, max_batches=3, **EASY)
    listed = scored(batches=list(Reshuffled()), max_batches=3, **EASY)
    assert batches.drawn == [0, 1, 2]
    assert scores.num_probes > 4
    assert torch.equal(scores.sensitivity[NAME], listed.sensitivity[NAME])


def test_units_without_standard_error_are_never_undecided() -> None:
    values, errors = torch.tensor([1.0, 1.0, 2.0, 9.0]), torch.tensor([0.0, 0.1, 0.5, 1.0])
    assert near_threshold(values, errors, 1.0).double().mean().item() == pytest.approx(0.5, abs=0)


@pytest.mark.parametrize(
    "amount",
    [
        {"prune_ratio": 0.29},
        {"prune_ratio": 0.5},
        {"target_params": 0.6},
        {"target_params": 0.3, "per_cost": True},
        {"target_macs": 0.5},
        {"target_macs": 0.4, "per_cost": True},
    ],
    ids=str,
)
def test_the_threshold_is_that_of_the_plan(amount: dict[str, Any]) -> None:
    groups = [heads_group("a", 4), ffn_group("a", 50), heads_group("b", 4), ffn_group("b", 46)]
    settings = HapConfig(**amount, max_group_ratio=1.0)
    for seed in range(5):
        scores = random_scores(groups, seed)
        for found in scores.sensitivity.values():
            found[found.argmax()] = 1e6  # the best unit of a group stays in any case
        plan = make_plan(groups, scores, settings)
        per = settings.per
        values = torch.cat([scores.sensitivity[g.name] / (per.unit_cost(g) if per else 1) for g in groups])
        assert plan.provenance[-1]["threshold"] == expected_threshold(groups, values, settings.asked)


@pytest.mark.parametrize(
    ("share", "outcome", "words"),
    [(0.001, False, "as many as allowed, stop_share not met"), (0.5, True, "stopped by stop_share")],
)
def test_the_outcome_is_in_the_report(share: float, outcome: bool, words: str) -> None:
    settings = config(num_probes=16, stop_share=share, kinds="ffn", prune_ratio=0.1)
    report = hap_hf.prune(bert(), [text_batch(labels=torch.tensor([0, 1, 1]))], settings)
    p = report.plan.provenance[-1]
    assert (p["settled"], p["settings"]["method"]["stop_share"]) == (outcome, share)
    assert report.to_dict()["provenance"][-1]["settled"] is outcome
    assert f"hessian, {p['num_probes']} probes, 1 batch, {words}" in report.to_markdown()
    assert (report.uncertain_units / 48 < share) is outcome
    assert (p["num_probes"] == 16) is not outcome


def test_without_the_rule_the_report_does_not_mention_it() -> None:
    settings = config(num_probes=2, kinds="ffn", method="hessian_split", num_output_probes=3)
    report = hap_hf.prune(bert(), [text_batch(labels=torch.tensor([0, 1, 1]))], settings)
    p = report.plan.provenance[-1]
    assert p["settled"] is None
    method = p["settings"]["method"]
    assert (method["hvp"], method["stop_share"], method["num_output_probes"]) == ("double_backward", None, 3)
    assert "- method: hessian_split, 2 probes, 1 batch\n" in report.to_markdown()
