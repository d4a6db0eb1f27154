"""One bar for a job of several parts."""

import io
import sys

from documented import bert, text_batches
from tqdm.auto import tqdm

from hap_hf import HapConfig, prune
from hap_hf.evidence.progress import job, part


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown_on(screen, monkeypatch):
    """Set inside of a test: pytest puts its own back between a fixture and the test."""
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_a_whole_pruning_is_one_bar(monkeypatch):
    terminal = shown_on(Terminal(), monkeypatch)
    prune(bert(), text_batches(), HapConfig(target_params=0.5))
    shown = terminal.getvalue()
    assert shown.count("\n") == 1  # each bar ends with one
    last = shown.strip().rpartition("\r")[2]
    assert last.startswith("pruning: 100%")
    assert "reconstruction (" in shown
    assert "repair (" in shown


def test_without_a_terminal_there_is_none(monkeypatch):
    pipe = shown_on(io.StringIO(), monkeypatch)
    prune(bert(), text_batches(), HapConfig(target_params=0.5, method="taylor"))
    assert pipe.getvalue() == ""


def test_progress_false_is_heeded(monkeypatch):
    terminal = shown_on(Terminal(), monkeypatch)
    prune(bert(), text_batches(), HapConfig(target_params=0.5, method="taylor", progress=False))
    assert terminal.getvalue() == ""


def test_the_total_takes_parts_to_come_for_as_long_as_the_one_at_hand(monkeypatch):
    bars = []
    shown_on(Terminal(), monkeypatch)
    monkeypatch.setattr("hap_hf.evidence.progress.tqdm", lambda **kwargs: bars.append(tqdm(**kwargs)) or bars[-1])
    with job("all", 3, shown=True):
        totals = []
        for steps in (2, 4):
            with part("some", "batch", steps, shown=True) as tick:
                totals.append(bars[0].total)
                for _ in range(steps):
                    tick()
    assert totals == [6, 2 + 4 * 2]
    assert (bars[0].n, bars[0].total) == (6, 6)  # a part that did not come is not waited for
    assert len(bars) == 1
