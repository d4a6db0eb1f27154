"""The callback that prunes."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hap_hf.config import HapConfig
from hap_hf.errors import ConfigError
from hap_hf.evidence.losses import LossFunction
from hap_hf.pipeline import prune_round
from hap_hf.report import PruningReport
from hap_hf.selection import Round
from hap_hf.trainer.best_model import forget_best_
from hap_hf.trainer.compiled import check_compiled, uncompiled
from hap_hf.trainer.distributed import check_arguments, check_wrapping, processes_of, pruning_together, rewrap_
from hap_hf.trainer.freezing import check_beginning, check_freezing, freeze_the_rest_
from hap_hf.trainer.host import calling_trainer
from hap_hf.trainer.optimizers import bare_optimizer, check_optimizer
from hap_hf.trainer.progress import is_result_of, progress_from_dict, progress_to_dict, saved_progress
from hap_hf.trainer.rebuilding import rebuild_before_loading
from hap_hf.trainer.scoring import check_training_data, scoring_batches, trainer_loss, without_autocast

logger = logging.getLogger(__name__)


class HessianPruner(TrainerCallback, ExportableState):
    """Prunes the model of a ``Trainer`` while it trains.

    Scores are computed with the Trainer's own loss (label smoothing and ``compute_loss_func`` included) on batches of
    its training data, the optimizer's state follows the parameters, and what was done is logged through the Trainer
    and written to ``pruning_report.json`` and ``pruning_report.md`` in its output folder. With several rounds these two
    are the last round's, and each has its own in ``pruning_round_1`` and so on.

    By default the model is pruned once, before the first step. ``step`` or ``epoch`` move that to the end of a step or
    epoch; with several rounds, the next ones follow ``interval`` steps (where ``step`` is given) or epochs later, each
    scored anew.

    Rounds are done once: a further ``train()`` with the same callback and a model that went through them, resumed or
    not, goes on with the next one; a new callback starts with the first. Checkpoints carry what is needed for that, and
    ``trainer.train(resume_from_checkpoint=...)`` prunes a dense model like the checkpoint's before it loads the
    weights, if the callback was given to the Trainer at its construction. The search for the best model begins anew
    with each round.

    Under ``torchrun`` or ``accelerate launch`` with ``DistributedDataParallel`` each process scores its share of the
    batches, of which there are as many in all as with one process. All processes end a round with the same plan and the
    same weights, and all raise if one fails; both are checked.

    Args:
        config: How much to prune and how; a mapping is read by ``HapConfig.from_dict``.
        step: Number of optimizer steps before the first round.
        epoch: Number of epochs before the first round.
        num_rounds: Number of rounds over which the amount rises to its target.
        interval: Steps or epochs between rounds.
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
        config: HapConfig | Mapping[str, Any],
        *,
        step: int | None = None,
        epoch: int | None = None,
        num_rounds: int = 1,
        interval: int = 1,
        batches: Iterable[Mapping[str, Any]] | None = None,
        loss_fn: LossFunction | None = None,
        train_only_implants: bool = False,
        also_train: Iterable[str] = (),
    ) -> None:
        if step is not None and epoch is not None:
            raise ConfigError(f"expected at most one of step and epoch, got step={step} and epoch={epoch}")
        for name, value in {"step": step, "epoch": epoch, "num_rounds": num_rounds, "interval": interval}.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        self.config = config if isinstance(config, HapConfig) else HapConfig.from_dict(config)
        self.step = step
        self.epoch = epoch
        self.num_rounds = num_rounds
        self.interval = interval
        self.train_only_implants = train_only_implants
        self.also_train = check_freezing(self.config, train_only_implants, also_train)
        self.reports: list[PruningReport] = []
        self._batches = batches
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
            self._check_schedule(args, state)
            if self._done < self.num_rounds:
                check_compiled(trainer, kwargs["model"])
                check_optimizer(kwargs["optimizer"], kwargs["model"])
                check_training_data(kwargs["train_dataloader"], self.config, needed=self._batches is None)
            check_beginning(kwargs["model"], self.num_rounds - self._done, self.also_train)
        # Rounds that some processes do and others do not would leave them waiting for each other.
        settings = self.state()["args"]
        settings = {**settings.pop("config"), **settings, "given": self._given(), "rounds done": self._done}
        processes.check_same("settings of HessianPruner", settings, "start every process with the same script")
        self._freeze_if_done(**kwargs)
        # Rounds between a checkpoint and its next step come here too: those of an epoch's end come after its last save.
        self._round_if_due(state.global_step if self.step is not None else int(state.epoch or 0), args, state, **kwargs)

    def _check_schedule(self, args: TrainingArguments, state: TrainerState) -> None:
        """Check that the last round comes no later than the end of the training."""
        last = self._due(self.num_rounds)
        total = float(state.max_steps if self.step is not None else args.num_train_epochs)
        if self.step is None and args.max_steps > 0:
            total = float("inf")  # max_steps overrides the epochs, and how many it makes depends on the data
        if self._done < self.num_rounds and last > total:
            raise ConfigError(
                f"round {self.num_rounds} of {self.num_rounds} would come after {last} "
                f"{'steps' if self.step is not None else 'epochs'} and the training ends after {total:g}; "
                "prune earlier, in fewer rounds, or train longer"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Do the round that is due after this step, if rounds go by steps."""
        if self.step is not None:
            self._round_if_due(state.global_step, args, state, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do the round that is due after this epoch, if rounds go by epochs."""
        if self.step is None:
            # `state.epoch` is a sum of fractions, which may fall short of the whole number.
            self._round_if_due(round(state.epoch or 0), args, state, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if the training ended before the last round."""
        if self._done < self.num_rounds:
            logger.warning(
                "the training ended at step %d, after %d of %d pruning rounds: the model is larger than was asked for",
                state.global_step,
                self._done,
                self.num_rounds,
            )

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes to ``trainer_state.json``: the settings and the rounds done."""
        names = ("step", "epoch", "num_rounds", "interval", "train_only_implants", "also_train")
        settings = {name: getattr(self, name) for name in names}
        return {"args": {"config": self.config.to_dict(), **settings}, "attributes": {"progress": self.progress}}

    @property
    def progress(self) -> Mapping[str, Any]:
        """The rounds done, as plain JSON values; setting it puts ``reports`` back."""
        return {**progress_to_dict(self.reports, self._start), "given": self._given()}

    @progress.setter
    def progress(self, saved: Mapping[str, Any]) -> None:
        self.reports, self._start = progress_from_dict(saved)

    @property
    def began(self) -> bool:
        """Whether anything was done to the model yet."""
        return bool(self.reports)

    @property
    def _done(self) -> int:
        return len(self.reports)

    def _due(self, number: int) -> int:
        """Return the step or epoch after which round ``number`` comes; 0 is before the first step."""
        first = self.step if self.step is not None else self.epoch or 0
        return first + (number - 1) * self.interval

    def _go_on(self, state: TrainerState, **kwargs: Any) -> None:
        """Find out which rounds the model has behind it: those of the checkpoint, of the last training, or none."""
        saved = saved_progress(calling_trainer(), self, state)
        if saved is not None:
            self.progress = saved
        # The rounds are the model's and not the callback's: a fresh model begins with the first.
        if not is_result_of(self.reports, kwargs["model"]):
            self.reports, self._start = [], None
        # The Trainer updates what it finds there at every save, and a checkpoint from before the callback has nothing.
        entries: Any = state.stateful_callbacks
        entries.setdefault(type(self).__name__, self.state())
        lost = [] if saved is None else sorted(set(saved["given"]) - set(self._given()))
        if lost and self._done < self.num_rounds:
            raise ConfigError(
                f"the rounds so far were done with {' and '.join(lost)}, which no checkpoint carries: pass the same to "
                "HessianPruner again, and leave restore_callback_states_from_checkpoint at False, as it would make a "
                "callback without; HessianPruner goes on where it was anyway"
            )

    def _given(self) -> list[str]:
        return [name for name in ("batches", "loss_fn") if getattr(self, f"_{name}") is not None]

    def _round_if_due(self, reached: int, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        # One at a time, also where several are due, as for a callback that an old checkpoint knows nothing of: the
        # model trains a step or an epoch between any two.
        if self._done < self.num_rounds and reached >= self._due(self._done + 1):
            self._round(args, state, **kwargs)

    def _round(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """Do the next round: score, prune, report, and let the training go on with what is left."""
        trainer = calling_trainer()
        place = Round(self._done + 1, self.num_rounds, self._start)
        model = kwargs["model"]
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "before_pruning"):
                callback.before_pruning(trainer)
        with uncompiled(trainer), without_autocast(model), pruning_together(trainer, model) as processes:
            if self._batches is None:
                loader = kwargs["train_dataloader"]
                batches = scoring_batches(
                    loader.dataset, loader.collate_fn, args.train_batch_size, self.config, processes=processes
                )
            else:
                batches = processes.share(islice(self._batches, self.config.max_batches))
            config = self.config if state.is_local_process_zero else replace(self.config, progress=False)
            loss_fn = self._loss_fn or trainer_loss(trainer)
            with processes.agreeing("drawing batches"):
                evidence = config.evidence(model, batches, loss_fn=loss_fn, processes=processes)
            report, place = prune_round(evidence, config, place, bare_optimizer(kwargs["optimizer"]))
        # Set after the round: one that fails has not taken place.
        self._start = place.start
        self.reports.append(report)
        self._freeze_if_done(**kwargs)
        forget_best_(state, kwargs["lr_scheduler"])
        with processes.agreeing("reporting"):
            trainer.log(report.to_log())
            if state.is_world_process_zero:
                self._write(report, Path(args.output_dir or "."))

    def _freeze_if_done(self, **kwargs: Any) -> None:
        if self.train_only_implants and self._done >= self.num_rounds:
            freeze_the_rest_(calling_trainer(), kwargs["model"], kwargs["optimizer"], self.also_train)

    def _write(self, report: PruningReport, folder: Path) -> None:
        """Write the report, and with several rounds also under the number of this one."""
        try:
            report.save(folder)
            if self.num_rounds > 1:
                report.save(folder / f"pruning_round_{self._done}")
        except OSError as error:  # a full disk must not cost the training, and the log and checkpoints have it all
            logger.warning("the pruning report could not be written to %s: %s; it is in reports", folder, error)
