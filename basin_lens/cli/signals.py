"""SIGTERM and SIGHUP while a command runs: it ends in order."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class EndedError(BaseException):
    """Somebody asked this process to end; no error that a command could answer."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def ends_in_order() -> Iterator[None]:
    """What SIGTERM and SIGHUP end is cleared away as after Ctrl-C. A signal that is ignored (nohup) stays so."""
    taken: list[int] = []

    def end(number: int, _: object) -> None:
        for one in taken:
            signal.signal(one, signal.SIG_IGN)  # the clearing is not to be disturbed
        raise EndedError(number)

    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # not every system has both
    try:
        for number in known if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) == signal.SIG_DFL:
                taken.append(number)
                signal.signal(number, end)
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
