"""The benchmark of what pruning costs."""

import argparse

import cost
import pytest
import torch

OWN = argparse.Namespace(batches=2, batch=3, tokens=8)


@pytest.mark.parametrize("subject", ["bert:1x32", "llama:1x64"])
def test_a_row_counts_what_was_done(subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(cost.time, "process_time", lambda: next(clock))  # each stage takes a second
    text = cost.main([subject, "--batches", "2", "--batch", "3", "--tokens", "8", "--repeats", "1"])
    header, _, row = (line.strip("| ").split(" | ") for line in text.splitlines()[:3])
    assert header[1:] == cost.COLUMNS
    one, discovery, decision, surgery, both, forwards, gradients, factors = map(float, row[1:])
    assert (one, discovery, decision, surgery, both) == (1, 1, 0, 1, 2)
    # Four passes and four trials of what makes up for units over both batches, and what discovery runs.
    assert forwards > 2 * (4 + 4)
    assert gradients > 2 * 4
    assert factors > 0


def test_images_get_norms_that_do_something() -> None:
    model, batches = cost.made("timm:resnet18@32", OWN)
    assert [b["x"].shape for b in batches] == [(3, 3, 32, 32)] * 2
    assert all(bool((m.weight > 0).all()) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_what_is_counted_is_put_back() -> None:
    own = torch.autograd.grad
    with cost.counted(torch.nn.Linear(2, 2)) as counts:
        assert torch.autograd.grad is not own
        torch.linalg.cholesky_ex(torch.eye(2))
    assert torch.autograd.grad is own
    assert dict(counts) == {"factors": 1}
