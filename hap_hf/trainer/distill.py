"""The callback that lets a pruned model learn from the dense one."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hap_hf.errors import ConfigError, UnsupportedModelError
from hap_hf.evidence.losses import shifts_labels
from hap_hf.host import attention_of, tree_map_only
from hap_hf.names.checks import boolean
from hap_hf.trainer.callback import HessianPruner
from hap_hf.trainer.host import calling_trainer
from hap_hf.trainer.scoring import is_scoring
from hap_hf.trainer.teacher import frozen_copy, load_teacher, save_teacher, skeleton_of
from hap_hf.trainer.terms import Weights, share_of_step

FOLDER = "teacher"
"""Where in ``output_dir`` the teacher is kept."""


class Distill(TrainerCallback):
    r"""Adds to the Trainer's loss how far the model is from its teacher, by default the dense model.

    The loss becomes ``(1 - alpha) * loss + alpha * logits + hidden * states + attention * maps``, where ``loss`` is
    what the Trainer would compute without it: the model's own, label smoothing, ``compute_loss_func`` or an overridden
    ``compute_loss``. Evaluation is left alone. The terms are weighted as the loss is, under gradient accumulation and
    in several processes too.

    Without ``teacher`` it is the model as it stands right before a :class:`HessianPruner` of the same Trainer begins to
    change it, and distillation begins at that moment. Where checkpoints are saved, the teacher is, too, to the folder
    ``teacher`` of ``output_dir``, from where a resumed training takes it.

    Args:
        teacher: A model with the same inputs and outputs, which is not changed.
        alpha: Share of the logits' term, in [0, 1]; the task's loss has the rest.
        temperature: By which logits are divided before their softmax (Hinton, Vinyals and Dean, 2015).
        hidden: Weight of the hidden states after each block; needs a model that takes ``output_hidden_states``.
        attention: Weight of the attention maps; needs a model with ``attn_implementation="eager"``.
        dtype: Weights and arithmetic of the teacher: ``"bfloat16"`` halves its memory. Its own by default.
        in_scores: Whether units are scored with this loss, too, and not with the task's alone.

    Raises:
        ConfigError: If a value is out of range, or nothing would be distilled.
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        *,
        alpha: float = 0.5,
        temperature: float = 2.0,
        hidden: float = 0.0,
        attention: float = 0.0,
        dtype: torch.dtype | str | None = None,
        in_scores: bool = False,
    ) -> None:
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise ConfigError(f"teacher must be a model, a torch.nn.Module, got a {type(teacher).__name__}")
        weights = {"alpha": alpha, "temperature": temperature, "hidden": hidden, "attention": attention}
        for name, value in weights.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ConfigError(f"{name} must be a number of at least 0, got {value!r}")
        if alpha > 1:
            raise ConfigError(f"alpha is the share of the logits' term and must be in [0, 1], got {alpha!r}")
        if not temperature:
            raise ConfigError("temperature must be above 0, got 0")
        if not (alpha or hidden or attention):
            raise ConfigError("alpha, hidden and attention are all 0, so nothing would be distilled")
        boolean("in_scores", in_scores)
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
            raise ConfigError(f"dtype must be a floating-point dtype, such as 'bfloat16', got {dtype!r}")
        self.teacher = teacher
        self.alpha = alpha
        self.temperature = temperature
        self.hidden = hidden
        self.attention = attention
        self.dtype: torch.dtype | None = kind
        self.in_scores = in_scores
        self._weights = Weights(alpha, temperature, hidden, attention)
        self._kept: nn.Module | None = None
        self._skeleton: nn.Module | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the terms around the loss of the Trainer, and note what its model looks like before it is pruned."""
        self._attach(calling_trainer())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that what is asked for can be had.

        Raises:
            ConfigError: If there is no teacher to be, or its attention maps are out of reach.
            UnsupportedModelError: If the model returns no hidden states.
        """
        self._begin(calling_trainer())

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the teacher of a training that is resumed."""
        trainer = calling_trainer()
        if self._kept is None and any(p.began for p in pruners_of(trainer)):
            self._resume(args)

    def before_pruning(self, trainer: Trainer) -> None:
        """Keep the model as the teacher if nothing has been done to it yet.

        Args:
            trainer: The Trainer whose model is about to be pruned for the first time, or again.
        """
        self._begin(trainer)  # it may be listed behind the callback that prunes
        if self.teacher is not None:
            return
        if any(p.began for p in pruners_of(trainer)):
            if self._kept is None:
                self._resume(trainer.args)
            return
        self._kept = frozen_copy(cast(nn.Module, trainer.model), self.dtype, trainer.args.device)
        if trainer.args.should_save and trainer.args.save_strategy != "no":
            save_teacher(self._kept, self._folder(trainer.args))

    def _begin(self, trainer: Trainer) -> None:
        """Check what is asked for, and get ready."""
        model = cast(nn.Module, trainer.model)
        self._attach(trainer)
        if self.teacher is None and not pruners_of(trainer):
            raise ConfigError(
                "Distill has no teacher: without one it takes the model as it is before a HessianPruner of the same "
                "Trainer prunes it, and there is none; pass the dense model, Distill(teacher=...)"
            )
        parameters = inspect.signature(model.forward).parameters
        for name, weight in (("output_hidden_states", self.hidden), ("output_attentions", self.attention)):
            if weight and name not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                raise UnsupportedModelError(
                    f"{type(model).__name__} takes no {name}, so nothing but logits can be distilled; set hidden=0 and "
                    "attention=0"
                )
        if self.attention:
            for whose in (model, self.teacher):
                kernel = attention_of(getattr(whose, "config", None))
                if kernel not in {None, "eager"}:
                    raise ConfigError(
                        f"attention maps are not computed by attn_implementation={kernel!r}; load model and teacher "
                        "with attn_implementation='eager', or set attention=0"
                    )
        if self.teacher is not None and self._kept is None:
            self._kept = frozen_copy(self.teacher, self.dtype, trainer.args.device)

    def _attach(self, trainer: Trainer) -> None:
        """Put the terms around the loss of a Trainer, once."""
        found = trainer.compute_loss
        if not (isinstance(found, partial) and found.func == self._loss):
            vars(trainer)["compute_loss"] = partial(self._loss, trainer, found)
            self._skeleton = None if self.teacher is not None or trainer.model is None else skeleton_of(trainer.model)

    def _folder(self, args: TrainingArguments) -> Path:
        return Path(args.output_dir or ".") / FOLDER

    def _resume(self, args: TrainingArguments) -> None:
        """Read the teacher that the training wrote when it was pruned first."""
        folder = self._folder(args)
        if self._skeleton is None:
            raise ConfigError(
                "a training that is resumed needs Distill when the Trainer is made: Trainer(..., callbacks=[Distill()])"
            )
        self._kept = load_teacher(self._skeleton, folder, self.dtype, args.device)

    def _loss(
        self,
        trainer: Trainer,
        task_loss: Callable[..., Any],
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the Trainer's loss with the terms of distillation; see ``Trainer.compute_loss``."""
        wanted = self.in_scores if is_scoring() else model.training
        teacher = self._kept
        began = self.teacher is not None or any(p.began for p in pruners_of(trainer))
        if teacher is None or not began or not wanted or self not in trainer.callback_handler.callbacks:
            return task_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        asked = {"output_hidden_states": self.hidden, "output_attentions": self.attention}
        inputs = {**inputs, **{name: True for name, weight in asked.items() if weight}}
        # The loss may take labels out of its mapping.
        found = task_loss(model, dict(inputs), True, num_items_in_batch=num_items_in_batch)
        if not isinstance(found, tuple) or len(found) != 2:
            raise UnsupportedModelError(
                f"expected compute_loss(model, inputs, return_outputs=True) to return the loss and the model's "
                f"outputs, got a {type(found).__name__}; return (loss, outputs) from your compute_loss"
            )
        loss, outputs = found
        shifted = shifts_labels(cast(nn.Module, trainer.model))
        problem = getattr(getattr(trainer.model, "config", None), "problem_type", None)
        terms = self._weights.terms(outputs, self._answers(teacher, inputs, trainer), inputs, problem, shifted)
        share = share_of_step(trainer, inputs, num_items_in_batch, shifted)
        total = (1 - self.alpha) * loss + share * terms.to(loss.dtype)
        return (total, outputs) if return_outputs else total

    def _answers(self, teacher: nn.Module, inputs: Mapping[str, Any], trainer: Trainer) -> Any:
        """Return the teacher's outputs, computed in the student's arithmetic unless another was asked for."""
        dtype = self.dtype
        if dtype is not None:
            inputs = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, dict(inputs))
        parameters = inspect.signature(teacher.forward).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            inputs = {name: value for name, value in inputs.items() if name in parameters}
        with torch.no_grad(), trainer.accelerator.autocast():
            return teacher(**inputs)


def pruners_of(trainer: Trainer) -> list[HessianPruner]:
    """Return the callbacks of a Trainer that prune its model.

    Args:
        trainer: The Trainer.

    Returns:
        The callbacks.
    """
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, HessianPruner)]
