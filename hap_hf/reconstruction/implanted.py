"""Rows of weights that an implant will compute: what the layers behind it are fitted to is what it gives them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hap_hf.layers.projection import known, output_dim
from hap_hf.names.actions import IMPLANT
from hap_hf.names.group import Role
from hap_hf.names.plan import GroupPlan


@dataclass(frozen=True)
class ImplantedRows:
    """Outputs of a layer that an implant will compute.

    Args:
        rows: Their indices, in ascending order.
        rank: Rank of the implant; 1 for a convolution.
    """

    rows: Sequence[int]
    rank: int

    def approximated(self, module: nn.Module, weight: Tensor, kept: Tensor, moment: Tensor) -> Tensor:
        """Return a weight whose implanted rows are those that the implant can compute.

        Args:
            module: The layer.
            weight: Its weight, or what it is to be.
            kept: Inputs that stay; what reads the others is left as it is.
            moment: Second moment of the kept inputs, of a convolution that of its patches.

        Returns:
            The weight, in the dtype that it had.
        """
        out = output_dim(module)
        index = torch.tensor(self.rows, dtype=torch.long, device=weight.device)
        rows = weight.detach().movedim(out, 0)
        some = rows.index_select(0, index)
        fitted = known(module).approximated(some.index_select(1, kept), self.rank, moment)
        some = some.index_copy(1, kept, fitted)
        return rows.index_copy(0, index, some).movedim(0, out).contiguous()


def implanted_rows(stage: Sequence[GroupPlan]) -> dict[str, ImplantedRows]:
    """Return the rows that implants will compute.

    Args:
        stage: What happens to the units.

    Returns:
        The rows by the name of the layer.
    """
    rows, ranks = defaultdict[str, set[int]](set), dict[str, int]()
    for g in stage:
        for s in g.group.slices if g.implanted else ():
            if s.role is Role.PRODUCER and s.tensor in g.ranks:
                path = s.tensor.rpartition(".")[0]
                rows[path] |= {i for u in g.units(IMPLANT) for i in s.indices(u)}
                # All slices of a weight share one implant, of the largest rank, as surgery has it.
                ranks[path] = max(ranks.get(path, 0), g.ranks[s.tensor])
    return {path: ImplantedRows(sorted(rows[path]), rank) for path, rank in ranks.items()}
