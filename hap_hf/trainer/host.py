"""Every private name of the Trainer, accelerate and DistributedDataParallel that is touched.

Seen in transformers 5.17 to 5.24, accelerate 1.1 to 1.15 and torch 2.9 to 2.15.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from hap_hf.errors import ConfigError
from hap_hf.host import CONTAINERS


def calling_trainer() -> Trainer:
    """Return the Trainer that called the callback.

    Callback events are given everything but the Trainer itself, which alone knows its loss and how to log.

    Returns:
        The Trainer.

    Raises:
        ConfigError: If no Trainer called.
    """
    frame = inspect.currentframe()
    # Outwards, so that of Trainers inside of Trainers the innermost is found, which is the one that calls.
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    raise ConfigError("HessianPruner must be called by a transformers Trainer; outside of one, use hap_hf.prune")


def wrap_loading_(trainer: Trainer, around: Callable[..., None]) -> None:
    """Let a Trainer call ``around`` in place of its method that loads the weights of a checkpoint.

    Args:
        trainer: The one Trainer to change; its class stays as it is.
        around: Called with that method and its arguments.
    """
    load = trainer._load_from_checkpoint
    vars(trainer)["_load_from_checkpoint"] = lambda *args, **kwargs: around(load, *args, **kwargs)


def forward_without_autocast(model: nn.Module) -> tuple[Any, Any] | None:
    """Return the forward that accelerate put around a model's own, and that one; None where there is none.

    Args:
        model: The Trainer's model.

    Returns:
        accelerate's forward and the model's own.
    """
    patched, original = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    return None if patched is None or original is None else (patched, original)


def communication_hooks(wrapper: DistributedDataParallel) -> list[tuple[Any, Any]]:
    """Return the hooks with which gradients are exchanged, and their states.

    Args:
        wrapper: The wrapper around a model.

    Returns:
        The pairs.
    """
    found: list[tuple[Any, Any]] = wrapper._comm_hooks
    return found


def averaged_parameters(wrapper: DistributedDataParallel) -> list[nn.Parameter]:
    """Return the parameters whose gradients are averaged.

    Args:
        wrapper: The wrapper around a model.

    Returns:
        The parameters.
    """
    return list(wrapper._module_parameters)


def build_anew_(wrapper: DistributedDataParallel, **settings: Any) -> None:
    """Build a wrapper anew in place around the parameters that its module has now.

    Args:
        wrapper: The wrapper, of which others hold references.
        **settings: What it is built with.
    """
    before = dict(vars(wrapper))
    # Parameters that surgery left alone would tell the old reducer of their gradients for as long as anything holds it.
    wrapper._remove_autograd_hooks()  # type: ignore[no-untyped-call]
    DistributedDataParallel.__init__(
        wrapper, wrapper.module, device_ids=wrapper.device_ids, output_device=wrapper.output_device, **settings
    )
    # What others have put on it: hooks of modules, the training flag, marks of accelerate.
    kept = {name for name in vars(nn.Module()) if name not in CONTAINERS}
    vars(wrapper).update({k: v for k, v in before.items() if k in kept or k not in vars(wrapper)})
    for hook, state in before["_comm_hooks"]:
        wrapper.register_comm_hook(state, hook)


def forget_averages_(scheduler: object) -> None:
    """Let a scheduler that compares streaming averages of a metric begin anew.

    Args:
        scheduler: Any learning rate scheduler.
    """
    watched = vars(scheduler) if hasattr(scheduler, "num_bad_epochs") else {}
    if {"num_good_epochs", "_streaming_avg"} <= watched.keys():  # GreedyLR
        watched["num_good_epochs"] = 0
        if watched["_streaming_avg"] is not None:
            watched["_streaming_avg"] = type(watched["_streaming_avg"])(watched["window_size"])
