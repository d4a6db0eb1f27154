"""Products with the Hessian by finite differences and by dual numbers leave nothing behind."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from scored_models import BATCH, FFN, bert, config, heads, net, score, snapshot, text_batch
from torch import Tensor, nn

from hap_hf.curvature import FiniteDifference

OTHERS = ["finite_difference", "forward_over_reverse"]


@pytest.mark.parametrize("hvp", OTHERS)
@pytest.mark.parametrize("ending", [None, ValueError("loss failed"), KeyboardInterrupt()], ids=repr)
def test_weights_and_all_else_are_bit_for_bit_as_before_however_scoring_ends(
    ending: BaseException | None, hvp: str
) -> None:
    model = bert().train()
    before, values = snapshot(model), [p.tolist() for p in model.parameters()]
    calls: list[bool] = []

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        calls.append([p.tolist() for p in model.parameters()] == values)
        if ending is not None and len(calls) == 3:
            raise ending
        return model(**batch).loss

    def run() -> None:
        batch = text_batch(labels=torch.tensor([0, 1, 1]))
        score(model, [heads(0)], [batch], config(num_probes=2, hvp=hvp), loss_fn=loss)

    if ending is None:
        run()
    else:
        with pytest.raises(type(ending)):
            run()
    assert snapshot(model) == before
    assert calls[0]
    assert calls[2] is (hvp != "finite_difference")


def test_a_ctrl_c_while_weights_are_put_back_does_not_leave_them_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before = snapshot(model)
    original, calls = torch.clear_autocast_cache, []

    def interrupted() -> None:
        calls.append(1)
        if len(calls) == 3:  # ahead, behind, back again
            model.up.weight.data[0] += 1
            raise KeyboardInterrupt
        original()

    monkeypatch.setattr(torch, "clear_autocast_cache", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(model, [FFN], [BATCH], config(hvp="finite_difference"))
    assert snapshot(model) == before


class Cached(nn.Module):
    """A layer that keeps a table made from its weights while in eval mode, as LeViT does."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.weight = inner, inner.weight
        self.table: Tensor | None = None

    def train(self, mode: bool = True) -> "Cached":
        """Drop the table in training mode."""
        if mode:
            self.table = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with the table."""
        if self.table is None:
            self.table = self.inner.weight.square()
        return x @ self.table.T


@pytest.mark.parametrize("hvp", OTHERS)
def test_what_layers_keep_from_their_weights_is_made_anew(hvp: str) -> None:
    plain, cached = net(), net()
    plain.up, cached.up = Cached(plain.up), Cached(cached.up)
    found, truth = (
        score(m, [FFN], [BATCH], config(hvp=h)).sensitivity["net:ffn"]
        for m, h in ((cached, hvp), (plain, "double_backward"))
    )
    assert (found - truth).norm() < 1e-6 * truth.norm()
    assert cached.up.table is None


def test_weights_and_vectors_of_zeros_are_no_division_by_zero() -> None:
    zero = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    ones, none = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    way = FiniteDifference(0, lambda: zero.square().sum(), {"zero": zero}, 1.0)
    torch.testing.assert_close(way.product({"zero": ones})["zero"], 2 * ones)
    assert torch.equal(way.product({"zero": none})["zero"], none)
