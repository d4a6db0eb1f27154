"""How batches fall into samples, and the forms in which they come."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hap_hf.errors import BatchError
from hap_hf.evidence.batches import as_batch, batch_size, call, called_with, few_samples
from hap_hf.evidence.samples import num_samples, part_of

X, Y = torch.arange(12.0).view(4, 3), torch.arange(4)
BOXES = [{"class_labels": torch.tensor([i]), "boxes": torch.full((i + 1, 4), float(i))} for i in range(4)]
Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ({"x": X, "labels": BOXES}, 4),
        ({"x": torch.zeros(9, 2), "labels": Y}, 4),
        ({"x": X, "target": Y}, 4),
        ({"x": X, "names": ["a", "b"]}, 4),
        ({"x": {"left": X, "right": X}}, 4),
        ({"flag": True, "x": list(X)}, 4),
        ((X, Y), 4),
        ((torch.zeros(9, 2), {"meta": X}, Y), 4),
        (BOXES, 4),
        ({"labels": torch.tensor(1.0), "x": X}, 4),
        (object(), 1),
        ({"text": "abc"}, 1),
    ],
)
def test_labels_say_how_many_samples_there_are_and_else_what_comes_first(batch: Any, size: int) -> None:
    assert num_samples(batch) == size


def test_lists_are_cut_along_with_tensors() -> None:
    batch = {"x": X, "labels": BOXES, "names": list("abcd"), "table": torch.zeros(7), "flag": True, "one": X.sum()}
    part = part_of(batch, slice(1, 3))
    assert torch.equal(part["x"], X[1:3])
    assert part["labels"] == BOXES[1:3]
    assert part["names"] == ["b", "c"]
    assert part["table"].shape == (7,)
    assert part["flag"] is True
    assert part["one"].dim() == 0


@pytest.mark.parametrize("kind", [tuple, list, Pair._make])
def test_a_part_has_the_form_of_the_whole(kind: Any) -> None:
    whole = kind([X, Y])
    part = part_of(whole, slice(2, 3))
    assert type(part) is type(whole)
    assert [t.tolist() for t in part] == [X[2:3].tolist(), [2]]


def test_a_list_of_samples_is_cut_between_them() -> None:
    assert part_of(BOXES, slice(0, 2)) == BOXES[:2]


def test_rows_by_the_sample_are_cut_where_that_is_asked_for() -> None:
    patches = torch.arange(8.0)
    batch = {"patches": patches, "labels": Y}
    assert part_of(batch, slice(1, 2))["patches"].shape == (8,)
    assert part_of(batch, slice(1, 2), multiples=True)["patches"].tolist() == [2.0, 3.0]


def test_few_samples_are_taken_where_all_agree_on_what_a_sample_is() -> None:
    few = few_samples({"x": X, "labels": BOXES})
    assert len(few["x"]) == len(few["labels"]) == 2
    packed = {"x": X, "patches": torch.zeros(10, 2)}
    assert few_samples(packed) == packed


class Net(nn.Module):
    """Takes inputs, labels and a flag."""

    def forward(self, x: Tensor, labels: Tensor | None = None, *, flag: bool = False) -> Any:
        """Return everything."""
        return x, labels, flag


@pytest.mark.parametrize("batch", [X, [X], (X,)])
def test_inputs_alone_go_to_the_first_argument(batch: Any) -> None:
    assert list(as_batch(Net(), batch)) == ["x"]


def test_images_of_several_sizes_are_a_list() -> None:
    batch = as_batch(Net(), ([torch.zeros(3, 4, 4), torch.zeros(3, 5, 4)], Y[:2]))
    assert [len(v) for v in batch.values()] == [2, 2]
    assert batch_size({"x": batch["x"]}) == 2


def test_three_parts_need_a_loss_that_takes_them() -> None:
    with pytest.raises(BatchError, match=r"got a tuple of 3 .*or loss_fn=lambda model, batch: ..., which gets batches"):
        as_batch(Net(), (X, X, Y))


def test_a_model_gets_what_its_forward_takes() -> None:
    assert call(Net(), {"x": X, "file": ["a"] * 4, "flag": True}) == (X, None, True)


def test_what_a_loss_calls_the_model_with_is_seen() -> None:
    model = Net()
    model.weight = nn.Parameter(torch.ones(3))

    ended = []

    def run() -> None:
        model(X * model.weight, flag=True)
        model(X, flag=False)
        ended.append(True)

    found = called_with(model, run)
    assert found is not None
    assert torch.equal(found["x"], X)
    assert not found["x"].requires_grad
    assert found["flag"] is True
    assert ended
    assert called_with(model, lambda: model.weight.sum()) is None
    assert called_with(model, lambda: {}["x"]) is None
    assert not model._forward_pre_hooks
