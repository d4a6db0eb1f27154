"""A figure that notebooks show and that knows how to be saved."""

import os
from io import BytesIO
from pathlib import Path

from hap_hf.errors import ConfigError

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError('pictures need matplotlib, which is not there: pip install "hap_hf[plots]"') from error

WIDTH, DPI = 6.0, 100
"""Inches, and pixels an inch: 600 pixels, the width of a column on the Hub."""
SMALL, TEXT = 7.0, 8.5
"""Sizes of letters in points."""
DARK, MIDDLE, LIGHT = "0.15", "0.5", "0.85"
"""Greys that stay apart in print."""


class Picture(Figure):
    """A figure without a window, so that nothing has to be closed.

    Args:
        height: In inches; the width is 6.
        title: What it shows.
    """

    def __init__(self, height: float, title: str) -> None:
        super().__init__(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
        self.suptitle(title, fontsize=TEXT + 1.5)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture.

        Args:
            path: File that ends in ``.png`` or ``.svg``.

        Raises:
            ConfigError: If it ends in something else.
        """
        target = Path(path)
        if target.suffix not in {".png", ".svg"}:
            raise ConfigError(f"pictures are written as .png or .svg, got {target.name!r}")
        # Without a date the same picture is the same file.
        self.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)

    def _repr_png_(self) -> bytes:
        """Return the picture for a notebook."""
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
