"""Results of a benchmark that may be stopped and started again."""

import json
import logging
import subprocess
import sys
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
        self._rows: list[Row] = []
        self.read()

    def read(self) -> None:
        """Read the file, to which another process may have written."""
        text = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
        self._rows = [json.loads(line) for line in text.splitlines()]

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


def made_in_processes(script: str, words: Sequence[str], names: Sequence[str]) -> None:
    """Make rows one after the other, each in a process of its own, so that none finds what another one left.

    Args:
        script: The benchmark, which makes one row where it is given ``--row``.
        words: Its other arguments.
        names: The rows. One that fails is logged, and left out.
    """
    for name in names:
        done = subprocess.run([sys.executable, script, *words, "--row", name], check=False)
        if done.returncode:
            logger.error("no row %r: its process ended with %d", name, done.returncode)
