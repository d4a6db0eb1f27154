"""Groups and scores without a model."""

from collections.abc import Mapping, Sequence

import torch

from hap_hf.criteria import Scores
from hap_hf.names.group import Group, Kind, Role, Slice

TOKENS = 10.0


def heads_group(name: str, num_units: int, *, width: int = 4, hidden: int = 16, core_macs: float = 50.0) -> Group:
    """Return attention heads: query, key, value and output projection, the first three with biases."""
    size = num_units * width
    slices = []
    for part in ("q", "k", "v"):
        slices.append(Slice(f"{name}.{part}.weight", (size, hidden), 0, 0, width, Role.PRODUCER, TOKENS))
        slices.append(Slice(f"{name}.{part}.bias", (size,), 0, 0, width, Role.ALIGNED))
    slices.append(Slice(f"{name}.o.weight", (hidden, size), 1, 0, width, Role.CONSUMER, TOKENS))
    return Group(f"{name}:heads", Kind.HEADS, num_units, tuple(slices), core_macs=core_macs)


def ffn_group(name: str, num_units: int, *, hidden: int = 16, bias: bool = True) -> Group:
    """Return FFN neurons: up projection and down projection."""
    slices = [Slice(f"{name}.up.weight", (num_units, hidden), 0, 0, 1, Role.PRODUCER, TOKENS)]
    if bias:
        slices.append(Slice(f"{name}.up.bias", (num_units,), 0, 0, 1, Role.ALIGNED))
    slices.append(Slice(f"{name}.down.weight", (hidden, num_units), 1, 0, 1, Role.CONSUMER, TOKENS))
    return Group(f"{name}:ffn", Kind.FFN, num_units, tuple(slices))


def scores_of(
    sensitivity: Mapping[Group, Sequence[float]], standard_error: Mapping[Group, Sequence[float]] | None = None
) -> Scores:
    """Return scores that hold these numbers."""
    values = {g.name: torch.tensor(list(v), dtype=torch.float64) for g, v in sensitivity.items()}
    errors = {g.name: torch.tensor(list(v), dtype=torch.float64) for g, v in (standard_error or {}).items()}
    return Scores(
        values,
        {name: errors.get(name, torch.zeros_like(v)) for name, v in values.items()},
        "hessian",
        num_probes=8,
        num_batches=3,
        num_loss_terms=24,
        seconds=1.5,
    )


def random_scores(groups: Sequence[Group], seed: int) -> Scores:
    """Return normally distributed scores, some of them negative, on another scale for each group."""
    generator = torch.Generator().manual_seed(seed)
    return scores_of({
        g: (torch.randn(g.num_units, generator=generator).double() * 3**i + 1).tolist() for i, g in enumerate(groups)
    })
