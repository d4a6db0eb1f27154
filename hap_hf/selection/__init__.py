"""Which units go: one ranking of all units, cut at a ratio or at a budget, in one round or several."""

from hap_hf.selection.door import at_the_door
from hap_hf.selection.make import make_plan
from hap_hf.selection.members import select_groups
from hap_hf.selection.passes import measure_and_score, score_groups, score_in_passes
from hap_hf.selection.reach import check_reachable
from hap_hf.selection.rounds import Ramp, Round, check_rounds, config_of_round

__all__ = [
    "Ramp",
    "Round",
    "at_the_door",
    "check_reachable",
    "check_rounds",
    "config_of_round",
    "make_plan",
    "measure_and_score",
    "score_groups",
    "score_in_passes",
    "select_groups",
]
