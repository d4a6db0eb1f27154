"""Results of a benchmark that may be stopped and started again."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class Rows:
    """What was measured, in a file that grows by a line for each row.

    Args:
        file: The file.
        flags: What all rows have in common; those made with other flags are not seen.
    """

    def __init__(self, file: Path, flags: Sequence[str]) -> None:
        self._file = file
        self._flags = list(flags)
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        self._rows: list[Row] = [json.loads(line) for line in text.splitlines()]

    def find(self, about: Row) -> Row | None:
        """Return the row about something, with its results, or None where it has to be made."""
        wanted = {**about, "flags": self._flags}
        return next((row for row in self._rows if all(row.get(key) == value for key, value in wanted.items())), None)

    def add(self, about: Row, results: Row) -> None:
        """Write a row.

        Args:
            about: Which row it is.
            results: What was measured.
        """
        row = {**about, "flags": self._flags, "results": results}
        self._rows.append(row)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        logger.info("%s: %s", about, results)
