"""The penalties of growing regularisation, from the choice of the units to the cut."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from hap_hf.config import HapConfig
from hap_hf.discovery import discover
from hap_hf.errors import ConfigError
from hap_hf.evidence.evidence import Evidence
from hap_hf.names.actions import KEEP, PRUNE
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.pipeline import decide
from hap_hf.report import PruningReport
from hap_hf.selection import Round, select_groups
from hap_hf.surgery.shrinking import add_penalty_, mean_sizes, shrink_
from hap_hf.trainer.growing import GrowingReg, increments, phases
from hap_hf.trainer.optimizers import bare_optimizer
from hap_hf.trainer.schedule import Timing, steps_of


@dataclass
class Growth:
    """The penalties of one round, from the choice of its units to the cut.

    Args:
        settings: How units shrink.
        stage: What will happen to every group; before variant 2 has chosen, that all units stay.
        shrinking: The names of the groups that may be pruned.
        began: Optimizer steps of the training before it.
        steps: Optimizer steps until the cut.
        increment: By how much the penalty grows.
        picking_increment: By how much it grows while variant 2 chooses.
        start: What could be pruned before the first round.
        planned: The report as it will be; None before variant 2 has chosen.
        iterations: Steps taken.
        penalties: The penalty of each unit, by group.
        ratios: By group, how many times smaller the chosen units are than the others, a running mean.
        finished: The groups whose penalty grows no more.
    """

    settings: GrowingReg
    stage: tuple[GroupPlan, ...]
    shrinking: tuple[str, ...]
    began: int
    steps: int
    increment: float
    picking_increment: float
    start: float | None
    planned: PruningReport | None
    iterations: int = 0
    penalties: dict[str, Tensor] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Begin without penalties."""
        for g in self._plans():
            self.penalties.setdefault(g.group.name, torch.zeros(g.group.num_units, dtype=torch.float64))

    @property
    def must_pick(self) -> bool:
        """Whether variant 2 has to choose now."""
        return self.planned is None and self.iterations >= phases(self.settings, self.steps)[0]

    @property
    def is_ripe(self) -> bool:
        """Whether the cut is due."""
        return self.planned is not None and self.iterations >= self.steps

    def pick(self, evidence: Evidence, config: HapConfig, place: Round) -> None:
        """Choose the units of variant 2: those whose weights are the smallest now that all of them shrank.

        Args:
            evidence: The model, and what to score on.
            config: How much to prune.
            place: Which round it is.
        """
        decision = decide(evidence, replace(config, method="magnitude", num_passes=None, compensate=None), place)
        planned = decision.expected
        self.stage, self.planned, self.start = planned.plan.stages[0], planned, decision.place.start
        for g in self._plans():
            gone = _gone(g)
            kept = torch.full_like(self.penalties[g.group.name], -self.settings.recover)
            self.penalties[g.group.name] = torch.where(gone, self.penalties[g.group.name], kept)

    def grow(self, model: nn.Module) -> None:
        """Let the penalties grow if it is time; called once a step, before the weights shrink.

        Args:
            model: The model, of which sizes are compared.
        """
        picking, growing = phases(self.settings, self.steps)
        now, self.iterations = self.iterations, self.iterations + 1
        if now % self.settings.interval or now >= picking + growing:
            return
        if self.planned is None:
            for penalty in self.penalties.values():
                penalty += self.picking_increment
            return
        for g in self._plans():
            self._compare(model, g)
        groups = {g.group.name for g in self._plans()}
        if self.settings.variant == 1 and not all(self.ratios.get(n, 0.0) >= self.settings.ratio for n in groups):
            self.finished.clear()  # all go on until all are there
        for g in self._plans():
            if g.group.name not in self.finished:
                self.penalties[g.group.name][_gone(g)] += self.increment

    def shrink_(self, model: nn.Module, optimizer: Any) -> None:
        """Shrink the weights by one step, or add the penalty to their gradients.

        Args:
            model: The model, changed in place.
            optimizer: Its optimizer, for the learning rates.
        """
        groups = bare_optimizer(optimizer).param_groups
        rates = {id(p): float(each["lr"]) for each in groups for p in each["params"]}
        usual = float(groups[0]["lr"])  # of weights that are not trained
        for g in self._plans():
            penalty = self.penalties[g.group.name]
            if self.settings.coupled:
                add_penalty_(model, g.group, penalty, self.settings.on)
            else:
                shrink_(model, g.group, penalty, self.settings.on, lambda p: rates.get(id(p), usual))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values, for a checkpoint."""
        plain = {n: getattr(self, n) for n in _PLAIN}
        return {
            **plain,
            "settings": self.settings.to_dict(),
            "stage": PruningPlan((self.stage,)).to_dict(),
            "shrinking": list(self.shrinking),
            "planned": None if self.planned is None else self.planned.to_dict(with_plan=True),
            "penalties": {name: values.tolist() for name, values in self.penalties.items()},
            "ratios": {name: value if math.isfinite(value) else None for name, value in self.ratios.items()},
            "finished": sorted(self.finished),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what ``to_dict`` described.

        Args:
            values: Values from a checkpoint.

        Returns:
            The growth, as it was.
        """
        return cls(
            **{name: values[name] for name in _PLAIN},
            settings=GrowingReg.from_dict(values["settings"]),
            stage=PruningPlan.from_dict(values["stage"]).stages[0],
            shrinking=tuple(values["shrinking"]),
            planned=None if values["planned"] is None else PruningReport.from_dict(values["planned"]),
            penalties={n: torch.tensor(x, dtype=torch.float64) for n, x in values["penalties"].items()},
            ratios={n: math.inf if x is None else x for n, x in values["ratios"].items()},
            finished=set(values["finished"]),
        )

    def _plans(self) -> list[GroupPlan]:
        wanted = set(self.shrinking)
        return [g for g in self.stage if g.group.name in wanted]

    def _compare(self, model: nn.Module, g: GroupPlan) -> None:
        """Take the sizes of the units of a group into its running mean."""
        name, gone = g.group.name, _gone(g)
        if not gone.any():
            self.ratios[name] = math.inf
            self.finished.add(name)
            return
        small, large = mean_sizes(model, g.group, self.settings.on, gone)
        # Of a group that goes as a whole there is nothing to compare with: it grows to the end.
        now = 0.0 if math.isnan(large) else large / small if small else math.inf
        before = self.ratios.get(name, now)
        self.ratios[name] = now if math.isinf(before) or math.isinf(now) else 0.9 * before + 0.1 * now
        if self.ratios[name] >= self.settings.ratio:
            self.finished.add(name)


_PLAIN = ("began", "steps", "increment", "picking_increment", "start", "iterations")


def _gone(g: GroupPlan) -> Tensor:
    return torch.tensor([a == PRUNE for a in g.actions], dtype=torch.bool)


def begin_growth(
    settings: GrowingReg,
    evidence: Evidence,
    config: HapConfig,
    place: Round,
    began: int,
    rates: Sequence[float],
) -> Growth:
    """Choose the units that will shrink.

    Args:
        settings: How units shrink.
        evidence: The model, and what to score on.
        config: How much to prune.
        place: Which round it is.
        began: Optimizer steps so far.
        rates: The learning rate of each step until the cut.

    Returns:
        The growth, in which nothing has shrunk yet.
    """
    first, then = increments(settings, rates)
    planned: PruningReport | None = None
    if settings.variant == 1:
        decision = decide(evidence, config, place)
        planned, start, stage = decision.expected, decision.place.start, decision.stage
        groups = [g.group for g in stage]
    else:
        found = discover(evidence.model, evidence.example, others=evidence.others())
        groups, start = list(found.groups), place.start
        stage = tuple(GroupPlan(g, KEEP * g.num_units) for g in groups)
    shrinking = tuple(g.name for g in select_groups(groups, config))
    return Growth(settings, stage, shrinking, began, len(rates), then, first, start, planned)


def check_growing(settings: GrowingReg, model: nn.Module, timing: Timing, total: int, *, scaled: bool) -> None:
    """Check that units have the time to shrink, and can.

    Args:
        settings: How units shrink.
        model: The Trainer's model.
        timing: When rounds come.
        total: Optimizer steps of the training.
        scaled: Whether gradients are scaled, as in a training with fp16.

    Raises:
        ConfigError: If they have not, or cannot.
    """
    steps, first = steps_of("steps", settings.steps, total), timing.due(1, total)
    interval = timing.due(2, total) - first
    if first < steps:
        raise ConfigError(
            f"units shrink for {steps} steps before the cut, and the first round comes after {first}: pass "
            f"step={steps} or more, or GrowingReg(steps={first}) or fewer"
        )
    if timing.num_rounds > 1 and interval < steps:
        raise ConfigError(
            f"units shrink for {steps} steps before each cut, and rounds follow each other after {interval}: pass "
            f"interval={steps} or more, or GrowingReg(steps={interval}) or fewer"
        )
    half = [n for n, p in model.named_parameters() if p.is_floating_point() and p.dtype.itemsize < 4]
    if half:
        raise ConfigError(
            f"{half[0]} is in {model.get_parameter(half[0]).dtype}, which rounds small steps of shrinking away; load "
            "the model with dtype='float32' and train with bf16=True or fp16=True"
        )
    if settings.coupled and scaled:
        raise ConfigError("coupled=True adds to gradients, which fp16=True scales; train with bf16=True, or without it")
