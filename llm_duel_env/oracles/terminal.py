"""A person's keys: single ones where there is a terminal, the first letter of a line elsewhere."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

try:
    import termios
    import tty
except ImportError:  # not POSIX: lines only
    termios = tty = None  # type: ignore[assignment]

_ARROWS = {"\x1b[D": "left", "\x1b[C": "right", "\x1bOD": "left", "\x1bOC": "right"}


class Stopped(Exception):  # noqa: N818 (asked for, no error)
    """The person wants to stop: Ctrl-C, or the end of the input."""


def read_key(source: TextIO) -> str:
    """One key, or one line without its end where `source` is no terminal; arrow keys are "left" and "right".

    Raises:
        Stopped: Ctrl-C, SIGTERM or the end of the input.
    """
    with _signals_stop():
        if termios is None or not source.isatty():
            line = source.readline()
            if not line:
                raise Stopped
            return line.strip()
        number = source.fileno()
        before = termios.tcgetattr(number)
        try:
            tty.setcbreak(number)  # keys come at once; Ctrl-C still is a signal
            pressed = os.read(number, 16).decode("utf-8", "replace")
        finally:
            termios.tcsetattr(number, termios.TCSADRAIN, before)
    if pressed in ("", "\x04"):
        raise Stopped
    return _ARROWS.get(pressed, pressed[:1])


@contextmanager
def _signals_stop() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM end a read at once, as `Stopped`; a run otherwise finishes its round first,
    which here would mean waiting for a person who has left."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread take signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters, but for line ends and tabs, are shown as escapes.

    >>> printable("a\\x1b[2Jb\\n")
    'a\\\\x1b[2Jb\\n'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)


def standard_input() -> TextIO:
    """Where a person's keys come from."""
    return sys.stdin
