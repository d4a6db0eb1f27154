"""Amounts that no scores could reach, found out before anything is scored."""

from collections.abc import Sequence

import torch

from hap_hf.config import HapConfig
from hap_hf.criteria import Scores
from hap_hf.errors import ConfigError
from hap_hf.names.group import Group
from hap_hf.selection.budget import Budget, out_of_reach
from hap_hf.selection.members import portions
from hap_hf.selection.ranking import Ranking


def check_reachable(groups: Sequence[Group], config: HapConfig) -> None:
    """Raise where a budget asks for less than the largest cut leaves, whatever the scores will be.

    Which units would be implanted depends on the scores, and with it what is left: with implants it is told later.

    Args:
        groups: The groups that may lose units.
        config: How much is to be left, and the limits of groups.

    Raises:
        ConfigError: If it cannot be reached.
    """
    if config.implant_ratio:
        return
    # The largest cut takes all that the limits of each group allow, so that any order of the units tells.
    anything = {g.name: torch.zeros(g.num_units, dtype=torch.float64) for g in groups}
    scores = Scores(anything, anything, "", num_probes=0, num_batches=0, num_loss_terms=0, seconds=0.0)
    for name, amount, members in portions(groups, config):
        if amount.what.num_cut(amount.keep, 1) is not None:
            continue
        if too_little := out_of_reach(Budget(Ranking.of(members, scores, config), amount)):
            raise ConfigError(f"{too_little}, for {name}" if name else too_little)
