"""Many runs on this machine: worker processes that each take one run after the other.

A worker imports torch once and then plays many runs. A run that fails is reported and the rest goes on; a worker that
dies takes only its present run with it. Runs that are finished are skipped, begun ones are resumed. Where memory is
short of what the largest worker so far has used, fewer play at once; one always does.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

from llm_duel_env.benchmark.heartbeat import Heartbeat
from llm_duel_env.benchmark.memory_watch import MemoryWatch
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.sweep_runs import STOPPED, THREADS, StopRequests, Sweep, heartbeat_of, play, unsettled

GRACE = 5.0
"""Seconds after a terminal's Ctrl-C in which the workers are left to have heard it themselves."""


class _Worker:
    """One process and the run it is playing."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked torch may hang
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,))
        self.process.start()
        theirs.close()
        self.run: RunConfig | None = None

    def play(self, run: RunConfig) -> None:
        self.run = run
        self.connection.send_bytes(json.dumps(dataclasses.asdict(run)).encode())

    def answer(self) -> str:
        """What the worker says of its run, which is thereby no longer its own; see `sweep_runs.play`."""
        self.run = None
        try:
            said = self.connection.recv_bytes().decode()
        except (EOFError, OSError):
            self.process.join()
            return f"the worker process died (exit code {self.process.exitcode})"
        if said == STOPPED:
            self.process.join()  # it leaves after this answer, and must not be given another run
        return said

    def leave(self) -> None:
        self.connection.close()  # the end of its line tells a worker to leave
        self.process.join()


def sweep(runs: Sequence[RunConfig], *, jobs: int, say: Callable[[str], None] | None = None) -> Sweep:
    """Plays `runs` in `jobs` processes and says how far they are.

    Args:
        runs: each with a folder of its own.
        jobs: worker processes, at least 1.
        say: takes lines of progress; by default standard output, a progress bar in a terminal.

    Raises:
        ValueError: `jobs` is not positive.
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    outcome = Sweep()
    waiting = deque(unsettled(runs, outcome))
    heartbeat = heartbeat_of(runs, outcome, say)
    pool = _Pool(jobs, heartbeat)
    with heartbeat, StopRequests() as stop:
        for folder, reason in outcome.broken.items():
            heartbeat.message(f"broken: {folder}: {reason}")
        try:
            pool.hand_out(waiting)
            while busy := pool.busy():
                ready = wait([worker.connection for worker in busy], timeout=1.0)
                for worker in busy:
                    pool.memory.look(worker.process.pid)
                for worker in [w for w in busy if w.connection in ready]:
                    assert worker.run is not None
                    folder = worker.run.folder
                    outcome.note(folder, worker.answer(), heartbeat, asked=stop.asked)
                if not stop.asked:
                    pool.hand_out(waiting)
                elif not stop.terminal or stop.seconds > GRACE:
                    pool.stop()
        finally:
            for worker in pool.workers:
                worker.connection.close()
            for worker in pool.workers:
                worker.process.join()
        outcome.stopped = stop.asked
    return outcome


class _Pool:
    """The workers, at most `jobs` of them and as many as there is memory for."""

    def __init__(self, jobs: int, heartbeat: Heartbeat) -> None:
        self.jobs, self.heartbeat = jobs, heartbeat
        self.workers: list[_Worker] = []
        self.memory = MemoryWatch()
        self._short = self._told = False

    def busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.run]

    def hand_out(self, waiting: deque[RunConfig]) -> None:
        """Gives runs to workers that have none, and to new ones."""
        self.workers = [worker for worker in self.workers if worker.run or worker.process.is_alive()]
        for worker in [w for w in self.workers if not w.run and waiting]:
            if self._room(worker.process.pid):
                worker.play(waiting.popleft())
            else:  # what it holds is of use to the others
                worker.leave()
                self.workers.remove(worker)
        while waiting and len(self.workers) < self.jobs and self._room(None):
            self.workers.append(_start())
            self.workers[-1].play(waiting.popleft())

    def _room(self, pid: int | None) -> bool:
        short = self.memory.short(pid) if self.busy() else ""
        if short and not self._short:
            self.heartbeat.message(f"{short}: {len(self.busy())} of {self.jobs} play until there is room")
        if short or pid is None:
            self._short = bool(short)  # said once, until there was room for one more
        return not short

    def stop(self) -> None:
        """Asks the workers to save and leave, once: a second signal would stop them at once."""
        if self._told:
            return
        self._told = True
        for worker in self.busy():
            if worker.process.is_alive():
                worker.process.terminate()


def _start() -> _Worker:
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(THREADS)  # read when the child imports torch
    try:
        return _Worker()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(connection: Connection) -> None:
    """A worker's life."""
    answer = ""
    while answer != STOPPED:
        try:
            told = connection.recv_bytes()
        except (EOFError, KeyboardInterrupt, OSError):
            return
        answer = play(told.decode())
        connection.send_bytes(answer.encode())


def default_jobs() -> int:
    """Cores of this machine that we may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
