"""The callback that prunes."""

import inspect
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hap_hf.checkpoint import plan_of
from hap_hf.config import HapConfig
from hap_hf.errors import ConfigError, UnsupportedModelError
from hap_hf.losses import LossFunction
from hap_hf.pipeline import Round, prune_round
from hap_hf.report import PruningReport
from hap_hf.selection.rounds import Amounts
from hap_hf.trainer.scoring import scoring_batches, trainer_loss, without_autocast

logger = logging.getLogger(__name__)


class HessianPruner(TrainerCallback):
    """Prunes the model of a ``Trainer`` while it trains.

    Scores are computed with the Trainer's own loss (label smoothing and ``compute_loss_func`` included) on batches of
    its training data, the optimizer's state follows the parameters, and what was done is logged through the Trainer
    and written to ``pruning_report.json`` and ``pruning_report.md`` in its output folder. With several rounds these two
    are the last round's, and each has its own in ``pruning_round_1`` and so on.

    By default the model is pruned once, before the first step. ``step`` or ``epoch`` move that to the end of a step or
    epoch; with several rounds, the next ones follow ``interval`` steps (where ``step`` is given) or epochs later, each
    scored anew.

    Args:
        config: How much to prune and how.
        step: Number of optimizer steps before the first round.
        epoch: Number of epochs before the first round.
        num_rounds: Number of rounds over which the amount rises to its target.
        interval: Steps or epochs between rounds.
        batches: Batches to score on instead of the Trainer's training data.
        loss_fn: Loss to score with instead of the Trainer's, called with the model and a batch.

    Attributes:
        reports: The report of each round so far.

    Raises:
        ConfigError: If ``step`` and ``epoch`` are both given, or a number is below 1.
    """

    def __init__(
        self,
        config: HapConfig,
        *,
        step: int | None = None,
        epoch: int | None = None,
        num_rounds: int = 1,
        interval: int = 1,
        batches: Iterable[Mapping[str, Any]] | None = None,
        loss_fn: LossFunction | None = None,
    ) -> None:
        if step is not None and epoch is not None:
            raise ConfigError(f"expected at most one of step and epoch, got step={step} and epoch={epoch}")
        for name, value in {"step": step, "epoch": epoch, "num_rounds": num_rounds, "interval": interval}.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        self.config = config
        self.step = step
        self.epoch = epoch
        self.num_rounds = num_rounds
        self.interval = interval
        self.reports: list[PruningReport] = []
        self._batches = batches
        self._loss_fn = loss_fn
        self._done = 0
        self._start: Amounts | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the training can be pruned, and do a round that is due before the first step.

        Args:
            args: The Trainer's arguments.
            state: The Trainer's state.
            control: Unused.
            **kwargs: ``model``, ``optimizer`` and ``train_dataloader``.

        Raises:
            UnsupportedModelError: If the training runs in a way that cannot be pruned.
            ConfigError: If a round would fall behind the end of the training.
        """
        _check_training(args)
        if state.global_step > 0:
            self._resume(state, kwargs["model"])
        else:
            self._done, self._start, self.reports = 0, None, []
        last = self._due(self.num_rounds)
        total = float(state.max_steps if self.step is not None else args.num_train_epochs)
        if self.step is None and args.max_steps > 0:
            total = float("inf")  # max_steps overrides the epochs, and how many it makes depends on the data
        if last > total:
            raise ConfigError(
                f"round {self.num_rounds} of {self.num_rounds} would come after {last} "
                f"{'steps' if self.step is not None else 'epochs'} and the training ends after {total:g}; "
                "prune earlier, in fewer rounds, or train longer"
            )
        if self.step is None and self.epoch is None and self._done == 0:
            self._round(args, state, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Do the rounds that are due after this step.

        Args:
            args: The Trainer's arguments.
            state: The Trainer's state.
            control: Unused.
            **kwargs: ``model``, ``optimizer`` and ``train_dataloader``.
        """
        if self.step is not None and self._done < self.num_rounds and state.global_step >= self._due(self._done + 1):
            self._round(args, state, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do the rounds that are due after this epoch.

        Args:
            args: The Trainer's arguments.
            state: The Trainer's state.
            control: Unused.
            **kwargs: ``model``, ``optimizer`` and ``train_dataloader``.
        """
        ended = round(state.epoch or 0)
        if self.step is None and self._done < self.num_rounds and ended >= self._due(self._done + 1):
            self._round(args, state, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if the training ended before the last round.

        Args:
            args: Unused.
            state: The Trainer's state.
            control: Unused.
            **kwargs: Unused.
        """
        if self._done < self.num_rounds:
            logger.warning(
                "the training ended at step %d, after %d of %d pruning rounds: the model is larger than was asked for",
                state.global_step,
                self._done,
                self.num_rounds,
            )

    def _due(self, number: int) -> int:
        first = self.step if self.step is not None else self.epoch or 0
        return first + (number - 1) * self.interval

    def _resume(self, state: TrainerState, model: nn.Module) -> None:
        plan = plan_of(model)
        self._done = int(plan.provenance.get("round") or 0) if plan is not None else 0
        if plan is not None and self._done:
            self._start = Amounts(
                int(plan.provenance["start_units"] or 0),
                int(plan.provenance["start_params"] or 0),
                float(plan.provenance["start_macs"] or 0),
            )
        progress = state.global_step if self.step is not None else int(state.epoch or 0)
        if (self._done < self.num_rounds and progress >= max(self._due(self._done + 1), 1)) or (
            not self._done and (self.step is None and self.epoch is None)
        ):
            raise ConfigError(
                f"the training resumes at step {state.global_step}, where round {self._done + 1} was already done, "
                "with a model that is not pruned; load the model from the checkpoint (AutoModel….from_pretrained after "
                "`import hap_hf`) and pass it to the Trainer"
            )

    def _round(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        trainer = _calling_trainer()
        place = Round(self._done + 1, self.num_rounds, self._start)
        batches = self._batches
        if batches is None:
            loader = kwargs["train_dataloader"]
            batches = scoring_batches(loader.dataset, loader.collate_fn, args.train_batch_size, self.config)
        optimizer = kwargs["optimizer"]
        with without_autocast(kwargs["model"]):
            result = prune_round(
                kwargs["model"],
                batches,
                self.config,
                place,
                loss_fn=self._loss_fn or trainer_loss(trainer),
                optimizer=getattr(optimizer, "optimizer", optimizer),  # accelerate wraps what holds the parameters
            )
        self._done += 1
        self._start = result.start
        self.reports.append(result.report)
        # What was best before is another model: it must not be loaded into this one, nor win against it.
        state.best_metric = None
        state.best_model_checkpoint = None
        trainer.log(result.report.to_log())
        if state.is_world_process_zero:
            folder = Path(args.output_dir or ".")
            result.report.save(folder)
            if self.num_rounds > 1:
                result.report.save(folder / f"pruning_round_{self._done}")


def _calling_trainer() -> Trainer:
    """Return the Trainer that called the callback.

    Callback events are given everything but the Trainer itself, which alone knows its loss and how to log.

    Returns:
        The Trainer.

    Raises:
        ConfigError: If no Trainer called.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    raise ConfigError("HessianPruner must be called by a transformers Trainer; outside of one, use hap_hf.prune")


def _check_training(args: TrainingArguments) -> None:
    for name, used in {
        "FSDP": bool(args.fsdp),
        "DeepSpeed": args.deepspeed is not None,
        f"{args.world_size} processes": args.world_size > 1,
        f"{args.n_gpu} GPUs in one process": args.n_gpu > 1,
    }.items():
        if used:
            raise UnsupportedModelError(
                f"HessianPruner works in one process on one device, and this training uses {name}; prune first with "
                "hap_hf.prune(model, batches, config) and train the smaller model"
            )
