"""Checks of values from JSON that a stranger may have written. Each returns its value or raises ``PlanFormatError``."""

import re
from enum import StrEnum
from typing import Any, TypeVar

from hap_hf.errors import PlanFormatError

_T = TypeVar("_T")
_E = TypeVar("_E", bound=StrEnum)

MAX_SIZE = 2**31
_MAX_NAME = 1000
# Each level is a nested call, and a deep document would exhaust Python's stack.
_MAX_DEPTH = 4
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def typed(value: object, kind: type[_T], where: str) -> _T:
    """Return ``value`` if it is a ``kind``; a bool is no int.

    Args:
        value: The value to check.
        kind: The type it must have.
        where: Place in the document, for the message.

    Returns:
        The value.

    Raises:
        PlanFormatError: If it is of another type.
    """
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise PlanFormatError(f"{where} must be a {kind.__name__}, got {type(value).__name__}")
    return value


def items(value: object, where: str, most: int) -> list[Any]:
    """Return ``value`` if it is a list of at most ``most`` entries.

    Args:
        value: The value to check.
        where: Place in the document, for the message.
        most: Largest length allowed.

    Returns:
        The list.

    Raises:
        PlanFormatError: If it is no list, or a longer one.
    """
    entries = typed(value, list, where)
    if len(entries) > most:
        raise PlanFormatError(f"{where} has {len(entries)} entries, at most {most} are allowed")
    return entries


def fixed_items(value: object, count: int, where: str) -> list[Any]:
    """Return ``value`` if it is a list of exactly ``count`` entries.

    Args:
        value: The value to check.
        count: Length it must have.
        where: Place in the document, for the message.

    Returns:
        The list.

    Raises:
        PlanFormatError: If it is no list, or of another length.
    """
    entries = typed(value, list, where)
    if len(entries) != count:
        raise PlanFormatError(f"{where} must have {count} entries, got {len(entries)}")
    return entries


def number(value: object, where: str, low: int, high: int) -> int:
    """Return ``value`` if it is an integer from ``low`` to ``high``.

    Args:
        value: The value to check.
        where: Place in the document, for the message.
        low: Smallest value allowed.
        high: Largest value allowed.

    Returns:
        The integer.

    Raises:
        PlanFormatError: If it is no integer or out of range.
    """
    integer = typed(value, int, where)
    if not low <= integer <= high:
        # Python refuses to print integers of thousands of digits.
        got = str(integer) if abs(integer) < 10**40 else "a number of over forty digits"
        raise PlanFormatError(f"{where} must lie between {low} and {high}, got {got}")
    return integer


def real(value: object, where: str) -> float:
    """Return ``value`` as a float if it is a finite number of at least 0.

    Args:
        value: The value to check.
        where: Place in the document, for the message.

    Returns:
        The number.

    Raises:
        PlanFormatError: If it is no number, negative, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PlanFormatError(f"{where} must be a number, got {type(value).__name__}")
    if not 0 <= value < 1e30:  # NaN fails both comparisons
        raise PlanFormatError(f"{where} must be a finite number of at least 0")
    return float(value)


def member(value: object, enum: type[_E], where: str) -> _E:
    """Return the member of ``enum`` whose value is ``value``.

    Args:
        value: The value to check.
        enum: The enum.
        where: Place in the document, for the message.

    Returns:
        The member.

    Raises:
        PlanFormatError: If there is none.
    """
    text = typed(value, str, where)
    try:
        return enum(text)
    except ValueError:
        raise PlanFormatError(f"{where} must be one of {[m.value for m in enum]}, got {short(text)}") from None


def dotted_name(value: object, where: str) -> str:
    """Return ``value`` if it can be the dotted name of a tensor or an attribute.

    Args:
        value: The value to check.
        where: Place in the document, for the message.

    Returns:
        The name.

    Raises:
        PlanFormatError: If it is no string, too long, or holds other characters.
    """
    name = typed(value, str, f"{where} name")
    # Surgery follows these names from module to module, and messages print them.
    if len(name) > _MAX_NAME or _NAME.fullmatch(name) is None:
        raise PlanFormatError(f"{where}: {short(name)} is no dotted tensor or attribute name")
    return name


def short(value: object) -> str:
    """Return ``value`` for a message, cut to 60 characters.

    Args:
        value: The value; anything but a string is named by its type.

    Returns:
        A printable form of bounded length.
    """
    return repr(value[:60] if isinstance(value, str) else type(value).__name__)


def json_object(value: object, where: str, most: int) -> dict[str, Any]:
    """Return a copy of ``value`` if it is a mapping of a bounded number of plain, finite JSON values.

    Args:
        value: The value to check.
        where: Place in the document, for the message.
        most: Largest number of values in it, those inside of others included.

    Returns:
        The mapping.

    Raises:
        PlanFormatError: If it is no mapping, holds more values, or something that JSON has no word for.
    """
    left = most + 1  # the mapping itself is none of its values

    def copied(inner: object, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > _MAX_DEPTH:
            raise PlanFormatError(f"{where} must hold at most {most} values, at most {_MAX_DEPTH} levels deep")
        if isinstance(inner, dict) and all(isinstance(key, str) for key in inner):
            return {key: copied(item, depth + 1) for key, item in inner.items()}
        if isinstance(inner, list):
            return [copied(item, depth + 1) for item in inner]
        if inner is None or isinstance(inner, str) or (isinstance(inner, (int, float)) and abs(inner) < 1e300):
            return inner
        raise PlanFormatError(f"{where} must hold finite JSON values under names, got a {type(inner).__name__}")

    copy: dict[str, Any] = copied(typed(value, dict, where), 0)
    return copy
