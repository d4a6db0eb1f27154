"""Files that are there whole or not at all."""

from collections.abc import Callable
from pathlib import Path


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
