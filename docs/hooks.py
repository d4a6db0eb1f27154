"""What mkdocs does to a page beyond its plugins: cross references of docstrings become plain names."""

import re
from typing import Any

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?([^<]*)</code>")


def on_page_content(html: str, **kwargs: Any) -> str:
    """Return a page in which Sphinx's ``:class:`~a.b.C``` reads ``C``.

    Args:
        html: The page.
        **kwargs: Unused.

    Returns:
        The page.
    """
    return _ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)
