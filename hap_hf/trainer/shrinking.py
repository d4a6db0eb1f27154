"""The events of a training in which units shrink."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hap_hf.trainer.growth import Growth
from hap_hf.trainer.host import calling_trainer


class Shrinks(TrainerCallback):
    """Lets units shrink in each step, from their choice to the cut."""

    def __init__(self) -> None:
        self._growth: Growth | None = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the penalty to the gradients, where it is part of them."""
        if self._growth is not None and self._growth.settings.coupled:
            self._growth.grow(kwargs["model"])
            self._growth.shrink_(kwargs["model"], kwargs["optimizer"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shrink the units that will go."""
        if self._growth is not None and not self._growth.settings.coupled:
            self._growth.grow(kwargs["model"])
            # A step that fp16 skipped has moved no weight, so it shrinks none.
            if not calling_trainer().accelerator.optimizer_step_was_skipped:
                self._growth.shrink_(kwargs["model"], kwargs["optimizer"])
