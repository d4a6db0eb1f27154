"""Reading settings that this version, an older or a newer one wrote to a file."""

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from hap_hf.errors import ConfigError
from hap_hf.version import __version__, is_newer

logger = logging.getLogger(__name__)


def known_settings(
    values: object, known: Collection[str], hint: Callable[[str, Collection[str]], str]
) -> dict[str, Any]:
    """Return those of some settings that this version knows.

    Args:
        values: Names and their values, with the version that wrote them under ``hap_hf``, if any did.
        known: The names there are.
        hint: Says what was probably meant by a name that there is not.

    Returns:
        The settings, without the version. Of what a newer version wrote, unknown names are dropped, with a warning.

    Raises:
        ConfigError: If ``values`` is no mapping, or a name is unknown.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"settings must be a mapping of names to values, or a HapConfig, got {type(values).__name__}; for example "
            "HapConfig(target_params=0.5)"
        )
    written_by = values.get("hap_hf")
    unknown = sorted(set(values) - set(known) - {"hap_hf"}, key=str)
    # What a newer version has more of may be left out; written by this one or by hand, an unknown name is a slip.
    if unknown and isinstance(written_by, str) and is_newer(written_by):
        logger.warning("hap_hf %s wrote settings %s that this one, %s, does not know", written_by, unknown, __version__)
        unknown = []
    if unknown:
        raise ConfigError(f"unknown settings {unknown}{hint(str(unknown[0]), known)}; known are {sorted(known)}")
    return {name: value for name, value in values.items() if name in known}
