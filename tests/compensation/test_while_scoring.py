"""What compensation needs is measured in the backward passes of the first scores."""

from typing import Any
from unittest import mock

import pytest
import torch
from cases import batch_of, build
from channel_nets import Residual
from compensations import TEXT, evidence_of
from scored_models import bert, config
from torch import Tensor, nn

from hap_hf import Compensation, decide, find_groups, score_groups
from hap_hf.curvature import Forward, Watchable
from hap_hf.curvature.sample_means import SampleMeans
from hap_hf.selection import measure_and_score

PIXELS = {"x": torch.randn(4, 3, 8, 8, dtype=torch.float64), "labels": torch.tensor([0, 1, 1, 0])}


def both(model: nn.Module, batches: list[Any], probes: int | None, **how: Any) -> tuple[Any, ...]:
    """Return what is measured and scored in one, and each alone."""
    wanted = config(method="mask_ggn", num_output_probes=probes, **how)
    evidence, groups = wanted.evidence(model, batches), find_groups(model, batches[0])
    one = measure_and_score(evidence, groups, wanted, Watchable())
    apart = Compensation.measure(evidence, groups, num_output_probes=probes)
    return *one, apart, score_groups(evidence, groups, wanted)


def assert_equal(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("probes", [None, 1, 3])
@pytest.mark.parametrize("family", ["bert", "llama", "residual"])
def test_one_pass_measures_and_scores_what_two_passes_do(family: str, probes: int | None) -> None:
    model = Residual().double().eval() if family == "residual" else build(family)
    batch = PIXELS if family == "residual" else batch_of(family)
    if family == "llama" and probes is None:
        probes = 2  # a column for each token and word is not a pass for a test
    with mock.patch.object(SampleMeans, "_one_by_one", None):
        compensation, scores, apart, plain = both(model, [batch, batch], probes)
    assert compensation.moments
    assert_equal(compensation.moments, apart.moments)
    assert_equal(scores.sensitivity, plain.sensitivity)


def test_single_samples_take_turns_as_before() -> None:
    model = bert().eval()
    singles = [{name: value[i : i + 1] for name, value in TEXT.items()} for i in range(4)]
    compensation, _, apart, _ = both(model, singles, 1)
    assert_equal(compensation.moments, apart.moments)


class PositionsFirst(nn.Module):
    """A classifier whose layers have samples in their second dimension, so that samples are differentiated alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, the mean over positions."""
        h = x.transpose(0, 1)
        return self.norm(h + self.down(torch.tanh(self.up(h)))).mean(0)


def test_where_layers_do_not_tell_samples_apart_it_takes_a_pass_of_its_own() -> None:
    torch.manual_seed(0)
    model = PositionsFirst().double().eval()
    batch = {"x": torch.randn(4, 5, 3, dtype=torch.float64), "labels": torch.tensor([0, 1, 2, 1])}
    compensation, scores, apart, plain = both(model, [batch], None, kinds=("ffn",))
    assert_equal(compensation.moments, apart.moments)
    assert_equal(scores.sensitivity, plain.sensitivity)


def test_a_decision_checks_single_samples_once_and_runs_the_model_as_often_as_it_must() -> None:
    """A look at two batches, four passes over them, one sample alone, and four trials of what makes up for units."""
    model = bert().eval()
    wanted = config(method="mask_ggn", prune_ratio=0.5)
    evidence = evidence_of(model, [TEXT, TEXT], num_output_probes=1)
    runs: list[int] = []
    own = Forward.__init__

    def counting(self: Forward, *args: Any, **kwargs: Any) -> None:
        runs.append(args[1].num_samples)
        own(self, *args, **kwargs)

    with mock.patch.object(Forward, "__init__", counting):
        decide(evidence, wanted)
    assert runs == [1, 1] + [6, 1, 6] + [6, 6] * 3  # a look is at a batch as a whole
