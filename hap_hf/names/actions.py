"""What happens to units, one letter each, and how a string of letters is written down."""

import re
from itertools import groupby

from hap_hf.errors import PlanFormatError
from hap_hf.names.untrusted import typed

KEEP, IMPLANT, PRUNE = "k", "i", "p"

_RUN = re.compile(r"([0-9]{0,8})([kip])")


def encode_actions(actions: str) -> str:
    """Return ``actions`` with runs of two or more written as a count and a letter, as in ``"3kip12k"``."""
    runs = ((letter, len(list(run))) for letter, run in groupby(actions))
    return "".join(f"{count}{letter}" if count > 1 else letter for letter, count in runs)


def decode_actions(data: object, num_units: int, where: str = "plan") -> str:
    """Return the letters that ``encode_actions`` wrote.

    Args:
        data: The coded string.
        num_units: Number of letters expected; nothing longer is ever built.
        where: Place in the plan, for the message.

    Returns:
        One letter for each unit.

    Raises:
        PlanFormatError: If the string is malformed or does not hold exactly ``num_units`` letters.
    """
    text = typed(data, str, f"{where}.actions")
    parts, total, position = [], 0, 0
    while position < len(text):
        match = _RUN.match(text, position)
        if match is None:
            raise PlanFormatError(
                f"{where}.actions is malformed at character {position}: {text[position : position + 20]!r}"
            )
        count = int(match[1] or 1)
        total += count
        # Before the letters are made: a few characters may ask for any number of them.
        if count == 0 or total > num_units:
            break
        parts.append(match[2] * count)
        position = match.end()
    if total != num_units or position < len(text):
        raise PlanFormatError(f"{where}.actions must describe exactly {num_units} units")
    return "".join(parts)
