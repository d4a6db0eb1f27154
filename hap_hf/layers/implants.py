"""Layers that have an implant already, when they are pruned again."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, cast

from torch import Tensor, nn

from hap_hf.layers.implant_conv import ImplantConv2d
from hap_hf.layers.implant_linear import ImplantLinear
from hap_hf.layers.kind import LayerKind, Segment, register_layer

Implanted = ImplantLinear | ImplantConv2d


class ImplantKind(LayerKind):
    """What layers with implants have in common: two weights, whose outputs take turns in segments."""

    has_implant: ClassVar[bool] = True

    def outputs(self, module: nn.Module) -> list[Segment]:
        """Return the kept and the implanted features of each segment, and the bias."""
        result = []
        # Three counters: features of the output in order, and for each weight the entries of its own.
        feature = kept = implanted = 0
        for num_kept, num_implanted in cast(Implanted, module).segments:
            result.append(Segment("weight", self.output_dim(module), feature, num_kept, kept))
            result.append(Segment(self.makes[1], 0, feature + num_kept, num_implanted, implanted))
            feature, kept, implanted = feature + num_kept + num_implanted, kept + num_kept, implanted + num_implanted
        return result + ([Segment("bias", 0, 0, feature, 0)] if module.bias is not None else [])

    def inputs(self, module: nn.Module) -> list[Segment]:
        """Return where the weight and the implant read the input features."""
        size = module.get_parameter(self.reads[1]).shape[1]
        return [*super().inputs(module), Segment(self.reads[1], 1, 0, size, 0)]

    def sync_sizes_(self, module: nn.Module) -> None:
        """Leave the sizes alone: they follow from the segments, which surgery passes to ``module.sync_sizes``."""

    def takes_constant(self, module: nn.Module) -> bool:
        """Return False."""
        return False

    def knows_rows(self, module: nn.Module) -> bool:
        """Return False: two weights read one input."""
        return False

    def takes_implant(self, module: nn.Module) -> bool:
        """Return False: there is one already."""
        return False

    def takes_weights(self, module: nn.Module) -> bool:
        """Return True."""
        return True


@register_layer(ImplantLinear)
class ImplantLinearKind(ImplantKind):
    """:class:`~hap_hf.layers.implant_linear.ImplantLinear`."""

    reads: ClassVar[tuple[str, ...]] = ("weight", "implant_down")
    makes: ClassVar[tuple[str, ...]] = ("weight", "implant_up")

    def output_dim(self, module: nn.Module) -> int:
        """Return 1 where the weight is stored as GPT-2's layers store it."""
        return int(cast(ImplantLinear, module).transposed)

    def forward_with(
        self, module: nn.Module, x: Tensor, weights: Mapping[str, Tensor], inner: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the output with other weights."""
        return cast(ImplantLinear, module).product(
            x, weights["weight"], weights["implant_down"], weights["implant_up"], inner
        )


@register_layer(ImplantConv2d)
class ImplantConv2dKind(ImplantKind):
    """:class:`~hap_hf.layers.implant_conv.ImplantConv2d`, whose implant is one kernel."""

    spatial_dims: ClassVar[int] = 2
    reads: ClassVar[tuple[str, ...]] = ("weight", "implant_pointwise")
    makes: ClassVar[tuple[str, ...]] = ("weight", "implant_pointwise")

    def num_groups(self, module: nn.Module) -> int:
        """Return 1."""
        return 1

    def forward_with(
        self, module: nn.Module, x: Tensor, weights: Mapping[str, Tensor], inner: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the output with other kernels."""
        return cast(ImplantConv2d, module).product(x, weights["weight"], weights["implant_pointwise"])


def implant_segments(module: nn.Module) -> Sequence[tuple[int, int]]:
    """Return the number of kept and of implanted outputs in each segment of a layer with an implant, in order."""
    return cast(Implanted, module).segments
