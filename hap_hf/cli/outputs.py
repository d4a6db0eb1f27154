"""Where results go, looked at before any work is done."""

import os
import tempfile
from pathlib import Path

import typer

from hap_hf.errors import ConfigError


def path_given(words: str) -> Path:
    """Return the path that the user gave.

    Args:
        words: What stands behind the flag.

    Returns:
        The path.

    Raises:
        BadParameter: If there is nothing, which would be the current folder.
    """
    if not words.strip():
        raise typer.BadParameter("expected a path, got an empty text; . is the current folder")
    return Path(words)


def check_folder(out: Path, model: str | None = None) -> None:
    """Check that results can be written to a folder. It is not made.

    Args:
        out: The folder, which need not be there.
        model: What is read: a folder, or a name on the Hub; None if it may be the same.

    Raises:
        ConfigError: If it is a file, or below one, or cannot be written to, or is the folder of the model.
    """
    there = out
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"--out {out}: expected a folder, or a place for one, and {there} is none; choose another")
    if model is not None and there is out and out.resolve() == Path(model).resolve():
        raise ConfigError(f"--out {out} is the folder of the model, which would be overwritten; choose another")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written to: {error.strerror or error}; choose another") from error


def check_file(out: Path, example: Path) -> None:
    """Check that a result can be written to a file. It is not made.

    Args:
        out: The file, which need not be there.
        example: The name of one, for the message.

    Raises:
        ConfigError: If it is a folder, or below a file, or cannot be written to.
    """
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file, as in {out / example}")
    check_folder(out.parent)
    if out.exists() and not os.access(out, os.W_OK):
        raise ConfigError(f"--out {out} cannot be written to: it is for reading only; choose another")
