"""Fewer runs play at once where memory is short of what a worker has used."""

import os
import sys

import pytest
from benchmark_helpers import config

from llm_duel_env.benchmark import memory_watch
from llm_duel_env.benchmark.memory_watch import MemoryWatch
from llm_duel_env.benchmark.sweep import sweep

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")


@linux
def test_what_the_system_tells():
    mine = memory_watch.resident(os.getpid())
    assert 10e6 < mine <= memory_watch.peak(os.getpid())
    assert memory_watch.available() > 0
    nobody = 2**22 + 1  # beyond the highest number that a process can have
    assert (memory_watch.peak(nobody), memory_watch.resident(nobody)) == (0, 0)


def test_room_is_what_the_largest_worker_used_and_a_worker_brings_its_own(monkeypatch):
    watch, held, free = MemoryWatch(), {7: 3 * 10**9}, 10**9
    monkeypatch.setattr(memory_watch, "available", lambda: free)
    monkeypatch.setattr(memory_watch, "peak", held.get)
    monkeypatch.setattr(memory_watch, "resident", held.get)
    assert watch.short() == ""  # nothing is known yet
    watch.look(7)
    held[7] = 2 * 10**9  # the peak that was seen counts
    watch.look(7)
    assert watch.short() == "1.00 GB of memory available, a worker has used up to 3.00 GB"
    assert watch.short(7) == ""
    free = 10**9 - 1
    assert watch.short(7) != ""
    monkeypatch.setattr(memory_watch, "available", lambda: None)  # a system that does not tell
    assert watch.short() == ""


PATIENT = """
import pathlib, time
from llm_duel_env.baselines.uniform import Uniform

class Patient(Uniform):
    '''Still at play when the first short run is over and the next one is to be handed out.'''

    def act(self, observation):
        while not pathlib.Path({short!r}).exists():
            time.sleep(0.1)
        if not self.round:
            time.sleep(3)
        return super().act(observation)
"""


@linux
@pytest.mark.slow
def test_a_sweep_without_memory_says_so_once_and_still_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_watch, "available", lambda: 0)
    monkeypatch.setattr(memory_watch, "peak", lambda pid: 2 * 10**9)  # of every worker, and it now holds half of that
    monkeypatch.setattr(memory_watch, "resident", lambda pid: 10**9)
    (tmp_path / "patient.py").write_text(PATIENT.format(short=str(tmp_path / "0" / "result.json")))
    agents = [f"{tmp_path / 'patient.py'}:Patient", "uniform", "uniform", "uniform"]
    runs = [config(tmp_path / str(i - 1), agent=agent, overrides={}, batch=2) for i, agent in enumerate(agents)]
    lines = []
    outcome = sweep(runs, jobs=2, say=lines.append)
    assert (sorted(outcome.finished), outcome.broken) == (sorted(run.folder for run in runs), {})
    said = [line for line in lines if "memory available" in line]
    assert len(said) == 1
    assert said[0].endswith("1 of 2 play until there is room")
