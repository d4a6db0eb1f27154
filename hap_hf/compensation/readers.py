"""Layers that read units, whose weights can make up for units that go."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from hap_hf.layers.projection import IMPLANTED, is_projection, spatial_dims
from hap_hf.layers.standardised import is_standardised
from hap_hf.names.group import Group, Role


@dataclass(frozen=True)
class Reader:
    """A layer that reads units.

    Args:
        path: Dotted name of the module.
        inputs: The dimension along which its inputs lie, by the name of each tensor that reads them.
        takes_constant: Whether its bias can take up what the units are on average.
    """

    path: str
    inputs: Mapping[str, int]
    takes_constant: bool

    @property
    def bias(self) -> str:
        """Name of the bias."""
        return f"{self.path}.bias"


def readers_of(model: nn.Module, groups: Iterable[Group]) -> list[Reader]:
    """Return the layers that read the units of ``groups`` and compute what their weights say.

    Args:
        model: The model that the groups were found in.
        groups: Its groups.

    Returns:
        Linear layers and ungrouped convolutions, without those that share a weight with other layers, which would get
        two answers, and those that standardise their weights.
    """
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    dims: dict[str, dict[str, int]] = defaultdict(dict)
    for group in groups:
        for s in group.slices:
            if s.role is Role.CONSUMER:
                dims[s.tensor.rpartition(".")[0]][s.tensor] = s.dim
    return [
        Reader(path, inputs, _takes_constant(module))
        for path, inputs in dims.items()
        if is_projection(module := model.get_submodule(path)) and not is_standardised(module)
        if all(users[id(model.get_parameter(name))] == 1 for name in inputs)
    ]


def _takes_constant(module: nn.Module) -> bool:
    if isinstance(module, IMPLANTED) or not isinstance(getattr(module, "bias", None), nn.Parameter):
        return False
    # Where a kernel reaches beyond the image, it reads zeros and no constant.
    return not spatial_dims(module) or module.get_parameter("weight").shape[2:].numel() == 1
