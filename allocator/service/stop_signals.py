"""Being told to stop: a signal becomes an exception where the work can be given back, and waits where it cannot."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopping(BaseException):
    """The process was told to stop.

    No ``Exception``: what reads a model makes an error of its own of each of those, and its job would have failed.
    """


class StopSignals:
    """Raises ``Stopping`` in the main thread when a signal comes; once, as another would interrupt the giving back."""

    def __init__(self) -> None:
        self._waits = False
        self._told: int | None = None

    def listen(self) -> None:
        """Takes the signals of the process."""
        for number in SIGNALS:
            signal.signal(number, self._take)

    @contextmanager
    def later(self) -> Iterator[None]:
        """Lets a signal wait until the end of the body, or of the next ``at_once`` in it that begins.

        Raises:
            Stopping: At the end, if a signal came.
        """
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        self._raise_if_told()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside of ``later``: a signal ends the body where it comes, and at its beginning if one has come already.

        Raises:
            Stopping: When a signal comes.
        """
        self._waits = False
        try:
            self._raise_if_told()
            yield
        finally:
            self._waits = True

    def _take(self, number: int, _frame: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        self._told = number
        if not self._waits:
            self._raise_if_told()

    def _raise_if_told(self) -> None:
        if self._told is not None:
            number, self._told = self._told, None
            msg = f"told to stop by signal {number}"
            raise Stopping(msg)
