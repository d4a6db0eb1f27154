"""timm's convolutions that standardise their weights in every forward pass. timm itself is not imported."""

import importlib
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional

from hap_hf.layers.conv import Convolution
from hap_hf.layers.kind import register_layer


@register_layer(
    "timm.layers.std_conv.StdConv2d",
    "timm.layers.std_conv.StdConv2dSame",
    "timm.layers.std_conv.ScaledStdConv2d",
    "timm.layers.std_conv.ScaledStdConv2dSame",
)
class StandardisedConv2d(Convolution):
    """A convolution with weight standardisation."""

    spatial_dims: ClassVar[int] = 2
    fixed: ClassVar[bool] = False

    def plain(self, module: nn.Module) -> nn.Module:
        """Return an ordinary convolution, as fewer inputs would standardise the same kernels to others.

        Grouped ones lose whole groups, and no kernel an input: they stay as they are.
        """
        return plain_convolution(module) if self.num_groups(module) == 1 else module


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
    # On meta: the weights come below, and an initialiser would move the caller's random numbers.
    with torch.device("meta"):  # not as an argument, which timm's layers before 1.0.21 do not take
        plain: nn.Conv2d = getattr(home, name)(
            weight.shape[1],
            weight.shape[0],
            source.kernel_size,
            stride=source.stride,
            padding=0 if name == "Conv2dSame" else source.padding,
            dilation=source.dilation,
            bias=False,
        )
    if weight.is_meta:
        fixed = weight.detach()
    else:
        # Scaled kinds have a learned gain a kernel and a fixed scale for the fan-in; both become part of the weight.
        gain = (source.gain * source.scale).flatten() if kind.startswith("Scaled") else None
        with torch.no_grad():
            # Standardising as timm does it: each kernel is a channel, [1, out, in * taps], in a batch of one.
            fixed = functional.batch_norm(
                weight.flatten(1)[None], None, None, gain, training=True, momentum=0.0, eps=source.eps
            ).view_as(weight)
    plain.weight = nn.Parameter(fixed, requires_grad=weight.requires_grad)
    plain.bias = source.bias
    return plain.train(module.training)
