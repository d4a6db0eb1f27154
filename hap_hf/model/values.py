"""Other values for parameters, which are replaced and never written to."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from hap_hf.host import own_parameters
from hap_hf.model.change import TensorChange, memory_format_of
from hap_hf.model.state import renew_caches


def replace_values_(model: nn.Module, values: Mapping[str, Tensor]) -> tuple[TensorChange, ...]:
    """Put new parameters in the place of some, with other values and everything else alike.

    Args:
        model: Any model; its old parameters keep their values, so that putting them back undoes this.
        values: Values by parameter name, in the parameter's shape and dtype and on its device.

    Returns:
        What changed, for :func:`hap_hf.surgery.carry_optimizer_state_`.
    """
    changes = []
    for name, value in values.items():
        old = model.get_parameter(name)
        copied = value.to(old.device, old.dtype, copy=True).contiguous(memory_format=memory_format_of(old))
        new = nn.Parameter(copied, requires_grad=old.requires_grad)
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
    """
    own = {name: model.get_parameter(name) for name in values}
    try:
        replace_values_(model, values)
        yield
    finally:
        # The objects from before and no copies, as optimizers hold them.
        for name, parameter in own.items():
            _put(model, name, parameter)
        renew_caches(model)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of one of the same name, and leave the order of the module's parameters as it is."""
    path, _, leaf = name.rpartition(".")
    own_parameters(model.get_submodule(path))[leaf] = parameter
