"""Plans in ``config.json``: what lets ``save_pretrained`` and ``from_pretrained`` work on pruned models."""

from hap_hf.checkpoint.legacy import load_pruned_heads
from hap_hf.checkpoint.record import bits_of, check_recordable, plan_of, record_bits, record_plan, save_pruned
from hap_hf.checkpoint.timm_wrapper import wrap_timm

__all__ = [
    "bits_of",
    "check_recordable",
    "load_pruned_heads",
    "plan_of",
    "record_bits",
    "record_plan",
    "save_pruned",
    "wrap_timm",
]
