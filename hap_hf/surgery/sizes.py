"""Size attributes of modules that follow their parameters."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn

from hap_hf.layers import norms
from hap_hf.layers.implants import implant_segments
from hap_hf.layers.kind import kind_of
from hap_hf.layers.projection import known
from hap_hf.names.group import Slice
from hap_hf.names.plan import GroupPlan
from hap_hf.surgery.order import Order

Cuts = Mapping[str, Mapping[int, Sequence[tuple[Slice, GroupPlan]]]]
"""Slices of a stage with their plans, by tensor and dimension."""


def segments_left(module: nn.Module, path: str, cuts: Cuts) -> list[tuple[int, int]]:
    """Return the segment sizes of a layer that had its implant before this stage.

    Args:
        module: A layer with an implant from an earlier stage.
        path: Its name.
        cuts: What the stage cuts.

    Returns:
        Kept and implanted features of each segment after the stage.
    """
    kind, segments = known(module), implant_segments(module)

    def left(leaf: str, dim: int, sizes: Sequence[int]) -> list[int]:
        """Return how many features each segment of one weight has left."""
        pairs = cuts.get(f"{path}.{leaf}", {}).get(dim)
        # Cutting moves no unit to another segment, so the old indices in a segment's range are what it has left.
        survivors = Order(pairs, sum(sizes)).survivors if pairs else torch.arange(sum(sizes))
        bounds = torch.tensor([0, *sizes]).cumsum(0)
        return [int(((survivors >= a) & (survivors < b)).sum()) for a, b in pairwise(bounds.tolist())]

    # The two weights number their own outputs, segment after segment.
    kept = left("weight", kind.output_dim(module), [k for k, _ in segments])
    implanted = left(kind.makes[1], 0, [i for _, i in segments])
    return list(zip(kept, implanted, strict=True))


def sync_sizes_(module: nn.Module) -> None:
    """Let the size attributes that torch modules print and check follow their parameters.

    Args:
        module: A module whose parameters were cut.
    """
    kind = kind_of(module)
    if kind is not None:
        kind.sync_sizes_(module)
    else:
        norms.sync_sizes_(module)
