"""A sign of life from a long job: a progress bar in a terminal, elsewhere a line at least every half minute."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@dataclass(frozen=True)
class Pulse:
    """How far a job is."""

    done: int
    """Queries so far."""
    note: str = ""
    """What else to say: a win rate, how many runs are over."""


class Heartbeat:
    """Watches a job from a thread of its own, so that it speaks while one long step is under way.

    A context manager. `pulse` is called from the thread and must only read.
    """

    def __init__(
        self,
        what: str,
        total: int,
        pulse: Callable[[], Pulse],
        *,
        seconds: float = 30.0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.what, self.total, self.pulse, self.seconds = what, total, pulse, seconds
        self._console = Console(file=sys.stdout)
        self._bar = self._make_bar() if say is None and self._console.is_terminal else None
        self._say = say or (lambda line: print(line, flush=True))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Heartbeat:
        self.restart()
        if self._bar:
            self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._bar:
            self._refresh(self._bar)
            self._bar.stop()
        else:
            self._say(self._line())

    def restart(self) -> None:
        """Rates count from here: what was done in an earlier sitting was not done in this one's time."""
        self._begun, self._from = monotonic(), self.pulse().done

    def message(self, line: str) -> None:
        """Says one line without tearing the bar."""
        if self._bar:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            self._say(line)

    def _make_bar(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
        self._task = bar.add_task(self.what, total=self.total, note="")
        return bar

    def _watch(self) -> None:
        wait = min(self.seconds, 0.5) if self._bar else self.seconds
        while not self._stop.wait(wait):
            if self._bar:
                self._refresh(self._bar)
            else:
                self._say(self._line())

    def _refresh(self, bar: Progress) -> None:
        now = self.pulse()
        bar.update(self._task, completed=now.done, note=now.note)

    def _line(self) -> str:
        now, seconds = self.pulse(), monotonic() - self._begun
        rate = (now.done - self._from) / max(seconds, 1e-9)
        left = f", {(self.total - now.done) / rate:.0f} s left" if 0 < now.done < self.total and rate > 0 else ""
        note = f", {now.note}" if now.note else ""
        return f"{self.what}: {now.done}/{self.total} queries{note}, {rate:.1f} queries/s{left}"
