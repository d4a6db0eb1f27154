"""Labels of data as classes of a model: by name wherever both have names."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hap_hf.errors import ConfigError

SEVERAL = (
    "the command line prunes models of one label a sample; with several, prune in Python: hap_hf.prune(model, batches, "
    "config), whose batches hold what the model takes"
)
_MOST = 10
"""Names of classes that a message lists."""


def classes_of(rows: Any, column: str, config: Any) -> Callable[[Any], int | float]:
    """Return what turns the labels of a column into classes of a model.

    Data of folders, saved datasets and the Hub name their classes, and number them in an order of their own, mostly
    the alphabet's. Where the model has names, too, a class is the one of the same name, whatever its case and spaces.

    Args:
        rows: Rows of a dataset.
        column: Name of the column; of lists, what is in them counts.
        config: The model's config.

    Returns:
        A function of a label; of a model with one output it returns the value itself. It raises a ConfigError where
        the model has no such class.
    """
    if config.num_labels == 1:
        return partial(_value, column)
    model = tuple(str(config.id2label.get(number, f"LABEL_{number}")) for number in range(config.num_labels))
    kind = rows.features[column]
    while hasattr(kind, "feature"):  # of lists
        kind = kind.feature
    names = tuple(map(str, getattr(kind, "names", None) or ()))
    return _Classes(column, model, names, _places(names, model)).of


@dataclass(frozen=True)
class _Classes:
    """The classes of a column and of a model.

    Args:
        column: Name of the column.
        model: The model's names.
        data: Names that the data gives to the numbers in the column; empty if it gives none.
        places: The model's class of each of these, None where it has none.
    """

    column: str
    model: tuple[str, ...]
    data: tuple[str, ...]
    places: tuple[int | None, ...]

    def of(self, label: Any) -> int:
        """Return the model's class of a label."""
        if isinstance(label, str):
            found = _place(label, self.model)
            if found is None and label.isdecimal() and int(label) < len(self.model):
                return int(label)
            return self._known(found, label)
        number = _whole(self.column, label)
        if number == -1:
            raise ConfigError(
                f"column {self.column!r} has the label -1, which says that a row has none, as in test splits of the "
                "Hub; judge by another split with --held-out (--held-out train takes a fifth of it), or drop such rows"
            )
        if not self.data:
            return self._known(number if 0 <= number < len(self.model) else None, number)
        inside = 0 <= number < len(self.data)
        return self._known(self.places[number] if inside else None, self.data[number] if inside else number)

    def _known(self, found: int | None, label: Any) -> int:
        if found is None:
            raise ConfigError(
                f"the model knows the classes {_some(self.model)}, and column {self.column!r} has {label!r}"
                + (f" of {_some(self.data)}" if self.data else "")
                + "; name another column by --label-column, rename what is in it, or set id2label and label2id in the "
                "model's config.json"
            )
        return found


def _places(names: Sequence[str], model: Sequence[str]) -> tuple[int | None, ...]:
    """Return the model's class of each class that the data names."""
    found = tuple(_place(name, model, number) for number, name in enumerate(names))
    if None not in found:
        return found
    if sorted(names) == sorted(map(str, range(len(names)))):  # folders named 0 to 10 come as 0, 1, 10, 2
        return tuple(int(name) if int(name) < len(model) else None for name in names)
    if all(name == f"LABEL_{number}" for number, name in enumerate(model)):  # which are no names
        return tuple(number if number < len(model) else None for number in range(len(names)))
    return found


def _place(name: str, model: Sequence[str], number: int | None = None) -> int | None:
    """Return the model's class of a name; of several of that name the one with the number that the data has."""
    same = [own for own, known in enumerate(model) if known == name]
    same = same or [own for own, known in enumerate(model) if _folded(known) == _folded(name)]
    if number in same:
        return number
    return same[0] if len(same) == 1 else None


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.casefold()).strip()


def _whole(column: str, label: Any) -> int:
    """Return the number of a class."""
    value = _value(column, label)
    if not value.is_integer():
        raise ConfigError(
            f"expected the number or the name of a class in column {column!r}, got {label!r}; name another column by "
            "--label-column. Values are learned by models with one output (num_labels=1)"
        )
    return int(value)


def _value(column: str, label: Any) -> float:
    """Return a label as a number."""
    if isinstance(label, (list, tuple, dict)):
        raise ConfigError(f"expected one label a row in column {column!r}, got {str(label)[:60]}: {SEVERAL}")
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(
            f"expected a number as label in each row of column {column!r}, got {label!r}; drop or mend such rows, or "
            "name another column by --label-column"
        )
    return value


def _some(names: Sequence[str]) -> str:
    return str(list(names[:_MOST])) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")
