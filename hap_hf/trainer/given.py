"""A plan that was made before the training, in place of one that is made of scores in it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hap_hf.checkpoint import plan_of
from hap_hf.checkpoint.headers import read_header
from hap_hf.config import HapConfig
from hap_hf.decision import Decision
from hap_hf.errors import ConfigError
from hap_hf.names.actions import IMPLANT
from hap_hf.names.plan import PruningPlan
from hap_hf.planned import check_fits
from hap_hf.report import PruningReport
from hap_hf.selection import Ramp


@dataclass(frozen=True, eq=False)
class GivenPlan:
    """What the rounds of a training do, a stage a round.

    Args:
        plan: The stages.
        decided: What is known of how the only stage came about; None where the plan is all there is.
    """

    plan: PruningPlan
    decided: PruningReport | None = None

    @classmethod
    def of(cls, given: object) -> "GivenPlan":
        """Return the plan that a user gave.

        Args:
            given: A plan, a decision, plain JSON values of a plan, or the folder or name of a pruned checkpoint.

        Returns:
            The plan.

        Raises:
            ConfigError: If it is none of these, or has nothing to do.
            PlanFormatError: If values or a checkpoint hold something that is no plan.
        """
        decided = None
        if isinstance(given, Decision):
            decided = given.expected
            given = decided.plan
        elif isinstance(given, (str, os.PathLike)):
            where = os.fspath(given)
            given = read_header(where).plan
            if given is None:
                raise ConfigError(f"plan={where!r} is a checkpoint without a plan of hap_hf; give one that was pruned")
        elif isinstance(given, Mapping):
            given = PruningPlan.from_dict(dict(given))
        if not isinstance(given, PruningPlan):
            raise ConfigError(
                f"plan must be a PruningPlan, a Decision, or the folder or name of a pruned checkpoint, got "
                f"{type(given).__name__}; hap_hf.plan_of(model) returns the plan of a pruned model"
            )
        if not given.stages:
            raise ConfigError("plan has no stage, so that there is nothing to do; leave HessianPruner out")
        return cls(given, decided)

    @property
    def has_implants(self) -> bool:
        """Whether it makes any implant."""
        return any(IMPLANT in g.actions for g in self.plan)

    def check_settings(self, num_rounds: int, ramp: Ramp, regularise: object) -> int:
        """Return the number of rounds, if the other settings leave the choice of units to the plan.

        Args:
            num_rounds: What was asked for, 1 by default.
            ramp: How an amount rises.
            regularise: How units shrink once they are chosen.

        Returns:
            The number of stages.

        Raises:
            ConfigError: If a setting is about choosing units, or about another number of rounds.
        """
        stages = len(self.plan.stages)
        if num_rounds not in {1, stages}:
            raise ConfigError(
                f"the plan has {stages} stage{'s' * (stages > 1)}, each of which is a round, got "
                f"num_rounds={num_rounds}; leave num_rounds out"
            )
        for name, wrong in (("ramp", ramp is not Ramp.LINEAR), ("regularise", regularise is not None)):
            if wrong:
                raise ConfigError(f"{name} says how units are chosen, and plan has chosen them; leave {name} out")
        return stages

    def config(self, given: HapConfig | None, decision: object) -> HapConfig:
        """Return the settings by which the plan is carried out: those given, those of the decision, or the defaults.

        Args:
            given: What the user said.
            decision: What the user gave as plan.

        Returns:
            The settings, whose amount is not read.
        """
        if given is not None:
            return given
        # Any amount: there has to be one, and none of them is read.
        return decision.config if isinstance(decision, Decision) else HapConfig(prune_ratio=0.0)

    def stage(self, number: int) -> PruningPlan:
        """Return the plan of one round.

        Args:
            number: Number of the round, from 1.

        Returns:
            A plan of one stage.
        """
        index = number - 1
        return PruningPlan(
            self.plan.stages[index:number], self.plan.provenance[index:number], self.plan.bypasses[index:number]
        )

    def check(self, model: nn.Module, reports: Sequence[PruningReport]) -> None:
        """Check that what is left of the plan fits a model.

        Args:
            model: The Trainer's model.
            reports: The rounds behind it.

        Raises:
            ConfigError: If these rounds did something else than the plan, or the model went through it already.
            PlanMismatchError: If it fits another model.
        """
        done = [stage for report in reports for stage in report.plan.stages]
        if list(self.plan.stages[: len(done)]) != done:
            raise ConfigError(
                f"the {len(done)} rounds so far did something else than the plan says; resume with the plan that the "
                "training began with, or begin anew"
            )
        left, own = self.plan.since(len(done)), plan_of(model)
        if left.stages and own is not None and own.stages[-len(left.stages) :] == left.stages:
            raise ConfigError(
                "the model went through this plan already; leave HessianPruner out, or begin with a dense model"
            )
        check_fits(model, left)


def plan_or_config(config: HapConfig | Mapping[str, Any] | None, plan: object) -> tuple[HapConfig, GivenPlan | None]:
    """Return the settings of a training, and the plan that was given for it.

    Args:
        config: Settings; a mapping is read by ``HapConfig.from_dict``.
        plan: What the user gave; None to choose units in the training.

    Returns:
        Both; None where no plan was given.

    Raises:
        ConfigError: If there is neither.
    """
    settings = config if config is None or isinstance(config, HapConfig) else HapConfig.from_dict(config)
    if plan is not None:
        given = GivenPlan.of(plan)
        return given.config(settings, plan), given
    if settings is None:
        raise ConfigError(
            "expected a config, or a plan to carry out, got neither: HessianPruner(HapConfig(target_params=0.5)) or "
            "HessianPruner(plan=...); plan_of(model) is None for a model that was not pruned"
        )
    return settings, None
