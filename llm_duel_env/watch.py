"""That no rank of a run is lost unnoticed, and none waits for a lost one."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from torch import distributed

from llm_duel_env.ranks import meet, rank, world

BEAT = 1.0
"""Seconds between two signs of life of a rank."""
SILENCE = 60.0
"""Seconds without a sign of life after which a rank counts as lost; the environment variable LLM_DUEL_SILENCE sets
another number."""
LOST = 70
"""Exit status of a rank that ends because another one is lost."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Within the block every rank shows that it lives and looks whether the others do, from a thread of its own.

    A rank that fails tells the others why, and one that is silent for too long (killed, stopped, its machine gone) is
    missed: the others then say so and end with status `LOST`, also where they wait for it inside a collective
    operation.
    """
    if world() == 1:
        yield
        return
    watch = _Watch()
    try:
        yield
        watch.leave()
    except BaseException as error:
        watch.fail(error)
        raise


class _Watch:
    """Signs of life in the store that the ranks met at.

    The store is kept by one process, a rank or the launcher, and a call waits for its answer without a limit. One
    thread alone therefore talks to it; another looks whether that one still gets answers, and nobody waits for either.
    """

    def __init__(self) -> None:
        # A connection of its own: the group's may be waiting inside a collective operation.
        group: Any = distributed.distributed_c10d
        self.store = group._get_default_store().clone()
        self.silence = float(os.environ.get("LLM_DUEL_SILENCE", SILENCE))
        self.over = threading.Event()
        self.failure = ""
        self.awake = self.answered = 0.0
        """Seconds that this process has run, now and when the store last answered."""
        self.threads = [threading.Thread(target=work, daemon=True, name="watch") for work in (self._talk, self._look)]
        for thread in self.threads:
            thread.start()

    def fail(self, error: BaseException) -> None:
        """Tells the others, as far as the store still answers, that this rank is about to end, and why."""
        self.failure = "".join(traceback.format_exception_only(error)).strip()
        self._stop()

    def leave(self) -> None:
        """Waits until all ranks are through, so that none misses one that has merely finished first."""
        meet()
        self._stop()

    def _stop(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(timeout=2 * BEAT)

    def _look(self) -> None:
        last = time.monotonic()
        while not self.over.wait(BEAT):
            now = time.monotonic()
            # Time in which this process was itself stopped does not count: nobody's answer could have come in.
            self.awake += min(now - last, 2 * BEAT)
            last = now
            if self.awake - self.answered > self.silence:
                keeper = "(rank 0 or the launcher keeps it)"
                self._end(f"the ranks' meeting place {keeper} has given no answer for {self.silence:.0f} s")

    def _talk(self) -> None:
        seen = {number: ("", 0.0) for number in range(world()) if number != rank()}
        beats = 0
        while not self.over.wait(BEAT):
            beats += 1
            try:
                self._exchange(str(beats), seen)
            except (RuntimeError, ConnectionError) as error:  # the store is gone with the process that kept it
                self._end(f"the ranks' meeting place is gone ({error})")
            self.answered = self.awake
        if self.failure:
            with contextlib.suppress(Exception):
                self.store.set("llm-duel/failed", f"rank {rank()} failed: {self.failure}")

    def _exchange(self, own: str, seen: dict[int, tuple[str, float]]) -> None:
        """Shows this rank's sign of life, and looks for the others': the last one, and when it was new."""
        self.store.set(f"llm-duel/beat/{rank()}", own)
        if self.store.check(["llm-duel/failed"]):
            self._end(self.store.get("llm-duel/failed").decode())
        for number, (beat, when) in seen.items():
            key = f"llm-duel/beat/{number}"
            found = self.store.get(key).decode() if self.store.check([key]) else ""
            if found != beat:
                seen[number] = (found, self.awake)
            elif self.awake - when > self.silence:
                self._end(f"rank {number} has given no sign of life for {self.silence:.0f} s")

    def _end(self, why: str) -> None:
        """Ends this process, wherever its main thread is waiting."""
        if self.over.is_set():
            return
        print(f"rank {rank()} of {world()} ends: {why}. It was here:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(LOST)
