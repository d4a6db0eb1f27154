"""Scoring leaves the model as found, and says what is wrong with bad input."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scored_models import BATCH, FFN, bert, config, heads, net, score, snapshot, text_batch
from torch import Tensor, nn

from hap_hf.errors import BatchError, CurvatureError, UnsupportedModelError
from hap_hf.names.group import Group, Kind, Role, Slice


def prepared() -> nn.Module:
    """Return a training BERT with a frozen weight and a stored gradient."""
    model = bert().train()
    model.bert.embeddings.eval()
    model.get_parameter("bert.encoder.layer.0.attention.self.query.weight").requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    return model


def labelled() -> dict[str, Tensor]:
    """Return a batch with labels."""
    return text_batch(labels=torch.tensor([0, 1, 1]))


@pytest.mark.parametrize("ending", [None, ValueError("loss failed"), KeyboardInterrupt()], ids=repr)
def test_the_model_is_left_as_found_however_scoring_ends(ending: BaseException | None) -> None:
    model = prepared()
    before = snapshot(model)
    calls: list[int] = []

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        calls.append(1)
        torch.rand(1)
        assert not model.training
        if ending is not None and len(calls) == 2:
            raise ending
        return model(**batch).loss

    def run() -> None:
        score(model, [heads(0)], [labelled()] * 2, config(num_probes=2), loss_fn=loss)

    if ending is None:
        run()
    else:
        with pytest.raises(type(ending)):
            run()
    assert len(calls) == 2
    assert snapshot(model) == before


def test_frozen_weights_are_scored_like_others() -> None:
    plain, frozen = bert(), bert().requires_grad_(False)
    first, second = (
        score(m, [heads(1)], [labelled()], config(num_probes=2)).sensitivity[heads(1).name] for m in (plain, frozen)
    )
    assert torch.equal(first, second)


def test_dropout_and_training_mode_do_not_matter() -> None:
    first, second = (
        score(m, [heads(1)], [labelled()], config(num_probes=2)).sensitivity[heads(1).name]
        for m in (bert().train(), bert().eval())
    )
    assert torch.equal(first, second)


def test_gradient_checkpointing_does_not_matter_and_stays_on() -> None:
    plain, checkpointed = bert(), bert().train()
    for module in checkpointed.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    first, second = (
        score(m, [heads(0)], [labelled()], config(num_probes=2)).sensitivity[heads(0).name]
        for m in (plain, checkpointed)
    )
    assert torch.equal(first, second)
    assert checkpointed.bert.encoder.layer[0].gradient_checkpointing


def test_batches_without_labels_are_an_error() -> None:
    with pytest.raises(
        BatchError, match=r"hold no labels, and without any every gradient that taylor is made of is zero"
    ):
        score(net(), [FFN], [{"x": BATCH["x"]}], config(method="taylor"))


def test_a_model_that_returns_a_dict_without_loss_is_an_error() -> None:
    model = net()
    model.forward = lambda x, labels: {"hidden": x}
    with pytest.raises(BatchError, match="returned no loss"):
        score(model, [FFN], [BATCH], config())


def test_no_batches_are_an_error() -> None:
    with pytest.raises(BatchError, match="expected at least one batch, got none"):
        score(net(), [FFN], [], config())


def test_batches_of_ignored_labels_only_are_an_error() -> None:
    batch = {**BATCH, "labels": torch.full((6,), -100)}
    with pytest.raises(BatchError, match="expected loss terms in the batches, got 1 with none"):
        score(net(), [FFN], [batch], config())


def test_a_batch_that_is_no_mapping_is_an_error() -> None:
    with pytest.raises(BatchError, match=r"batch 1: expected a mapping or a pair of tensors, got a tuple of 3 \("):
        score(net(), [FFN], [BATCH, (BATCH["x"], BATCH["labels"], BATCH["labels"])], config())


def test_a_pair_of_inputs_and_labels_is_scored_as_the_mapping_it_stands_for() -> None:
    pairs, mappings = (
        score(net(), [FFN], batches, config()).sensitivity["net:ffn"]
        for batches in ([(BATCH["x"], BATCH["labels"]), [BATCH["x"], BATCH["labels"]]], [BATCH] * 2)
    )
    assert torch.equal(pairs, mappings)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    spoilt = {**BATCH, "x": BATCH["x"] * float("nan")}
    with pytest.raises(CurvatureError, match="batch 1: expected a finite loss, got nan"):
        score(net(), [FFN], [BATCH, spoilt], config())


def test_a_loss_that_does_not_depend_on_the_weights_is_an_error() -> None:
    constant = torch.ones((), dtype=torch.float64)
    with pytest.raises(CurvatureError, match="batch 0: expected a loss that depends on the weights"):
        score(net(), [FFN], [BATCH], config(), loss_fn=lambda model, batch: constant)


def test_no_groups_are_an_error() -> None:
    with pytest.raises(UnsupportedModelError, match="expected at least one group to score, got none"):
        score(net(), [], [BATCH], config())


def test_a_group_without_matrices_is_an_error() -> None:
    group = Group("biases", Kind.FFN, 4, (Slice("up.bias", (4,), 0, 0, 1, Role.ALIGNED),))
    with pytest.raises(UnsupportedModelError, match="biases has no weight matrix"):
        score(net(), [group], [BATCH], config())


@pytest.mark.parametrize(
    ("name", "shape", "got"),
    [("up.wait", (4, 3), "none"), ("up.weight", (5, 3), r"\[4, 3\] of torch.float64")],
)
def test_groups_of_another_model_are_an_error(name: str, shape: tuple[int, ...], got: str) -> None:
    group = Group("ffn", Kind.FFN, 4, (Slice(name, shape, 0, 0, 1, Role.PRODUCER),))
    with pytest.raises(
        UnsupportedModelError, match=rf"ffn: expected a floating-point parameter {name} .* Net, got {got}"
    ):
        score(net(), [group], [BATCH], config())


def test_quantized_weights_are_an_error() -> None:
    model = net()
    model.up.weight = nn.Parameter(torch.ones(4, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"up.weight .* got \[4, 3\] of torch.int8"):
        score(model, [FFN], [BATCH], config())


def test_foreign_attention_kernels_are_an_error() -> None:
    model = net()
    model.down.config = SimpleNamespace(_attn_implementation="flash_attention_2")
    with pytest.raises(UnsupportedModelError, match="'flash_attention_2', which may not be differentiable twice"):
        score(model, [FFN], [BATCH], config())
