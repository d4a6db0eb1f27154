"""Numbers of a report in words."""

from hap_hf.report.size import ModelSize


def counts(units: int, kept: int, implanted: int) -> str:
    """Return units before and after, as in ``12 -> 7 (+2 implants)``."""
    implants = f" (+{implanted:,} implant{'s' if implanted > 1 else ''})" if implanted else ""
    return f"{units:,} -> {kept:,}{implants}"


def size_cells(before: ModelSize, after: ModelSize) -> tuple[str, str]:
    """Return the parameters and the multiply-accumulates left, with their shares."""
    return (
        f"{_short(after.params)}{_percent(after.params, before.params)}",
        f"{_short(after.macs)}{_percent(after.macs, before.macs)}",
    )


def exact(before: float, after: float) -> str:
    """Return a number before and after, with the share that is left."""
    return f"{before:,.0f} -> {after:,.0f}{_percent(after, before)}"


def one_number(before: float, after: float) -> str:
    """Return a number before and after in short, with the share that is left."""
    return f"{_short(before)} -> {_short(after)}{_percent(after, before)}"


def share(part: float, whole: float) -> float | None:
    """Return a part as a share of the whole, None where there is none."""
    return part / whole if whole else None


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {letter}"
    return f"{value:,.0f}"


def _percent(part: float, whole: float) -> str:
    return f" ({part / whole:.1%})" if whole else ""
