"""Training the implants alone, from the last round on."""

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import Trainer

from hap_hf.config import HapConfig
from hap_hf.errors import ConfigError
from hap_hf.model.bare import check_bare
from hap_hf.surgery import checked_patterns, train_only_implants_
from hap_hf.surgery.calibration import ImplantInit
from hap_hf.trainer.distributed import rewrap_
from hap_hf.trainer.optimizers import bare_optimizer

logger = logging.getLogger(__name__)


def check_freezing(
    config: HapConfig, train_only_implants: bool, also_train: Iterable[str], *, implants: bool
) -> list[str]:
    """Check that implants can be trained alone, if they shall.

    Args:
        config: How the model is pruned.
        train_only_implants: Whether they shall.
        also_train: Glob patterns of what is trained beside them.
        implants: Whether the rounds make any.

    Returns:
        The patterns, as JSON would give them back.

    Raises:
        ConfigError: If there are no implants or the config makes them so that they would get no gradient, or if the
            patterns have no meaning.
    """
    if isinstance(also_train, str):
        raise ConfigError(f"also_train must be a list of glob patterns, got {also_train!r}; write [{also_train!r}]")
    patterns = list(also_train)
    if patterns and not train_only_implants:
        raise ConfigError(f"also_train={patterns} has a meaning only with train_only_implants=True")
    if train_only_implants and not implants:
        raise ConfigError(
            "train_only_implants=True needs implants, got a config with implant_ratio=0 or a plan without any"
        )
    if train_only_implants and config.implant_init is ImplantInit.ZERO:
        raise ConfigError(
            "with implant_init='zero' the columns that read the implants are zero, and with train_only_implants=True "
            "they would stay so and the implants without gradients; use implant_init='svd'"
        )
    return patterns


def check_beginning(model: nn.Module, rounds_left: int, also_train: Iterable[str]) -> None:
    """Check before the first step what would otherwise fail in the middle of a training.

    Args:
        model: The Trainer's model.
        rounds_left: How many times it is to be pruned.
        also_train: Glob patterns of what is trained beside the implants.
    """
    if rounds_left > 0:
        check_bare(model)
    checked_patterns(model, also_train)


def freeze_the_rest_(trainer: Trainer, model: nn.Module, optimizer: Any, also_train: Iterable[str]) -> None:
    """Let ``trainer`` train nothing but the implants of ``model`` from now on.

    Args:
        trainer: A Trainer whose last round is done.
        model: Its model, which was pruned.
        optimizer: Its optimizer, or accelerate's wrapper around it.
        also_train: Glob patterns of what is trained beside them.
    """
    before = [p.requires_grad for p in model.parameters()]
    names = train_only_implants_(model, also_train, optimizer=bare_optimizer(optimizer))
    if before != [p.requires_grad for p in model.parameters()]:
        # The reducer would wait for gradients of parameters that no longer get any.
        rewrap_(trainer, anew=True)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info("from now on %d parameters in %d tensors are trained: %s", count, len(names), ", ".join(names))
