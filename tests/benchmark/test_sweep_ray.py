"""Sweeps on Ray: the same results and the same guarantees as in local processes, on a cluster of two CPUs here."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from benchmark_helpers import config, silent, untimed

from llm_duel_env import cli
from llm_duel_env.benchmark import sweep, sweep_ray
from llm_duel_env.benchmark.runner import run
from llm_duel_env.extras import MissingExtraError

NOT_TESTED = "NOT TESTED: Ray is not installed here; `make test-ray` runs these tests in an environment that has it"
if importlib.util.find_spec("ray") is None:
    warnings.warn(NOT_TESTED, stacklevel=1)
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason=NOT_TESTED)

CLUSTER = """
import os, sys
from llm_duel_env.benchmark.sweep_ray import _cluster
with _cluster("local", 2) as ray:
    print(ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"], flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def address():
    """A cluster that `local` has started in a process of its own, as one that is there already for the tests."""
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        told, token = process.stdout.readline().split()
        assert told.startswith("127.0.0.1:"), told
        os.environ.update(sweep_ray.OURS, RAY_AUTH_TOKEN=token)  # before Ray is imported here
        yield told
        process.stdin.close()
    for name in [*sweep_ray.OURS, "RAY_AUTH_TOKEN"]:
        del os.environ[name]


def holder(path):
    """The process that has a file open; None where none has."""
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(handle) == str(path):
                return int(handle.parts[2])
    return None


def when_under_way(folder, act):
    """Starts a thread that does something to the process that plays a run, some rounds after it began or went on."""
    metrics = Path(folder, "metrics.jsonl")
    before = metrics.stat().st_size if metrics.exists() else 0

    def watch():
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            if metrics.exists() and metrics.stat().st_size > before + 4000 and (pid := holder(metrics)):
                act(pid)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def timeless(folder):
    """The result of a run without its times and places."""
    result = json.loads(Path(folder, "result.json").read_text())
    for name in ("seconds", "folder", "config", "versions", "sittings"):
        result.pop(name, None)
    return {name: value for name, value in result.items() if "time" not in name}


@needs_ray
@pytest.mark.slow
def test_runs_end_as_in_local_processes_past_one_that_is_over_and_one_that_breaks(address, tmp_path):
    runs = [config(tmp_path / f"seed-{seed}", seed=seed) for seed in range(3)]
    broken = config(tmp_path / "broken", overrides={"no_such_setting": 1})
    run(runs[0], say=silent)
    before = Path(runs[0].folder, "result.json").stat().st_mtime_ns
    lines = []
    outcome = sweep_ray.sweep([broken, *runs], address=address, say=lines.append)
    assert sorted(outcome.finished) == [run.folder for run in runs]
    assert list(outcome.broken) == [broken.folder]
    assert "no_such_setting" in outcome.broken[broken.folder]
    assert any(line.startswith("broken: ") for line in lines)
    assert "3/4 runs over, 1 broken" in lines[-1]
    assert Path(runs[0].folder, "result.json").stat().st_mtime_ns == before
    here = [dataclasses.replace(run, folder=str(tmp_path / f"here-{run.seed}")) for run in runs[1:]]
    assert len(sweep.sweep(here, jobs=1, say=silent).finished) == 2
    for there, local in zip(runs[1:], here, strict=True):
        assert untimed(there.folder) == untimed(local.folder)
        assert timeless(there.folder) == timeless(local.folder)
    versions = json.loads(Path(runs[1].folder, "versions.json").read_text())
    assert versions["OMP_NUM_THREADS"] == "1"


@needs_ray
@pytest.mark.slow
def test_a_run_whose_worker_is_killed_and_that_is_then_stopped_ends_as_if_nothing_had_happened(address, tmp_path):
    long = config(tmp_path / "long", budget=2000, eval_every=1.0, checkpoint_every=0.05)
    short = config(tmp_path / "short")
    thread = when_under_way(long.folder, lambda pid: os.kill(pid, signal.SIGKILL))
    outcome = sweep_ray.sweep([long, short], address=address, say=silent)
    thread.join()
    assert outcome.finished == [short.folder]
    assert "the worker died (WorkerCrashedError" in outcome.broken[long.folder]
    assert not Path(long.folder, "result.json").exists()

    late = config(tmp_path / "late")  # waits for the long one, and is never begun
    thread = when_under_way(long.folder, lambda pid: os.kill(os.getpid(), signal.SIGINT))
    outcome = sweep_ray.sweep([long, late], address=address, jobs=1, say=silent)
    thread.join()
    assert outcome.stopped
    assert (outcome.finished, outcome.broken) == ([], {})
    assert not Path(late.folder, "config.json").exists()
    assert not Path(long.folder, "result.json").exists()
    state = json.loads(Path(long.folder, "checkpoint", "state.json").read_text())
    assert (
        state["metrics_bytes"] == Path(long.folder, "metrics.jsonl").stat().st_size
    )  # saved when it was asked to stop
    outcome = sweep_ray.sweep([long, late], address=address, say=silent)
    assert sorted(outcome.finished) == sorted([late.folder, long.folder])
    alone = dataclasses.replace(long, folder=str(tmp_path / "alone"))
    run(alone, say=silent)
    assert untimed(alone.folder) == untimed(long.folder)


@needs_ray
@pytest.mark.slow
def test_who_takes_connections_and_is_no_cluster_is_given_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        where = f"127.0.0.1:{mute.getsockname()[1]}"
        code = f"""
import sys
from llm_duel_env import cli
from llm_duel_env.benchmark import sweep_ray
sweep_ray.ANSWER = 3.0
cli.main(["bench", "demo", "--ray", {where!r}])
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert f"Ray at {where}" in done.stderr
    assert "Traceback" not in done.stderr


def test_nobody_at_the_address(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    for where in (f"127.0.0.1:{free}", f"ray://127.0.0.1:{free}"):
        begun = time.monotonic()
        with pytest.raises(SystemExit) as caught:
            cli.main(["bench", "demo", "--out", str(tmp_path), "--ray", where])
        assert caught.value.code == 2
        assert f"error: there is no Ray cluster at {where}: " in capsys.readouterr().err
        assert time.monotonic() - begun < 60
    with pytest.raises(ValueError, match="expected auto, local, HOST:PORT or ray://HOST:PORT, got 'here'"):
        sweep_ray.sweep([config(tmp_path / "run")], address="here")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_is_refused_first(tmp_path, monkeypatch, capsys):
    runs = [config(tmp_path / "run")]
    with pytest.raises(ValueError, match="jobs: expected at least 1, got 0"):
        sweep_ray.sweep(runs, address="local", jobs=0)
    for gpus in (-1.0, 1.5):
        with pytest.raises(ValueError, match=f"a share of one, or a whole number, got {gpus}"):
            sweep_ray.sweep(runs, address="local", gpus=gpus)
    with pytest.raises(SystemExit):
        cli.main(["bench", "demo", "--ray-gpus", "1"])
    assert "--ray-gpus: expected --ray with it" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in [*sweep_ray.OURS, "RAY_AUTH_TOKEN"]:
        monkeypatch.setenv(name, "")  # put back afterwards
    with pytest.raises(MissingExtraError, match=r"--ray.* needs .*llm-duel-env\[ray\]"):
        sweep_ray.sweep(runs, address="local")


def test_a_node_that_does_not_see_the_folders_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = json.dumps(dataclasses.asdict(config("runs/one", agent="uniform", overrides={})))
    assert "does not see runs/one: runs must go to a file system that all nodes share" in sweep_ray._task(
        told, str(tmp_path)
    )
    assert "does not see the folder that the command was given in" in sweep_ray._task(told, str(tmp_path / "no"))
    Path("runs/one").mkdir(parents=True)
    monkeypatch.chdir("/")
    assert sweep_ray._task(told, str(tmp_path)) == ""  # relative paths are those of the command
    assert json.loads((tmp_path / "runs/one/result.json").read_text())["queries"] == 100
