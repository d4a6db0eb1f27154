"""What is measured on is checked where it comes in, drawn once, and the same whoever measures."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scored_models import BATCH, config, net
from torch import Tensor

from hap_hf.curvature import rademacher
from hap_hf.errors import BatchError, UnsupportedModelError
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.mean import mean_loss
from hap_hf.evidence.precision import Precision
from hap_hf.evidence.processes import Processes

HALVES = [{k: v[:2] for k, v in BATCH.items()}, {k: v[2:] for k, v in BATCH.items()}]


def quiet(batches: Any, **settings: Any) -> Evidence:
    """Return evidence of the net without a progress bar."""
    return Evidence.of(net(), batches, **{"progress": False, **settings})


def test_batches_are_drawn_once_and_no_more_of_them_than_asked_for() -> None:
    drawn: list[int] = []

    def batches() -> Iterator[dict[str, Tensor]]:
        for i in range(5):
            drawn.append(i)
            yield {**BATCH, "x": BATCH["x"] + i}

    evidence = quiet(batches(), max_batches=3)
    first, second = ([loss().item() for loss, _ in evidence.losses()] for _ in range(2))
    assert drawn == [0, 1, 2]
    assert first == second
    assert len(set(first)) == 3


def test_without_a_limit_all_batches_are_used() -> None:
    assert len(quiet([BATCH] * 11, max_batches=None).batches) == 11
    assert len(quiet([BATCH] * 11).batches) == 8


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_pair_goes_to_the_first_argument_of_forward_and_to_labels(kind: type) -> None:
    (batch,) = quiet([kind((BATCH["x"], BATCH["labels"]))]).batches
    assert batch == {"x": BATCH["x"], "labels": BATCH["labels"]}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            (BATCH["x"],) * 3,
            r"expected a mapping or a pair of tensors, got a tuple of 3 \(Tensor, Tensor, Tensor\); pass mappings of",
        ),
        ([BATCH["x"], 1], r"expected a mapping or a pair of tensors, got a list of 2 \(Tensor, int\)"),
        (3.0, "expected a mapping, got float; pass mappings of argument names"),
        ("input_ids", "got the string 'input_ids', as of a single batch; put it in a list"),
        ({"text": ["a", "b"]}, r"expected tensors in the batch, got a mapping of \['text'\] to \['list'\]; let a coll"),
    ],
    ids=["triple", "pair_of_other_things", "number", "string", "mapping_without_tensors"],
)
def test_what_is_no_batch_is_an_error_that_says_which_one_it_is(bad: Any, message: str) -> None:
    with pytest.raises(BatchError, match=f"batch 1: {message}"):
        quiet([BATCH, bad])


def test_a_batch_that_is_not_reached_is_not_looked_at() -> None:
    assert len(quiet([BATCH, "no batch"], max_batches=1).batches) == 1


def test_a_single_batch_in_place_of_several_is_an_error() -> None:
    with pytest.raises(BatchError, match=r"expected several batches, got one with \['labels', 'x'\]; put it in a list"):
        quiet(BATCH)


def test_what_is_no_model_is_an_error_that_finds_the_one_inside() -> None:
    with pytest.raises(UnsupportedModelError, match=r"expected a model, a torch.nn.Module, got a str$"):
        Evidence.of("bert-base-uncased", [BATCH])
    with pytest.raises(UnsupportedModelError, match=r"got a SimpleNamespace \(a pipeline's is pipeline.model\)"):
        Evidence.of(SimpleNamespace(model=net()), [BATCH])


def test_no_batches_are_an_error_where_one_is_needed() -> None:
    evidence = quiet([])
    with pytest.raises(
        BatchError, match="expected at least one batch, got none: the model is run on it to see what can be removed"
    ):
        _ = evidence.example
    with pytest.raises(BatchError, match="expected at least one batch, got none"):
        mean_loss(evidence)


def test_a_config_makes_evidence_with_its_own_settings() -> None:
    loss = lambda model, batch: model(**batch).loss  # ruff: ignore[lambda-assignment]
    evidence = config(precision="bf16", seed=3, max_batches=1).evidence(net(), [BATCH] * 2, loss_fn=loss)
    assert (evidence.precision, evidence.seed, evidence.progress) == (Precision.BF16, 3, False)
    assert (len(evidence.batches), evidence.loss_fn) == (1, loss)


def test_the_mean_loss_is_that_of_all_loss_terms_however_they_are_batched() -> None:
    labels = BATCH["labels"].clone()
    labels[[0, 4]] = -100
    whole = {**BATCH, "labels": labels}
    expected = net()(**whole).loss.item()
    parts = [{k: v[rows] for k, v in whole.items()} for rows in (slice(0, 1), slice(1, 2), slice(2, 6))]
    assert mean_loss(quiet([whole])) == pytest.approx(expected, rel=1e-12)
    assert mean_loss(quiet(parts)) == pytest.approx(expected, rel=1e-12)  # the first part has no term at all


def test_a_mean_loss_that_is_not_finite_is_infinite() -> None:
    assert mean_loss(quiet([BATCH, {**BATCH, "x": BATCH["x"] * float("nan")}])) == float("inf")


@pytest.mark.parametrize("rank", [0, 1])
def test_signs_are_those_of_the_batch_among_the_batches_of_all_processes(rank: int) -> None:
    tensors = {"w": torch.zeros(3, 5)}
    own = quiet(HALVES[rank:], processes=Processes(rank, 2), seed=4).signs(tensors, 3, 1)
    alone = quiet(HALVES, seed=4).signs(tensors, 3 * 2 + rank, 1)
    assert torch.equal(own["w"], alone["w"])
    assert torch.equal(own["w"], rademacher(tensors, 4, 3 * 2 + rank, 1)["w"])
