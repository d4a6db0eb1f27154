"""The new order of the indices of a tensor dimension."""

from collections.abc import Sequence

import torch

from hap_hf.names.actions import IMPLANT, KEEP
from hap_hf.names.group import Role, Slice
from hap_hf.names.plan import GroupPlan


class Order:
    """The new order of the indices of one dimension.

    Of each slice the kept units come first and the implanted ones behind them, in every tensor alike: a layer with an
    implant concatenates its two parts in each segment, and what follows or reads it must have its outputs' order.

    Args:
        pairs: Slices along the dimension with the plans of their groups.
        size: Size of the dimension.

    Attributes:
        segments: Number of kept and of implanted indices in each segment; one a slice, and one for the rest.
        kept: Old indices of what stays as it is.
        factored: Old indices of implanted units: the rows that an implant replaces, along the outputs of a layer.
        read_from_implants: Those of ``factored`` that read implanted units and do not make them.
        survivors: Old indices of everything that is left, in its new order.
    """

    def __init__(self, pairs: Sequence[tuple[Slice, GroupPlan]], size: int) -> None:
        self.segments: list[tuple[int, int]] = []
        kept: list[int] = []
        factored: list[int] = []
        read: list[int] = []
        survivors: list[int] = []
        position = 0
        for s, g in sorted(pairs, key=lambda pair: pair[0].offset):
            whole = [i for u in g.units(KEEP) for i in s.indices(u)]
            implanted = [i for u in g.units(IMPLANT) for i in s.indices(u)]
            # Indices between slices belong to no unit: they stay, with the kept part of the segment that follows.
            before = list(range(position, s.offset))
            kept += before + whole
            factored += implanted
            read += implanted if s.role is Role.CONSUMER else []
            survivors += before + whole + implanted
            self.segments.append((len(before) + len(whole), len(implanted)))
            position = s.offset + g.group.num_units * s.width
        # Likewise behind the last slice, where no segment follows.
        rest = list(range(position, size))
        if rest:
            self.segments.append((len(rest), 0))
        self.kept = torch.tensor(kept + rest, dtype=torch.long)
        self.factored = torch.tensor(factored, dtype=torch.long)
        self.read_from_implants = torch.tensor(read, dtype=torch.long)
        self.survivors = torch.tensor(survivors + rest, dtype=torch.long)
