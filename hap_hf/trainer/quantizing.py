"""The callback that quantizes, and lets the training go on with what it rounds."""

import logging
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hap_hf.bits import BitConfig, BitReport, quantize_
from hap_hf.bits.ranges import Ranges, move_ranges_, taken
from hap_hf.checkpoint import record_bits
from hap_hf.errors import ConfigError
from hap_hf.host import BatchNorm
from hap_hf.layers.quantized import inputs_of
from hap_hf.model.quantizing import bit_plan_of, quantized_layers
from hap_hf.names.bits import Stored
from hap_hf.names.checks import at_least, boolean, share
from hap_hf.trainer.best_model import forget_best_
from hap_hf.trainer.callback import HessianPruner
from hap_hf.trainer.compiled import check_compiled, uncompiled
from hap_hf.trainer.distributed import check_arguments, check_wrapping, processes_of, pruning_together
from hap_hf.trainer.host import calling_trainer
from hap_hf.trainer.progress import saved_progress
from hap_hf.trainer.rebuilding import rebuild_before_loading
from hap_hf.trainer.scoring import check_training_data, scoring_batches, without_autocast

logger = logging.getLogger(__name__)


class QuantizeAware(TrainerCallback, ExportableState):
    """Quantizes the model of a ``Trainer`` and lets it train with rounded weights and activations.

    The model is quantized at the end of a step or epoch, and not before every :class:`~hap_hf.HessianPruner` of the
    Trainer has done its last round; by default as soon as that is so. From then on each step rounds, gradients go
    straight through, and ranges of activations follow what goes through the layers, until they are frozen for the last
    part of the training. Batch norms keep their statistics. Checkpoints hold weights in floating point, and resuming
    goes on; once the training has ended, ``save_model`` writes integers.

    Under ``DistributedDataParallel`` all processes have the same ranges.

    Args:
        config: Bits, and how to round; a mapping is read by ``BitConfig.from_dict``.
        step: Number of optimizer steps before it.
        epoch: Number of epochs before it.
        batches: Batches to take the first ranges from instead of the Trainer's training data, the same in every
            process.
        freeze_ranges_after: Share of the steps with rounding after which ranges stay as they are; 1 for never.
        freeze_batch_norms: Whether batch norms keep their statistics.

    Attributes:
        report: What was quantized; None before it, and in a resumed training that came after it.

    Raises:
        ConfigError: If a value is out of range, or ``step`` and ``epoch`` are both given.
    """

    def __init__(
        self,
        config: BitConfig | Mapping[str, Any] | None = None,
        *,
        step: int | None = None,
        epoch: int | None = None,
        batches: Iterable[Mapping[str, Any]] | None = None,
        freeze_ranges_after: float = 0.9,
        freeze_batch_norms: bool = True,
    ) -> None:
        if step is not None and epoch is not None:
            raise ConfigError(f"expected at most one of step and epoch, got step={step} and epoch={epoch}")
        for name, value in {"step": step, "epoch": epoch}.items():
            if value is not None:
                at_least(name, value, 1)
        share("freeze_ranges_after", freeze_ranges_after, "(0, 1]")
        boolean("freeze_batch_norms", freeze_batch_norms)
        self.config = config if isinstance(config, BitConfig) else BitConfig.from_dict(config or {})
        self.step, self.epoch = step, epoch
        self.freeze_ranges_after, self.freeze_batch_norms = freeze_ranges_after, freeze_batch_norms
        self.report: BitReport | None = None
        self._batches = batches
        self._start: int | None = None
        self._frozen: list[RemovableHandle] = []

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the Trainer prune and quantize its model like a checkpoint's before it loads that one's weights."""
        rebuild_before_loading(calling_trainer(), HessianPruner)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the training can be quantized, and do so if it is due before the first step.

        Raises:
            UnsupportedModelError: If the training runs in a way that cannot be quantized.
            ConfigError: If it would come behind the end of the training.
        """
        check_arguments(args)
        trainer, model = calling_trainer(), kwargs["model"]
        check_wrapping(trainer, model)
        processes = processes_of(args)
        saved = saved_progress(trainer, self, state)
        with processes.agreeing("the beginning of the training"):
            if _is_quantized(model):
                self._start = saved["start"] if saved and saved["start"] is not None else state.global_step
            else:
                self._start = None
                total = state.max_steps if self.step is not None else args.num_train_epochs
                due = self.step if self.step is not None else self.epoch
                if due is not None and due > total and (self.step is not None or args.max_steps <= 0):
                    raise ConfigError(
                        f"the model would be quantized after {due} {'steps' if self.step is not None else 'epochs'} "
                        f"and the training ends after {total:g}; quantize earlier, or train longer"
                    )
                check_compiled(trainer, model)
                check_training_data(kwargs["train_dataloader"], self.config, needed=self._batches is None)
        settings = {**self.config.to_dict(), **self.state()["args"], "quantized": self._start is not None}
        settings.pop("config", None)
        processes.check_same("settings of QuantizeAware", settings, "start every process with the same script")
        entries: Any = state.stateful_callbacks
        entries.setdefault(type(self).__name__, self.state())
        if self._start is not None:
            self._watch(model)
            return
        self._if_due(state.global_step, int(state.epoch or 0), args, state, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Quantize if it is due after this step; else let the ranges follow what was seen in it."""
        if self._start is None:
            self._if_due(state.global_step, -1, args, state, **kwargs)
            return
        model = kwargs["model"]
        layers = dict(quantized_layers(model))
        if all(layer.observed is None for layer in layers.values()):
            return
        move_ranges_(model, _of_all(taken(layers), model, args))
        if state.global_step >= self._start + self.freeze_ranges_after * (state.max_steps - self._start):
            for layer in layers.values():
                layer.observed = None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Quantize if it is due after this epoch."""
        if self._start is None:
            self._if_due(state.global_step, round(state.epoch or 0), args, state, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze the ranges, and let the next save write integers."""
        model = kwargs["model"]
        for handle in self._frozen:
            handle.remove()
        self._frozen.clear()
        if self._start is None:
            logger.warning(
                "the training ended at step %d and the model was not quantized: %s",
                state.global_step,
                "HessianPruner had rounds left" if _pruners_left(calling_trainer()) else "it was not due before",
            )
            return
        for _, layer in quantized_layers(model):
            layer.observed = None
        record_bits(model, bit_plan_of(model, Stored.CODES))

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes to ``trainer_state.json``: the settings, and since when it rounds."""
        names = ("step", "epoch", "freeze_ranges_after", "freeze_batch_norms")
        settings = {name: getattr(self, name) for name in names}
        return {"args": {"config": self.config.to_dict(), **settings}, "attributes": {"progress": self.progress}}

    @property
    def progress(self) -> Mapping[str, Any]:
        """The step since which the model is rounded, and its bits where no config of the model holds them."""
        bits = None if self.report is None else self.report.plan.to_dict()
        return {"start": self._start, "bits": bits}

    @progress.setter
    def progress(self, saved: Mapping[str, Any]) -> None:
        self._start = saved["start"]

    def _if_due(self, step: int, epoch: int, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """Quantize the model, if it is time and every pruner is done."""
        trainer, model = calling_trainer(), kwargs["model"]
        reached = step >= self.step if self.step is not None else self.epoch is None or epoch >= self.epoch
        if not reached or _pruners_left(trainer):
            return
        with uncompiled(trainer), without_autocast(model), pruning_together(trainer, model) as processes:
            with processes.agreeing("drawing batches"):
                if self._batches is None:
                    loader = kwargs["train_dataloader"]
                    drawn: Iterable[Any] = list(
                        scoring_batches(
                            loader.dataset, loader.collate_fn, args.train_batch_size, self.config, processes=processes
                        )
                    )
                else:
                    drawn = list(processes.share(islice(self._batches, self.config.max_batches)))
            self.report = quantize_(model, drawn, self.config, processes=processes)
        self._start = state.global_step
        self._watch(model)
        forget_best_(state, kwargs["lr_scheduler"])
        trainer.log(self.report.to_log())

    def _watch(self, model: nn.Module) -> None:
        """Let the layers observe their inputs, and the batch norms stay as they are."""
        record_bits(model, bit_plan_of(model, Stored.FLOATS))
        for _, layer in quantized_layers(model):
            layer.observed = {} if inputs_of(layer) else None
        if self.freeze_batch_norms:
            norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
            self._frozen += [module.register_forward_pre_hook(_stay_in_eval) for module in norms]


def _stay_in_eval(module: nn.Module, args: Any) -> None:
    """Let a batch norm use its statistics: the Trainer puts all modules into train mode before each step."""
    module.training = False


def _is_quantized(model: nn.Module) -> bool:
    return next(quantized_layers(model), None) is not None


def _pruners_left(trainer: Trainer) -> bool:
    """Return whether a callback of the Trainer has pruning to do."""
    pruners = (c for c in trainer.callback_handler.callbacks if isinstance(c, HessianPruner))
    return any(len(c.reports) < c.num_rounds for c in pruners)


def _of_all(seen: Ranges, model: nn.Module, args: TrainingArguments) -> Ranges:
    """Return the ranges that hold what all processes have seen."""
    if args.world_size == 1:
        return seen
    keys = [(name, which) for name, layer in quantized_layers(model) for which in inputs_of(layer)]
    # Infinite where a layer was not called, so that every process sends as many numbers.
    nothing = torch.tensor([torch.inf, -torch.inf], device=args.device)
    both = torch.stack([seen[key].to(args.device) if key in seen else nothing for key in keys])
    both[:, 0].neg_()
    torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX)
    both[:, 0].neg_()
    return dict(zip(keys, both, strict=True))
