"""Convolutions of one, two and three dimensions, and timm's that pad as TensorFlow does."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hap_hf.layers.implant_conv import ImplantConv2d, centre_tap, padding_sides, patch_moment, pointwise_rows
from hap_hf.layers.kind import LayerKind, register_layer

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class Convolution(LayerKind):
    """What convolutions have in common: groups, and channels in place of features."""

    size_names = ("in_channels", "out_channels")

    def num_groups(self, module: nn.Module) -> int:
        """Return the number of groups."""
        return int(cast(nn.Conv2d, module).groups)

    def sync_sizes_(self, module: nn.Module) -> None:
        """Let the numbers of channels follow the weight, which holds the inputs of one group only."""
        weight = module.get_parameter("weight")
        # Each kernel holds the inputs of its own group, and all groups together read all of them.
        sizes = weight.shape[1] * self.num_groups(module), weight.shape[0]
        for name, size in zip(self.size_names, sizes, strict=True):
            setattr(module, name, size)

    def takes_constant(self, module: nn.Module) -> bool:
        """Return whether there is a bias and a kernel of one tap: others read zeros, no constant, beyond the image."""
        return super().takes_constant(module) and module.get_parameter("weight").shape[2:].numel() == 1

    def takes_weights(self, module: nn.Module) -> bool:
        """Return whether the padding is known: of zeros, or in two dimensions."""
        return self.fixed and (self.spatial_dims == 2 or cast(nn.Conv2d, module).padding_mode == "zeros")

    def forward_with(
        self, module: nn.Module, x: Tensor, weights: Mapping[str, Tensor], inner: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the output with another kernel."""
        conv, padding = cast(nn.Conv2d, module), cast(nn.Conv2d, module).padding
        if conv.padding_mode != "zeros":
            x, padding = functional.pad(x, padding_sides(conv), mode=conv.padding_mode), (0, 0)
        convolve: Callable[..., Tensor] = _CONVOLUTIONS[self.spatial_dims]
        return convolve(x, weights["weight"], conv.bias, conv.stride, padding, conv.dilation, conv.groups)

    def knows_rows(self, module: nn.Module) -> bool:
        """Return False: only two dimensions can be unfolded."""
        return False

    def takes_implant(self, module: nn.Module) -> bool:
        """Return False: what stands in for channels is made for two dimensions."""
        return False


@register_layer(nn.Conv1d)
class Conv1d(Convolution):
    """``nn.Conv1d``."""

    spatial_dims: ClassVar[int] = 1


@register_layer(nn.Conv3d)
class Conv3d(Convolution):
    """``nn.Conv3d``."""

    spatial_dims: ClassVar[int] = 3


@register_layer(nn.Conv2d)
class Conv2d(Convolution):
    """``nn.Conv2d``."""

    spatial_dims: ClassVar[int] = 2

    def knows_rows(self, module: nn.Module) -> bool:
        """Return True: patches are unfolded."""
        return True

    def rows(self, module: nn.Module, x: Tensor, output_size: Sequence[int]) -> Tensor | None:
        """Return the patch at each output position, ``[rows of the batch, channels * taps, positions]``."""
        conv = cast(nn.Conv2d, module)
        return functional.unfold(
            self._padded(conv, x, output_size), conv.kernel_size, dilation=conv.dilation, stride=conv.stride
        )

    def _padded(self, conv: nn.Conv2d, x: Tensor, output_size: Sequence[int]) -> Tensor:
        """Return the input with its padding: unfold itself pads zeros alone, as much on one side as on the other."""
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return functional.pad(x, padding_sides(conv), mode=mode)

    def takes_implant(self, module: nn.Module) -> bool:
        """Return whether channels can become a 1 x 1 convolution, and a cheaper one."""
        conv = cast(nn.Conv2d, module)
        return conv.groups == 1 and tuple(conv.kernel_size) != (1, 1)

    def implanted(
        self, module: nn.Module, num_inputs: int, segments: Sequence[tuple[int, int]], rank: int
    ) -> nn.Module:
        """Return the convolution with an implant, its weights not yet set; the rank is always 1, for one tap."""
        return ImplantConv2d.from_conv(cast(nn.Conv2d, module), num_inputs, segments)

    def input_moment(self, module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        """Return the sum of patch times centre, see :func:`~hap_hf.layers.implant_conv.patch_moment`."""
        return patch_moment(x, cast(nn.Conv2d, module))

    def fitted(self, rows: Tensor, implant: nn.Module, moment: Tensor | None) -> Mapping[str, Tensor]:
        """Return the 1 x 1 kernels that stand in for ``rows``, ``[implanted, in_channels, kh, kw]``."""
        return {"implant_pointwise": pointwise_rows(rows, moment)}

    def approximated(self, rows: Tensor, rank: int, moment: Tensor) -> Tensor:
        """Return kernels that are zero but for their centre, ``[implanted, in_channels, kh, kw]``."""
        num_taps, centre = prod(rows.shape[2:]), centre_tap(rows.shape[2:])
        result = torch.zeros_like(rows).flatten(2)
        result[:, :, centre] = pointwise_rows(rows, moment[:, centre::num_taps])[:, :, 0, 0]
        return result.view_as(rows)


@register_layer("timm.layers.conv2d_same.Conv2dSame")
class Conv2dSame(Conv2d):
    """timm's convolution that pads as TensorFlow does, by the size of its input."""

    def _padded(self, conv: nn.Conv2d, x: Tensor, output_size: Sequence[int]) -> Tensor:
        pads: list[int] = []
        for size, out, k, s, d in zip(
            x.shape[2:], output_size, conv.kernel_size, conv.stride, conv.dilation, strict=True
        ):
            # What the last patch lacks; of an odd total the larger part comes after, as in TensorFlow.
            total = max((out - 1) * s + (k - 1) * d + 1 - size, 0)
            pads = [total // 2, total - total // 2, *pads]  # functional.pad begins with the last dimension
        return functional.pad(x, pads)

    def forward_with(
        self, module: nn.Module, x: Tensor, weights: Mapping[str, Tensor], inner: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the output with another kernel."""
        conv = cast(nn.Conv2d, module)
        sizes = [-(-size // stride) for size, stride in zip(x.shape[-2:], conv.stride, strict=True)]
        x = self._padded(conv, x, sizes)
        return functional.conv2d(x, weights["weight"], conv.bias, conv.stride, 0, conv.dilation, conv.groups)

    def takes_implant(self, module: nn.Module) -> bool:
        """Return False: the implant would have to pad by the size of its input, too."""
        return False
