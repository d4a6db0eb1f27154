"""A setting of a dataclass, with what it means: command lines and the documentation are made of it."""

from dataclasses import field
from typing import Any


def setting(default: Any, help: str) -> Any:
    """Return a field.

    Args:
        default: Its default.
        help: What it means.

    Returns:
        The field, with ``help`` in its metadata.
    """
    return field(default=default, metadata={"help": help})
