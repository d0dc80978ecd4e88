"""That no rank of a run is lost unnoticed, and none waits for a lost one."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
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
    except BaseException as error:
        watch.fail(error)
        raise
    watch.leave()


class _Watch:
    """Signs of life in the store that the ranks met at."""

    def __init__(self) -> None:
        # A connection of its own: the group's may be waiting inside a collective operation.
        group: Any = distributed.distributed_c10d
        self.store = group._get_default_store().clone()
        self.silence = float(os.environ.get("LLM_DUEL_SILENCE", SILENCE))
        self.over = threading.Event()
        self.beats = 0
        self.thread = threading.Thread(target=self._watch, daemon=True, name="watch")
        self.thread.start()

    def fail(self, error: BaseException) -> None:
        """Tells the others that this rank is about to end, and why."""
        self.over.set()
        self.thread.join()
        told = "".join(traceback.format_exception_only(error)).strip()
        with contextlib.suppress(Exception):
            self.store.set("llm-duel/failed", f"rank {rank()} failed: {told}")

    def leave(self) -> None:
        """Waits until all ranks are through, so that none misses one that has merely finished first."""
        meet()
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        seen = {number: ("", 0.0) for number in range(world()) if number != rank()}
        waited = 0.0
        while not self.over.wait(BEAT):
            waited += BEAT
            try:
                self.beats += 1
                self.store.set(f"llm-duel/beat/{rank()}", str(self.beats))
                if self.store.check(["llm-duel/failed"]):
                    self._end(self.store.get("llm-duel/failed").decode())
                for number, (beat, when) in seen.items():
                    key = f"llm-duel/beat/{number}"
                    now = self.store.get(key).decode() if self.store.check([key]) else ""
                    if now != beat:
                        seen[number] = (now, waited)
                    elif waited - when > self.silence:
                        self._end(f"rank {number} has given no sign of life for {self.silence:.0f} s")
            except (RuntimeError, ConnectionError) as error:  # the store is gone with the process that kept it
                self._end(f"the ranks' meeting place is gone ({error})")

    def _end(self, why: str) -> None:
        """Ends this process, wherever its main thread is waiting."""
        if self.over.is_set():
            return
        print(f"rank {rank()} of {world()} ends: {why}. It was here:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(LOST)
