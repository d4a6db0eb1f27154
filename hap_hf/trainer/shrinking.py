"""The events of a training in which units shrink."""

import inspect
import logging
from abc import abstractmethod
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hap_hf.config import HapConfig
from hap_hf.errors import ConfigError
from hap_hf.evidence.evidence import Evidence
from hap_hf.names.checks import meant
from hap_hf.report import PruningReport
from hap_hf.selection import Round
from hap_hf.trainer.growing import GrowingReg
from hap_hf.trainer.growth import Growth, begin_growth
from hap_hf.trainer.host import calling_trainer
from hap_hf.trainer.schedule import Timing, future_rates, steps_of

logger = logging.getLogger(__name__)


class Shrinks(TrainerCallback):
    """Lets units shrink in each step, from their choice to the cut, and counts the rounds."""

    # Hidden from type checkers, which would take it for the signature.
    if not TYPE_CHECKING:

        def __new__(cls, *args: Any, **settings: Any) -> "Shrinks":
            """Say where a setting belongs that this is not one of."""
            own, of_config = inspect.signature(cls.__init__).parameters, HapConfig.help()
            # A class derived from this one that hands its settings on says itself what it knows.
            hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values())
            for name in settings if not hands_on else ():
                if name not in own:
                    where = f": write {cls.__name__}(HapConfig({name}=...))" if name in of_config else meant(name, own)
                    raise ConfigError(f"{cls.__name__} has no setting {name!r}{where}")
            return super().__new__(cls)

    num_rounds: int
    reports: list[PruningReport]
    _timing: Timing

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

    @property
    @abstractmethod
    def _place(self) -> Round:
        """The next round."""

    @abstractmethod
    def _evidence(self, *, train_dataloader: Any, **_: Any) -> AbstractContextManager[tuple[Evidence, HapConfig]]:
        """Let the model be scored inside the block."""

    def _grow_if_due(self, settings: GrowingReg, reached: int, state: TrainerState, **kwargs: Any) -> None:
        # Right after a round, if need be: a training that is resumed there begins with it.
        steps = steps_of("steps", settings.steps, state.max_steps)
        due = self._timing.due(self._done + 1, state.max_steps)
        if self._growth is None and self._done < self.num_rounds and reached >= due - steps:
            rates = future_rates(kwargs["lr_scheduler"], kwargs["optimizer"], state.global_step, steps)
            with self._evidence(**kwargs) as found:
                self._growth = begin_growth(settings, *found, self._place, state.global_step, rates)
        if self._growth is not None and self._growth.must_pick:
            with self._evidence(**kwargs) as found:
                self._growth.pick(*found, self._place)

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

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if the training ended before the last round."""
        if not self.finished:
            said = (
                "the training ended at step %d, after %d of %d pruning rounds: the model is larger than was asked for"
            )
            logger.warning(said, state.global_step, self._done, self.num_rounds)

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
