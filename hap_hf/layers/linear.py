"""Linear layers: torch's, timm's, and GPT-2's transposed one."""

from collections.abc import Callable, Mapping
from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from hap_hf.layers.kind import LayerKind, register_layer


@register_layer(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, "timm.layers.linear.Linear")
class Linear(LayerKind):
    """``nn.Linear``, the one inside ``nn.MultiheadAttention``, and timm's, which knows TorchScript."""

    def takes_weights(self, module: nn.Module) -> bool:
        """Return True."""
        return True

    def forward_with(
        self, module: nn.Module, x: Tensor, weights: Mapping[str, Tensor], inner: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the output with another weight."""
        weight = weights["weight"]
        return functional.linear(x, weight.T if self.output_dim(module) else weight, cast(nn.Linear, module).bias)


@register_layer("transformers.pytorch_utils.Conv1D")
class TransposedLinear(Linear):
    """GPT-2's ``Conv1D``, which is no convolution: its weight is stored as ``[in, out]``."""

    size_names = ("nx", "nf")

    def output_dim(self, module: nn.Module) -> int:
        """Return 1."""
        return 1
