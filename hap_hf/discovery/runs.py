"""The ways in which a model is run while it is looked at: what one example does not reach, another run may."""

import logging
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hap_hf.evidence.batches import Batch, call, shortened
from hap_hf.host import own_parameters, tree_leaves
from hap_hf.model.state import preserved, restart_random_numbers
from hap_hf.model.training import FunctionLog, as_in_training

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One way to run a model.

    Args:
        batch: Keyword arguments of its forward, on its device.
        training: Whether it takes the paths of training, without dropout.
    """

    batch: Batch
    training: bool = False

    def output(self, model: nn.Module, batch: Batch | None = None) -> Any:
        """Return what the model gives, with the same random numbers each time, which :func:`preserved` puts back.

        Args:
            model: The model, in eval mode.
            batch: The batch in another dtype; by default the run's own.

        Returns:
            Whatever it returns.
        """
        with self._mode(model):
            restart_random_numbers(model)  # two runs with other random numbers would never agree
            return call(model, self.batch if batch is None else batch)

    @contextmanager
    def _mode(self, model: nn.Module) -> Generator[None]:
        if not self.training:
            yield
            return
        with as_in_training(model):
            yield


def on_few_tokens(runs: Sequence[Run]) -> tuple[Run, ...] | None:
    """Return the same runs on a few positions of each text.

    Args:
        runs: The runs.

    Returns:
        The runs; None where nothing is long.
    """
    cut = [shortened(run.batch) for run in runs]
    if cut[0] is None:
        return None
    return tuple(run if few is None else replace(run, batch=few) for run, few in zip(runs, cut, strict=True))


def runs_of(model: nn.Module, example: Batch, others: Iterable[Batch] = ()) -> tuple[tuple[Run, ...], frozenset[str]]:
    """Return how the model is to be run so that as much of it as possible is seen, and the modules that still are not.

    The example comes first. Training is looked at where the model behaves otherwise there: other functions are called,
    beside dropout. While there are modules with parameters that no run has called, other batches are tried, and the
    example's images in twice and half their size.

    Args:
        model: The model, which is left as found.
        example: Keyword arguments of its forward, on its device.
        others: Further batches.

    Returns:
        The runs, and the names of the modules with parameters that none of them calls.
    """
    waiting = {n for n, m in model.named_modules() if any(p is not None for p in own_parameters(m).values())}
    runs = [Run(example)]
    with preserved(model), torch.no_grad():
        first = _watched(model, runs[0])
        if first is None:
            return tuple(runs), frozenset()
        waiting -= first.called
        training = Run(example, training=True)
        found = _watched(model, training)
        if found is not None and found.functions != first.functions and _repeats(model, training):
            runs.append(training)
            waiting -= found.called
        for batch in [*others, *_resized(example)] if waiting else ():
            for run in (Run(batch), Run(batch, training=True)):
                found = _watched(model, run) if waiting else None
                if found is not None and waiting & found.called:
                    runs.append(run)
                    waiting -= found.called
    return tuple(runs), frozenset(waiting)


@dataclass(frozen=True)
class _Watched:
    called: frozenset[str]
    functions: list[str]


def _watched(model: nn.Module, run: Run) -> _Watched | None:
    """Return which modules and functions a run calls; None where the model does not run so."""
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda m, args, n=name: called.add(n))
        for name, module in model.named_modules()
    ]
    log = FunctionLog()
    try:
        with log:
            run.output(model)
    except Exception as error:  # the model's own code, run in a way that it may not have been written for
        logger.debug("not run %s: %s", "in training mode" if run.training else "on another batch", error)
        return None
    finally:
        for handle in handles:
            handle.remove()
    return _Watched(frozenset(called), log.names)


def _repeats(model: nn.Module, run: Run) -> bool:
    """Return whether a run gives the same twice, so that two models can be compared by it."""
    a, b = ([t for t in tree_leaves(run.output(model)) if isinstance(t, Tensor)] for _ in range(2))
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _resized(example: Batch) -> list[Batch]:
    """Return the example with its images in twice and half their size; none where it has no images."""
    images = {k: v for k, v in example.items() if isinstance(v, Tensor) and v.dim() == 4 and v.is_floating_point()}
    if not images:
        return []
    return [
        {**example, **{k: functional.interpolate(v, scale_factor=factor) for k, v in images.items()}}
        for factor in (2.0, 0.5)
    ]
