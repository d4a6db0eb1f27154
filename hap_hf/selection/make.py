"""From scores to a plan: which units are kept, implanted and pruned."""

import logging
from collections.abc import Sequence

from hap_hf.config import HapConfig
from hap_hf.criteria import Scores
from hap_hf.errors import ConfigError
from hap_hf.names.amount import floor_share
from hap_hf.names.group import Group
from hap_hf.names.plan import KEEP, GroupPlan, PruningPlan
from hap_hf.selection.budget import Budget, meet_budget
from hap_hf.selection.ranking import Ranking, Split, implants
from hap_hf.version import __version__

logger = logging.getLogger(__name__)


def make_plan(groups: Sequence[Group], scores: Scores, config: HapConfig) -> PruningPlan:
    """Decide what happens to every unit.

    All units of the selected groups are sorted together, by sensitivity or, with a budget and ``config.per_cost``, by
    sensitivity per parameter or multiply-accumulate. Of N units the ``int(r N)`` least sensitive are cut; of those
    the ``int((1 - q) r N)`` least sensitive are pruned and the others implanted, as in the reference code of Yu et al.,
    "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022. With a budget, the number of cut units is searched.
    Then each group has its say: no more than ``max_group_ratio`` of it is cut, its most sensitive unit stays, implants
    that would not be cheaper than what they replace are pruned, and numbers of neurons and channels are
    rounded up to ``round_to``.

    Args:
        groups: The groups of the model, as found; those that ``config`` does not select stay whole.
        scores: Sensitivities of at least the selected groups.
        config: How much to cut, of what.

    Returns:
        A plan of one stage, with the threshold and the settings as provenance.

    Raises:
        ConfigError: If the plan would change nothing, a budget cannot be met, a pattern matches nothing, or the scores
            are those of other groups.
    """
    ranking = Ranking.of(select_groups(groups, config), scores, config)
    if config.prune_ratio is not None:
        cut = floor_share(config.prune_ratio * ranking.total)
        splits = ranking.splits(cut)
        if not any(s.pruned or s.implanted for s in splits):
            raise ConfigError(_why_nothing(ranking, cut))
    else:
        name, target = ("target_params", config.target_params)
        if target is None:
            name, target = "target_macs", config.target_macs
        cut, splits = meet_budget(Budget(ranking, name, target or 0.0))
    _log_outcome(ranking, cut, splits)
    chosen = {g.name: ranking.plan(index, splits[index]) for index, g in enumerate(ranking.groups)}
    stage = tuple(chosen.get(g.name) or GroupPlan(g, KEEP * g.num_units) for g in groups)
    return PruningPlan((stage,), _provenance(scores, config, ranking.values[cut].item()))


def select_groups(groups: Sequence[Group], config: HapConfig) -> tuple[Group, ...]:
    """Return the groups that ``config`` lets be pruned.

    Args:
        groups: All groups of a model.
        config: Settings; ``kinds`` and ``exclude`` are used.

    Returns:
        The groups of the wanted kinds that no pattern excludes, in the same order.

    Raises:
        ConfigError: If none is left, a pattern matches no group, or two groups have the same name.
    """
    names = [g.name for g in groups]
    if len(set(names)) < len(names):
        raise ConfigError(f"group names must be unique, got {sorted({n for n in names if names.count(n) > 1})} twice")
    unmatched = [p for p in config.exclude if not any(g.matches(p) for g in groups)]
    if unmatched:
        raise ConfigError(
            f"exclude patterns {unmatched} match no group and no tensor of one; groups are {names[:3]}"
            f"{' and so on' if len(names) > 3 else ''}, and * stands for any characters"
        )
    wanted = [g for g in groups if g.kind in config.kinds]
    left = tuple(g for g in wanted if not any(g.matches(p) for p in config.exclude))
    if not left:
        kinds = [k.value for k in config.kinds]
        found = sorted({g.kind.value for g in groups})
        reason = (
            f"exclude={list(config.exclude)} leaves none of {len(wanted)} groups of the kinds {kinds}"
            if wanted
            else f"there are no groups of the kinds {kinds}, only {found}"
            if groups
            else "there are no groups"
        )
        raise ConfigError(f"the plan would change nothing: {reason}")
    return left


def _why_nothing(ranking: Ranking, cut: int) -> str:
    config = ranking.config
    if not cut:
        reason = f"prune_ratio={config.prune_ratio} of {ranking.total} units is less than one unit"
    else:
        capped = cut - sum(map(sum, ranking.rule(cut)))
        reason = (
            f"prune_ratio={config.prune_ratio} cuts {cut} of {ranking.total} units, of which "
            f"max_group_ratio={config.max_group_ratio} and the best unit of each group bring back {capped} "
            f"and round_to={config.round_to} brings back {cut - capped}"
        )
    return f"the plan would change nothing: {reason}; raise prune_ratio or loosen these settings"


def _log_outcome(ranking: Ranking, cut: int, splits: Sequence[Split]) -> None:
    config = ranking.config
    ruled = ranking.rule(cut)
    capped = cut - sum(map(sum, ruled))
    if capped:
        logger.info("%d of %d cut units stay because of max_group_ratio=%s", capped, cut, config.max_group_ratio)
    refused = [
        f"{i.tensor}: {i.shape.rows} rows of {i.shape.inputs} inputs are {i.shape.replaced} weights, "
        f"rank {i.rank} has {i.weights}"
        for index, split in enumerate(ruled)
        if split.implanted and not splits[index].implanted
        for i in implants(ranking.groups[index], split.implanted, config.implant_cost)
        if not i.is_cheaper
    ]
    if refused:
        logger.info("pruned instead of implanted, as the implant would not be cheaper: %s", "; ".join(refused))
    if config.implant_ratio and not any(s.implanted for s in splits):
        asked = cut - floor_share((1 - config.implant_ratio) * cut)
        logger.warning(
            "implant_ratio=%s of %d cut units asks for %d implants, and the plan has none: %d stay whole because "
            "of max_group_ratio=%s; an implant of the others would not be cheaper, or has no layer that takes one%s",
            config.implant_ratio,
            cut,
            asked,
            asked - sum(s.implanted for s in ruled),
            config.max_group_ratio,
            "".join(f"; {line}" for line in refused),
        )


def _provenance(scores: Scores, config: HapConfig, threshold: float) -> dict[str, str | int | float | bool | None]:
    return {
        "hap_hf": __version__,
        "method": str(scores.method),
        "num_probes": scores.num_probes,
        "stop_share": config.stop_share,
        "settled": scores.settled,
        "num_output_probes": config.num_output_probes,
        "hvp": config.hvp.value,
        "num_batches": scores.num_batches,
        "num_loss_terms": scores.num_loss_terms,
        "num_passes": config.passes,
        "compensate": config.compensates,
        "coupling": config.coupling.value,
        "precision": config.precision.value,
        "seed": config.seed,
        "threshold": threshold,
        "per": config.per,
        "prune_ratio": config.prune_ratio,
        "target_params": config.target_params,
        "target_macs": config.target_macs,
        "implant_ratio": config.implant_ratio,
        "implant_init": config.implant_init.value,
        "implant_cost": config.implant_cost,
        "max_group_ratio": config.max_group_ratio,
        "round_to": config.round_to,
        "kinds": " ".join(k.value for k in config.kinds),
        "exclude": " ".join(config.exclude),
    }
