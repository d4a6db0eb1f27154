"""Which modules multiply by a weight matrix, and how they store it."""

from torch import nn

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
