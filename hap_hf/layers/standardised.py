"""Convolutions that standardise their weights in every forward pass."""

import importlib
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from hap_hf.layers.projection import num_groups


def is_standardised(module: nn.Module) -> bool:
    """Return whether ``module`` is one of timm's convolutions with weight standardisation, over all of its inputs.

    Args:
        module: Any module.

    Returns:
        Whether it is.
    """
    kind = type(module)
    named = kind.__module__ == "timm.layers.std_conv" and kind.__name__.endswith(("StdConv2d", "StdConv2dSame"))
    return named and num_groups(module) == 1


def plain_convolution(module: nn.Module) -> nn.Conv2d:
    """Return an ordinary convolution with the weights that ``module`` convolves with at this moment.

    Mean and variance run over a kernel's inputs, so with fewer inputs the same kernels would become others. The fixed
    weights do not. What is lost is that later training keeps them standardised.

    Reference: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
    arXiv 1903.10520; Brock et al., "Characterizing signal propagation to close the performance gap in unnormalized
    ResNets", ICLR 2021, for the gain.

    Args:
        module: A convolution with weight standardisation.

    Returns:
        The convolution, with a weight and a bias of the same names and shapes and without a gain.
    """
    source = cast(Any, module)
    weight: nn.Parameter = source.weight
    kind = type(module).__name__
    name = "Conv2dSame" if getattr(module, "same_pad", False) else "Conv2d"
    home = importlib.import_module("timm.layers") if name == "Conv2dSame" else nn
    plain: nn.Conv2d = getattr(home, name)(
        weight.shape[1],
        weight.shape[0],
        source.kernel_size,
        stride=source.stride,
        padding=0 if name == "Conv2dSame" else source.padding,
        dilation=source.dilation,
        bias=False,
        device="meta",
    )
    if weight.is_meta:
        fixed = weight.detach()
    else:
        gain = (source.gain * source.scale).flatten() if kind.startswith("Scaled") else None
        with torch.no_grad():
            fixed = functional.batch_norm(
                weight.flatten(1)[None], None, None, gain, training=True, momentum=0.0, eps=source.eps
            ).view_as(weight)
    plain.weight = nn.Parameter(fixed, requires_grad=weight.requires_grad)
    plain.bias = source.bias
    return plain.train(module.training)
