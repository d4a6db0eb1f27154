"""Files that are there whole or not at all, and what is said of others."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hap_hf.errors import ConfigError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and move it into place when complete, which a file system does at once.

    Args:
        path: The file.
        write: Writes to the path that it is given.
    """
    draft = path.with_name(f"{path.name}.tmp")
    try:
        write(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the values of a file of JSON.

    Args:
        path: The file.

    Returns:
        The values.

    Raises:
        ConfigError: If it is damaged: half a file, or one of something else.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged, or no JSON ({error}); copy it again, or make it anew") from error


@contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a file of tensors for a while.

    Args:
        path: A file in safetensors.

    Yields:
        The file, as ``safetensors.safe_open`` opens it.

    Raises:
        ConfigError: If it is damaged: half a file, or one of something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged, or no safetensors ({error}); copy or download it again") from error
