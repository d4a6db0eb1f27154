"""Linear layers: torch's, timm's, and GPT-2's transposed one."""

from torch import nn

from hap_hf.layers.kind import LayerKind, register_layer


@register_layer(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, "timm.layers.linear.Linear")
class Linear(LayerKind):
    """``nn.Linear``, the one inside ``nn.MultiheadAttention``, and timm's, which knows TorchScript."""


@register_layer("transformers.pytorch_utils.Conv1D")
class TransposedLinear(LayerKind):
    """GPT-2's ``Conv1D``, which is no convolution: its weight is stored as ``[in, out]``."""

    size_names = ("nx", "nf")

    def output_dim(self, module: nn.Module) -> int:
        """Return 1."""
        return 1
