"""Slow and simple truths, written without importing hap_hf."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def masked(model: nn.Module, removed: Mapping[Any, list[int]]) -> Generator[nn.Module]:
    """Zero units where they are consumed: the input channels of the layers that read them."""
    channels: dict[str, list[int]] = {}
    for group, units in removed.items():
        for s in group.slices:
            if s.role == "consumer":
                module = s.tensor.rpartition(".")[0]
                for u in units:
                    channels.setdefault(module, []).extend(range(s.offset + u * s.width, s.offset + (u + 1) * s.width))

    def zero(indices: list[int]) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0].clone()
            dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
            spatial = next((n for kind, n in dims.items() if isinstance(module, kind)), 0)
            x.movedim(-1 - spatial, 0)[indices] = 0
            return (x, *args[1:])

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(zero(i)) for n, i in channels.items()]
    try:
        yield model
    finally:
        for h in handles:
            h.remove()


def logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the model's logits in eval mode."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        result = model(**batch).logits
    model.train(was_training)
    return result


def uneven_removal(groups: Any, seed: int = 0) -> dict[Any, list[int]]:
    """Return a random choice of units for each group, a different number in neighbouring ones, never all."""
    generator = torch.Generator().manual_seed(seed)
    removed = {}
    for i, group in enumerate(groups):
        n = group.num_units
        count = 1 + (i + seed) % (n - 1)
        removed[group] = torch.randperm(n, generator=generator)[:count].tolist()
    return removed
