"""The report of a model's last pruning, for as long as the model is in memory."""

from weakref import WeakKeyDictionary

from torch import nn

from hap_hf.report.report import PruningReport

_LAST: "WeakKeyDictionary[nn.Module, PruningReport]" = WeakKeyDictionary()


def note_report(model: nn.Module, report: PruningReport) -> None:
    """Remember the report of a model that was just pruned.

    Args:
        model: The model.
        report: Its report.
    """
    _LAST[model] = report


def last_report(model: nn.Module) -> PruningReport | None:
    """Return the report of a model's last pruning in this process, None where there was none.

    Args:
        model: Any model.

    Returns:
        The report.
    """
    return _LAST.get(model)
