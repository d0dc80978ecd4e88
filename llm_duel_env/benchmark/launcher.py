"""Starts one command as several ranks on this machine. For several machines there are torchrun and deepspeed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from types import FrameType

PATIENCE = 15.0
"""Seconds that the other ranks are given to end by themselves once one has failed."""


def launched() -> bool:
    """Whether a launcher (this one, torchrun, deepspeed) started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def speaks() -> bool:
    """Whether this process is the one that tells the user: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def launch(command: Sequence[str], count: int) -> int:
    """Runs `command` on `count` ranks; the exit status of the first that fails, or 0.

    The ranks meet on the loopback address. A rank that fails is told to the others, which then end; what is left of
    them after a while is killed. SIGINT and SIGTERM go to all ranks.
    """
    from torch.distributed import TCPStore

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())
    children = [_start(command, number, count, port) for number in range(count)]
    with _signals_for(children):
        status = _wait(children)
    del store  # the ranks' meeting place, kept open until here
    return status


def _start(command: Sequence[str], number: int, count: int, port: int) -> subprocess.Popen:
    threads = max((os.cpu_count() or 1) // count, 1)
    env = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        **{"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is this process's, no rank's
    }
    # A session of its own: Ctrl-C reaches it once, through this process.
    return subprocess.Popen(command, env=env, start_new_session=True)


def _wait(children: Sequence[subprocess.Popen]) -> int:
    while (failed := next((child for child in children if child.poll()), None)) is None:
        if all(child.poll() == 0 for child in children):
            return 0
        time.sleep(0.1)
    until = time.monotonic() + PATIENCE
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        time.sleep(0.1)
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()
    return failed.returncode if failed.returncode > 0 else 128 - failed.returncode  # as a shell tells a signal


@contextlib.contextmanager
def _signals_for(children: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Within the block SIGINT and SIGTERM go to the children."""

    def forward(number: int, _frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
