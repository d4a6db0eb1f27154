"""Errors as one line and an exit code, results as text or JSON."""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

import typer
from transformers.utils import logging as transformers_logging

from hap_hf.errors import HapError

P = ParamSpec("P")


def told(command: Callable[P, None]) -> Callable[P, None]:
    """Let a command end with a line on stderr and exit code 1 where the user can do something about an error.

    Args:
        command: A command.

    Returns:
        The command; other errors pass through with their traceback, as they are faults of the program.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        if not sys.stderr.isatty():  # bars of loading and saving, in a pipe
            transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            command(*args, **kwargs)
        # Names and files that do not exist, in transformers', datasets' and the Hub's words.
        except (HapError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error

    return wrapped


def reason(error: BaseException) -> str:
    """Return why something of another package failed, in one line.

    Args:
        error: What was raised; of one with a cause the first cause counts.

    Returns:
        The line.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def say(as_json: bool, values: Any, text: str) -> None:
    """Print a result.

    Args:
        as_json: Whether values are printed, and nothing else.
        values: JSON values.
        text: The same for people.
    """
    typer.echo(json.dumps(values, indent=2) if as_json else text)
