"""Questions about any module: does it multiply by a weight matrix or kernel, and how does it store that."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hap_hf.layers import conv, implants, linear, timm  # noqa: F401  (each registers its kinds)
from hap_hf.layers.kind import LayerKind, kind_of


def spatial_dims(module: nn.Module) -> int:
    """Return over how many dimensions a convolution slides its kernel.

    Args:
        module: Any module.

    Returns:
        1 to 3 for the convolutions that are known, 0 for everything else.
    """
    kind = kind_of(module)
    return kind.spatial_dims if kind is not None else 0


def num_groups(module: nn.Module) -> int:
    """Return the number of groups of a convolution.

    Args:
        module: Any module.

    Returns:
        The number, 0 for everything that is no convolution.
    """
    kind = kind_of(module)
    return kind.num_groups(module) if kind is not None else 0


def is_grouped(module: nn.Module) -> bool:
    """Return whether ``module`` is a convolution whose outputs each read only some inputs, as depthwise ones do."""
    return num_groups(module) > 1


def is_projection(module: nn.Module) -> bool:
    """Return whether ``module`` is of a registered kind in which every output reads every input.

    Args:
        module: Any module.

    Returns:
        True for linear layers, ungrouped convolutions and layers with implants.
    """
    return kind_of(module) is not None and not is_grouped(module)


def has_implant(module: nn.Module) -> bool:
    """Return whether ``module`` is a layer with an implant."""
    kind = kind_of(module)
    return kind is not None and kind.has_implant


def known(module: nn.Module) -> LayerKind:
    """Return the kind of a layer that is known to have one.

    Args:
        module: A projection or a grouped convolution.

    Returns:
        The kind.

    Raises:
        TypeError: If it has none.
    """
    kind = kind_of(module)
    if kind is None:
        raise TypeError(f"expected a layer of a registered kind, got a {type(module).__name__}")
    return kind


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
    return known(module).output_dim(module)


def input_dim(module: nn.Module) -> int:
    """Return the dimension of ``module.weight`` along which the inputs lie.

    Args:
        module: A projection.

    Returns:
        0 or 1.
    """
    return 1 - output_dim(module)


def implant_tensors(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights of a layer's implant.

    Args:
        module: A layer with an implant.

    Returns:
        The weight that reads the inputs, then the one that makes the outputs; one name where they are the same.
    """
    kind = known(module)
    # Of both lists `weight` is the first; what else is named, once, belongs to the implant.
    return tuple(dict.fromkeys(kind.reads[1:] + kind.makes[1:]))


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
        # Models may call their layers by keyword, under any name: the first one is the input.
        name = None if args else next(iter(kwargs))
        changed = function(args[0] if name is None else kwargs[name])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: changed})

    return module.register_forward_pre_hook(hook, with_kwargs=True)
