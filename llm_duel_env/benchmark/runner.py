"""One run: an agent, an environment, a seed and a budget of oracle queries. The loop stands in `run`."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from llm_duel_env.benchmark.heartbeat import Heartbeat, Pulse
from llm_duel_env.benchmark.launcher import launched
from llm_duel_env.benchmark.result_fields import read_result
from llm_duel_env.benchmark.run_config import RunConfig, check
from llm_duel_env.benchmark.run_folder import RunFolder
from llm_duel_env.benchmark.settings import typed
from llm_duel_env.oracles.base import OracleStopped

if TYPE_CHECKING:
    from llm_duel_env.benchmark.session import Session

MAY_DIFFER = ("folder", "checkpoint_every", "heartbeat")
"""Fields that a resumed run may change: they bear on no result."""


class RunInterrupted(Exception):  # noqa: N818  asked for, no error
    """The run was asked to stop; its state is saved in `folder`."""

    def __init__(self, folder: Path, queries: int) -> None:
        super().__init__(f"stopped after {queries} queries, state saved in {folder}")
        self.folder = folder


def run(config: RunConfig, *, resume: bool = False, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Plays one run to its end and returns its result (also written to ``result.json``).

    Args:
        config: what to run.
        resume: go on where the run in `config.folder` stopped. Labels bought after its last checkpoint are replayed
            from the ledger, not bought again. Without it the folder must not hold a run.
        say: takes lines of progress; by default standard output, a progress bar in a terminal.

    Raises:
        ValueError: the configuration cannot be run, or is not that of the run to be resumed; nothing was spent.
        RunInterrupted: SIGINT or SIGTERM came; the round was finished and the state saved.
        OracleError: the oracle gave no usable answer; the labels bought before it are in the ledger.
    """
    if launched():
        from llm_duel_env import ranks, watch  # which bring torch

        ranks.join(ranks.device())
        with watch.watched():
            try:
                return _run(config, resume, say if ranks.rank() == 0 else _silent)
            except RunInterrupted as stop:  # all ranks stop together: none of them has failed
                interrupted = stop
        raise interrupted
    return _run(config, resume, say)


def _run(config: RunConfig, resume: bool, say: Callable[[str], None] | None) -> dict[str, Any]:
    folder = RunFolder(config.folder)
    _on_first(lambda: check_folder(config, folder, resume=resume))
    if folder.result.exists():
        result = read_result(folder.result)
        (say or print)(f"{folder.path}: already {result['status']}")
        return result
    name = f"{config.label or config.agent} on {config.env}, seed {config.seed}"
    heartbeat = Heartbeat(name, config.budget, lambda: Pulse(0, "loading"), seconds=config.heartbeat, say=say)
    with stop_signals() as stop, heartbeat:
        from llm_duel_env.benchmark.session import Session  # brings torch and TensorBoard, which a help text must not

        with Session(config, folder) as session:
            heartbeat.pulse = session.pulse
            _on_first(lambda: _begin(config, folder, session.fingerprint, resume))
            with _long_lived():
                return _play(session, heartbeat, stop)


def _begin(config: RunConfig, folder: RunFolder, fingerprint: str, resume: bool) -> None:
    if not folder.begun:  # only now: what cannot be built leaves nothing behind
        folder.create(dataclasses.asdict(config), fingerprint)
    folder.add_command(command_line(config, resume=resume))


def _on_first(work: Callable[[], None]) -> None:
    """Does something on rank 0 while the others wait."""
    if not launched():
        work()
        return
    from llm_duel_env import ranks

    if ranks.rank() == 0:
        work()
    ranks.meet()


@contextlib.contextmanager
def _long_lived() -> Iterator[None]:
    """What is there lives as long as the run: Python's collector need not look through it again and again while rounds
    make small objects, which is felt where rounds are short."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _silent(line: str) -> None:
    """Takes the lines of ranks that nobody watches."""


def _play(session: Session, heartbeat: Heartbeat, stop: threading.Event) -> dict[str, Any]:
    folder = session.folder.path
    for line in session.start():
        heartbeat.message(line)
    heartbeat.restart()  # `start` has put an earlier sitting's queries back
    try:
        while not session.over:
            session.play_round()
            session.evaluate_if_due()
            if session.agreed(stop.is_set()):
                session.save()
                raise RunInterrupted(folder, session.queries)
            session.save_if_due()
    except OracleStopped as stopped:  # what was bought in this sitting is replayed from the ledger
        raise RunInterrupted(folder, session.queries) from stopped
    except ValueError as error:  # not the user's to mend, unlike one raised before the run began
        raise RuntimeError(f"{folder} broke after {session.queries} queries: {error}") from error
    return session.finish()


def command_line(config: RunConfig, *, resume: bool) -> str:
    """The shell command that plays this run, or goes on with it; what it is called in tables is no part of it."""
    if resume:
        return shlex.join(["llm-duel", "run", "--resume", config.folder])
    names = ("agent", "env", "seed", "budget", "batch", "eval_every", "eval_prompts", "checkpoint_every", "folder")
    words = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]
    for option, values in (("--set", config.overrides), ("--env-set", config.env_kwargs)):
        words += [option, *typed(values)] if values else []
    return shlex.join(["llm-duel", "run", *words, "--no-recipe"])  # the recipe is among the overrides


def check_folder(config: RunConfig, folder: RunFolder, *, resume: bool) -> None:
    """Checks that the folder is free, or, to resume, that it holds this very run.

    Raises:
        ValueError: the folder holds a run and `resume` is off, or holds another run, or none; says which.
    """
    # As JSON says it, so that a tuple and a list of the same values are the same.
    wanted = _as_json(dataclasses.asdict(config))
    if not resume:
        if folder.begun:
            raise ValueError(f"{folder.path} already holds a run: go on with --resume {folder.path}, or choose another")
        if folder.ledger.exists() or folder.metrics.exists():
            raise ValueError(f"{folder.path} holds a ledger or metrics but no config.json: choose another folder")
        check(config)
        return
    stored = _as_json(dataclasses.asdict(RunConfig.read(folder.path)))
    differing = [name for name in wanted if name not in MAY_DIFFER and wanted[name] != stored[name]]
    if differing:
        told = "; ".join(f"{name}: it has {stored[name]!r}, asked for {wanted[name]!r}" for name in differing)
        raise ValueError(f"the run in {folder.path} is another one ({told})")


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that a step is never cut in half. A second signal stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python lets only the main thread take signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(f"a run's settings must be plain data (numbers, text, lists, mappings): {error}") from None
