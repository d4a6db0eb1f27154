"""Other values for parameters, which are replaced and never written to."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from hap_hf.curvature.state import renew_caches
from hap_hf.surgery.apply import TensorChange, memory_format_of


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
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = module.get_parameter(leaf)
        new = nn.Parameter(value.clone(memory_format=memory_format_of(old)), requires_grad=old.requires_grad)
        new.grad = old.grad
        module._parameters[leaf] = new
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
    own = dict(model.named_parameters(remove_duplicate=False))
    try:
        replace_values_(model, values)
        yield
    finally:
        for name in values:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = own[name]
        renew_caches(model)
