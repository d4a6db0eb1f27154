"""How long each step took."""

import time
from collections.abc import Mapping


class Clock:
    """Seconds by step.

    Args:
        before: Seconds of the steps before.
    """

    def __init__(self, before: Mapping[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = dict(before or {})
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        """Book the time since the last lap under ``step``.

        Args:
            step: Name of the step that just ended.
        """
        # Read once: the end of one step is the beginning of the next, so that all of them add up to the whole.
        now = time.perf_counter()
        self.seconds[step] = now - self._last
        self._last = now
