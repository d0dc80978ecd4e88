"""A run killed at any moment and resumed ends bit for bit as one that was left alone."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_helpers import SMALL_ERM, config, sea, silent, untimed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llm_duel_env.benchmark.runner import run

CHILD = Path(__file__).with_name("benchmark_helpers.py")
SINGLE = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture
def one_thread():
    """Bit-identical results need one thread count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def killed(told, kills):
    plan = json.dumps({"config": dataclasses.asdict(told), "kills": kills})
    done = subprocess.run(
        [sys.executable, str(CHILD)], input=plan, capture_output=True, text=True, env=os.environ | SINGLE, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_same(left, right):
    assert untimed(left) == untimed(right)
    assert Path(left, "ledger.jsonl").read_bytes() == Path(right, "ledger.jsonl").read_bytes()
    assert Path(left, "samples.jsonl").read_bytes() == Path(right, "samples.jsonl").read_bytes() != b""
    timeless = [json.loads(Path(f, "result.json").read_text()) for f in (left, right)]
    for result in timeless:
        assert result.pop("sittings") >= 1
        for name in ("seconds", "time", "versions"):  # the code may be committed between two runs
            del result[name]
    assert timeless[0] == timeless[1]


@pytest.mark.usefixtures("one_thread")
def test_killed_at_every_awkward_moment(tmp_path):
    whole = sea(tmp_path / "whole")
    run(whole, say=silent)
    broken = dataclasses.replace(whole, folder=str(tmp_path / "broken"), checkpoint_every=0.1)
    moments = [
        ("bought", 2),  # before there is any checkpoint
        ("logged", 9),
        ("bought", 3),
        ("torn ledger", 2),
        ("half a checkpoint", 2),
        ("between renames", 2),
        ("bought", 2),
    ]
    fates = killed(broken, [*moments, ("never", 0)])
    assert fates == [signal.SIGKILL] * len(moments) + [0]
    assert_same(whole.folder, broken.folder)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_killed_at_random_times(tmp_path):
    whole = config(tmp_path / "whole", budget=640)
    run(whole, say=silent)
    broken = dataclasses.replace(whole, folder=str(tmp_path / "broken"), checkpoint_every=0.1)
    seconds = np.random.default_rng(5).uniform(0.05, 0.6, 4)
    fates = killed(broken, [*(("time", float(s)) for s in seconds), ("never", 0)])
    assert signal.SIGKILL in fates  # or nothing was tested
    assert fates[-1] == 0
    assert_same(whole.folder, broken.folder)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_tensorboard_shows_no_round_twice_after_a_resume(tmp_path):
    told = config(tmp_path / "run", checkpoint_every=0.1)
    assert killed(told, [("bought", 9), ("never", 0)]) == [signal.SIGKILL, 0]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rounds = [line["queries"] for line in untimed(told.folder) if line["kind"] == "round"]
    assert [event.step for event in events.Scalars("round/shown")] == rounds
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2  # two sittings


@pytest.mark.usefixtures("one_thread")
def test_resuming_with_other_settings_is_refused(tmp_path):
    told = config(tmp_path / "run")
    run(told, say=silent)
    with pytest.raises(ValueError, match="seed: it has 3, asked for 4"):
        run(dataclasses.replace(told, seed=4), resume=True, say=silent)
    with pytest.raises(ValueError, match="already holds a run"):
        run(told, say=silent)
    with pytest.raises(ValueError, match="no run in"):
        run(config(tmp_path / "nowhere"), resume=True, say=silent)


@pytest.mark.usefixtures("one_thread")
def test_a_finished_run_says_so(tmp_path):
    told = config(tmp_path / "run")
    result = run(told, say=silent)
    lines = []
    again = run(told, resume=True, say=lines.append)
    assert again == result
    assert "already finished" in lines[0]


@pytest.mark.usefixtures("one_thread")
def test_a_language_model_killed_and_resumed_is_the_same_bit_for_bit(tmp_path):
    overrides = {"policy.learning_rate": 1e-3, "candidates": 3, "burn_in": 0.1} | SMALL_ERM | {"reward_model.start": 4}
    told = {"env": "duel/TinyTLDR-v0", "env_kwargs": {}, "overrides": overrides, "agent": "sea", "budget": 16}
    whole = config(tmp_path / "whole", batch=4, eval_every=0.5, eval_prompts=4, **told)
    run(whole, say=silent)
    broken = dataclasses.replace(whole, folder=str(tmp_path / "broken"), checkpoint_every=0.01)
    fates = killed(broken, [("bought", 3), ("half a checkpoint", 1), ("never", 0)])
    assert fates == [signal.SIGKILL] * 2 + [0]
    assert_same(whole.folder, broken.folder)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_killed_while_it_learns_in_the_background(tmp_path):
    whole = sea(tmp_path / "whole")
    whole = dataclasses.replace(whole, overrides=whole.overrides | {"policy.asynchronous": True})
    plain = sea(tmp_path / "plain")
    run(whole, say=silent)
    run(plain, say=silent)
    assert Path(whole.folder, "ledger.jsonl").read_bytes() != Path(plain.folder, "ledger.jsonl").read_bytes()
    steps = [json.loads(Path(f.folder, "result.json").read_text())["gradient_steps"] for f in (whole, plain)]
    assert steps[0] > 10
    assert abs(steps[0] - steps[1]) <= 3  # no lesson is lost; the runs may differ in ties
    broken = dataclasses.replace(whole, folder=str(tmp_path / "broken"), checkpoint_every=0.1)
    fates = killed(broken, [("bought", 5), ("half a checkpoint", 2), ("never", 0)])
    assert fates == [signal.SIGKILL] * 2 + [0]
    assert_same(whole.folder, broken.folder)
