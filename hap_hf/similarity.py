"""Units that repeat each other: what one of them says can be read from another one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.discovery import find_groups
from hap_hf.errors import BatchError, ConfigError
from hap_hf.layers.projection import is_projection, known, output_dim, spatial_dims
from hap_hf.names.group import Group, Role, Slice
from hap_hf.surgery import collect_input_moments

_TOO_SMALL = 1e-12
"""Units with less than this share of the energy of a group's largest one say nothing, and repeat nobody."""


@dataclass(frozen=True, eq=False)
class SimilarUnits:
    """A unit that another one of its group can stand in for.

    Args:
        group: Name of the group.
        unit: The unit that could go.
        other: The unit that could stand in for it.
        explained: Share of what the unit tells the layer that reads it, squared, which follows from the other one; 1
            for an exact repetition.
        factor: What the other one is to be multiplied with, ``[width, width]``: a number for neurons and channels.
    """

    group: str
    unit: int
    other: int
    explained: float
    factor: Tensor

    def __str__(self) -> str:
        """Return it as in ``encoder.layer.0:ffn: 7 repeats 3 (99.2%)``."""
        return f"{self.group}: {self.unit} repeats {self.other} ({self.explained:.1%})"


def similar_units(model: nn.Module, batches: Iterable[Any], *, least: float = 0.95) -> tuple[SimilarUnits, ...]:
    r"""Return which units of a model repeat each other on some batches.

    With the second moments C of the inputs of the layer that reads the units, and D its columns, a unit v is read from
    another one u best as :math:`x_v \approx A x_u` with :math:`A = C_{vu} C_{uu}^{-1}`, which explains the share
    :math:`\operatorname{tr}(D_v A C_{uv} D_v^T) / \operatorname{tr}(D_v C_{vv} D_v^T)`. For neurons and channels that
    is the squared cosine of their responses. Of convolutions the pixel in the middle of each patch counts.

    Removing one of two such units and keeping the other costs next to nothing once the layers are fitted again, which
    ``prune`` does; this says where a model has room and why. Heads, neurons and filters of one function are the subject
    of Qin et al., "Functionality-Oriented Convolutional Filter Pruning", 2018, which finds them by images that excite
    them.

    Args:
        model: The model, left as found.
        batches: As for ``prune``; labels are not needed.
        least: Smallest share to be told, in (0, 1].

    Returns:
        For each unit that repeats another one, the one that it repeats most, the closest first.

    Raises:
        BatchError: If there are no batches.
        ConfigError: If ``least`` is out of range.
        UnsupportedModelError: If the model cannot be analysed.
    """
    if isinstance(least, bool) or not isinstance(least, (int, float)) or not 0 < least <= 1:
        raise ConfigError(f"least must be a share in (0, 1], got {least!r}")
    given = list(batches)
    if not given:
        raise BatchError("expected batches to look at the responses of units, got none")
    read = {g.name: (g, s) for g in find_groups(model, given[0]) if (s := _reader(model, g)) is not None}
    moments = collect_input_moments(model, {s.tensor for _, s in read.values()}, given)
    found = [pair for g, s in read.values() if s.tensor in moments for pair in _pairs(model, g, s, moments[s.tensor])]
    return tuple(sorted((p for p in found if p.explained >= least), key=lambda p: -p.explained))


def _reader(model: nn.Module, group: Group) -> Slice | None:
    """Return where the units are read, by a layer that knows the moments of its inputs."""
    for s in group.slices:
        path, _, leaf = s.tensor.rpartition(".")
        if s.role is Role.CONSUMER and leaf == "weight":
            module = model.get_submodule(path)
            if is_projection(module) and spatial_dims(module) in {0, 2} and known(module).knows_rows(module):
                return s
    return None


def _pairs(model: nn.Module, group: Group, read: Slice, moment: Tensor) -> Iterator[SimilarUnits]:
    """Yield for each unit of a group the other one that explains most of it."""
    module = model.get_submodule(read.tensor.rpartition(".")[0])
    inputs, units, width = moment.shape[1], group.num_units, read.width
    whole = moment.view(inputs, -1, inputs)
    whole = whole[:, whole.shape[1] // 2]  # centres with centres
    chosen = slice(read.offset, read.offset + units * width)
    blocks = whole[chosen, chosen].reshape(units, width, units, width).transpose(1, 2)  # [units, units, width, width]
    weight = module.get_parameter("weight").detach().double().movedim(output_dim(module), 0)
    columns = weight[:, chosen].reshape(len(weight), units, width, -1).movedim(3, 1).flatten(0, 1)
    weights = torch.einsum("oui,ouj->uij", columns, columns).to(blocks.device)  # D^T D, [units, width, width]
    energy = torch.einsum("uij,uuji->u", weights, blocks)
    inverse = torch.linalg.pinv(torch.einsum("uuij->uij", blocks), hermitian=True)
    factors = torch.einsum("vuij,ujk->vuik", blocks, inverse)
    explained = torch.einsum("vij,vujk,uvki->vu", weights, factors, blocks)
    talking = energy > energy.amax() * _TOO_SMALL
    shares = torch.where(talking[:, None] & talking, explained / energy[:, None], torch.zeros_like(explained))
    shares.fill_diagonal_(0)
    for unit, (share, other) in enumerate(zip(*shares.max(1), strict=True)):
        if units > 1 and talking[unit]:
            yield SimilarUnits(group.name, unit, int(other), min(share.item(), 1.0), factors[unit, int(other)])
