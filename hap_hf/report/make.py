"""Putting a report together from what was decided and what came of it."""

from collections.abc import Mapping, Sequence

from hap_hf.config import HapConfig
from hap_hf.criteria import Scores
from hap_hf.criteria.stopping import near_threshold
from hap_hf.discovery import LeftWhole
from hap_hf.errors import ConfigError
from hap_hf.names.bypass import BypassPlan
from hap_hf.names.group import Group
from hap_hf.names.outcome import Footprint, footprint, whole
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.report.group import GroupReport
from hap_hf.report.report import PruningReport
from hap_hf.report.size import ModelSize


def make_report(
    plan: PruningPlan,
    before: ModelSize,
    after: ModelSize,
    *,
    config: HapConfig | None = None,
    scores: Scores | None = None,
    threshold: float | None = None,
    left_whole: Sequence[LeftWhole] = (),
    seconds: Mapping[str, float] | None = None,
    loss_before: float | None = None,
    loss_after: float | None = None,
) -> PruningReport:
    """Put together what one stage of a plan did.

    Args:
        plan: A plan of one stage.
        before: Size of the model before.
        after: Size of the model after.
        config: The settings; None for a plan from elsewhere.
        scores: What the plan was made from.
        threshold: Sensitivity (per cost, if so ranked) of the least sensitive unit above the cut.
        left_whole: What could not be removed, and why.
        seconds: Wall-clock time of each step.
        loss_before: Mean loss before; None if unknown.
        loss_after: Mean loss after; None if unknown.

    Returns:
        The report.

    Raises:
        ConfigError: If the plan has several stages.
    """
    if len(plan.stages) > 1:
        raise ConfigError(f"a report is about one stage, got a plan of {len(plan.stages)}; make one for each")
    stage = [g for groups in plan.stages for g in groups]
    chosen = [config is None or config.selects(g.group) for g in stage]
    # What was not to be pruned had no decision to be uncertain about.
    groups = tuple(
        _group_report(g, scores if wanted else None, threshold, config) for g, wanted in zip(stage, chosen, strict=True)
    )
    # The prunable part is what the amount was about: excluded groups count neither before nor after.
    pruned = [g for g, wanted in zip(stage, chosen, strict=True) if wanted]
    return PruningReport(
        groups=groups,
        before=before,
        after=after,
        prunable_before=_size(whole(g.group for g in pruned)),
        prunable_after=_size(pruned, plan.bypasses[0] if plan.bypasses else ()),
        bypasses={b.exit: b.rank for paths in plan.bypasses for b in paths},
        threshold=threshold,
        negative_share=scores.negative_share if scores is not None and scores.sensitivity else None,
        asked=_asked(config, [g.group for g in pruned], before),
        method=_method(scores),
        left_whole=tuple(left_whole),
        seconds=dict(seconds or {}),
        plan=plan,
        scores=scores,
        loss_before=loss_before,
        loss_after=loss_after,
    )


def _size(stage: Sequence[GroupPlan], bypasses: Sequence[BypassPlan] = ()) -> ModelSize:
    found = footprint(stage, bypasses)
    return ModelSize(round(found.params), found.macs)


def _group_report(
    plan: GroupPlan, scores: Scores | None, threshold: float | None, config: HapConfig | None
) -> GroupReport:
    """Return what happened to one group; without scores for one that was not to be pruned."""
    group = plan.group
    # None is "not scored", 0 "scored, and none of them": sums leave out the former.
    uncertain = negative = limit = None
    sensitivity = scores.sensitivity.get(group.name) if scores is not None else None
    if scores is not None and sensitivity is not None:
        negative = int((sensitivity < 0).sum())
        if threshold is not None:
            per = config.per if config is not None else None
            # The threshold may be per cost: times the cost of one of this group's units it is a sensitivity again.
            limit = threshold * (per.unit_cost(group) if per is not None else 1.0)
            error = scores.standard_error.get(group.name)
            uncertain = None if error is None else int(near_threshold(sensitivity, error, limit).sum())
    return GroupReport(
        name=group.name,
        kind=group.kind,
        units=group.num_units,
        kept=plan.kept,
        implanted=plan.implanted,
        removed=plan.pruned,
        uncertain=uncertain,
        negative=negative,
        before=_size(whole([group])),
        after=_size([plan]),
        limit=limit,
        actions=plan.actions,
    )


def _asked(config: HapConfig | None, groups: Sequence[Group], before: ModelSize) -> str:
    """Return what was asked for, in the terms that it was meant in and in those that people may take it for."""
    if config is None:
        return ""
    both = None if config.parts else config.asked.in_both_terms(groups, Footprint(before.params, before.macs))
    terms = "" if both is None else f" ({both[0]:.1%} of what can be pruned = {both[1]:.1%} of the whole model)"
    parts = [f"{config.asked}{terms}"]
    parts += [f"parts={dict(config.parts)}"] if config.parts else []
    if config.implant_ratio:
        parts += [f"{n}={getattr(config, n)}" for n in ("implant_ratio", "implant_cost", "implant_init")]
    return ", ".join(parts)


def _method(scores: Scores | None) -> str:
    if scores is None:
        return ""
    counted = (scores.num_probes, "probe", "probes"), (scores.num_batches, "batch", "batches")
    parts = [scores.method, *(f"{number} {one if number == 1 else many}" for number, one, many in counted if number)]
    if scores.settled is not None:
        parts.append("stopped by stop_share" if scores.settled else "as many as allowed, stop_share not met")
    return ", ".join(parts)
