"""One progress bar for a job of several parts, however many of them measure something."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]


@dataclass
class _Job:
    """A bar, and how many parts it is for.

    Args:
        bar: The bar.
        parts: Number of parts expected.
        begun: Number of parts that were begun.
    """

    bar: Any
    parts: int
    begun: int = 0


_CURRENT: ContextVar[_Job | None] = ContextVar("hap_hf job", default=None)


@contextmanager
def job(title: str, parts: int, *, shown: bool) -> Generator[None, None, None]:
    """Show one bar for all that is measured inside the block, with an estimate of the time left.

    The estimate takes each part that is still to come for as long as the one at hand. A job inside of a job is part of
    it.

    Args:
        title: What the bar is called.
        parts: How many parts are expected; more or fewer may come.
        shown: Whether there is a bar.
    """
    if not shown or _CURRENT.get() is not None:
        yield
        return
    # A file or a pipe, which cannot go back, would get a line for every step.
    with tqdm(desc=title, total=parts, unit="step", disable=None) as bar:
        token = _CURRENT.set(_Job(bar, parts))
        try:
            yield
            bar.total = bar.n
            bar.set_description_str(title)
        finally:
            _CURRENT.reset(token)


@contextmanager
def part(title: str, unit: str, steps: int, *, shown: bool) -> Generator[Callable[[], object], None, None]:
    """Show the progress of one part inside the block, in the bar of the job where there is one.

    Args:
        title: What the part is called.
        unit: What it counts, where it has a bar of its own.
        steps: Number of its steps.
        shown: Whether there is a bar.

    Yields:
        The function that moves the bar by one.
    """
    current = _CURRENT.get()
    if current is None or not shown:
        with tqdm(desc=title, total=steps, unit=unit, disable=None if shown else True) as bar:
            yield bar.update
        return
    current.begun += 1
    left = max(current.parts - current.begun, 0)
    current.bar.total = current.bar.n + steps * (1 + left)
    current.bar.set_description_str(f"pruning, {title} ({current.begun} of {max(current.parts, current.begun)})")
    yield current.bar.update
