"""Many runs on this machine: worker processes that each take one run after the other.

A worker imports torch once and then plays many runs. A run that fails is reported and the rest goes on; a worker that
dies takes only its present run with it. Runs that are finished are skipped, begun ones are resumed.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from llm_duel_env.benchmark.heartbeat import Heartbeat, Pulse
from llm_duel_env.benchmark.run_config import RunConfig, fingerprint_of
from llm_duel_env.benchmark.run_folder import RunFolder, last_queries
from llm_duel_env.benchmark.runner import check_folder

THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
"""One thread per worker: torch's spinning threads collapse when workers share cores."""


@dataclass
class Sweep:
    """What became of the runs."""

    finished: list[str] = field(default_factory=list)
    """Folders of the runs that are over, those of earlier sweeps included."""
    broken: dict[str, str] = field(default_factory=dict)
    """Folder -> what went wrong."""
    stopped: bool = False
    """True where Ctrl-C ended the sweep; the same command goes on with it."""


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
        """What the worker says of its run: "" when it is over, "stopped", else what went wrong."""
        try:
            return self.connection.recv_bytes().decode()
        except (EOFError, OSError):
            self.process.join()
            return f"the worker process died (exit code {self.process.exitcode})"


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
    made_of: dict[str, str] = {}
    waiting = deque(run for run in runs if not _settled(run, outcome, made_of))
    watch = _Watch(runs, outcome)
    heartbeat = Heartbeat(f"{len(runs)} runs", sum(run.budget for run in runs), watch.pulse, say=say)
    with heartbeat, _StopRequests() as stop:
        for folder, reason in outcome.broken.items():
            heartbeat.message(f"broken: {folder}: {reason}")
        workers = _start(min(jobs, len(waiting)))
        try:
            for worker in workers:
                worker.play(waiting.popleft())
            while busy := [worker for worker in workers if worker.run]:
                ready = wait([worker.connection for worker in busy], timeout=1.0)
                for worker in [w for w in busy if w.connection in ready]:
                    _note(worker, outcome, heartbeat, asked=stop.asked)
                    if stop.asked or not waiting:
                        continue
                    if not worker.process.is_alive():
                        workers.remove(worker)
                        workers += _start(1)
                        worker = workers[-1]
                    worker.play(waiting.popleft())
                if stop.asked:
                    stop.pass_on(workers)
        finally:
            for worker in workers:
                worker.connection.close()  # the end of its line tells a worker to leave
            for worker in workers:
                worker.process.join()
        outcome.stopped = stop.asked
    return outcome


def _settled(run: RunConfig, outcome: Sweep, made_of: dict[str, str]) -> bool:
    """Whether a run is over; noted in `outcome` as finished, or as broken where it was played with other settings or on
    other weights. `made_of` remembers the tasks' fingerprints."""
    folder = RunFolder(run.folder)
    if not folder.result.exists():
        return False
    try:
        check_folder(run, folder, resume=True)
        task = json.dumps([run.env, run.env_kwargs], sort_keys=True)
        if task not in made_of:
            made_of[task] = fingerprint_of(run.env, run.env_kwargs)
        folder.check_fingerprint(made_of[task])
        outcome.finished.append(run.folder)
    except ValueError as error:  # a recipe, a suite or a model has changed since: its result is not this run's
        outcome.broken[run.folder] = f"{error}; move the folder away, or choose another"
    return True


def _start(count: int) -> list[_Worker]:
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(THREADS)  # read when the child imports torch
    try:
        return [_Worker() for _ in range(count)]
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _note(worker: _Worker, outcome: Sweep, heartbeat: Heartbeat, *, asked: bool) -> None:
    """Takes a worker's answer; `asked` says whether the sweep was told to stop, which explains a stopped run."""
    assert worker.run is not None
    folder, said = worker.run.folder, worker.answer()
    worker.run = None
    if said == "stopped":
        worker.process.join()  # it leaves after this answer, and must not be given another run
        said = "its worker was stopped from outside; its state is saved, and the same command goes on with it"
        if asked:
            return
    if not said:
        outcome.finished.append(folder)
    else:
        outcome.broken[folder] = said
        heartbeat.message(f"broken: {folder}: {said}")


def _work(connection: Connection) -> None:
    """A worker's life: runs come as JSON, answers go as text."""
    from llm_duel_env.benchmark.runner import RunInterrupted, run

    while True:
        try:
            told = connection.recv_bytes()
        except (EOFError, KeyboardInterrupt, OSError):
            return
        config = RunConfig(**json.loads(told))
        folder = RunFolder(config.folder)
        folder.path.mkdir(parents=True, exist_ok=True)
        try:
            with (folder.path / "log.txt").open("a") as log:
                run(config, resume=folder.begun, say=partial(print, file=log, flush=True))
            answer = ""
        except (RunInterrupted, KeyboardInterrupt):
            answer = "stopped"
        except Exception as error:
            answer = _explain(error, folder)
        connection.send_bytes(answer.encode())
        if answer == "stopped":
            return


def _explain(error: Exception, folder: RunFolder) -> str:
    import traceback

    with (folder.path / "log.txt").open("a") as log:
        traceback.print_exception(error, file=log)
    return f"{type(error).__name__}: {error} (see {folder.path / 'log.txt'})"


class _Watch:
    """Queries over all runs, read from their metrics files."""

    def __init__(self, runs: Sequence[RunConfig], outcome: Sweep) -> None:
        self.runs, self.outcome = runs, outcome

    def pulse(self) -> Pulse:
        over = set(self.outcome.finished)
        done = sum(r.budget if r.folder in over else last_queries(RunFolder(r.folder).metrics) for r in self.runs)
        broken = f", {len(self.outcome.broken)} broken" if self.outcome.broken else ""
        return Pulse(done, f"{len(over)}/{len(self.runs)} runs over{broken}")


class _StopRequests:
    """Takes Ctrl-C and SIGTERM once: workers finish their round, save, and leave."""

    GRACE = 5.0

    def __init__(self) -> None:
        self.asked = False
        self._told = False
        self._since = 0.0

    def __enter__(self) -> _StopRequests:
        self._before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        for number in self._before:
            signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self._since, self._terminal = True, time.monotonic(), number == signal.SIGINT

    def pass_on(self, workers: Sequence[_Worker]) -> None:
        # A terminal's Ctrl-C reaches the workers by itself, and a second one would stop them at once.
        if not self._told and (not self._terminal or time.monotonic() - self._since > self.GRACE):
            self._told = True
            for worker in workers:
                if worker.run and worker.process.is_alive():
                    worker.process.terminate()


def default_jobs() -> int:
    """Cores of this machine that we may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
