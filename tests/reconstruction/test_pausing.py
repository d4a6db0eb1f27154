"""Forward passes that stop on the way and go on later."""

import contextvars
import threading

import pytest

from hap_hf.reconstruction.pausing import PausedForward


def counting(upto, log):
    def run():
        for i in range(upto):
            log.append((i, PausedForward.running().pause(i)))

    return PausedForward(run)


def test_two_passes_go_on_in_turns_and_get_their_own_answers():
    logs = [], []
    passes = [counting(3, log) for log in logs]
    said = [[p.advance() for p in passes]]
    said += [[p.advance(answer + 10 * number) for number, p in enumerate(passes)] for answer in range(3)]
    assert said == [[0, 0], [1, 1], [2, 2], [None, None]]
    assert logs[0] == [(0, 0), (1, 1), (2, 2)]
    assert logs[1] == [(0, 10), (1, 11), (2, 12)]
    assert all(p.finished for p in passes)


def test_an_error_in_the_pass_is_raised_where_it_is_driven():
    def fail():
        PausedForward.running().pause("first")
        raise ValueError("in the model")

    forward = PausedForward(fail)
    assert forward.advance() == "first"
    with pytest.raises(ValueError, match="in the model"):
        forward.advance()


def test_a_closed_pass_ends_where_it_stands_and_cleans_up():
    log, before = [], threading.active_count()

    def run():
        try:
            PausedForward.running().pause(1)
            log.append("went on")
        except Exception:  # as of a model that catches whatever goes wrong
            log.append("caught")
        finally:
            log.append("cleaned up")

    forward, unstarted = PausedForward(run), PausedForward(run)
    forward.advance()
    forward.close()
    unstarted.close()
    assert log == ["cleaned up"]
    assert threading.active_count() == before


def test_a_pass_sees_the_context_in_which_it_was_made():
    setting = contextvars.ContextVar("setting", default="none")
    setting.set("of the caller")
    seen = []
    PausedForward(lambda: seen.append(setting.get())).advance()
    assert seen == ["of the caller"]
    assert PausedForward.running() is None
