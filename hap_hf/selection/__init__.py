"""Which units go: one ranking of all units, cut at a ratio or at a budget, in one round or several."""

from hap_hf.selection.make import make_plan, select_groups
from hap_hf.selection.passes import score_in_passes

__all__ = ["make_plan", "score_in_passes", "select_groups"]
