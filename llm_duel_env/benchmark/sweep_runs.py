"""What the sweeps on this machine and on a Ray cluster share: which runs are over, how a worker plays one, what became
of it, and how they are asked to stop. Runs come to workers as JSON, answers go back as text.
"""

from __future__ import annotations

import json
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llm_duel_env.benchmark.heartbeat import Heartbeat, Pulse
from llm_duel_env.benchmark.result_fields import read_result
from llm_duel_env.benchmark.run_config import RunConfig, fingerprint_of
from llm_duel_env.benchmark.run_folder import RunFolder, last_queries
from llm_duel_env.benchmark.runner import check_folder

THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
"""One thread per worker: torch's spinning threads collapse when workers share cores."""

STOPPED = "stopped"
"""A worker's answer where its run was asked to stop and has saved its state; "" is that of a run that is over, and all
else says what went wrong."""


@dataclass
class Sweep:
    """What became of the runs."""

    finished: list[str] = field(default_factory=list)
    """Folders of the runs that are over, those of earlier sweeps included."""
    broken: dict[str, str] = field(default_factory=dict)
    """Folder -> what went wrong."""
    stopped: bool = False
    """True where Ctrl-C ended the sweep; the same command goes on with it."""

    def note(self, folder: str, said: str, heartbeat: Heartbeat, *, asked: bool) -> None:
        """Takes a worker's answer; `asked` says whether the sweep was told to stop, which explains a stopped run."""
        if said == STOPPED:
            said = "its worker was stopped from outside; its state is saved, and the same command goes on with it"
            if asked:
                return
        if not said:
            self.finished.append(folder)
        else:
            self.broken[folder] = said
            heartbeat.message(f"broken: {folder}: {said}")


def unsettled(runs: Sequence[RunConfig], outcome: Sweep) -> list[RunConfig]:
    """The runs that are not over. The others are noted in `outcome`: as finished, or as broken where they were played
    with other settings or on other weights."""
    made_of: dict[str, str] = {}  # fingerprints of the tasks
    return [run for run in runs if not _settled(run, outcome, made_of)]


def _settled(run: RunConfig, outcome: Sweep, made_of: dict[str, str]) -> bool:
    folder = RunFolder(run.folder)
    if not folder.result.exists():
        return False
    try:
        check_folder(run, folder, resume=True)
        read_result(folder.result)
        task = json.dumps([run.env, run.env_kwargs], sort_keys=True)
        if task not in made_of:
            made_of[task] = fingerprint_of(run.env, run.env_kwargs)
        folder.check_fingerprint(made_of[task])
        outcome.finished.append(run.folder)
    except ValueError as error:  # damaged; or a recipe, a suite or a model has changed since: it is not this run's
        outcome.broken[run.folder] = f"{error}; move the folder away, or choose another"
    return True


def heartbeat_of(runs: Sequence[RunConfig], outcome: Sweep, say: Any) -> Heartbeat:
    """A sign of life over all runs, read from their metrics files."""
    return Heartbeat(f"{len(runs)} runs", sum(run.budget for run in runs), lambda: _pulse(runs, outcome), say=say)


def _pulse(runs: Sequence[RunConfig], outcome: Sweep) -> Pulse:
    over = set(outcome.finished)
    done = sum(run.budget if run.folder in over else last_queries(RunFolder(run.folder).metrics) for run in runs)
    broken = f", {len(outcome.broken)} broken" if outcome.broken else ""
    return Pulse(done, f"{len(over)}/{len(runs)} runs over{broken}")


def play(told: str) -> str:
    """Plays or resumes one run in a worker, its lines of progress going to ``log.txt`` in its folder.

    Args:
        told: a `RunConfig` as JSON.

    Returns:
        "", `STOPPED`, or what went wrong.
    """
    from llm_duel_env.benchmark.runner import RunInterrupted, run

    config = RunConfig(**json.loads(told))
    folder = RunFolder(config.folder)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return str(error)
    try:
        with (folder.path / "log.txt").open("a") as log:
            run(config, resume=folder.begun, say=partial(print, file=log, flush=True))
        return ""
    except (RunInterrupted, KeyboardInterrupt):
        return STOPPED
    except Exception as error:
        return _explain(error, folder)


def _explain(error: Exception, folder: RunFolder) -> str:
    with (folder.path / "log.txt").open("a") as log:
        traceback.print_exception(error, file=log)
    return f"{type(error).__name__}: {error} (see {folder.path / 'log.txt'})"


class StopRequests:
    """Takes Ctrl-C and SIGTERM once, so that workers can finish their round, save, and leave; a second one raises
    KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False
        """Whether one came."""
        self.terminal = False
        """Whether it came from the terminal, which sends it to all processes of the command."""
        self._since = 0.0

    def __enter__(self) -> StopRequests:
        self._before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        for number in self._before:
            signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.monotonic() - self._since if self.asked else 0.0

    def _ask(self, number: int, _frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self._since, self.terminal = True, time.monotonic(), number == signal.SIGINT
