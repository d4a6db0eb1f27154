"""What pruning cost and saved, for each group and in all."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hap_hf.criteria import Scores
from hap_hf.criteria.stopping import near_threshold
from hap_hf.names.footprint import footprint, whole_footprint
from hap_hf.names.group import Kind
from hap_hf.names.plan import IMPLANT, KEEP, PRUNE, GroupPlan, PruningPlan
from hap_hf.report.size import ModelSize, measure_size
from hap_hf.report.tables import markdown, plain_text

__all__ = ["GroupReport", "ModelSize", "PruningReport", "make_report", "measure_size"]

_COLUMNS = ("group", "units", "parameters left", "MACs left", "uncertain")


@dataclass(frozen=True)
class GroupReport:
    """What happened to one group.

    Args:
        name: Name of the group.
        kind: What one unit is.
        units: Number of units before.
        kept: Number of units kept.
        implanted: Number of units implanted.
        removed: Number of units removed.
        uncertain: Units within two standard errors of the threshold; None where the group was not scored.
        negative: Units with a negative sensitivity; None where the group was not scored.
        before: Size of the group before.
        after: Size of the group after, implants included.
    """

    name: str
    kind: Kind
    units: int
    kept: int
    implanted: int
    removed: int
    uncertain: int | None
    negative: int | None
    before: ModelSize
    after: ModelSize

    @property
    def summary(self) -> str:
        """The heads or the width, as in ``heads 12 -> 7 (+2 implants)``: 7 are kept, 2 implanted, 3 removed."""
        return f"{self.kind.value} {_counts(self.units, self.kept, self.implanted)}"


@dataclass(frozen=True)
class PruningReport:
    """What pruning cost and saved.

    Args:
        groups: What happened to each group, stage by stage.
        before: Size of the model before.
        after: Size of the model after.
        prunable_before: Size before of the part that was to be pruned: all groups but excluded ones.
        prunable_after: Size of that part after.
        threshold: Sensitivity (per cost, if so ranked) of the least sensitive unit above the cut; None if unknown.
        negative_share: Share of scored units with a negative sensitivity; None without scores.
        seconds: Wall-clock time of each stage.
        plan: The plan that was applied.
    """

    groups: tuple[GroupReport, ...]
    before: ModelSize
    after: ModelSize
    prunable_before: ModelSize
    prunable_after: ModelSize
    threshold: float | None
    negative_share: float | None
    seconds: Mapping[str, float] = field(default_factory=dict)
    plan: PruningPlan = field(default=PruningPlan(()), repr=False)

    @property
    def provenance(self) -> Mapping[str, str | int | float | bool | None]:
        """How the plan came about."""
        return self.plan.provenance

    @property
    def uncertain_units(self) -> int | None:
        """Units within two standard errors of the threshold, of all scored groups; None without scores."""
        known = [g.uncertain for g in self.groups if g.uncertain is not None]
        return sum(known) if known else None

    def units(self, kind: Kind) -> tuple[int, int, int]:
        """Return how many units of a kind there were, are kept and are implanted.

        Args:
            kind: The kind.

        Returns:
            Number of units before, kept and implanted.
        """
        members = [g for g in self.groups if g.kind is kind]
        return sum(g.units for g in members), sum(g.kept for g in members), sum(g.implanted for g in members)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; numbers that are not finite become None."""
        result = asdict(replace(self, plan=PruningPlan(())))
        del result["plan"]  # the checkpoint carries it
        result["provenance"] = dict(self.provenance)
        for entry, group in zip(result["groups"], self.groups, strict=True):
            entry["summary"] = group.summary
        result["uncertain_units"] = self.uncertain_units
        cleaned: dict[str, Any] = _jsonable(result)
        return cleaned

    def to_log(self) -> dict[str, float]:
        """Return the main numbers under flat names, for a Trainer's log."""
        values: dict[str, float | None] = {
            "prune_params_before": self.before.params,
            "prune_params": self.after.params,
            "prune_macs_before": self.before.macs,
            "prune_macs": self.after.macs,
            "prune_prunable_params_kept": _share(self.prunable_after.params, self.prunable_before.params),
            "prune_prunable_macs_kept": _share(self.prunable_after.macs, self.prunable_before.macs),
            "prune_threshold": self.threshold,
            "prune_uncertain_units": self.uncertain_units,
            "prune_negative_share": self.negative_share,
            "prune_seconds": sum(self.seconds.values()),
        }
        for kind in Kind:
            units, kept, implanted = self.units(kind)
            if units:
                values |= {f"prune_{kind.value}_kept": kept, f"prune_{kind.value}_implanted": implanted}
        return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}

    def to_markdown(self) -> str:
        """Return a heading, the facts as a list and a table of all groups, in GitHub's markdown."""
        return markdown("Pruning report", self._facts(), _COLUMNS, self._rows())

    def __str__(self) -> str:
        """Return the table and the facts as plain text."""
        return plain_text(self._facts(), _COLUMNS, self._rows(), num_totals=2)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``pruning_report.json`` and ``pruning_report.md``; a reader never sees half a file.

        Args:
            directory: Folder to write to; made where it does not exist.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            "pruning_report.json": json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
            "pruning_report.md": self.to_markdown(),
        }
        for name, text in texts.items():
            draft = folder / f"{name}.tmp"
            try:
                draft.write_text(text, encoding="utf-8")
                draft.replace(folder / name)
            finally:
                draft.unlink(missing_ok=True)

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            (g.name, g.summary, *_size_cells(g.before, g.after), "" if g.uncertain is None else f"{g.uncertain:,}")
            for g in self.groups
        ]
        uncertain = "" if self.uncertain_units is None else f"{self.uncertain_units:,}"
        # One short line a kind, as heads and neurons do not add up.
        units = ", ".join(f"{kind.value} {_counts(*self.units(kind))}" for kind in Kind if self.units(kind)[0])
        rows.append(("prunable part", "", *_size_cells(self.prunable_before, self.prunable_after), uncertain))
        rows.append(("whole model", units, *_size_cells(self.before, self.after), ""))
        return rows

    def _facts(self) -> list[tuple[str, str]]:
        p = self.provenance
        asked = [f"{k}={p[k]}" for k in ("prune_ratio", "target_params", "target_macs") if p.get(k) is not None]
        asked += [f"{k}={p[k]}" for k in ("implant_ratio", "implant_cost", "implant_init") if p.get("implant_ratio")]
        scored = [f"{p[k]} {name}" for k, name in (("num_probes", "probes"), ("num_batches", "batches")) if p.get(k)]
        if p.get("settled") is not None:
            scored.append("stopped by stop_share" if p["settled"] else "as many as allowed, stop_share not met")
        facts = [
            ("parameters", _exact(self.before.params, self.after.params)),
            ("MACs per sample", _exact(self.before.macs, self.after.macs)),
            ("prunable parameters", _exact(self.prunable_before.params, self.prunable_after.params)),
            ("prunable MACs per sample", _exact(self.prunable_before.macs, self.prunable_after.macs)),
            ("asked for", ", ".join(asked)),
            ("method", ", ".join([str(p.get("method") or ""), *scored])),
        ]
        if self.threshold is not None:
            facts.append(("threshold", f"{self.threshold:.4g}"))
        if self.uncertain_units is not None:
            facts.append(("within two standard errors of the threshold", f"{self.uncertain_units:,} units"))
        if self.negative_share is not None:
            facts.append(("negative sensitivities", f"{self.negative_share:.1%}"))
        facts.append(("seconds", ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())))
        return [(name, text) for name, text in facts if text]


def make_report(
    plan: PruningPlan, scores: Scores | None, before: ModelSize, after: ModelSize, seconds: Mapping[str, float]
) -> PruningReport:
    """Put together what a plan did.

    Args:
        plan: The plan that was applied.
        scores: What it was made from; None for a plan from disk.
        before: Size of the model before.
        after: Size of the model after.
        seconds: Wall-clock time of each stage.

    Returns:
        The report.
    """
    value = plan.provenance.get("threshold")
    threshold = float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
    patterns = str(plan.provenance.get("exclude") or "").split()
    kinds = str(plan.provenance.get("kinds") or " ".join(Kind)).split()
    chosen = [g.group.kind.value in kinds and not any(g.group.matches(p) for p in patterns) for g in plan]
    # What was not to be pruned had no decision to be uncertain about.
    per = str(plan.provenance.get("per"))
    groups = tuple(_group_report(g, scores if c else None, threshold, per) for g, c in zip(plan, chosen, strict=True))
    # The stages of a composed plan cut the same part again: it is whole before the first and small after the last.
    first = plan.stages[0] if plan.stages else ()
    prunable = whole_footprint(g.group for g, wanted in zip(first, chosen, strict=False) if wanted)
    left = prunable
    for stage in plan.stages:
        left -= whole_footprint(g.group for g in stage) - footprint(stage)
    return PruningReport(
        groups=groups,
        before=before,
        after=after,
        prunable_before=ModelSize(round(prunable.params), prunable.macs),
        prunable_after=ModelSize(round(left.params), left.macs),
        threshold=threshold,
        negative_share=scores.negative_share if scores is not None and scores.sensitivity else None,
        seconds=dict(seconds),
        plan=plan,
    )


def _group_report(plan: GroupPlan, scores: Scores | None, threshold: float | None, per: str) -> GroupReport:
    group = plan.group
    uncertain = negative = None
    sensitivity = scores.sensitivity.get(group.name) if scores is not None else None
    # A composed plan names a group once a stage; scores are those of one stage.
    if scores is not None and sensitivity is not None and len(sensitivity) == group.num_units:
        negative = int((sensitivity < 0).sum())
        error = scores.standard_error.get(group.name)
        if threshold is not None and error is not None:
            limit = threshold * group.unit_cost(per if per in {"params", "macs"} else None)
            uncertain = int(near_threshold(sensitivity, error, limit).sum())
    whole = GroupPlan(group, KEEP * group.num_units)
    kept, implanted, removed = (plan.actions.count(a) for a in (KEEP, IMPLANT, PRUNE))
    return GroupReport(
        group.name,
        group.kind,
        group.num_units,
        kept,
        implanted,
        removed,
        uncertain,
        negative,
        ModelSize(whole.params, whole.macs),
        ModelSize(plan.params, plan.macs),
    )


def _counts(units: int, kept: int, implanted: int) -> str:
    implants = f" (+{implanted:,} implant{'s' if implanted > 1 else ''})" if implanted else ""
    return f"{units:,} -> {kept:,}{implants}"


def _size_cells(before: ModelSize, after: ModelSize) -> tuple[str, str]:
    return (
        f"{_short(after.params)}{_percent(after.params, before.params)}",
        f"{_short(after.macs)}{_percent(after.macs, before.macs)}",
    )


def _exact(before: float, after: float) -> str:
    return f"{before:,.0f} -> {after:,.0f}{_percent(after, before)}"


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {letter}"
    return f"{value:,.0f}"


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percent(part: float, whole: float) -> str:
    return f" ({part / whole:.1%})" if whole else ""


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Kind) else value
