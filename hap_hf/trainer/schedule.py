"""When rounds come, in the terms of ``TrainingArguments``: steps, epochs, or shares of the training."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from hap_hf.errors import ConfigError
from hap_hf.names.checks import at_least, boolean
from hap_hf.selection import Ramp


def steps_of(name: str, value: float, total: int | None) -> int:
    """Return a number of steps that may be given as a share of the training, as ``save_steps`` may.

    Args:
        name: Name of the setting.
        value: An integer of at least 1, or a share in (0, 1).
        total: Steps of the training; None to check the value alone.

    Returns:
        The number of steps, at least 1; 0 where the total is not known and a share was given.

    Raises:
        ConfigError: If it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, float) and 0 < value < 1:
        return 0 if total is None else max(1, math.ceil(value * total))
    raise ConfigError(f"{name} must be an integer of at least 1, or a share of the training in (0, 1), got {value!r}")


@dataclass(frozen=True)
class Timing:
    """When the rounds of a :class:`HessianPruner` come.

    Args:
        step: Optimizer steps before the first round, or a share of the training's.
        epoch: Epochs before it.
        num_rounds: Number of rounds.
        interval: Steps or epochs between them.
        ramp: How the amount rises over them.
        rewind: Whether the learning rate schedule begins anew after each.

    Raises:
        ConfigError: If a value is out of range, or two of them contradict each other.
    """

    step: float | None
    epoch: int | None
    num_rounds: int
    interval: float
    ramp: Ramp
    rewind: bool

    def __post_init__(self) -> None:
        """Check every value."""
        if self.step is not None and self.epoch is not None:
            raise ConfigError(f"expected at most one of step and epoch, got step={self.step} and epoch={self.epoch}")
        for name in ("epoch", "num_rounds"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        if self.step is not None:
            steps_of("step", self.step, None)
        steps_of("interval", self.interval, None)
        if self.step is None and isinstance(self.interval, float):
            raise ConfigError(f"interval={self.interval} is a share of the steps, so step must be given, too")
        boolean("rewind", self.rewind)

    def due(self, number: int, total: int) -> int:
        """Return when a round comes.

        Args:
            number: Number of the round, from 1.
            total: Optimizer steps of the training.

        Returns:
            The step or epoch after which it comes; 0 is before the first step.
        """
        if self.step is None:
            return (self.epoch or 0) + (number - 1) * int(self.interval)
        first, interval = (steps_of("", value, total) for value in (self.step, self.interval))
        return first + (number - 1) * interval

    def check_in(self, args: TrainingArguments, total: int) -> None:
        """Check that the last round comes no later than the end of the training.

        Args:
            args: The Trainer's arguments.
            total: Optimizer steps of the training.

        Raises:
            ConfigError: If it comes later.
        """
        end = float(total if self.step is not None else args.num_train_epochs)
        if self.step is None and args.max_steps > 0:
            end = float("inf")  # max_steps overrides the epochs, and how many it makes depends on the data
        last = self.due(self.num_rounds, total)
        if last > end:
            raise ConfigError(
                f"round {self.num_rounds} of {self.num_rounds} would come after {last} "
                f"{'steps' if self.step is not None else 'epochs'} and the training ends after {end:g}; "
                "prune earlier, in fewer rounds, or train longer"
            )

    def cuts(self, args: TrainingArguments, total: int, loader: Any) -> list[int]:
        """Return the optimizer steps after which rounds come.

        Args:
            args: The Trainer's arguments.
            total: Optimizer steps of the training.
            loader: The Trainer's training data.

        Returns:
            The steps, in order.
        """
        each = 1 if self.step is not None else steps_in_epoch(args, loader)
        return [each * self.due(number + 1, total) for number in range(self.num_rounds)]


def steps_in_epoch(args: TrainingArguments, loader: Any) -> int:
    """Return how many optimizer steps an epoch has.

    Args:
        args: The Trainer's arguments.
        loader: The Trainer's training data.

    Returns:
        The number.

    Raises:
        ConfigError: If the data has no length.
    """
    try:
        return max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))
    except TypeError as error:
        raise ConfigError(
            "rewind needs to know how many steps an epoch has, and the training data has no length; give the rounds in "
            "steps: HessianPruner(config, step=...)"
        ) from error


def position(step: int, cuts: Sequence[int], total: int) -> float:
    """Return how far a learning rate schedule has come that begins anew after each cut.

    After a cut it runs once from its beginning to its end, in the steps until the next cut or the end of the training.
    Before the first cut it is as without.

    Args:
        step: Optimizer steps so far.
        cuts: The steps after which rounds come, in order.
        total: Steps of the training.

    Returns:
        The step of the schedule that is used.
    """
    behind = [cut for cut in cuts if cut <= step]
    if not behind:
        return step
    end = next((cut for cut in cuts if cut > behind[-1]), total)
    # Behind the end it stays there.
    return total * min(1.0, (step - behind[-1]) / max(1, end - behind[-1]))


def rewind_(scheduler: Any, cuts: Sequence[int], total: int) -> None:
    """Let a learning rate schedule begin anew after each cut, in place.

    Args:
        scheduler: The Trainer's scheduler.
        cuts: The steps after which rounds come, in order.
        total: Steps of the training.

    Raises:
        ConfigError: If it follows a metric, or another rule that has no beginning.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ConfigError(
            f"rewind=True needs a schedule that depends on the step alone, such as lr_scheduler_type='linear' or "
            f"'cosine', got {type(scheduler).__name__}"
        )
    scheduler.lr_lambdas = [partial(_rewound, _inner(each), tuple(cuts), total) for each in scheduler.lr_lambdas]


def _rewound(rule: Callable[[Any], float], cuts: Sequence[int], total: int, step: int) -> float:
    return rule(position(step, cuts, total))


def _inner(rule: Any) -> Any:
    """Return the rule that :func:`rewind_` was given, as a further training may find its own."""
    return rule.args[0] if isinstance(rule, partial) and rule.func is _rewound else rule


def future_rates(scheduler: Any, optimizer: Any, first: int, steps: int) -> list[float]:
    """Return the learning rates of the steps to come, as far as they can be told.

    Args:
        scheduler: The Trainer's scheduler.
        optimizer: Its optimizer.
        first: Steps taken.
        steps: How many to come.

    Returns:
        The rates of the first group of parameters; the present one throughout where the schedule follows a metric.
    """
    if isinstance(scheduler, LambdaLR):
        base, rule = scheduler.base_lrs[0], scheduler.lr_lambdas[0]
        return [float(base) * rule(first + t) for t in range(steps)]
    return [float(optimizer.param_groups[0]["lr"])] * steps
