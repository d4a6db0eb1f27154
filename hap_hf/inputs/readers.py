"""Layers that read units, whose weights can make up for units that go."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from hap_hf.host import own_parameters
from hap_hf.layers.projection import is_projection, known
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
        groups: The groups whose units may go.

    Returns:
        Linear layers and ungrouped convolutions, without those that share a weight with other layers, which would get
        two answers, and those that standardise their weights.
    """
    # By module and not by name: one module under two paths has one input and one answer.
    users = Counter(id(p) for module in model.modules() for p in own_parameters(module).values())
    dims: dict[str, dict[str, int]] = defaultdict(dict)
    for group in groups:
        for s in group.slices:
            if s.role is Role.CONSUMER:
                dims[s.tensor.rpartition(".")[0]][s.tensor] = s.dim
    # A weight that is standardised in each forward pass would not act as it was fitted.
    return [
        Reader(path, inputs, known(module).takes_constant(module))
        for path, inputs in dims.items()
        if is_projection(module := model.get_submodule(path)) and known(module).fixed
        if all(users[id(model.get_parameter(name))] == 1 for name in inputs)
    ]
