"""The version of the package."""

__version__ = "0.3.0"


def is_newer(other: str) -> bool:
    """Return whether a version is later than this one, as far as its numbers tell.

    Args:
        other: The version, as in ``"1.2.3"``.

    Returns:
        Whether it is; False where it is no version.
    """
    return _numbers(other) > _numbers(__version__)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:3])
