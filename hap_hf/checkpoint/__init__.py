"""Plans in ``config.json``: what lets ``save_pretrained`` and ``from_pretrained`` work on pruned models."""

from hap_hf.checkpoint import loading  # noqa: F401  (registers what from_pretrained calls)
from hap_hf.checkpoint.legacy import load_pruned_heads
from hap_hf.checkpoint.parts import bits_of, plan_of
from hap_hf.checkpoint.plain import load_pruned_
from hap_hf.checkpoint.record import check_recordable, record_bits, record_plan, save_pruned
from hap_hf.checkpoint.timm_wrapper import wrap_timm

__all__ = [
    "bits_of",
    "check_recordable",
    "load_pruned_",
    "load_pruned_heads",
    "plan_of",
    "record_bits",
    "record_plan",
    "save_pruned",
    "wrap_timm",
]
