"""The callback that prunes."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hap_hf.admission import check_prunable
from hap_hf.config import HapConfig
from hap_hf.decision import Decision
from hap_hf.errors import ConfigError
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.losses import LossFunction
from hap_hf.names.checks import member
from hap_hf.names.plan import PruningPlan
from hap_hf.planned import check_planned
from hap_hf.report import PruningReport
from hap_hf.selection import Ramp, Round, check_rounds
from hap_hf.trainer.best_model import forget_best_
from hap_hf.trainer.compiled import check_compiled
from hap_hf.trainer.distributed import check_arguments, check_wrapping, processes_of, rewrap_
from hap_hf.trainer.evidence import kept, look_ahead, training_evidence
from hap_hf.trainer.floor import Floor
from hap_hf.trainer.freezing import check_beginning, check_freezing, freeze_the_rest_
from hap_hf.trainer.given import plan_or_config
from hap_hf.trainer.growing import GrowingReg, regularisation
from hap_hf.trainer.growth import Growth, check_growing
from hap_hf.trainer.host import calling_trainer
from hap_hf.trainer.optimizers import bare_optimizer, check_optimizer
from hap_hf.trainer.progress import (
    check_given,
    is_result_of,
    progress_from_dict,
    progress_to_dict,
    saved_progress,
    write_report,
)
from hap_hf.trainer.rebuilding import rebuild_before_loading
from hap_hf.trainer.round import do_round
from hap_hf.trainer.schedule import Timing, rewind_
from hap_hf.trainer.scoring import check_training_data
from hap_hf.trainer.showing import show
from hap_hf.trainer.shrinking import Shrinks


class HessianPruner(Shrinks, ExportableState):
    """Prunes the model of a ``Trainer`` while it trains.

    Scores are computed with the Trainer's own loss (label smoothing and ``compute_loss_func`` included) on batches of
    its training data, the optimizer's state follows the parameters, and what was done is logged through the Trainer
    and written to ``pruning_report.json`` and ``pruning_report.md`` in its output folder. With several rounds these two
    are the last round's, and each has its own in ``pruning_round_1`` and so on.

    By default the model is pruned once, before the first step. ``step`` or ``epoch`` move that to the end of one; with
    several rounds, the next ones follow ``interval`` steps (where ``step`` is given) or epochs later, scored anew.

    Rounds are done once: a further ``train()`` with the same callback and a model that went through them goes on with
    the next one; a new callback starts with the first. Checkpoints carry what is needed for that, and
    ``trainer.train(resume_from_checkpoint=...)`` prunes a dense model like the checkpoint's before it loads the
    weights, if the callback was given to the Trainer at its construction. The search for the best model begins anew
    with each round.

    With ``DistributedDataParallel`` each process scores its share of the batches, of which there are as many in all as
    with one. All processes end a round with the same plan and weights, and all raise if one fails; both are checked.

    Args:
        config: How much to prune and how; a mapping is read by ``HapConfig.from_dict``.
        plan: What to do in place of scoring: a plan, a decision, or a pruned checkpoint; each stage is a round. What
            makes up for units is fitted anew; the settings for that are the config's, whose amount is not read.
        step: Number of optimizer steps before the first round; below 1, a share of the training's.
        epoch: Number of epochs before the first round.
        num_rounds: Number of rounds over which the amount rises to its target.
        interval: Steps or epochs between rounds; steps below 1 are a share of the training's.
        ramp: How the amount rises: ``"linear"``, or ``"cubic"``, by most in the first rounds.
        rewind: Let the learning rate schedule begin anew after each round.
        regularise: Shrink units before they are cut, see :class:`GrowingReg`.
        floor: How much of the Trainer's metric may be lost, see :class:`Floor`; the config's amount is the most that
            goes.
        batches: Batches to score on instead of the Trainer's training data, the same in every process.
        loss_fn: Loss to score with instead of the Trainer's, called with the model and a batch.
        train_only_implants: Freeze the rest after the last round, as :func:`hap_hf.train_only_implants_` does.
        also_train: Glob patterns of modules and parameters that are then trained beside the implants.

    Attributes:
        reports: The report of each round so far.

    Raises:
        ConfigError: If ``step`` and ``epoch`` are both given, a number is below 1, or implants cannot be trained alone.
    """

    def __init__(
        self,
        config: HapConfig | Mapping[str, Any] | None = None,
        *,
        plan: PruningPlan | Decision | Mapping[str, Any] | str | PathLike[str] | None = None,
        step: int | float | None = None,
        epoch: int | None = None,
        num_rounds: int = 1,
        interval: int | float = 1,
        ramp: Ramp | str = Ramp.LINEAR,
        rewind: bool = False,
        regularise: GrowingReg | Mapping[str, Any] | None = None,
        floor: Floor | Mapping[str, Any] | float | None = None,
        batches: Iterable[Mapping[str, Any]] | None = None,
        loss_fn: LossFunction | None = None,
        train_only_implants: bool = False,
        also_train: Iterable[str] = (),
    ) -> None:
        self.config, self._plan = plan_or_config(config, plan)
        ramp = member(Ramp, "ramp", ramp)
        if self._plan is not None:
            num_rounds = self._plan.check_settings(num_rounds, ramp, regularise)
        else:
            check_rounds(self.config, num_rounds)
        self._timing = Timing(step, epoch, num_rounds, interval, ramp, rewind)
        if regularise is not None and step is None:
            raise ConfigError(
                "regularise shrinks units in the steps before a round, so step=... must say when it comes"
            )
        super().__init__()
        self.step = step
        self.epoch = epoch
        self.num_rounds = num_rounds
        self.interval = interval
        self.ramp = ramp
        self.rewind = rewind
        self.regularise = regularisation(self.config, regularise)
        self.floor = Floor.of(floor, self.config, plan=plan, num_rounds=num_rounds > 1, regularise=regularise)
        self.train_only_implants = train_only_implants
        implants = self._plan.has_implants if self._plan is not None else self.config.implant_ratio > 0
        self.also_train = check_freezing(self.config, train_only_implants, also_train, implants=implants)
        self.reports: list[PruningReport] = []
        self._batches = kept(batches, self.config.max_batches)
        self._loss_fn = loss_fn
        self._start: float | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the Trainer prune its model like a checkpoint's before it loads that one's weights."""
        rebuild_before_loading(calling_trainer(), type(self))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the training can be pruned, and do a round that is due before the first step.

        Raises:
            UnsupportedModelError: If the training runs in a way that cannot be pruned.
            ConfigError: If a round would fall behind the end of the training.
        """
        check_arguments(args)
        trainer = calling_trainer()
        check_wrapping(trainer, kwargs["model"])
        rewrap_(trainer)  # an earlier training may have left it behind a model that was pruned since
        processes = processes_of(args)
        with processes.agreeing("the beginning of the training"):
            # First of all, as what is checked below matters only to rounds that are still to come.
            self._go_on(state, **kwargs)
            self._check_schedule(args, state, **kwargs)
            if not self.finished:
                if self._plan is not None:
                    self._plan.check(kwargs["model"], self.reports)
                check_compiled(trainer, kwargs["model"])
                check_optimizer(kwargs["optimizer"], kwargs["model"])
                if self.floor is not None:
                    self.floor.check(trainer)
                check_training_data(kwargs["train_dataloader"], self.config, needed=self._batches is None)
            check_beginning(kwargs["model"], self.num_rounds - self._done, self.also_train)
        # Rounds that some processes do and others do not would leave them waiting for each other.
        settings = self.state()["args"] | {"given": self._given(), "rounds done": self._done}
        settings = {**settings.pop("config"), **settings}
        processes.check_same("settings of HessianPruner", settings, "start every process with the same script")
        self._freeze_if_done(**kwargs)
        reached = state.global_step if self.step is not None else int(state.epoch or 0)
        # What a later round finds too little for is left out, also where a training is resumed.
        if not self.finished and not self.began and reached < self._timing.due(self._done + 1, state.max_steps):
            look_ahead(trainer, self.config, kwargs["train_dataloader"], self._batches, self._loss_fn, self._check)
        # Rounds between a checkpoint and its next step come here too: those of an epoch's end come after its last save.
        self._round_if_due(reached, args, state, **kwargs)

    def _check(self, evidence: Evidence, config: HapConfig) -> None:
        if self._plan is None:
            check_prunable(evidence, config, self._place)
        else:
            check_planned(evidence, config, self._plan.stage(self._done + 1))

    def _check_schedule(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """Check that there is time for all rounds, and let the learning rate begin anew after each."""
        left = self._done < self.num_rounds
        if left:
            self._timing.check_in(args, state.max_steps)
        if left and self.regularise is not None:
            scaled = calling_trainer().accelerator.scaler is not None
            check_growing(self.regularise, kwargs["model"], self._timing, state.max_steps, scaled=scaled)
        if self.rewind and (left or state.global_step):
            cuts = self._timing.cuts(args, state.max_steps, kwargs["train_dataloader"])
            rewind_(kwargs["lr_scheduler"], cuts, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Do the round that is due after this step, if rounds go by steps."""
        if self.step is not None:
            self._round_if_due(state.global_step, args, state, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do the round that is due after this epoch, if rounds go by epochs."""
        if self.step is None:  # `state.epoch` is a sum of fractions, which may fall short of the whole number
            self._round_if_due(round(state.epoch or 0), args, state, **kwargs)

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes to ``trainer_state.json``: the settings and the rounds done."""
        names = ("step", "epoch", "num_rounds", "interval", "rewind", "train_only_implants", "also_train")
        growing = None if self.regularise is None else self.regularise.to_dict()
        settings = {name: getattr(self, name) for name in names} | {"ramp": self.ramp.value, "regularise": growing}
        settings["floor"] = None if self.floor is None else self.floor.to_dict()
        if self._plan is not None:
            settings["plan"] = self._plan.plan.to_dict()
        return {"args": {"config": self.config.to_dict(), **settings}, "attributes": {"progress": self.progress}}

    @property
    def progress(self) -> Mapping[str, Any]:
        """The rounds done, as plain JSON values; setting it puts ``reports`` back."""
        growth = None if self._growth is None else self._growth.to_dict()
        others = {"given": self._given(), "growth": growth, "left_out": self._left_out}
        return {**progress_to_dict(self.reports, self._start), **others}

    @progress.setter
    def progress(self, saved: Mapping[str, Any]) -> None:
        self.reports, self._start = progress_from_dict(saved)
        growth, self._left_out = saved.get("growth"), saved.get("left_out", 0)
        self._growth = None if growth is None else Growth.from_dict(growth)

    def _go_on(self, state: TrainerState, **kwargs: Any) -> None:
        """Find out which rounds the model has behind it: those of the checkpoint, of the last training, or none."""
        saved = saved_progress(calling_trainer(), self, state)
        if saved is not None:
            self.progress = saved
        # The rounds are the model's and not the callback's: a fresh model begins with the first.
        if not is_result_of(self.reports, kwargs["model"]):
            self.reports, self._start, self._growth, self._left_out = [], None, None, 0
        # One that an earlier training left behind is not this one's.
        if self._growth is not None and self._growth.iterations != state.global_step - self._growth.began:
            self._growth = None
        # The Trainer updates what it finds there at every save, and a checkpoint from before the callback has nothing.
        entries: Any = state.stateful_callbacks
        entries.setdefault(type(self).__name__, self.state())
        if saved is not None and not self.finished:
            check_given(saved["given"], self._given())

    def _given(self) -> list[str]:
        return [name for name in ("batches", "loss_fn") if getattr(self, f"_{name}") is not None]

    def _round_if_due(self, reached: int, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        # One at a time, also where a checkpoint without the callback leaves several due: the model trains between them.
        if not self.finished:
            with self._unless_nothing_is_left(self._done, self.num_rounds):
                self._advance(reached, args, state, **kwargs)
            self._freeze_if_done(**kwargs)

    def _advance(self, reached: int, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        if self.regularise is None:
            if reached >= self._timing.due(self._done + 1, state.max_steps):
                self._round(args, state, **kwargs)
            return
        if self._growth is not None and self._growth.is_ripe:
            self._round(args, state, **kwargs)
        with self._unless_nothing_is_left(self._done, self.num_rounds):  # of the next round
            self._grow_if_due(self.regularise, reached, state, **kwargs)

    @property
    def _place(self) -> Round:
        return Round(self._done + 1, self.num_rounds, self._start, self.ramp)

    def _evidence(self, *, train_dataloader: Any, **_: Any) -> AbstractContextManager[tuple[Evidence, HapConfig]]:
        return training_evidence(calling_trainer(), self.config, train_dataloader, self._batches, self._loss_fn)

    def _round(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """Do the next round: score, prune, report, and let the training go on with what is left."""
        trainer, place, optimizer = calling_trainer(), self._place, bare_optimizer(kwargs["optimizer"])
        with self._evidence(**kwargs) as (evidence, config):
            report, place = do_round(
                trainer, evidence, config, place, optimizer, growth=self._growth, plan=self._plan, floor=self.floor
            )
        self._start, self._growth = place.start, None  # after the round: one that fails has not taken place
        self.reports.append(report)
        forget_best_(state, kwargs["lr_scheduler"])
        with evidence.processes.agreeing("reporting"):
            show(trainer, report)
            if state.is_world_process_zero:
                number = self._done if self.num_rounds > 1 else None
                write_report(report, Path(args.output_dir or "."), number)

    def _freeze_if_done(self, **kwargs: Any) -> None:
        if self.train_only_implants and self.finished:
            freeze_the_rest_(calling_trainer(), kwargs["model"], kwargs["optimizer"], self.also_train)
