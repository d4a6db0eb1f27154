"""Which modules multiply by a weight matrix, and how they store it."""

from torch import nn

from hap_hf.surgery.implant import ImplantLinear

LINEAR_DIMS = {"Linear": (0, 1), "NonDynamicallyQuantizableLinear": (0, 1), "Conv1D": (1, 0)}
"""Output and input dimension of ``weight`` for each class that surgery may cut, by class name.

``Conv1D`` is transformers' transposed linear layer of GPT-2. Subclasses under other names may compute something else with the weight
and are left alone.
"""


def is_projection(module: nn.Module) -> bool:
    """Return whether ``module`` computes ``x W + b`` and nothing else.

    Args:
        module: Any module.

    Returns:
        True for ``nn.Linear``, transformers' ``Conv1D`` and layers with implants.
    """
    return isinstance(module, ImplantLinear) or (
        type(module).__name__ in LINEAR_DIMS and isinstance(getattr(module, "weight", None), nn.Parameter)
    )


def output_dim(module: nn.Module) -> int:
    """Return the dimension of ``module.weight`` along which the outputs lie.

    Args:
        module: A projection.

    Returns:
        0 or 1.
    """
    if isinstance(module, ImplantLinear):
        return 1 if module.transposed else 0
    return LINEAR_DIMS[type(module).__name__][0]


def input_dim(module: nn.Module) -> int:
    """Return the dimension of ``module.weight`` along which the inputs lie.

    Args:
        module: A projection.

    Returns:
        0 or 1.
    """
    return 1 - output_dim(module)
