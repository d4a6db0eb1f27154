"""Other values for parameters, which are replaced and never written to."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from hap_hf.model.change import TensorChange, memory_format_of
from hap_hf.model.state import renew_caches


def replace_values_(model: nn.Module, values: Mapping[str, Tensor]) -> tuple[TensorChange, ...]:
    """Put new parameters in the place of some, with other values and everything else alike.

    Args:
        model: The model.
        values: Values by parameter name, in the parameter's shape and dtype and on its device.

    Returns:
        What changed, for :func:`hap_hf.surgery.carry_optimizer_state_`.
    """
    changes = []
    for name, value in values.items():
        old = model.get_parameter(name)
        new = nn.Parameter(value.clone(memory_format=memory_format_of(old)), requires_grad=old.requires_grad)
        new.grad = old.grad
        _put(model, name, new)
        changes.append(TensorChange(name, old, new))
    renew_caches(model)
    return tuple(changes)


@contextmanager
def replaced_values(model: nn.Module, values: Mapping[str, Tensor]) -> Generator[None]:
    """Give some parameters other values inside the block.

    Args:
        model: The model, afterwards with the parameters that it had.
        values: As for :func:`replace_values_`.

    Yields:
        Nothing.
    """
    own = {name: model.get_parameter(name) for name in values}
    try:
        replace_values_(model, values)
        yield
    finally:
        for name, parameter in own.items():
            _put(model, name, parameter)
        renew_caches(model)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = parameter
