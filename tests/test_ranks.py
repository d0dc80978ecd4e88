"""What ranks tell each other, and what becomes of them when one is lost: real processes on this machine."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_duel_env import ranks, watch
from llm_duel_env.benchmark.launcher import launch

WORKER = str(Path(__file__).with_name("ranks_worker.py"))


def play(what, count, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    begun = time.monotonic()
    return launch([sys.executable, WORKER, what], count), time.monotonic() - begun


def test_one_rank_needs_nobody():
    assert (ranks.rank(), ranks.world()) == (0, 1)
    part = torch.arange(6).view(3, 2)
    assert ranks.gather(part, 3) is part
    assert ranks.share(4).tolist() == [0, 1, 2, 3]
    assert ranks.share(0).tolist() == []
    assert ranks.tell({"a": 1}) == {"a": 1}
    assert ranks.any_of(True)
    ranks.check_alike("anything", [part])
    with watch.watched():
        pass


def test_three_ranks_tell_each_other_everything(monkeypatch, capfd):
    status, _ = play("together", 3, monkeypatch)
    captured = capfd.readouterr()
    assert status == 0, captured.err
    assert "all well" in captured.out


@pytest.mark.slow
def test_two_ranks_score_what_one_scores(monkeypatch, capfd):
    status, _ = play("scores", 2, monkeypatch)
    captured = capfd.readouterr()
    assert status == 0, captured.err
    assert "all well" in captured.out


def test_a_rank_that_fails_brings_the_others_down_with_its_reason(monkeypatch, capfd):
    status, seconds = play("fails", 2, monkeypatch)
    told = capfd.readouterr().err
    assert status in (1, watch.LOST)
    assert "ValueError: the egg broke" in told
    assert seconds < 60  # most of it is importing torch; the ranks would wait for half an hour


def test_a_rank_ends_in_good_order_right_after_an_operation(monkeypatch, capfd):
    status, _ = play("ends_at_once", 2, monkeypatch)
    assert status == 0, capfd.readouterr().err


@pytest.mark.slow
def test_a_rank_that_hangs_is_missed(monkeypatch, capfd):
    monkeypatch.setenv("LLM_DUEL_SILENCE", "4")
    status, seconds = play("stops", 2, monkeypatch)
    told = capfd.readouterr().err
    assert status == watch.LOST
    assert "rank 0 of 2 ends: rank 1 has given no sign of life for 4 s" in told
    assert "any_of" in told  # where it was waiting
    assert seconds < 90


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "silence", "status", "told"),
    [
        ("host_stops", 2, watch.LOST, r"rank 1 of 2 ends: the ranks' meeting place (rank 0 or the launcher keeps it)"),
        ("host_stops_and_the_other_fails", 600, 1, "ValueError: the egg broke"),
    ],
)
def test_nobody_waits_for_a_rank_that_keeps_the_meeting_place_and_hangs(what, silence, status, told):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "TEST_BEAT": "0.2"}
    env |= {"LLM_DUEL_SILENCE": str(silence), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    host, other = (
        subprocess.Popen([sys.executable, WORKER, what], env={**env, "RANK": number}, stderr=subprocess.PIPE, text=True)
        for number in ("0", "1")
    )
    try:
        _, err = other.communicate(timeout=150)
    finally:
        for child in (host, other):
            child.kill()
            child.communicate()
    assert other.returncode == status, err
    assert told in err


def test_only_plain_data_is_told():
    for value in ({1: 2}, object(), np.array(["a"], object)):
        with pytest.raises(TypeError, match="expected"):
            ranks._packed(value)
    value = {"a": [np.float32(0.5), (1, 2)], "empty": {}, "none": [], "of": np.zeros((0, 3), np.int8)}
    back = ranks._unpacked(ranks._packed(value))
    assert back["a"] == [0.5, [1, 2]]
    assert (back["empty"], back["none"]) == ({}, [])
    assert (back["of"].shape, back["of"].dtype) == ((0, 3), np.int8)
