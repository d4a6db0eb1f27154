"""From scores to a plan: which units are kept, implanted and pruned."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hap_hf.config import HapConfig
from hap_hf.criteria import Scores
from hap_hf.errors import ConfigError
from hap_hf.names.actions import KEEP
from hap_hf.names.amount import Amount
from hap_hf.names.currencies import floor_share
from hap_hf.names.group import Group, Role
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.selection.budget import Budget, meet_budget
from hap_hf.selection.members import portions, select_groups
from hap_hf.selection.ranking import Ranking, Split, implants

logger = logging.getLogger(__name__)

_NOTHING = "the plan would change nothing"


@dataclass(frozen=True)
class Choice:
    """Which units go, before it is a plan.

    Args:
        stage: What happens to every group, those that were not selected included.
        threshold: Sensitivity (per cost, where units are ranked by that) of the least sensitive unit above the cut.
        notes: What people should know, each with whether it is a warning.
    """

    stage: tuple[GroupPlan, ...]
    threshold: float
    notes: tuple[tuple[bool, str], ...] = ()

    def log(self) -> None:
        """Say what people should know."""
        for is_warning, note in self.notes:
            logger.log(logging.WARNING if is_warning else logging.INFO, "%s", note)


def choose(groups: Sequence[Group], scores: Scores, config: HapConfig, done: float | None = None) -> Choice | str:
    """Decide which units go.

    Args:
        groups: The groups of the model; those that ``config`` does not select stay whole.
        scores: Sensitivities of at least the selected groups.
        config: How much to cut, of what.
        done: Share of what the config asks for that is cut, all of it removed and none implanted; None for all of it.

    Returns:
        The choice, or why it would change nothing or cannot be made.
    """
    if done is not None:
        # A pass only silences units, and an implant is not there before surgery makes it.
        config = replace(config, implant_ratio=0.0)
    choices, reasons = [], []
    for name, amount, members in portions(select_groups(groups, config), config):
        choice = _choose(members, scores, config, amount if done is None else amount.after(done))
        if isinstance(choice, Choice):
            choices.append(choice)
        elif choice.startswith(_NOTHING):
            reasons.append(f"{choice}, for {name}" if name else choice)
        else:
            return f"{choice}, for {name}" if name else choice
    if not choices:
        return "; ".join(reasons)
    chosen = {g.group.name: g for c in choices for g in c.stage}
    # Groups that stay whole are named, too: reports list them, and a decision that is loaded finds its groups here.
    stage = tuple(chosen.get(g.name) or GroupPlan(g, KEEP * g.num_units) for g in groups)
    notes = tuple(note for c in choices for note in c.notes) + tuple((False, reason) for reason in reasons)
    return Choice(stage, max(c.threshold for c in choices), notes)


def _choose(groups: Sequence[Group], scores: Scores, config: HapConfig, wanted: Amount) -> Choice | str:
    """Decide which units of groups go that compete with each other."""
    ranking = Ranking.of(groups, scores, config)
    # A share of the units says how many go; what goes to meet a budget has to be searched.
    cut = wanted.what.num_cut(wanted.keep, ranking.total)
    if cut is None:
        met = meet_budget(Budget(ranking, wanted))
        if isinstance(met, str):
            return met
        cut, splits, notes = met.cut, met.splits, [(True, note) for note in met.notes]
    else:
        splits, notes = ranking.splits(cut), []
        if not any(s.pruned or s.implanted for s in splits):
            return _why_nothing(ranking, cut, wanted)
    notes += _outcome(ranking, cut, splits)
    stage = tuple(ranking.plan(index, splits[index]) for index in range(len(groups)))
    return Choice(stage, ranking.values[min(cut, ranking.total - 1)].item(), tuple(notes))


def make_plan(groups: Sequence[Group], scores: Scores, config: HapConfig) -> PruningPlan:
    """Decide what happens to every unit.

    All units of the selected groups are sorted together, by sensitivity or, with a budget and ``config.per_cost``, by
    sensitivity per cost. Of N units the ``int(r N)`` least sensitive are cut; of those the ``int((1 - q) r N)`` least
    sensitive are pruned and the others implanted, as in the reference code of Yu et al., "Hessian-Aware Pruning and
    Optimal Neural Implant", WACV 2022. With a budget, the number of cut units is searched. Then each group has its say:
    no more than ``max_group_ratio`` of it is cut, its most sensitive unit stays, implants that would not be cheaper
    than what they replace are pruned, and numbers of neurons and channels are rounded up to ``round_to``.

    Args:
        groups: The groups of the model, as found; those that ``config`` does not select stay whole.
        scores: Sensitivities of at least the selected groups.
        config: How much to cut, of what.

    Returns:
        A plan of one stage, with the settings and what came of them as provenance.

    Raises:
        ConfigError: If the plan would change nothing, a budget cannot be met, a pattern matches nothing, or the scores
            are those of other groups.
    """
    choice = choose(groups, scores, config)
    if isinstance(choice, str):
        raise ConfigError(choice)
    choice.log()
    return PruningPlan((choice.stage,), (provenance(scores, config, choice.threshold),))


def check_takes_implants(groups: Sequence[Group], config: HapConfig) -> None:
    """Check that there is a layer in which an implant could stand, if any are asked for.

    Args:
        groups: The groups that are selected.
        config: Settings; ``implant_ratio`` is used.

    Raises:
        ConfigError: If there is none.
    """
    if config.implant_ratio and not any(s.role is Role.PRODUCER for g in groups for s in g.slices):
        layers = sorted({s.tensor.rpartition(".")[0] for g in groups for s in g.slices if s.role is Role.FACTOR})
        raise ConfigError(
            f"implant_ratio={config.implant_ratio} asks for implants, and none of the layers takes one: {layers[:4]}"
            f"{' and so on' if len(layers) > 4 else ''}; they stand in for linear layers and for ungrouped nn.Conv2d "
            "with a kernel of more than one tap. Set implant_ratio=0"
        )


def _why_nothing(ranking: Ranking, cut: int, amount: Amount) -> str:
    """Return why nothing would change: no unit is below the threshold, or limits of groups bring all of them back."""
    config = ranking.config
    if not cut:
        reason = f"{amount} of {ranking.total} units is less than one unit"
    else:
        # The rule includes the caps of groups; the other units came back by rounding widths up.
        capped = cut - sum(map(sum, ranking.rule(cut)))
        reason = (
            f"{amount} cuts {cut} of {ranking.total} units, of which "
            f"max_group_ratio={config.max_group_ratio} and the best unit of each group bring back {capped} "
            f"and round_to={config.round_to} brings back {cut - capped}"
        )
    return f"{_NOTHING}: {reason}; raise prune_ratio or loosen these settings"


def _outcome(ranking: Ranking, cut: int, splits: Sequence[Split]) -> list[tuple[bool, str]]:
    """Return what people should know of a cut, each with whether it is a warning."""
    config = ranking.config
    # What the rule asks for, before implants that do not pay and widths change it.
    ruled = ranking.rule(cut)
    capped = cut - sum(map(sum, ruled))
    notes = []
    if capped:
        notes.append((False, f"{capped} of {cut} cut units stay because of max_group_ratio={config.max_group_ratio}"))
    refused = [
        f"{i.tensor}: {i.shape.rows} rows of {i.shape.inputs} inputs are {i.shape.replaced} weights, "
        f"rank {i.rank} has {i.weights}"
        for index, split in enumerate(ruled)
        if split.implanted and not splits[index].implanted
        for i in implants(ranking.groups[index], split.implanted, config.implant_cost)
        if not i.is_cheaper
    ]
    if refused:
        listed = "; ".join(refused)
        notes.append((False, f"pruned instead of implanted, as the implant would not be cheaper: {listed}"))
    if config.implant_ratio and not any(s.implanted for s in splits):
        asked = cut - floor_share((1 - config.implant_ratio) * cut)
        kept = asked - sum(s.implanted for s in ruled)
        note = (
            f"implant_ratio={config.implant_ratio} of {cut} cut units asks for {asked} implants, and the plan has "
            f"none: {kept} stay whole because of max_group_ratio={config.max_group_ratio}; an implant of the others "
            "would not be cheaper, or has no layer that takes one"
        )
        notes.append((True, note + "".join(f"; {line}" for line in refused)))
    return notes


def provenance(scores: Scores, config: HapConfig, threshold: float) -> dict[str, Any]:
    """Return how a plan came about, for people to read.

    Args:
        scores: What it was made from.
        config: The settings it was made with.
        threshold: Sensitivity of the least sensitive unit above the cut.

    Returns:
        JSON values, for ``PruningPlan.provenance``.
    """
    return {
        "settings": config.to_dict(),
        # What the criterion said where the settings left it to it.
        "num_passes": config.passes,
        "compensate": config.compensates,
        "per": None if config.per is None else config.per.name,
        "num_probes": scores.num_probes,
        "settled": scores.settled,
        "num_batches": scores.num_batches,
        "num_loss_terms": scores.num_loss_terms,
        "threshold": threshold,
    }
