"""Which Trainer a callback was called by."""

import inspect

from transformers import Trainer

from hap_hf.errors import ConfigError


def calling_trainer() -> Trainer:
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
