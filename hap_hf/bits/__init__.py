"""Fewer bits for weights and activations: quantization after pruning, and how many bits each layer gets."""

from hap_hf.bits.allocate import Allocation, Sensitivity, allocate_bits, bit_frontier
from hap_hf.bits.config import BitConfig
from hap_hf.bits.quantize import quantize_
from hap_hf.bits.report import BitReport
from hap_hf.bits.sensitivity import bit_sensitivity

__all__ = [
    "Allocation",
    "BitConfig",
    "BitReport",
    "Sensitivity",
    "allocate_bits",
    "bit_frontier",
    "bit_sensitivity",
    "quantize_",
]
