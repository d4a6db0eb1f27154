"""Reconstruction: what a pruned model computes, brought back to what the dense model computes, layer by layer."""

from hap_hf.reconstruction.best import Repair, best_repair, bypassed_repair
from hap_hf.reconstruction.blocks import PathGains

__all__ = ["PathGains", "Repair", "best_repair", "bypassed_repair"]
