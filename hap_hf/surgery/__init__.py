"""Making a model smaller: everything here reads a plan, never a score."""

from hap_hf.surgery.apply import apply_plan_, check_plan
from hap_hf.surgery.bypass import bypassed, takes_bypass
from hap_hf.surgery.calibration import ImplantInit, collect_input_moments
from hap_hf.surgery.freezing import checked_patterns, train_only_implants_
from hap_hf.surgery.optimizer import carry_optimizer_state_
from hap_hf.surgery.recalibration import (
    Statistics,
    recalibrate_batch_norms_,
    renew_statistics_,
    shift_statistics_,
    statistics_of,
)

__all__ = [
    "ImplantInit",
    "Statistics",
    "apply_plan_",
    "bypassed",
    "carry_optimizer_state_",
    "check_plan",
    "checked_patterns",
    "collect_input_moments",
    "recalibrate_batch_norms_",
    "renew_statistics_",
    "shift_statistics_",
    "statistics_of",
    "takes_bypass",
    "train_only_implants_",
]
