"""Arithmetic of the forward pass and its derivatives."""

from enum import StrEnum


class Precision(StrEnum):
    """Arithmetic of the forward pass and its derivatives while scoring."""

    FP32 = "fp32"
    """The model's own dtype, no autocast."""
    BF16 = "bf16"
    """bfloat16 autocast."""
    FP16 = "fp16"
    """float16 autocast with a constant loss scale (Chong et al., 2023, with the scale divided out again)."""
