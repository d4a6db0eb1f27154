"""Which units go: one ranking of all units, cut at a ratio or at a budget, in one round or several."""

from hap_hf.selection.make import make_plan, select_groups

__all__ = ["make_plan", "select_groups"]
