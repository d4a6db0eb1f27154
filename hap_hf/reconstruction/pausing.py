"""Forward passes that stop on the way and go on later, so that many batches reach a layer together."""

import contextvars
import threading
from collections.abc import Callable
from typing import Any, Self

_here = threading.local()


class _Closed(BaseException):
    """Ends a forward pass that is no longer wanted; no handler of the model's own code may catch it."""


class PausedForward:
    """A forward pass in a thread of its own, of which only one at a time is running.

    A model's forward is one call that cannot be left and entered again, whatever it consists of. In a thread it can
    wait: a hook calls :meth:`pause`, and whoever drives the pass goes on until it says :meth:`advance`. So all batches
    go through a model side by side, layer by layer, in one forward pass of each.

    Args:
        function: What to run; it needs no arguments. Modes that belong to a thread, such as ``torch.no_grad``, are its
            own to enter.

    Attributes:
        finished: Whether the function has returned.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._said: Any = None
        self._answer: Any = None
        self._error: BaseException | None = None
        self._closing = False
        self.finished = False
        # Context variables, as libraries use them for settings, are those of whoever made this.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), daemon=True)

    @classmethod
    def running(cls) -> Self | None:
        """Return the forward pass in which the caller is, or None outside of one."""
        found = getattr(_here, "forward", None)
        return found if isinstance(found, cls) else None

    def advance(self, answer: Any = None) -> Any:
        """Go on to the next pause.

        Args:
            answer: What the pause returns at which it stands.

        Returns:
            What it pauses with, None where it has finished.
        """
        self._answer = answer
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self._said

    def pause(self, said: Any) -> Any:
        """Wait; to be called from inside the function.

        Args:
            said: What :meth:`advance` returns.

        Returns:
            The answer.
        """
        self._check_wanted()
        self._said = said
        self._stopped.release()
        self._go.acquire()
        self._check_wanted()
        return self._answer

    def close(self) -> None:
        """End the forward pass where it stands."""
        self._closing = True
        if self._thread.ident is not None:
            self._go.release()
            self._thread.join()
        self.finished = True

    def _check_wanted(self) -> None:
        if self._closing:
            raise _Closed

    def _run(self) -> None:
        _here.forward = self
        try:
            self._function()
        except _Closed:
            pass
        except BaseException as error:  # whatever it is belongs to whoever drives this
            self._error = error
        finally:
            self._said, self.finished = None, True
            self._stopped.release()
