"""What a card says, gathered from a model and its report."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hap_hf.checkpoint import plan_of
from hap_hf.names.plan import PruningPlan
from hap_hf.report import PruningReport
from hap_hf.report.last import last_report


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside what the plan says.

    Args:
        plan: What was done.
        architecture: Name of the model's class.
        report: Sizes and losses before and after; None where the model came without.
        base: What was pruned: a name on the Hub, or any other name; empty if unknown.
        task: The task, as pipelines call it; empty if unknown.
        data: What it was pruned and judged on; empty if unknown.
        metric: What ``results`` are.
        results: Values of the metric, by when they were measured.
        latency: Milliseconds of a batch before and after, and a sentence about where.
        pictures: File names of pictures beside the card.
    """

    plan: PruningPlan
    architecture: str
    report: PruningReport | None = None
    base: str = ""
    task: str = ""
    data: str = ""
    metric: str = ""
    results: Mapping[str, float] = field(default_factory=dict)
    latency: tuple[float, float, str] | None = None
    pictures: Sequence[str] = ()

    @classmethod
    def of(cls, model: Any, report: PruningReport | None = None, **more: Any) -> "CardFacts | None":
        """Return what is known of a model.

        Args:
            model: A model.
            report: Its report; by default that of its last pruning in this process, or the one beside the checkpoint
                that it was loaded from.
            **more: Other fields.

        Returns:
            The facts, or None of a model that was not pruned.
        """
        plan = plan_of(model)
        if plan is None or not isinstance(model, PreTrainedModel):
            return None
        origin = str(model.name_or_path or "")
        report = report or last_report(model)
        if report is None and (Path(origin) / "pruning_report.json").is_file():
            report = PruningReport.load(origin)
        return cls(plan, type(model).__name__, report, **{"base": origin, **more})

    @property
    def base_on_the_hub(self) -> str | None:
        """The name of the base model where it is one of the Hub's."""
        # A name, or an owner and a name: what else a folder may be called is none.
        is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.base) and not self.base.startswith(".")
        return self.base if is_name and not Path(self.base).exists() else None
