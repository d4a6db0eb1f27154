"""Which modules multiply by a weight matrix or kernel, and how they store it."""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hap_hf.layers.implant_conv import ImplantConv2d
from hap_hf.layers.implant_linear import ImplantLinear

_LINEAR = {nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear}
_CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, ImplantConv2d: 2}
"""Number of spatial dimensions."""
_TIMM_CONVOLUTIONS = {
    ("timm.layers.conv2d_same", "Conv2dSame"),
    ("timm.layers.std_conv", "StdConv2d"),
    ("timm.layers.std_conv", "StdConv2dSame"),
    ("timm.layers.std_conv", "ScaledStdConv2d"),
    ("timm.layers.std_conv", "ScaledStdConv2dSame"),
}
IMPLANTED = (ImplantLinear, ImplantConv2d)
"""Layers with implants."""


def implant_tensors(module: ImplantLinear | ImplantConv2d) -> tuple[str, str]:
    """Return the names of the implant's weight that reads the inputs and of the one that makes the outputs.

    Args:
        module: A layer with an implant.

    Returns:
        Both names; the same for a convolution, whose implant is one kernel.
    """
    return ("implant_down", "implant_up") if isinstance(module, ImplantLinear) else ("implant_pointwise",) * 2


def _is_conv1d(module: nn.Module) -> bool:
    # transformers' transposed linear layer of GPT-2, recognised without importing transformers.
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def spatial_dims(module: nn.Module) -> int:
    """Return over how many dimensions a convolution slides its kernel.

    Args:
        module: Any module.

    Returns:
        1 to 3 for the convolutions that surgery knows, 0 for everything else.
    """
    kind = type(module)
    # Exact types, named for timm's so that timm need not be imported: a subclass may do something else with its kernel.
    return 2 if (kind.__module__, kind.__name__) in _TIMM_CONVOLUTIONS else _CONVOLUTIONS.get(kind, 0)


def is_grouped(module: nn.Module) -> bool:
    """Return whether ``module`` is a convolution of which each output reads a part of the inputs, as depthwise ones do.

    Args:
        module: Any module.

    Returns:
        Whether it is.
    """
    return num_groups(module) > 1


def num_groups(module: nn.Module) -> int:
    """Return the number of groups of a convolution.

    Args:
        module: Any module.

    Returns:
        The number, 0 for everything that is no convolution.
    """
    return int(cast(nn.Conv2d, module).groups) if spatial_dims(module) else 0


def is_projection(module: nn.Module) -> bool:
    """Return whether ``module`` computes ``x W + b``, or a convolution in which every output reads every input.

    Args:
        module: Any module.

    Returns:
        True for ``nn.Linear``, transformers' ``Conv1D``, ungrouped convolutions and layers with implants.
    """
    # Exact types: a subclass may compute something else with the weight (adapters, quantization).
    if spatial_dims(module):
        return not is_grouped(module)
    return isinstance(module, ImplantLinear) or type(module) in _LINEAR or _is_conv1d(module)


def channel_dim(module: nn.Module) -> int:
    """Return the dimension of inputs and outputs along which the features or channels lie.

    Args:
        module: A projection or a grouped convolution.

    Returns:
        The dimension, counted from the last one: -1 for linear layers.
    """
    return -1 - spatial_dims(module)


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
