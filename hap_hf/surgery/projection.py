"""Which modules multiply by a weight matrix, and how they store it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hap_hf.surgery.implant import ImplantLinear

_LINEAR = {nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear}


def _is_conv1d(module: nn.Module) -> bool:
    # transformers' transposed linear layer of GPT-2, recognised without importing transformers.
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_projection(module: nn.Module) -> bool:
    """Return whether ``module`` computes ``x W + b`` and nothing else.

    Args:
        module: Any module.

    Returns:
        True for ``nn.Linear``, transformers' ``Conv1D`` and layers with implants.
    """
    # Exact types: a subclass may compute something else with the weight (adapters, quantization).
    return isinstance(module, ImplantLinear) or type(module) in _LINEAR or _is_conv1d(module)


def output_dim(module: nn.Module) -> int:
    """Return the dimension of ``module.weight`` along which the outputs lie.

    Args:
        module: A projection.

    Returns:
        0 or 1.
    """
    if isinstance(module, ImplantLinear):
        return 1 if module.transposed else 0
    return int(_is_conv1d(module))


def input_dim(module: nn.Module) -> int:
    """Return the dimension of ``module.weight`` along which the inputs lie.

    Args:
        module: A projection.

    Returns:
        0 or 1.
    """
    return 1 - output_dim(module)


def on_input(module: nn.Module, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call ``function`` with the input of a projection before each of its calls.

    Args:
        module: A projection, called with its input by position or by name.
        function: Takes the input; what it returns, if anything, takes the input's place.

    Returns:
        The handle that takes the hook away again.
    """

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        name = None if args else next(iter(kwargs))
        changed = function(args[0] if name is None else kwargs[name])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: changed})

    return module.register_forward_pre_hook(hook, with_kwargs=True)
