"""The events of a training in which units shrink."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hap_hf.errors import ConfigError
from hap_hf.report import PruningReport
from hap_hf.trainer.growth import Growth
from hap_hf.trainer.host import calling_trainer

logger = logging.getLogger(__name__)


class Shrinks(TrainerCallback):
    """Lets units shrink in each step, from their choice to the cut, and counts the rounds."""

    num_rounds: int
    reports: list[PruningReport]

    def __init__(self) -> None:
        self._growth: Growth | None = None
        self._left_out = 0

    @property
    def began(self) -> bool:
        """Whether anything was done to the model yet."""
        return bool(self.reports) or self._growth is not None

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return self._done >= self.num_rounds

    @property
    def _done(self) -> int:
        return len(self.reports) + self._left_out

    @contextmanager
    def _unless_nothing_is_left(self, done: int, total: int) -> Generator[None]:
        """Leave a round out that has nothing left to do, unless it is the first: a training is worth more than that."""
        try:
            yield
        except ConfigError as error:
            if not done:
                raise
            logger.warning("round %d of %d is left out: %s", done + 1, total, error)
            self._left_out, self._growth = self._left_out + 1, None

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
