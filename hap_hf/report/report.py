"""What pruning cost and saved, for each group and in all."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from hap_hf.criteria import Scores
from hap_hf.discovery import LeftWhole
from hap_hf.errors import ConfigError
from hap_hf.names.group import Kind
from hap_hf.names.plan import PruningPlan
from hap_hf.report.files import read_json, write_whole
from hap_hf.report.group import GroupReport, checked, number_of, size_of
from hap_hf.report.scores import SCORES_FILE, load_scores, save_scores
from hap_hf.report.size import ModelSize
from hap_hf.report.tables import markdown, plain_text
from hap_hf.report.words import counts, exact, one_number, share, size_cells

_COLUMNS = ("group", "units", "parameters left", "MACs left", "uncertain")


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
        asked: What was asked for, in words; empty if unknown.
        method: How units were scored, in words; empty if unknown.
        left_whole: What could not be removed, and why.
        seconds: Wall-clock time of each step.
        plan: The plan that was applied.
        scores: What the plan was made from; None for a plan from elsewhere.
        loss_before: Mean loss on the batches before; None where the scores need none.
        loss_after: Mean loss on them after, before any training.
    """

    groups: tuple[GroupReport, ...]
    before: ModelSize
    after: ModelSize
    prunable_before: ModelSize
    prunable_after: ModelSize
    threshold: float | None
    negative_share: float | None
    asked: str = ""
    method: str = ""
    left_whole: tuple[LeftWhole, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    plan: PruningPlan = field(default=PruningPlan(()), repr=False)
    scores: Scores | None = field(default=None, repr=False, compare=False)
    loss_before: float | None = None
    loss_after: float | None = None
    bypasses: Mapping[str, int] = field(default_factory=dict)

    @property
    def uncertain_units(self) -> int | None:
        """Units within two standard errors of the threshold, of all scored groups; None without scores."""
        known = [g.uncertain for g in self.groups if g.uncertain is not None]
        return sum(known) if known else None

    @property
    def summary(self) -> str:
        """What was done, in one line."""
        parts = [
            f"pruned to {one_number(self.before.params, self.after.params)} parameters",
            f"{one_number(self.before.macs, self.after.macs)} MACs",
        ]
        if (left := share(self.prunable_after.params, self.prunable_before.params)) is not None:
            parts.insert(1, f"{left:.1%} of the prunable ones")
        if self.loss_before is not None and self.loss_after is not None:
            parts.append(f"loss {self.loss_before:.4g} -> {self.loss_after:.4g}")
        return ", ".join(parts) + (f"; asked for {self.asked}" if self.asked else "")

    def units(self, kind: Kind) -> tuple[int, int, int]:
        """Return how many units of a kind there were, are kept and are implanted.

        Args:
            kind: The kind.

        Returns:
            Number of units before, kept and implanted.
        """
        members = [g for g in self.groups if g.kind is kind]
        return sum(g.units for g in members), sum(g.kept for g in members), sum(g.implanted for g in members)

    def to_dict(self, *, with_plan: bool = False) -> dict[str, Any]:
        """Return everything as JSON values; numbers that are not finite become None.

        Args:
            with_plan: Whether the plan is in it, too, which a checkpoint carries anyway.

        Returns:
            The values.
        """
        # asdict would take the plan apart, which has a form of its own and is long, and the scores are tensors.
        result = asdict(replace(self, plan=PruningPlan(()), scores=None, groups=()))
        del result["plan"], result["scores"]
        result["groups"] = [group.to_dict() for group in self.groups]
        result["uncertain_units"] = self.uncertain_units
        result["provenance"] = [dict(origin) for origin in self.plan.provenance]
        cleaned: dict[str, Any] = _jsonable(result)
        return {**cleaned, "plan": self.plan.to_dict()} if with_plan else cleaned

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the report that ``to_dict`` described; without a plan if it had none.

        Args:
            values: The values, such as those of ``pruning_report.json``.

        Returns:
            The report.

        Raises:
            ConfigError: If they are not those of a report.
        """
        try:
            return cls(
                groups=tuple(GroupReport.from_dict(g) for g in values["groups"]),
                before=size_of(values["before"]),
                after=size_of(values["after"]),
                prunable_before=size_of(values["prunable_before"]),
                prunable_after=size_of(values["prunable_after"]),
                seconds={name: number_of(x) for name, x in values["seconds"].items()},
                left_whole=tuple(
                    LeftWhole(
                        tuple(checked("names", n, str) for n in w["names"]),
                        checked("reason", w["reason"], str),
                        None if w["kind"] is None else Kind(w["kind"]),
                    )
                    for w in values.get("left_whole", ())
                ),
                # The file beside a checkpoint has none, as the checkpoint carries it.
                plan=PruningPlan.from_dict(values["plan"]) if "plan" in values else PruningPlan(()),
                **{n: checked(n, values[n], float, None) for n in ("threshold", "negative_share")},
                **{n: checked(n, values.get(n, ""), str) for n in ("asked", "method")},
                **{n: checked(n, values.get(n), float, None) for n in ("loss_before", "loss_after")},
                bypasses={str(name): int(rank) for name, rank in values.get("bypasses", {}).items()},
            )
        except KeyError as error:
            raise ConfigError(
                f"expected the values of a pruning report, got some without {error}; read pruning_report.json"
            ) from error
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"expected the values of a pruning report, got others ({error}); read pruning_report.json"
            ) from error

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Self:
        """Return the report that :meth:`save` wrote to a folder.

        Args:
            directory: Folder with ``pruning_report.json``.

        Returns:
            The report, without the plan, which the checkpoint carries; with the scores if they lie beside it.

        Raises:
            ConfigError: If a file is damaged, or none of a report.
        """
        file = Path(directory) / "pruning_report.json"
        values = read_json(file)
        try:
            report = cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error
        scores = Path(directory) / SCORES_FILE
        return replace(report, scores=load_scores(scores)) if scores.is_file() else report

    def to_log(self) -> dict[str, float]:
        """Return the main numbers under flat names, for a Trainer's log."""
        values: dict[str, float | None] = {
            "prune_params_before": self.before.params,
            "prune_params": self.after.params,
            "prune_macs_before": self.before.macs,
            "prune_macs": self.after.macs,
            "prune_prunable_params_kept": share(self.prunable_after.params, self.prunable_before.params),
            "prune_prunable_macs_kept": share(self.prunable_after.macs, self.prunable_before.macs),
            "prune_threshold": self.threshold,
            "prune_uncertain_units": self.uncertain_units,
            "prune_negative_share": self.negative_share,
            "prune_loss_before": self.loss_before,
            "prune_loss_after": self.loss_after,
            "prune_seconds": sum(self.seconds.values()),
        }
        for kind in Kind:
            units, kept, implanted = self.units(kind)
            if units:
                values |= {f"prune_{kind.value}_kept": kept, f"prune_{kind.value}_implanted": implanted}
        # Loggers take numbers, and some fail on NaN.
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
        if self.scores is not None:
            write_whole(folder / SCORES_FILE, partial(save_scores, self.scores))
        else:  # those of an earlier report would be taken for this one's
            (folder / SCORES_FILE).unlink(missing_ok=True)
        for name, text in texts.items():
            write_whole(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            (g.name, g.summary, *size_cells(g.before, g.after), "" if g.uncertain is None else f"{g.uncertain:,}")
            for g in self.groups
        ]
        uncertain = "" if self.uncertain_units is None else f"{self.uncertain_units:,}"
        rows.append(("prunable part", "", *size_cells(self.prunable_before, self.prunable_after), uncertain))
        rows.append(("whole model", "", *size_cells(self.before, self.after), ""))
        return rows

    def _facts(self) -> list[tuple[str, str]]:
        # By kind, as heads and neurons do not add up; what can lose nothing is in no group.
        units = ", ".join(f"{kind.value} {counts(*self.units(kind))}" for kind in Kind if self.units(kind)[0])
        facts = [
            ("units of these groups", units),
            ("parameters", exact(self.before.params, self.after.params)),
            ("MACs per sample", exact(self.before.macs, self.after.macs)),
            ("prunable parameters", exact(self.prunable_before.params, self.prunable_after.params)),
            ("prunable MACs per sample", exact(self.prunable_before.macs, self.prunable_after.macs)),
            ("asked for", self.asked),
            ("method", self.method),
        ]
        if self.threshold is not None:
            facts.append(("threshold", f"{self.threshold:.4g}"))
        if self.uncertain_units is not None:
            facts.append(("within two standard errors of the threshold", f"{self.uncertain_units:,} units"))
        if self.negative_share is not None:
            facts.append(("negative sensitivities", f"{self.negative_share:.1%}"))
        if self.loss_before is not None and self.loss_after is not None:
            facts.append(("loss right before and after the cut", f"{self.loss_before:.4g}, {self.loss_after:.4g}"))
        if self.bypasses:
            ranks = sorted(self.bypasses.values())
            facts.append(("bypasses", f"{len(ranks)} of rank {ranks[0]} to {ranks[-1]}"))
        facts += [("left whole", str(entry)) for entry in self.left_whole]
        facts.append(("seconds", ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())))
        return [(name, text) for name, text in facts if text]


def _jsonable(value: Any) -> Any:
    """Return a value as JSON has it, which knows neither NaN nor infinity: those become None."""
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Kind) else value
