"""Many runs on a Ray cluster: each is a task of one CPU on whatever node has one.

Run folders lie on a file system that all nodes see under the same path, and so does the folder that the command is
given in: the tasks work there, so that relative paths mean on every node what they mean here. The package is installed
on all nodes.

Ray repeats nothing (`max_retries=0`). A run that took its worker down, with all the memory of a node, say, would do so
again, and a node that was thought lost may still be writing into the run's folder. It is reported like any broken run,
the rest goes on, and the same command resumes it: exactly, from its checkpoint and its ledger.

What goes to a task is a run as JSON, and text comes back; Ray itself pickles both, and opens ports. A cluster of our
own (`local`) listens on 127.0.0.1 alone, and to those who have its token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_duel_env.benchmark.heartbeat import Heartbeat
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.sweep import default_jobs
from llm_duel_env.benchmark.sweep_runs import STOPPED, THREADS, StopRequests, Sweep, heartbeat_of, play, unsettled
from llm_duel_env.extras import require
from llm_duel_env.tasks.pool_files import WHERE

KNOCK = 5.0
"""Seconds in which an address must take a connection."""
ANSWER = 30.0
"""Seconds in which a cluster there must answer."""
PROBE = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level=40); ray.shutdown()"
LOOPBACK = "127.0.0.1"
OURS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else 127.0.0.1 is replaced by the address outside
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # others on this machine reach its ports too
}
"""What Ray is told for a cluster of our own."""
STORE = 100 * 2**20
"""Bytes of shared memory for the objects of a cluster of our own, which are short texts."""
CLIENT_PORT = 10001
"""Where a cluster's server for clients (ray://) listens if nothing else is said."""


def sweep(
    runs: Sequence[RunConfig],
    *,
    address: str,
    jobs: int | None = None,
    gpus: float = 0.0,
    say: Callable[[str], None] | None = None,
) -> Sweep:
    """Plays `runs` on the cluster at `address` and says how far they are.

    Args:
        runs: each with a folder of its own, on a file system that all nodes see.
        address: ``HOST:PORT``, ``ray://HOST:PORT``, ``auto`` (the cluster that this machine is part of), or ``local``
            (one of our own on this machine, gone afterwards).
        jobs: runs that the cluster is given at once; all where None, of which it plays as many as it has CPUs.
        gpus: of each run: 0, a share of one, or a whole number.
        say: takes lines of progress; by default standard output, a progress bar in a terminal.

    Raises:
        ValueError: `jobs` or `gpus` cannot be.
        MissingExtraError: Ray is not installed.
        ConnectionError: there is no cluster at `address`, or it does not answer; names it.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise ValueError(f"gpus of a run: expected 0, a share of one, or a whole number, got {gpus}")
    outcome = Sweep()
    heartbeat = heartbeat_of(runs, outcome, say)
    with _cluster(address, jobs) as ray:  # before anything else: what cannot be reached says so within seconds
        waiting = deque(unsettled(runs, outcome))
        with heartbeat, StopRequests() as stop:
            for folder, reason in outcome.broken.items():
                heartbeat.message(f"broken: {folder}: {reason}")
            _check_resources(ray, gpus, heartbeat)
            task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_task)
            playing: dict[Any, RunConfig] = {}
            cancelled = False
            while True:
                while waiting and not stop.asked and (jobs is None or len(playing) < jobs):
                    run = waiting.popleft()
                    if said := _make(run.folder):
                        outcome.note(run.folder, said, heartbeat, asked=False)
                        continue
                    playing[task.remote(json.dumps(dataclasses.asdict(run)), os.getcwd())] = run
                if not playing:
                    break
                if stop.asked and not cancelled:
                    cancelled = True
                    for reference in playing:
                        ray.cancel(reference)  # a KeyboardInterrupt over there; what has not begun never does
                ready, _ = ray.wait(list(playing), timeout=1.0)
                for reference in ready:
                    outcome.note(playing.pop(reference).folder, _answer(ray, reference), heartbeat, asked=stop.asked)
            outcome.stopped = stop.asked
    return outcome


def _make(folder: str) -> str:
    """Makes a run's folder here, so that a node that does not see it is known to have another disk; "", or what went
    wrong."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return ""
    except OSError as error:
        return str(error)


def _task(told: str, where: str) -> str:
    """Plays a run on a node; see `sweep_runs.play`."""
    node = socket.gethostname()
    try:
        os.chdir(where)
    except OSError as error:
        return f"node {node} does not see the folder that the command was given in: {error}"
    folder = Path(json.loads(told)["folder"])
    if not folder.is_dir():
        return f"node {node} does not see {folder}: runs must go to a file system that all nodes share"
    return play(told)


def _answer(ray: Any, reference: Any) -> str:
    try:
        return ray.get(reference)
    except ray.exceptions.TaskCancelledError:
        return STOPPED
    except ray.exceptions.RayError as error:  # the worker or its node died, or had no memory left
        return f"the worker died ({type(error).__name__}: {_one_line(error)})"


def _check_resources(ray: Any, gpus: float, heartbeat: Heartbeat) -> None:
    """Says so where no node could play a run now: the runs then wait for one, which an autoscaler may bring."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= gpus for node in nodes):
        heartbeat.message(f"no node of the cluster has a CPU and {gpus:g} GPUs; the runs wait until one has")


@contextlib.contextmanager
def _cluster(address: str, jobs: int | None) -> Iterator[Any]:
    """Ray, connected; what `local` started is stopped afterwards."""
    if address not in ("auto", "local"):
        _knock(address)
    if address == "local":
        os.environ.update(OURS, RAY_AUTH_TOKEN=secrets.token_hex(32))  # read when Ray is imported
    ray = require("ray", "a sweep on Ray (--ray)")
    variables = THREADS | ({WHERE: os.environ[WHERE]} if WHERE in os.environ else {})
    told = {"logging_level": logging.ERROR, "log_to_driver": False, "runtime_env": {"env_vars": variables}}
    try:
        if address == "local":
            _start(ray, jobs or default_jobs(), told)
        else:
            _probe(address)
            ray.init(address, **told)
        yield ray
    finally:
        ray.shutdown()


def _start(ray: Any, cpus: int, told: dict[str, Any]) -> None:
    """A cluster of our own.

    Raises:
        ConnectionError: it did not start, or would listen beyond this machine.
    """
    try:
        ray.init(
            "local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=STORE,
            _node_ip_address=LOOPBACK,
            **told,
        )
    except Exception as error:  # Ray's own, of no class
        raise ConnectionError(f"Ray does not start on this machine: {_one_line(error)}") from error
    if ray.util.get_node_ip_address() != LOOPBACK:
        raise ConnectionError(f"Ray was imported before this sweep, and would listen beyond {LOOPBACK}")


def _knock(address: str) -> None:
    """Checks that somebody takes connections at an address, which Ray itself would go on trying for long.

    Raises:
        ConnectionError: nobody does.
        ValueError: it is no address.
    """
    client, plain = address.startswith("ray://"), address.removeprefix("ray://")
    host, _, port = plain.rpartition(":") if ":" in plain else (plain, "", str(CLIENT_PORT) if client else "")
    if not host or not port.isdigit():
        raise ValueError(f"--ray: expected auto, local, HOST:PORT or ray://HOST:PORT, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"there is no Ray cluster at {address}: {error}") from None


def _probe(address: str) -> None:
    """Connects once in a process of its own: where a cluster does not answer or refuses, Ray may wait for long, end the
    process, or keep it from ending.

    Raises:
        ConnectionError: it did not work, or took longer than `ANSWER`.
    """
    command = [sys.executable, "-c", PROBE, address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER)
    except subprocess.TimeoutExpired:
        raise ConnectionError(f"Ray at {address} has not answered within {ANSWER:g} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ConnectionError(f"Ray at {address}: {said[-1][:300]}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
