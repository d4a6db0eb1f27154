"""Reconstruction: what a pruned model computes, brought back to what the dense model computes, layer by layer."""

from hap_hf.reconstruction.best import Repair, best_repair

__all__ = ["Repair", "best_repair"]
