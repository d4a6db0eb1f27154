"""Putting a model and its optimizer back if what is done to them does not come to its end."""

import signal
import threading
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from hap_hf.errors import ConfigError
from hap_hf.model.stale import note_in_use

_CONTAINERS = (dict, OrderedDict, set)


@contextmanager
def undone_on_error(model: nn.Module, optimizer: Optimizer | None = None) -> Generator[None]:
    """Leave ``model`` and ``optimizer`` as they were if the block ends with an exception, Ctrl-C included.

    Put back are the modules with all their attributes, hooks and flags, the values of buffers, and which tensors the
    optimizer trains with what state. Parameters are not copied: the block may replace them but must not write to them,
    which is what surgery promises.

    Args:
        model: Any model.
        optimizer: A torch optimizer, not a wrapper around one.

    Raises:
        ConfigError: If the optimizer is none.
    """
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ConfigError(f"optimizer must be the torch.optim.Optimizer of the model, got a {type(optimizer).__name__}")
    # Pairs of each dictionary itself and a copy of it: the dictionary is filled again in place, as others may hold it.
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    contents = [(c, c.copy()) for _, own in attributes for c in own.values() if type(c) in _CONTAINERS]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    lists = [
        (group[key], list(group[key]))
        for group in (optimizer.param_groups if optimizer is not None else [])
        for key in ("params", "param_names")
        if key in group
    ]
    state = {} if optimizer is None else dict(optimizer.state)
    try:
        yield
    except BaseException:
        # A second Ctrl-C must not stop this half-way, which would leave neither the old state nor the new.
        with interrupts_deferred():
            for current, saved in [*attributes, *contents]:
                current.clear()
                current.update(saved)
            for p, requires_grad, grad in flags:
                p.requires_grad_(requires_grad)
                p.grad = grad
            with torch.no_grad():
                for buffer, value in buffers:
                    if not buffer.is_meta and not torch.equal(buffer, value):
                        buffer.copy_(value)
            # In place: wrappers and schedulers share these lists with the optimizer.
            for entries, old in lists:
                entries[:] = old
            if optimizer is not None:
                optimizer.state.clear()
                optimizer.state.update(state)
            # Surgery may have noted them as replaced, and the next step of their optimizer would raise.
            note_in_use(model.parameters())
        raise


@contextmanager
def interrupts_deferred() -> Generator[None]:
    """Let Ctrl-C wait until the block has ended; only the main thread ever gets one."""
    handler = signal.getsignal(signal.SIGINT)
    # A handler that was set outside of Python is None here, and could not be put back.
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            signal.raise_signal(signal.SIGINT)
