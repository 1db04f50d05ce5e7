"""For every test: signals do what they do in a terminal, whatever started pytest."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    # nohup ignores SIGHUP, a shell's background job SIGINT; so would the processes that tests send them to.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
