"""Rows of data from a file, a folder, the Hub, or from what a dependency ships."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hap_hf.cli.told import reason
from hap_hf.errors import ConfigError

BUILDERS = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
    ".md": ("text", {}),
    ".rst": ("text", {}),
}
DIGITS = "digits"


@dataclass(frozen=True)
class Rows:
    """Rows to score and train on, and rows to judge by.

    Args:
        train: Rows of a dataset.
        held_out: Other rows.
    """

    train: Any
    held_out: Any


def rows_of(data: str, *, held_out: str | None, seed: int) -> Rows:
    """Return the rows of some data.

    Args:
        data: A file of csv, tsv, json, jsonl, parquet or text; a folder that ``datasets`` reads; ``digits``, which
            scikit-learn ships; or a name on the Hub, with its configuration after a colon.
        held_out: The split to judge by; validation or test by default, or a fifth of the rows where there is neither.
        seed: Of the order in which rows are taken.

    Returns:
        The rows, in random order.

    Raises:
        ConfigError: If ``datasets`` is not installed, the data cannot be read or is empty, or there is no such split.
    """
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError('reading data takes datasets, which is not there: pip install "hap_hf[cli]"') from error
    if not sys.stderr.isatty():  # bars of reading, in a pipe
        datasets.disable_progress_bars()
    with _in_one_line(datasets, data):
        loaded = _loaded(datasets, data)
    splits: Mapping[str, Any] = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    splits = {name: rows for name, rows in splits.items() if len(rows)}
    if not splits:
        raise ConfigError(f"{data} has no rows")
    if held_out is not None and held_out not in splits:
        raise ConfigError(f"{data} has no split {held_out!r}, only {list(splits)}")
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    known = [held_out] if held_out else [n for n in splits if n.startswith(("validation", "dev", "test"))]
    other = next((splits[name] for name in known if splits[name] is not train), None)
    if other is not None:
        return Rows(train.shuffle(seed=seed), other.shuffle(seed=seed))
    if len(train) < 2:
        raise ConfigError(f"expected at least two rows in {data}, some to judge by, got {len(train)}")
    both = train.train_test_split(test_size=0.2, seed=seed)
    return Rows(both["train"], both["test"])


@contextmanager
def _in_one_line(datasets: Any, data: str) -> Iterator[None]:
    """Let what datasets, and the readers that it takes, say of data that they cannot read be one line."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of pandas, pyarrow, json and the Hub, too, each with its own
        why = reason(error)
        if "corresponds to no data" in why:
            raise ConfigError(f"{data} has no rows") from error
        if not Path(data).exists():
            raise ConfigError(f"there is no file or folder {data!r}, and no such data on the Hub ({why})") from error
        raise ConfigError(
            f"{data} cannot be read as data ({why}); expected a table with names of columns in UTF-8, or a folder of "
            "files of one kind"
        ) from error
    finally:
        datasets.logging.set_verbosity(before)


def _loaded(datasets: Any, data: str) -> Any:
    path = Path(data)
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise ConfigError(f"expected a file that ends in one of {' '.join(BUILDERS)}, got {path.name}")
        if not path.stat().st_size:
            raise ConfigError(f"{data} is empty")
        builder, options = BUILDERS[path.suffix.lower()]
        return datasets.load_dataset(builder, data_files=str(path), **options)
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path))
    if data == DIGITS:
        return _digits(datasets)
    name, _, configuration = data.partition(":")
    if "/" not in name and path.suffix:
        raise ConfigError(f"there is no file {data!r}")
    return datasets.load_dataset(name, configuration or None)


def _digits(datasets: Any) -> Any:
    """Return scikit-learn's handwritten digits, 8 x 8 pixels of 0 to 16, as images of 0 to 255."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError('the digits come with scikit-learn, which is not there: pip install "hap_hf[cli]"') from error
    found = load_digits()
    images = (found.images * 255 / 16).round().astype("uint8")
    return datasets.Dataset.from_dict({"image": list(images), "label": found.target.tolist()})


def column(rows: Any, wanted: str | None, names: tuple[str, ...], what: str) -> str:
    """Return the name of a column.

    Args:
        rows: Rows of a dataset.
        wanted: The name that the user gave, if any.
        names: Names that such a column usually has.
        what: What it holds, which is also the name of its flag.

    Returns:
        The name.

    Raises:
        ConfigError: If there is no such column.
    """
    known = list(rows.column_names)
    found = next((name for name in ([wanted] if wanted else names) if name in known), None)
    if found is None:
        tried = repr(wanted) if wanted else " or ".join(map(repr, names))
        raise ConfigError(f"the data has no column {tried}, only {known}; name it by --{what}-column")
    return found
